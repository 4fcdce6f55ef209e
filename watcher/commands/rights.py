"""Root treats each store with the rights of its owner: here, or for several owners in children."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import click

from watcher.errors import Exit, WatchError
from watcher.ollama import names
from watcher.system import stopping

if TYPE_CHECKING:
    from watcher.model import Known

    Knows = Callable[[str], Known]

_STOPPED_SECONDS, _MOST_STOPS = 1.0, 5  #: when a stopped child goes on, and how often


def settle(store: str) -> None:
    """Become the owner of a store, if root, before any thread. Raises NoPermissionError."""
    from watcher.state import folders
    from watcher.system import privileges

    if os.geteuid() == 0:
        way, folder = folders.KeptWay(store), folders.owner(store)
        owner = privileges.owner_of(folder.st_uid, folder.st_gid)
        privileges.become(owner, f"the store {names.printable(store)}")
        way.begin()


def several_owners(stores: Sequence[str]) -> bool:
    """Whether these stores can't be treated in one process: root's, and of several users."""
    from watcher.state import folders

    return os.geteuid() == 0 and len({folders.owner(store).st_uid for store in stores}) > 1


def in_children(stores: Sequence[str], again: float | None) -> int:
    """Go on in a child for each store, one after the other; there, the index of its store.

    With `again`, in others after so many seconds, as long as all end well. The process itself ends
    here: it raises click's Exit with the highest code of all.
    """
    while True:
        code = 0
        for index in range(len(stores)):
            child = _forked()
            if child == 0:
                return index
            code = max(code, _code_of(child))
            if code == Exit.INTERRUPTED:
                break
        if again is None or code:
            raise click.exceptions.Exit(code)
        time.sleep(again)


def _forked() -> int:
    """Fork; what was printed before is not printed twice."""
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork()


def known_to(store: str, knows: "Knows") -> "Known":
    """What a store can be asked for, looked at by a child with its owner's rights."""
    import json

    from watcher.model import Known

    ours, theirs = os.pipe()
    child = _forked()
    if child == 0:
        try:
            os.close(ours)
            failed = contextlib.suppress(WatchError, OSError)
            with failed, open(theirs, "w", encoding="ascii") as answer:
                settle(store)
                found = knows(store)
                known = {model: sorted(each) for model, each in found.models.items()}
                json.dump([known, sorted(found.digests), found.unseen], answer)
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as answer:
        raw = answer.read()
    os.waitpid(child, 0)
    models, digests, unseen = json.loads(raw) if raw else ({}, [], [])
    models = {model: frozenset(each) for model, each in models.items()}
    return Known(models, frozenset(digests), tuple(unseen))


def _code_of(child: int) -> int:
    """Wait for a child, whose user may stop or end it, and hand SIGTERM on to it."""
    asked: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if number == signal.SIGTERM:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    with stopping.handling({signal.SIGINT: end, signal.SIGTERM: end}):
        for _ in range(_MOST_STOPS):
            _, status = os.waitpid(child, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                break
            time.sleep(_STOPPED_SECONDS)
            os.kill(child, signal.SIGCONT)
        else:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if asked:
        return Exit.INTERRUPTED
    return Exit.FAILED if code in (Exit.INTERRUPTED, *range(-signal.NSIG, 0)) else code

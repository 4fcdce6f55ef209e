"""Runs cycles that break at a chosen changing call: an order a line of stdin, an answer each.

For each order the process forks; the child puts something between ``watcher.state.fs`` and the
system that counts every call which changes a file, and at call `at` does what `how` says:

kill     SIGKILL, before the call
half     SIGKILL after half of the bytes of a write (as `kill` for other calls)
stop     SIGSTOP before the call, which is made once somebody lets the process go on
ENOSPC   and any other name of an error number: the call fails, and with `lasting` each one after it
""       nothing

With `then`, SIGKILL so many calls after that one. With `process` false, what would be killed makes
no changing call any more instead, and leaves the same files in a fraction of the time. The answer
tells how it ended and which calls it made; those that the system refused, and that have changed
nothing, end in `REFUSED`.

An order that ends no process and makes nobody else of it needs no child: see `carried_out`.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NoReturn, TypeAlias

from tests.support.loaded import load_all, load_packages
from tests.support.runs import changed, one_run, rules
from watcher import reconcile
from watcher.act import second_names
from watcher.commands import rights
from watcher.decide import modes
from watcher.errors import WatchError
from watcher.model import Action, Entry, Holder
from watcher.observe import processes, scan
from watcher.observe.host import Host
from watcher.state import fs

CHANGING = frozenset(
    (
        *("mkdir", "rmdir", "unlink", "rename", "replace", "link", "symlink"),
        *("write", "pwrite", "writev", "pwritev", "ftruncate", "truncate", "posix_fallocate"),
        *("fchmod", "fchown", "chmod", "chown", "utime", "fsync", "fdatasync"),
    )
)
POLICY = rules(clean=True, repair=False, writers_visible=True)
REFUSED = " (refused)"


#: Carries out an order, telling its calls to a descriptor; gives back the exit code.
Child: TypeAlias = Callable[[dict[str, Any], int], int]


class DeadError(BaseException):
    """In place of a kill: whoever catches it changes nothing any more."""


class Breaking:
    """Stands in for the module ``os`` inside ``watcher.state.fs``."""

    def __init__(self, order: dict[str, Any], told: int) -> None:
        self._at, self._how = order.get("at", 0), order.get("how", "")
        self._lasting, self._then = order.get("lasting", False), order.get("then", 0)
        self._process, self._dead = order.get("process", True), False
        self._told, self._calls = told, 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(os, name)
        if name in CHANGING:
            return lambda *words, **more: self.call(name, value, *words, **more)
        if name == "open":
            return self._open
        return value

    def _open(self, path: str, flags: int, *words: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            return int(self.call("open", os.open, path, flags, *words, **more))
        return os.open(path, flags, *words, **more)

    def call(self, name: str, do: Callable[..., Any], *words: Any, **more: Any) -> Any:
        """Make a call, or break at it."""
        if self._dead:
            raise DeadError
        shown = " ".join(str(each) for each in map(_shown, words) if each is not None)
        os.write(self._told, f"\n{name} {shown}".encode())
        self._calls += 1
        if self._then and self._calls == self._at + self._then:
            self._end()
        broken = self._calls >= self._at if self._lasting else self._calls == self._at
        if not broken or not self._how:
            try:
                # What has reached the disk plays no part where only the process is killed.
                return None if name == "fsync" else do(*words, **more)
            except OSError:
                os.write(self._told, REFUSED.encode())
                raise
        if self._how == "half" and name == "write":
            fd, data = words
            os.write(fd, bytes(data)[: len(data) // 2])
        if self._how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            return do(*words, **more)
        if self._how in ("kill", "half"):
            self._end()
        code = getattr(errno, self._how)
        raise OSError(code, os.strerror(code), shown or name)

    def _end(self) -> NoReturn:
        if self._process:
            os.kill(os.getpid(), signal.SIGKILL)
        self._dead = True
        raise DeadError


def _shown(word: object) -> str | None:
    """A name, or the name behind a descriptor."""
    if isinstance(word, str):
        return word
    if isinstance(word, int) and not isinstance(word, bool) and 2 < word < 1024:
        with contextlib.suppress(OSError):
            return os.path.basename(os.readlink(f"/proc/self/fd/{word}"))
    return None


def break_files(
    order: dict[str, Any], told: int, kind: Callable[[dict[str, Any], int], Breaking] = Breaking
) -> None:
    """Put `Breaking` between ``watcher.state.fs`` and the system, for good."""
    breaking = kind(order, told)
    module: Any = fs
    module.os = breaking
    if not order.get("no_replace", True):
        module._renameat2 = None
    elif module._renameat2 is not None:
        real = module._renameat2
        module._renameat2 = lambda a, name, b, new, flag: breaking.call(
            "renameat2", lambda old, to: real(a, old, b, to, flag), name, new
        )


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """At the end there is nothing between the program and the system any more."""
    module: Any = fs
    kept = module.os, module._renameat2, processes.holders_of
    mask = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(mask)
        module.os, module._renameat2, processes.holders_of = kept


def _held_from(look: int) -> None:
    """From the n-th look at the holders on, somebody has every file open."""
    looks = [0]

    def holders_of(host: Host, entries: Iterable[Entry]) -> tuple[Holder, ...]:
        looks[0] += 1
        held = looks[0] >= look
        return tuple(Holder(1, "reader", entry.name, False) for entry in entries) if held else ()

    processes.holders_of = holders_of


def _answer(registry: int | None, *_: object) -> int | None:
    return registry


def _fetched(store: str, action: Action) -> tuple[Entry, int]:
    """What was fetched before: a transfer that is all there."""
    path = f"{store}/.ollama-watch/transfers/{action.subject}"
    with fs.opened_folder(path) as folder:
        found = scan.look("data", folder)
    assert found is not None
    return found, 0


def _child(order: dict[str, Any], told: int) -> int:
    registry = order.get("registry")
    fetch = partial(_fetched, order["store"])
    length = partial(_answer, registry)
    host = Host(order["store"], proc=order["proc"], registry_length=length, fetch=fetch)
    os.umask(order.get("umask", 0o022))
    if "owner" in order:
        rights.settle(order["store"])
    break_files(order, told)
    if order.get("keep"):
        second_names.keep(host, order["keep"])
        return 0
    if order.get("held_from"):
        _held_from(order["held_from"])
    approve = reconcile.approve_all if order.get("clean", True) else reconcile.approve_none
    policy = changed(
        POLICY, **{name: _value(each) for name, each in order.get("policy", {}).items()}
    )
    try:
        if order.get("prepare"):
            reconcile.Reconciler(host, policy.settings).keep_fresh(modes.PREPARE_TIMES)
        report = one_run(host, policy, approve=approve)
    except WatchError:
        return 4
    return 0 if all(outcome.result == "done" for outcome in report.outcomes) else 3


def _value(given: Any) -> Any:
    """A setting: labels are a list in JSON."""
    return frozenset(given) if isinstance(given, list) else given


def ends_here(order: dict[str, Any]) -> bool:
    """Whether this process is there after an order as it was before."""
    kills = order.get("how") in ("kill", "half") or order.get("then")
    stays = not kills or not order.get("process", True)
    return stays and order.get("how") != "stop" and "owner" not in order


def carried_out(order: dict[str, Any]) -> tuple[int, list[str]]:
    """Carry out an order that `ends_here`: how it ended, and its calls."""
    with open(os.memfd_create("calls"), "rb") as told, put_back():
        try:
            code = _child(order, told.fileno())
        except DeadError:
            code = -signal.SIGKILL
        return code, _calls(told.fileno())


def _calls(told: int) -> list[str]:
    return os.pread(told, os.fstat(told).st_size, 0).decode().splitlines()[1:]


def _run(order: dict[str, Any], child: Child) -> dict[str, Any]:
    if "owner" in order:
        load_packages()  # each child would
    # Not a pipe: whoever reads it would be woken by each call.
    with open(os.memfd_create("calls"), "rb") as told:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(order, told.fileno())
            except Exception:  # told by the exit code and on stderr
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        return {"exit": os.waitstatus_to_exitcode(status), "calls": _calls(told.fileno())}


def main(child: Child) -> None:
    """Take orders until stdin ends; each is carried out by `child` in a process of its own."""
    load_all()  # each child would
    gc.freeze()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(json.loads(line), child)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(_child)

"""A change of what we keep, broken at each of its calls: it was made or it was not, never half."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.driving import environment
from watcher.pull import queue
from watcher.state import fs, records

#: Orders a line of stdin: which change to make in which store, and at which call to break it how.
DRIVER = """
import json, os, sys, types
from tests.support.breaking import break_files, put_back
from watcher.state import records
from watcher.errors import WatchError
from watcher.pull import queue, running
from watcher.pull.queue import Driven, Result

def record(store):
    records.change(store, "llama3", {"state": "error", "error": "new"})

def progress(store):
    records.change(store, "llama3", {"downloaded_bytes": 150})

def queue_add(store):
    queue.FILE.change(store, lambda kept: queue.add(kept, "new", 10, 0.0, 5.0))

running.time = types.SimpleNamespace(time=lambda: 9.0)
running.random = types.SimpleNamespace(random=lambda: 0.5)

def queue_run(store):
    driven = Driven(Result.FAILED, "no network")
    running.run_next(store, lambda *_: driven)

for line in sys.stdin:
    order = json.loads(line)
    kills = order["how"] in ("kill", "half")
    with open(os.memfd_create("calls"), "rb") as calls:
        pid = os.fork() if kills else 0
        if pid == 0:
            code = 0
            store = os.open(order["store"], os.O_RDONLY)
            with put_back():
                break_files(order, calls.fileno())
                try:
                    globals()[order["change"]](store)
                except WatchError:
                    code = 4
            os.close(store)
        if kills:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        calls.seek(0)
        print(json.dumps([code, calls.read().decode().splitlines()[1:]]), flush=True)
"""


class Ended(NamedTuple):
    """The exit code (-9 after a kill, 4 for an error with its words), and the calls made."""

    code: int
    calls: list[str]


Drive = Callable[..., Ended]


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drive]:
    """Makes one change, or breaks it."""
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        env=environment(tmp_path_factory.mktemp("driver")),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        ask, answers = process.stdin, process.stdout
        assert ask is not None
        assert answers is not None

        def order(change: str, store: Path, at: int = 0, how: str = "") -> Ended:
            ask.write(json.dumps({"change": change, "store": str(store), "at": at, "how": how}))
            ask.write("\n")
            ask.flush()
            return Ended(*json.loads(answers.readline()))

        yield order
        ask.close()


def laid_out(store: Path, *, new: bool) -> Path:
    """A store in which each of the changes can be made; `new`: without our folder."""
    store.mkdir()
    if not new:
        with fs.opened_folder(str(store)) as fd:
            records.change(fd, "llama3", {"state": "starting", "total_bytes": 200})
            records.change(fd, "other", {"state": "error", "error": "old"})
            queue.FILE.change(fd, lambda kept: queue.add(kept, "a", 0, 0.0, 1.0))
    return store


def seen(store: Path) -> object:
    """What is kept, times aside; nothing damaged may be there."""
    ours = store / ".ollama-watch"
    assert not list(ours.glob("*.damaged"))
    with fs.opened_folder(str(store)) as fd:
        line = queue.revived(queue.FILE.read(fd), lambda *_: False, 0.0).line
        return {
            model: (each.state, each.error, each.downloaded_bytes)
            for model, each in records.read(fd).items()
        }, [(item.model, item.state, item.ready_at, item.so_far.tries) for item in line]


@pytest.mark.parametrize("how", ["kill", "half", "ENOSPC", "EIO"])
@pytest.mark.parametrize(
    ("change", "new"),
    [
        ("record", False),
        ("record", True),
        ("progress", False),
        ("queue_add", False),
        ("queue_add", True),
        ("queue_run", False),
    ],
)
def test_broken_at_every_call(
    drive: Drive, tmp_path: Path, change: str, new: bool, how: str
) -> None:
    reference = laid_out(tmp_path / "reference", new=new)
    before = seen(reference)
    ended = drive(change, reference)
    assert ended.code == 0
    after = seen(reference)
    assert after != before
    for at, call in enumerate(ended.calls, 1):
        store = laid_out(tmp_path / f"broken{at}", new=new)
        broken = drive(change, store, at, how)
        where = f"{how} at call {at}, {call}"
        # The words in a lock are for people only: a full disk keeps nobody from acting.
        words = call.startswith("pwrite ") or (
            call.startswith("ftruncate ") and call.endswith(".lock")
        )
        unimportant = words and how not in ("kill", "half")
        assert broken.code == (0 if unimportant else 4 if how[0] == "E" else -9), where
        assert seen(store) in (before, after), where
        assert drive(change, store).code == 0, where
        assert seen(store) == after, where
        left = {path.name for path in (store / ".ollama-watch").iterdir()}
        assert not {name for name in left if name.endswith(".new")}, where

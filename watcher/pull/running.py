"""Driving the queue: take the first item, drive it, record what became of it."""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from watcher.errors import WatchError
from watcher.ollama import names
from watcher.pull import queue
from watcher.pull.queue import Driven, Item, Queue, Result, Runner
from watcher.state import fs, records, state_folder

#: Why a drive should stop; empty where it should not. It may be called as often as one likes.
Why = Callable[[], str]
#: Downloads a model until it is there, has failed or has to stop.
Drive = Callable[[str, Why], Driven]

#: How old an answer of `Why` may be, and how long an idle runner sleeps before it checks again.
_LOOK_SECONDS = 1.0
#: Checking whether something runs the queue takes its lock for an instant; that is waited for.
_INSTANT_SECONDS = 0.1


def run(store: int, drive: Drive) -> Iterator[Item]:
    """Drive items, each given as it is then, until none is left that can start by itself."""
    while True:
        while (item := run_next(store, drive)) is not None:
            yield item
        due = queue.next_due(queue.FILE.read(store))
        if due is None:
            return
        time.sleep(min(_LOOK_SECONDS, max(_INSTANT_SECONDS, due - time.time())))


def run_next(store: int, drive: Drive) -> Item | None:
    """Drive the first item that is due to its end, and return it as it is then.

    None where nothing is due. An error of ours that `drive` raises is a failed attempt; for
    everything else that it raises the item waits for its turn, and the error is raised again.
    """
    with ExitStack() as held:
        item = _take(store, held)
        if item is None:
            return None
        try:
            driven = drive(item.model, _asking(store, item))
        except WatchError as error:
            driven = Driven(Result.FAILED, str(error))
        except BaseException:
            _end(store, item, Driven(Result.STOPPED))
            raise
        after = _end(store, item, driven)
    at = queue.position(after, item.model)
    if at >= 0:
        return after.line[at]
    return next((each for each in after.done if each.model == item.model), item)


def _take(store: int, held: ExitStack) -> Item | None:
    """The first item that is due, driven by this process as long as its lock is held."""
    taken: Item | None = None

    def take(before: Queue) -> Queue:
        nonlocal taken
        now = time.time()
        alive = queue.revived(before, driven_by(store), now)
        passed: set[str] = set()
        while True:
            after, item = queue.take(alive, me(), now, passed)
            if item is None:
                return after
            locks = held.enter_context(state_folder.made(store, records.DRIVEN))
            lock = fs.locked(_lock_of(item), locks, seconds=_INSTANT_SECONDS)
            try:
                # Before anyone else can see it in the file.
                held.enter_context(lock)
            except fs.BusyError:
                passed.add(item.model)  # its last process has not ended yet
                continue
            taken = item
            return after

    queue.FILE.change(store, take)
    return taken


def _lock_of(item: Item) -> str:
    """Its name in ``driven/``: no lock of a model's record has an ``@``."""
    return f"queue@{names.file_safe(item.model.lower())}.lock"


def _end(store: int, item: Item, driven: Driven) -> Queue:
    now, chance = time.time(), random.random()  # noqa: S311 - many clients, no secret
    return queue.FILE.change(store, lambda before: queue.ended(before, item, driven, now, chance))


def _asking(store: int, item: Item) -> Why:
    asked_at, answer = -_LOOK_SECONDS, ""

    def why() -> str:
        nonlocal asked_at, answer
        now = time.time()
        if not 0 <= now - asked_at < _LOOK_SECONDS:
            asked_at, answer = now, queue.why_stop(queue.FILE.read(store), item, now)
        return answer

    return why


@contextmanager
def seen_to_run(store: int) -> Iterator[bool]:
    """Be seen to run the queue; False where another process does, or nothing can be written."""
    lock = state_folder.LongLock(state_folder.QUEUE_LOCK)
    try:
        yield hold(lock, store)
    finally:
        lock.release()


def hold(lock: state_folder.LongLock, store: int) -> bool:
    """Be seen to run the queue, by this lock; whether that is so."""
    try:
        lock.hold(store, _INSTANT_SECONDS)
    except (OSError, fs.BusyError):
        return False
    return True


def me() -> Runner:
    pid = os.getpid()
    return Runner(pid, born(pid) or 0)


def driven_by(store: int) -> Callable[[Item, Runner], bool]:
    """Says whether the runner of an item still drives it, as far as visible."""

    def is_driven(item: Item, runner: Runner) -> bool:
        try:
            with state_folder.opened(store, records.DRIVEN) as locks:
                return fs.holder(_lock_of(item), locks) is not None
        except OSError:
            return alive(runner)  # driven by an earlier version, which took no such lock

    return is_driven


def alive(runner: Runner) -> bool:
    """Whether that very process still runs, as far as visible."""
    if runner.pid <= 0:
        return False  # to a signal that would be a group of processes
    since = born(runner.pid)
    if since is not None:
        return since == runner.born
    try:
        os.kill(runner.pid, 0)
    except PermissionError:
        return True  # it runs, and is not visible to us
    except (ProcessLookupError, OverflowError):
        return False
    return True


def born(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; None where that is not visible."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            # Its name may hold anything, so what follows is counted from its closing bracket on.
            state, *fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return -1 if state in b"ZX" else int(fields[18])

"""Driving what is in the queue: take the first, drive it, write down what became of it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from watcher import files, journal
from watcher.errors import WatchError
from watcher.memory import FOLDER
from watcher.observe.serving import QUEUE_LOCK
from watcher.pull import queue
from watcher.pull.queue import Driven, Item, Queue, Result, Runner

#: Says why a drive should stop; empty where it should not. It may be asked as often as one likes.
Why = Callable[[], str]
#: Downloads a model until it is there, has failed or has to stop.
Drive = Callable[[str, Why], Driven]

#: How old an answer of `Why` may be, and how long an idle runner sleeps until it looks again.
_LOOK_SECONDS = 1.0
#: Who looks whether somebody runs the queue holds its lock for an instant; that is waited for.
_INSTANT_SECONDS = 0.1
#: What this process drives: model, and since when. An item that is said to be driven by it and is
#: not here could not be put back, since the disk was full or failing then.
_driving: set[tuple[str, float]] = set()


def run(
    store: int,
    drive: Drive,
    *,
    tell: Callable[[Item], None] = lambda _: None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Queue:
    """Drive one item after the other until none is left that could be begun by itself.

    `tell` gets each item as it is after its drive. Gives back the queue as it is then.
    """
    while True:
        item = run_next(store, drive, clock=clock)
        if item is not None:
            tell(item)
            continue
        left = queue.FILE.read(store)
        due = queue.next_due(left)
        if due is None:
            return left
        sleep(min(_LOOK_SECONDS, max(0.0, due - clock())))


def run_next(
    store: int,
    drive: Drive,
    *,
    clock: Callable[[], float] = time.time,
    chance: Callable[[], float] = random.random,
) -> Item | None:
    """Drive the first item that is due to its end, and give it back as it is then.

    None where nothing is due. An error of ours that `drive` raises is a failed try; whatever else
    it raises is raised again, and the item waits for its turn.
    """
    with _taken(store, clock) as item:
        if item is None:
            return None
        with _put_back(store, item, clock):
            try:
                driven = drive(item.model, _asking(store, item, clock))
            except WatchError as error:
                driven = Driven(Result.FAILED, str(error))
        after = _end(store, item, driven, clock(), chance())
    at = queue.position(after, item.model)
    if at >= 0:
        return after.line[at]
    return next((each for each in after.done if each.model == item.model), item)


@contextmanager
def _taken(store: int, clock: Callable[[], float]) -> Iterator[Item | None]:
    """The first item that is due, driven by this process as long as the block lasts."""
    taken: list[Item] = []

    def take(before: Queue) -> Queue:
        now = clock()
        after, item = queue.take(queue.revived(before, is_driven, now), me(), now)
        if item is not None:
            taken.append(item)
            # Before anyone else can see it in the file.
            _driving.add((item.model, item.so_far.since))
        return after

    try:
        queue.FILE.change(store, take)
        yield taken[0] if taken else None
    finally:
        _driving.difference_update((item.model, item.so_far.since) for item in taken)


def _end(store: int, item: Item, driven: Driven, now: float, chance: float) -> Queue:
    return queue.FILE.change(store, lambda before: queue.ended(before, item, driven, now, chance))


@contextmanager
def _put_back(store: int, item: Item, clock: Callable[[], float]) -> Iterator[None]:
    """Whatever breaks a drive off, a ctrl-C too: the item waits again."""
    try:
        yield
    except BaseException:
        _end(store, item, Driven(Result.STOPPED), clock(), 0.0)
        raise


def _asking(store: int, item: Item, clock: Callable[[], float]) -> Why:
    """Looks at the queue, once a second at most."""
    asked_at, answer = -_LOOK_SECONDS, ""

    def why() -> str:
        nonlocal asked_at, answer
        now = clock()
        if not 0 <= now - asked_at < _LOOK_SECONDS:
            asked_at, answer = now, queue.why_stop(queue.FILE.read(store), item, now)
        return answer

    return why


# ---------------------------------------------------------------- who runs


@contextmanager
def seen_to_run(store: int) -> Iterator[bool]:
    """Be seen as who runs the queue; False where somebody else is, or nothing can be written."""
    with ExitStack() as held:
        try:
            files.ensure_folder(FOLDER, store)
            ours = held.enter_context(files.opened_folder(FOLDER, store))
            lock = files.locked(QUEUE_LOCK, ours, journal.owner(), seconds=_INSTANT_SECONDS)
            held.enter_context(lock)
        except (OSError, files.BusyError):
            yield False
            return
        yield True


def me() -> Runner:
    """This process."""
    pid = os.getpid()
    return Runner(pid, born(pid) or 0)


def is_driven(item: Item, runner: Runner) -> bool:
    """Whether the runner of an item still drives it, as far as can be seen."""
    if runner == me():
        return (item.model, item.so_far.since) in _driving
    return alive(runner)


def alive(runner: Runner) -> bool:
    """Whether that very process still runs, as far as can be seen."""
    if runner.pid <= 0:
        return False  # to a signal that would be a group of processes
    since = born(runner.pid)
    if since is not None:
        return since == runner.born
    try:
        os.kill(runner.pid, 0)
    except PermissionError:
        return True  # it is there, and hidden from us
    except (ProcessLookupError, OverflowError):
        return False
    return True


def born(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; None where that can't be seen."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            # Its name may hold anything, so what follows is counted from its closing bracket on.
            state, *fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return -1 if state in b"ZX" else int(fields[18])

"""``queue.json``: which models to download, in which order, and what became of it.

The line is in order: higher priority first, first in first out among equals. Each hour of waiting
counts as one step of priority, so that nothing waits for ever. All age alike, so the order of two
that wait never changes by that: the place of an item is one number, its `rank`, which does not
depend on the time.

Everything here but `FILE` is a function from one value to another; time and chance are arguments.
"""

import enum
import operator
import re
import time
from bisect import bisect_right, insort
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from watcher.errors import TargetError
from watcher.observe import targets
from watcher.ollama import names
from watcher.state import checks, json_file

SCHEMA = "ollama-watch/queue-file/1"
NAME = "queue.json"

PRIORITIES = {"high": 10, "normal": 0, "low": -10}
URGENT = PRIORITIES["high"]  #: from here on an item may take the place of a running one
_MOST_PRIORITY = 100
_AGING = 3600.0  #: seconds of waiting that count as one step of priority
#: The pause after a failed try: seconds, doubled each time up to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 3600.0
HOURLY = 3600.0  #: the pause after what somebody has to change, which no event reports
_MOST_REASONS = 10
_MOST_DONE = 100
_LONGEST_MODEL = 1000


class ItemState(enum.StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    FAILED = "failed"
    DONE = "done"


_WAIT = frozenset({ItemState.WAITING, ItemState.FAILED})


class Runner(NamedTuple):
    """A process that drives an item: its number, and when it began (clock ticks since the boot)."""

    pid: int
    born: int


class Reason(NamedTuple):
    at: float
    why: str


class Trial(NamedTuple):
    state: ItemState = ItemState.WAITING
    since: float = 0.0  #: when it got into that state
    runner: Runner | None = None
    tries: int = 0  #: those that have failed, one after the other
    reasons: tuple[Reason, ...] = ()  #: the last ones


class Item(NamedTuple):
    """A model to download; times are seconds since the epoch."""

    model: str  #: as `names.ModelName.shown`
    priority: int
    rank: float  #: its place in the line, the smallest first
    added_at: float
    ready_at: float | None = 0.0  #: it does not start before that time; None: not by itself
    trial: Trial | None = None  #: None: nothing yet

    @property
    def so_far(self) -> Trial:
        return self.trial or Trial()

    @property
    def state(self) -> ItemState:
        return self.so_far.state

    def due(self, now: float) -> bool:
        waits = self.trial is None or self.trial.state in _WAIT
        return waits and self.ready_at is not None and self.ready_at <= now


class Queue(NamedTuple):
    """The line in order, and what is done, the oldest first."""

    line: tuple[Item, ...] = ()
    done: tuple[Item, ...] = ()
    paused: bool = False  #: nothing starts, and a process that drives an item stops


class Result(enum.StrEnum):
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


class Driven(NamedTuple):
    """How a drive ended, and why; `retry`: another attempt may succeed."""

    result: Result
    why: str = ""
    retry: bool = True
    pause: float | None = None  #: seconds until then; None: a pause that grows with each try


# ---------------------------------------------------------------- what people type


def priority(text: str) -> int:
    """The number of ``high``, ``normal``, ``low`` or of a number. Raises ValueError."""
    word = text.strip().lower()
    if word in PRIORITIES:
        return PRIORITIES[word]
    if re.fullmatch(r"[+-]?[0-9]{1,3}", word, re.ASCII) and abs(int(word)) <= _MOST_PRIORITY:
        return int(word)
    numbers = f"a number from -{_MOST_PRIORITY} to {_MOST_PRIORITY}"
    raise ValueError(f"want {', '.join(PRIORITIES)} or {numbers}")


def next_time(text: str, now: float) -> float:
    """The next time that the local clock shows ``22:00``. Raises ValueError."""
    match = re.fullmatch(r"\s*([01]?[0-9]|2[0-3]):([0-5][0-9])\s*", text, re.ASCII)
    if match is None:
        raise ValueError("want a time of day such as 22:00")
    today = time.localtime(now)
    for day in range(2):
        # The calendar's next day, which may have 23 or 25 hours.
        date = (today.tm_year, today.tm_mon, today.tm_mday + day)
        at = time.mktime((*date, int(match[1]), int(match[2]), 0, 0, 0, -1))
        if at > now:
            break
    return at


# ---------------------------------------------------------------- what people do with it


def position(queue: Queue, model: str) -> int:
    """Where a model is in the line, from 0 on; -1 where it is not."""
    key = model.lower()
    keys = [item.model.lower() for item in queue.line]
    return keys.index(key) if key in keys else -1


def add(queue: Queue, model: str, level: int, not_before: float, now: float) -> Queue:
    """Put a model into the line. Raises TargetError for what is no model.

    One that is there takes the new priority and time, keeps how long it has waited, and waits again
    where it had failed or was paused.
    """
    shown = names.to_model(model).shown
    at = position(queue, shown)
    item = Item(shown, level, 0.0, now)
    if at >= 0:
        item = queue.line[at]._replace(priority=level)
        if item.trial is not None and item.state is not ItemState.RUNNING:
            item = _waiting(item, now, tries=0)
    if item.state is ItemState.WAITING:
        item = item._replace(ready_at=not_before)
    rank = max(item.added_at, item.ready_at or 0.0) - level * _AGING
    line = queue.line if at < 0 else _without(queue.line, at)
    place = bisect_right(line, rank, key=lambda each: each.rank)
    done = tuple(each for each in queue.done if each.model.lower() != shown.lower())
    line = (*line[:place], item._replace(rank=rank), *line[place:])
    return queue._replace(line=line, done=done)


def remove(queue: Queue, models: Collection[str]) -> Queue:
    """Take models out, done ones too. Raises TargetError where one is not there."""
    gone = {names.to_model(model).key for model in models}
    done = {item.model.lower() for item in queue.done}
    for model in models:
        if names.to_model(model).key not in done:
            _found(queue, model)
    line, left = (
        tuple(item for item in items if item.model.lower() not in gone)
        for items in (queue.line, queue.done)
    )
    return queue._replace(line=line, done=left)


def move(queue: Queue, model: str, to: int) -> Queue:
    """Put a model at the place `to`, from 1 on; it ages like its neighbor. Raises TargetError."""
    at = _found(queue, model)
    rest = _without(queue.line, at)
    place = min(max(to - 1, 0), len(rest))
    moved = queue.line[at]
    if place < at:
        moved = moved._replace(rank=rest[place].rank)
    elif place > at:
        moved = moved._replace(rank=rest[place - 1].rank)
    return queue._replace(line=(*rest[:place], moved, *rest[place:]))


def pause(queue: Queue, models: Collection[str], now: float) -> Queue:
    """Stop models until they are resumed; without models: the queue. Raises TargetError."""
    if not models:
        return queue._replace(paused=True)
    for at in [_found(queue, model) for model in models]:
        item = queue.line[at]
        if item.state is not ItemState.PAUSED:
            queue = _put(queue, at, _become(item, ItemState.PAUSED, now))
    return queue


def resume(queue: Queue, models: Collection[str], now: float) -> Queue:
    """Let paused and failed models wait anew; without models: the queue. TargetError."""
    if not models:
        return queue._replace(paused=False)
    for at in [_found(queue, model) for model in models]:
        item = queue.line[at]
        if item.state in (ItemState.PAUSED, ItemState.FAILED):
            queue = _put(queue, at, _waiting(item, now, tries=0))
    return queue


def _found(queue: Queue, model: str) -> int:
    """The position of a model that people name. Raises TargetError where it is not in the line."""
    key = names.to_model(model).key
    at = position(queue, key)
    if at < 0:
        helps = targets.perhaps(model, [item.model for item in queue.line])
        missing = f"not in the queue: {names.printable(model)}"
        raise TargetError(missing, helps or "the queue is empty")
    return at


def _without(line: tuple[Item, ...], at: int) -> tuple[Item, ...]:
    return (*line[:at], *line[at + 1 :])


def _put(queue: Queue, at: int, item: Item) -> Queue:
    return queue._replace(line=(*queue.line[:at], item, *queue.line[at + 1 :]))


def _become(item: Item, state: ItemState, now: float, **more: Any) -> Item:
    trial = item.so_far._replace(state=state, since=now, runner=None)
    return item._replace(trial=trial._replace(**more))


def _waiting(item: Item, now: float, **more: Any) -> Item:
    return _become(item, ItemState.WAITING, now, **more)._replace(ready_at=0.0)


# ---------------------------------------------------------------- what a runner does with it


def revived(queue: Queue, driven: Callable[[Item, Runner], bool], now: float) -> Queue:
    """Items whose runner drives them no more wait again, at their place."""
    for at, item in enumerate(queue.line):
        runner = item.trial and item.trial.runner
        if runner is not None and not driven(item, runner):
            why = _reasons(item, now, "its process is gone")
            queue = _put(queue, at, _waiting(item, now, reasons=why))
    return queue


def take(
    queue: Queue, runner: Runner, now: float, passed: Collection[str] = ()
) -> tuple[Queue, Item | None]:
    """The first that is due runs from now on; None where nothing is due, but for those `passed`."""
    due = (at for at, item in enumerate(queue.line) if item.due(now) and item.model not in passed)
    at = next(due, -1)
    if at < 0 or queue.paused:
        return queue, None
    item = _become(queue.line[at], ItemState.RUNNING, now, runner=runner)
    taken = item._replace(ready_at=0.0)
    return _put(queue, at, taken), taken


def ended(queue: Queue, taken: Item, driven: Driven, now: float, chance: float) -> Queue:
    """What becomes of an item that was taken. `chance` (0 to 1) spreads the next try."""
    at = position(queue, taken.model)
    if at < 0 or not _still(queue.line[at], taken):
        return queue
    item = queue.line[at]
    reasons = _reasons(item, now, driven.why)
    if driven.result is Result.DONE:
        item = _become(item, ItemState.DONE, now)
        done = (*queue.done, item)[-_MOST_DONE:]
        return queue._replace(line=_without(queue.line, at), done=done)
    if driven.result is Result.STOPPED:
        return _put(queue, at, _waiting(item, now, reasons=reasons))
    tries = item.so_far.tries + 1
    pause = next_pause(tries, chance)
    if driven.pause is not None:
        pause = driven.pause * (0.95 + chance / 10)
    again = now + pause if driven.retry else None
    item = _become(item, ItemState.FAILED, now, tries=tries, reasons=reasons)
    return _put(queue, at, item._replace(ready_at=again))


def next_pause(tries: int, chance: float) -> float:
    """Seconds until the next try after so many that have failed."""
    pause = min(_FIRST_PAUSE * 2.0 ** min(tries - 1, 30), _LONGEST_PAUSE)
    return pause * (0.5 + chance)


def why_stop(queue: Queue, taken: Item, now: float) -> str:
    """Why an item's process should stop, such as for an urgent one that is due; "" for nothing."""
    at = position(queue, taken.model)
    if at < 0:
        return "it was removed from the queue"
    item = queue.line[at]
    if item.state is ItemState.PAUSED:
        return "it was paused"
    if not _still(item, taken):
        return "another process took it"
    if queue.paused:
        return "the queue was paused"
    if any(each.state is ItemState.RUNNING for each in queue.line[at + 1 :]):
        return ""
    urgent = (each for each in queue.line[:at] if each.priority >= URGENT and each.due(now))
    first = next((each.model for each in urgent if each.priority > item.priority), "")
    return first and f"{first} is more urgent"


def next_due(queue: Queue) -> float | None:
    """When the next item may start; None where none will by itself."""
    if queue.paused:
        return None
    times = (item.ready_at for item in queue.line if item.state in _WAIT)
    return min((at for at in times if at is not None), default=None)


def _still(item: Item, taken: Item) -> bool:
    """Whether an item is driven by the same runner, from the same time on."""
    return item.so_far[:3] == taken.so_far[:3]


def _reasons(item: Item, now: float, why: str) -> tuple[Reason, ...]:
    more = (Reason(now, names.sayable(why)),) if why else ()
    return (*item.so_far.reasons, *more)[-_MOST_REASONS:]


def arrivals(
    queue: Queue, now: float, missing: Callable[[str], int | None], rate: float | None
) -> tuple[float | None, ...]:
    """When each item is done, None for unknown. `missing`: its bytes; `rate`: per second."""
    found: list[float | None] = [None] * len(queue.line)
    if not rate or queue.paused:
        return tuple(found)
    runs, ready, later = [], [], []
    for at, item in enumerate(queue.line):
        if item.due(now):
            ready.append(at)
        elif item.state is ItemState.RUNNING:
            runs.append(at)
        elif item.state is not ItemState.PAUSED and item.ready_at is not None:
            later.append((item.ready_at, at))
    # From here on the last ones are the next ones.
    later.sort(reverse=True)
    ready.reverse()
    runs.reverse()
    while runs or ready or later:
        if not (runs or ready):
            now = max(now, later[-1][0])
        while later and later[-1][0] <= now:
            insort(ready, later.pop()[1], key=operator.neg)
        at = runs.pop() if runs else ready.pop()
        size = missing(queue.line[at].model)
        if size is None:
            break  # when the others start is not known either
        now += size / rate
        found[at] = now
    return tuple(found)


# ---------------------------------------------------------------- the file


def _item(row: list[Any]) -> Item:
    model, priority, rank, added_at, ready_at, trial = row
    if not checks.text(model, _LONGEST_MODEL).isprintable():
        raise ValueError("a model that has no name")
    return Item(
        model,
        checks.whole(priority, _MOST_PRIORITY, -_MOST_PRIORITY),
        checks.seconds(rank, checks.LAST_DAY),
        checks.seconds(added_at, checks.LAST_DAY),
        None if ready_at is None else checks.seconds(ready_at, checks.LAST_DAY),
        None if trial is None else _trial(*trial),
    )


def _trial(
    state: str, since: float, runner: list[int] | None, tries: int, reasons: list[list[Any]]
) -> Trial:
    if (runner is None) is (state == ItemState.RUNNING):
        raise ValueError("what runs has a runner, and nothing else has one")
    return Trial(
        ItemState(state),
        checks.seconds(since, checks.LAST_DAY),
        None if runner is None else Runner(*map(checks.whole, runner)),
        checks.whole(tries, (1 << 31) - 1),
        tuple(Reason(checks.seconds(at, checks.LAST_DAY), checks.text(why)) for at, why in reasons),
    )


class _File(json_file.File[Queue]):
    schema = SCHEMA
    apart = "queue"

    def decode(self, found: Mapping[str, Any]) -> Queue:
        line, done = ([_item(row) for row in found[key]] for key in ("line", "done"))
        line.sort(key=lambda item: item.rank)
        return Queue(tuple(line), tuple(done), bool(found["paused"]))

    def encode(self, value: Queue) -> Mapping[str, object]:
        # An item is a row: with ten thousand of them, keys would take most of the time.
        return {"item": Item._fields, "trial": Trial._fields, **value._asdict()}


FILE = _File(NAME, Queue())

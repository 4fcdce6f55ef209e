"""The queue for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from watcher.observe.serving import QueueRunner
from watcher.ollama import names
from watcher.pull import queue
from watcher.pull.queue import Item, ItemState, Queue
from watcher.show.lines import count, run_by, runs
from watcher.show.tables import Command, clock
from watcher.state import event_log

SCHEMA = "ollama-watch/queue/1"

#: So many of the line are shown, and so many of what is done.
_SHOWN, _SHOWN_DONE = 30, 5
_STYLE = {
    ItemState.RUNNING: "green",
    ItemState.FAILED: "bold red",
    ItemState.PAUSED: "yellow",
    ItemState.DONE: "cyan",
}
_WORDS = {number: word for word, number in queue.PRIORITIES.items()}


def table(
    kept: Queue, arrivals: Sequence[float | None], by: QueueRunner | None, now: float, helps: str
) -> list[object]:
    """What ``queue ls`` prints; `arrivals`: when each of the line will be done, where known.

    `helps`: the command that gets the queue going again, or "".
    """
    shown: list[object] = []
    if kept.line:
        told = runs(kept, by)
        shown.append(Text(told, style="yellow" if kept.paused or by is None else ""))
        if helps:
            shown.append(Command(helps))
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    made.add_column("#", justify="right")
    made.add_column("model", overflow="fold", ratio=3)
    made.add_column("priority")
    made.add_column("state", overflow="fold", ratio=4)
    made.add_column("done by")
    made.expand = True
    for number, (item, at) in enumerate(zip(kept.line, arrivals, strict=True), 1):
        if number > _SHOWN:
            break
        done_by = "" if at is None else clock(at, now)
        made.add_row(str(number), *_cells(item, now), done_by)
    for item in kept.done[: -_SHOWN_DONE - 1 : -1]:
        made.add_row("", *_cells(item, now), "")
    if made.row_count:
        shown.append(made)
    if len(kept.line) > _SHOWN:
        shown.append(Text(f"and {len(kept.line) - _SHOWN:,} more: --json has them all"))
    if not made.row_count:
        shown.append(Text("the queue is empty: `queue add MODEL` puts a model into it"))
    return shown


def told(item: Item, now: float) -> str:
    """What is with an item, in words."""
    so_far = item.so_far
    if item.state is ItemState.RUNNING:
        assert so_far.runner is not None
        return f"running since {clock(so_far.since, now)}, pid {so_far.runner.pid}"
    if item.state is ItemState.DONE:
        return f"done at {clock(so_far.since, now)}"
    if item.state is ItemState.FAILED:
        why = so_far.reasons[-1].why.splitlines()[0] if so_far.reasons else "for an unknown reason"
        if item.ready_at is None:
            return f"failed: {why}"
        times = f"failed {count(so_far.tries, 'time')}"
        return f"{times}, again at {clock(item.ready_at, now)}: {why}"
    if item.state is ItemState.WAITING and item.ready_at is not None and item.ready_at > now:
        return f"waiting until {clock(item.ready_at, now)}"
    return item.state.value


def document(
    store: str,
    kept: Queue,
    arrivals: Sequence[float | None],
    by: QueueRunner | None,
    now: float,
) -> dict[str, Any]:
    """What ``queue ls --json`` prints."""
    return {
        "schema": SCHEMA,
        "time": event_log.rfc3339(now),
        "store": names.exact(store),
        "paused": kept.paused,
        "run_by": run_by(by),
        "items": [
            {"position": number, **_item(item), "done_by": _time(at)}
            for number, (item, at) in enumerate(zip(kept.line, arrivals, strict=True), 1)
        ],
        "done": [_item(item) for item in kept.done],
    }


def _cells(item: Item, now: float) -> tuple[Text, str, Text]:
    return (
        Text(names.printable(item.model)),
        _WORDS.get(item.priority, str(item.priority)),
        Text(told(item, now), style=_STYLE.get(item.state, "")),
    )


def _item(item: Item) -> dict[str, Any]:
    so_far = item.so_far
    return {
        "model": names.exact(item.model),
        "priority": item.priority,
        "state": item.state.value,
        "since": _time(so_far.since or item.added_at),
        "added_at": _time(item.added_at),
        "ready_at": _time(item.ready_at),
        "pid": None if so_far.runner is None else so_far.runner.pid,
        "tries": so_far.tries,
        "reasons": [{"at": _time(each.at), "why": each.why} for each in so_far.reasons],
    }


def _time(at: float | None) -> str | None:
    return None if not at else event_log.rfc3339(at)

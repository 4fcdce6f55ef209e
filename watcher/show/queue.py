"""The queue for people and for programs."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from watcher.ollama import names
from watcher.pull import queue, running
from watcher.pull.queue import Item, ItemState, Queue
from watcher.show.text import Line, Part, Span, Table, command, count, more, name
from watcher.state import event_log, records, state_folder
from watcher.state.event_log import clock
from watcher.state.state_folder import Running
from watcher.system import advice

_SHOWN, _SHOWN_DONE = 30, 5  #: so many of the line are shown, and so many of what is done
_STYLE = {
    ItemState.RUNNING: "green",
    ItemState.FAILED: "bold red",
    ItemState.PAUSED: "yellow",
    ItemState.DONE: "cyan",
}
_WORDS = {number: word for word, number in queue.PRIORITIES.items()}


class Shown(NamedTuple):
    """The queue, and what runs it; `arrivals`: when each of the line is complete, where known."""

    kept: Queue
    arrivals: Sequence[float | None]
    by: Running | None
    now: float


def look(store: int, path: str, kept: Queue) -> Shown:
    """A queue of an open store as it is now, with what runs it, and when each item arrives."""
    now = time.time()
    kept = queue.revived(kept, running.driven_by(store), now)
    known = records.read(store)

    def missing(model: str) -> int | None:
        record = known.get(model.lower())
        if record is None or record.total_bytes is None:
            return None
        return max(0, record.total_bytes - record.downloaded_bytes)

    going = (each.model.lower() for each in kept.line if each.state is ItemState.RUNNING)
    rate = sum(known[key].bytes_per_second or 0.0 for key in going if key in known) or None
    arrivals = queue.arrivals(kept, now, missing, rate)
    return Shown(kept, arrivals, state_folder.queue_runner(path), now)


def table(shown: Shown, helps: str, *, verbose: bool) -> Iterator[Part]:
    """What ``queue ls`` prints. `helps`: the command that starts the queue again, or ""."""
    kept, by, most = shown.kept, shown.by, None if verbose else _SHOWN
    if not (kept.line or kept.done):
        yield "the queue is empty; to add a model:"
        yield command(helps)
        return
    if kept.line:
        style = "yellow" if kept.paused or by is None else ""
        known = [at for at in shown.arrivals if at is not None]
        all_by = f", done by {clock(max(known), shown.now)}" if len(known) == len(kept.line) else ""
        yield Line(f"{len(kept.line):,} queued{all_by}; {runs(kept, by)}", style=style)
        if helps:
            yield command(helps)
    line = zip(kept.line[:most], shown.arrivals[:most], strict=True)
    rows = [(str(number), *_cells(*each, shown.now)) for number, each in enumerate(line, 1)]
    rows += [("", *_cells(item, None, shown.now)) for item in kept.done[: -_SHOWN_DONE - 1 : -1]]
    yield Table(rows, ("#", "model", "priority", "done by", "state"), frozenset({0}))
    if most is not None and kept.line[most:]:
        yield more(len(kept.line) - most)


def runs(kept: Queue, by: Running | None) -> str:
    """Which process runs the queue, in words; or that nothing does."""
    if kept.paused:
        return "paused"
    if by is None:
        return "nothing runs it; set queue = true for the daemon, or run it"
    pid = "" if by.pid is None else f" (pid {by.pid})"
    return f"run by the daemon{pid}" if by.is_daemon else f"run by ollama-watch queue run{pid}"


def restart(kept: Queue, by: Running | None, store: str, found_by: str) -> str:
    """The command that starts a queue again, or fills it; "" where it runs."""
    if not (kept.line or kept.done):
        return advice.on(store, found_by, "queue", "add", "MODEL")
    if kept.paused:
        return advice.on(store, found_by, "queue", "resume")
    return advice.on(store, found_by, "queue", "run") if by is None else ""


def run_by(by: Running | None) -> dict[str, Any] | None:
    """Which process runs the queue, in a document."""
    return None if by is None else {"pid": by.pid, "daemon": by.is_daemon}


def state_of(item: Item, now: float) -> str:
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


def document(shown: Shown, store: str) -> dict[str, Any]:
    kept = shown.kept
    return {
        "schema": "ollama-watch/queue/1",
        "time": event_log.rfc3339(shown.now),
        "store": names.exact(store),
        "paused": kept.paused,
        "run_by": run_by(shown.by),
        "items": [
            {"position": number, **_item(item), "done_by": _time(at)}
            for number, (item, at) in enumerate(zip(kept.line, shown.arrivals, strict=True), 1)
        ],
        "done": [_item(item) for item in kept.done],
    }


def _cells(item: Item, done_at: float | None, now: float) -> tuple[str | Span, ...]:
    priority = _WORDS.get(item.priority, str(item.priority))
    done_by = "" if done_at is None else clock(done_at, now)
    state = Span(state_of(item, now), _STYLE.get(item.state, ""))
    return name(item.model), priority, done_by, state


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

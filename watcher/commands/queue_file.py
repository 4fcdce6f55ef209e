"""The queue of the one store that is meant: changed, and shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from watcher.commands.context import Context, complain
from watcher.observe import place, serving
from watcher.ollama import names
from watcher.pull import queue, running
from watcher.pull.queue import Item, ItemState, Queue
from watcher.show import queue as drawn
from watcher.state import folders, records


def change(context: Context, changed: Callable[[Queue], Queue]) -> Queue:
    """Change the queue of the one store that is meant; for programs, print what it is then."""
    with opened(context) as (found, store):
        kept, lost = queue.FILE.change_and_report(store, changed)
        if lost:
            complain(lost)
        if context.json:
            show(context, found, store, kept)
        return kept


@contextmanager
def opened(context: Context) -> Iterator[tuple[place.Found, int]]:
    """The one store that is meant, and open. Raises SettingsError where several are."""
    found = context.only_place("each has a queue of its own")
    with folders.opened_store(found.path) as store:
        yield found, store


def show(context: Context, found: place.Found, store: int, kept: Queue) -> None:
    now = time.time()
    kept = queue.revived(kept, running.driven_by(store), now)
    known = records.read(store)
    arrivals = queue.arrivals(kept, now, _missing(known), _rate(kept, known))
    shown = drawn.Shown(kept, arrivals, serving.queue_runner(found.path), now)
    if context.json:
        context.document(drawn.document(shown, found.path))
    elif kept.line or kept.done or not context.quiet:
        helps = drawn.restart(kept, shown.by, found.path, found.by)
        most = None if context.verbose else drawn.SHOWN
        context.show(drawn.table(shown, helps, most))


def in_words(item: Item) -> str:
    return f"{names.printable(item.model)}: {drawn.told(item, time.time())}"


def _missing(known: records.Records) -> Callable[[str], int | None]:
    def missing(model: str) -> int | None:
        record = known.get(model.lower())
        if record is None or record.total_bytes is None:
            return None
        return max(0, record.total_bytes - record.downloaded_bytes)

    return missing


def _rate(kept: Queue, known: records.Records) -> float | None:
    """Bytes per second of all that run now; None where that is not known."""
    running_now = (each.model.lower() for each in kept.line if each.state is ItemState.RUNNING)
    rates = (known[key].bytes_per_second for key in running_now if key in known)
    return sum(rate for rate in rates if rate is not None) or None

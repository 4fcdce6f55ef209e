"""``queue``: models that are to be downloaded one after the other."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from watcher.commands.context import Context, complain
from watcher.errors import Exit
from watcher.observe import place, serving
from watcher.ollama import names
from watcher.pull import queue, running
from watcher.pull.queue import Item, ItemState, Queue
from watcher.pull.running import Drive
from watcher.state import folders, records
from watcher.state.event_log import Event
from watcher.system import advice, stopping


def add(context: Context, models: tuple[str, ...], level: int, after: str | None) -> Exit:
    """Put models into the line; `after`: a time of day."""
    now = time.time()
    not_before = 0.0 if after is None else queue.next_time(after, now)

    def added(before: Queue) -> Queue:
        for model in models:
            before = queue.add(before, model, level, not_before, now)
        return before

    kept = _change(context, added)
    if not (context.quiet or context.json):
        for model in models:
            place = queue.position(kept, names.to_model(model).shown)
            words = f"{place + 1} of {len(kept.line)}: {_in_words(kept.line[place])}"
            sys.stdout.write(f"{words}\n")
    return Exit.HEALTHY


def ls(context: Context) -> Exit:
    """Tell what is in the line, and what is done."""
    for found in context.places():
        with folders.opened_store(found.path) as store:
            _show(context, found, store, queue.FILE.read(store))
    return Exit.HEALTHY


def rm(context: Context, models: tuple[str, ...]) -> Exit:
    """Take models out of the queue; what is there of them stays."""
    _change(context, lambda before: queue.remove(before, models))
    return Exit.HEALTHY


def move(context: Context, model: str, to: int) -> Exit:
    """Put a model at another place of the line."""
    _change(context, lambda before: queue.move(before, model, to))
    return Exit.HEALTHY


def pause(context: Context, models: tuple[str, ...]) -> Exit:
    """Let models, or the queue, wait until they are resumed."""
    now = time.time()
    _change(context, lambda before: queue.pause(before, models, now))
    return Exit.HEALTHY


def resume(context: Context, models: tuple[str, ...]) -> Exit:
    """Let models, or the queue, go on."""
    now = time.time()
    _change(context, lambda before: queue.resume(before, models, now))
    return Exit.HEALTHY


def run(context: Context, drive: Drive) -> Exit:
    """Drive one item after the other until none is left that could be begun by itself."""

    def tell(item: Item) -> None:
        if not context.quiet:
            complain(_in_words(item))

    with _opened(context) as (found, store), running.seen_to_run(store):
        left = running.run(store, drive, tell=tell)
    if left.paused:
        complain(f"the queue is paused\n  -> {advice.on(found.path, found.by, 'queue', 'resume')}")
    given_up = [item for item in left.line if item.state is ItemState.FAILED]
    return Exit.FAILED if given_up else Exit.HEALTHY


def run_leashed(context: Context) -> Exit:
    """The same for a daemon: drive what is due, and end in order when stdin does.

    On stdout are the events, one a line.
    """
    from watcher.commands import queue_drive

    (host,) = context.hosts(changes=True)
    drive = queue_drive.leashed(context, replace(host, tell=_tell_daemon), _ends_with_stdin())
    with folders.opened_store(host.store) as store, suppress(KeyboardInterrupt):
        while running.run_next(store, drive) is not None:
            pass
    return Exit.HEALTHY


def _tell_daemon(event: Event) -> None:
    with suppress(OSError):  # it is gone; the logs have the event
        os.write(sys.stdout.fileno(), event.line)


def _ends_with_stdin() -> Callable[[], bool]:
    """Says whether stdin is at its end."""
    ended = threading.Event()

    def read() -> None:
        with suppress(OSError):
            while os.read(sys.stdin.fileno(), 1 << 10):
                pass
        ended.set()
        stopping.ask()

    threading.Thread(target=read, name="leash", daemon=True).start()
    return ended.is_set


def _change(context: Context, changed: Callable[[Queue], Queue]) -> Queue:
    """Change the queue of the one store that is meant; for programs, print what it is then."""
    with _opened(context) as (found, store):
        kept = queue.FILE.change(store, changed, tell=complain)
        if context.json:
            _show(context, found, store, kept)
        return kept


@contextmanager
def _opened(context: Context) -> Iterator[tuple[place.Found, int]]:
    """The one store that is meant, and open. Raises SettingsError where several are."""
    found = context.only_place("each has a queue of its own")
    with folders.opened_store(found.path) as store:
        yield found, store


def _show(context: Context, found: place.Found, store: int, kept: Queue) -> None:
    from watcher.show import queue as show

    now = time.time()
    kept = queue.revived(kept, running.driven_by(store), now)
    known = records.read(store)
    arrivals = queue.arrivals(kept, now, _missing(known), _rate(kept, known))
    shown = show.Shown(kept, arrivals, serving.queue_runner(found.path), now)
    if context.json:
        context.document(show.document(shown, found.path))
    elif kept.line or kept.done or not context.quiet:
        helps = show.restart(kept, shown.by, found.path, found.by)
        most = None if context.verbose else show.SHOWN
        context.show(show.table(shown, helps, most))


def _in_words(item: Item) -> str:
    from watcher.show import queue as show

    return f"{names.printable(item.model)}: {show.told(item, time.time())}"


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

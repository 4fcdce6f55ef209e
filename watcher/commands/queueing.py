"""The queue of the one store that is meant: changed, shown, and run item by item."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from watcher.commands import pulling
from watcher.commands.context import Context, complain
from watcher.errors import Exit
from watcher.observe import place
from watcher.observe.host import Host
from watcher.ollama import names, server
from watcher.pull import queue, running, target
from watcher.pull.account import Options
from watcher.pull.driver import Pull
from watcher.pull.failures import Cause
from watcher.pull.queue import Driven, Item, ItemState, Queue, Result
from watcher.pull.running import Drive, Why
from watcher.pull.target import Target
from watcher.show import queue as drawn
from watcher.state import folders
from watcher.state.event_log import Event
from watcher.system import advice, stopping
from watcher.transfer.rate import Limit


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
    """Print a queue, with what runs it and when each item arrives."""
    shown = drawn.look(store, found.path, kept)
    if context.json:
        context.document(drawn.document(shown, found.path))
    elif kept.line or kept.done or not context.quiet:
        helps = drawn.restart(shown.kept, shown.by, found.path, found.by)
        context.show(drawn.table(shown, helps, verbose=context.verbose))


def in_words(item: Item) -> str:
    return f"{names.printable(item.model)}: {drawn.state_of(item, time.time())}"


def run(context: Context, drive: Drive) -> Exit:
    """Drive one item after the other until none is left that can start by itself."""
    with opened(context) as (found, store), running.seen_to_run(store):
        for item in running.run(store, drive):
            if not context.quiet:
                complain(in_words(item))
        left = queue.FILE.read(store)
    if left.paused:
        complain(f"the queue is paused\n  -> {advice.on(found.path, found.by, 'queue', 'resume')}")
    given_up = any(item.state is ItemState.FAILED for item in left.line)
    return Exit.FAILED if given_up else Exit.HEALTHY


def run_leashed(context: Context) -> Exit:
    """The same for a daemon: drive what is due, print events, end in order when stdin does."""
    ended = threading.Event()

    def report(event: Event) -> None:
        with suppress(OSError):  # the daemon is gone; the logs have the event
            os.write(sys.stdout.fileno(), event.line)

    limit = Limit(context.settings.rate)

    def wait_for_the_end() -> None:
        with suppress(OSError), open(sys.stdin.fileno(), "rb", closefd=False) as leash:
            for line in leash:
                limit.per_second = int(line)  # the settings have been reread
        ended.set()
        stopping.ask()

    (host,) = context.hosts(changes=True)
    threading.Thread(target=wait_for_the_end, name="leash", daemon=True).start()
    drive = leashed(context, replace(host, report=report), limit, ended.is_set)
    with folders.opened_store(host.store) as store, suppress(KeyboardInterrupt):
        while running.run_next(store, drive) is not None:
            pass
    return Exit.HEALTHY


def queued(context: Context, host: str | None, *, insecure: bool) -> Drive:
    """What drives an item of the queue, through the server at `host`."""
    found = pulling.site_of(context, host)
    options = Options(
        insecure, connections=context.settings.connections, limit=Limit(context.settings.rate)
    )
    return _driver(context, found, lambda _: options, lambda: False)


def leashed(context: Context, host: Host, limit: Limit, ended: Callable[[], bool]) -> Drive:
    """The same for a daemon, until it has `ended`: through the server that has the store."""
    found = target.of_store(host, context.settings, os.environ)
    if found.host is None and not os.environ.get("OLLAMA_HOST"):
        # What it would pull would come into somebody else's store.
        return lambda _, __: Driven(Result.FAILED, f"not pulled: {found.why}")

    def options(model: str) -> Options:
        insecure = server.is_loopback(names.to_model(model).host)
        return Options(insecure, connections=context.settings.connections, limit=limit)

    return _driver(context, found, options, ended)


def _driver(
    context: Context, found: Target, options: Callable[[str], Options], ended: Callable[[], bool]
) -> Drive:
    def drive(model: str, why_stop: Why) -> Driven:
        with pulling.cancelled_by_signals() as signalled:

            def asked() -> bool:
                return signalled() or ended()

            one = Pull(found, model, options(model), lambda: asked() or bool(why_stop()))
            with pulling.display(context) as shown:
                pulling.drive(one, shown)
        # Not before signals have their usual meaning again: none is lost between the two.
        if asked():
            stopping.ask()
            raise KeyboardInterrupt  # what was driven is put back, and the run ends
        cause = one.end.cause
        if cause is None:
            return Driven(Result.DONE)
        if cause is Cause.INTERRUPTED:
            return Driven(Result.STOPPED, why_stop())
        pause = queue.HOURLY if cause.hourly else None
        why = "; ".join(filter(None, (one.end.text, one.step, one.command)))
        return Driven(Result.FAILED, why, cause.passes or cause.hourly, pause)

    return drive

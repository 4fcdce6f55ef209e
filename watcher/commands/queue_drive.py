"""What runs the queue: one item after the other, each a pull until it has ended or makes place."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from watcher.commands import pulling
from watcher.commands.context import Context, complain
from watcher.commands.pulling import PullOptions
from watcher.commands.queue_file import in_words, opened
from watcher.errors import Exit
from watcher.observe.host import Host
from watcher.ollama import names, server
from watcher.pull import queue, running, target
from watcher.pull.driver import Options, Pull
from watcher.pull.failures import Cause
from watcher.pull.queue import Driven, ItemState, Result
from watcher.pull.running import Drive, Why
from watcher.pull.target import Target
from watcher.show import progress
from watcher.state import folders
from watcher.state.event_log import Event
from watcher.system import advice, stopping


def run(context: Context, drive: Drive) -> Exit:
    """Drive one item after the other until none is left that can start by itself."""
    with opened(context) as (found, store), running.seen_to_run(store):
        for item in running.run(store, drive):
            if not context.quiet:
                complain(in_words(item))
        left = queue.FILE.read(store)
    if left.paused:
        complain(f"the queue is paused\n  -> {advice.on(found.path, found.by, 'queue', 'resume')}")
    given_up = [item for item in left.line if item.state is ItemState.FAILED]
    return Exit.FAILED if given_up else Exit.HEALTHY


def run_leashed(context: Context) -> Exit:
    """The same for a daemon: drive what is due, and end in order when stdin does.

    On stdout are the events, one a line.
    """
    (host,) = context.hosts(changes=True)
    drive = leashed(context, replace(host, tell=_tell_daemon), _ends_with_stdin())
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


def queued(context: Context, wanted: PullOptions) -> Drive:
    """What drives an item of the queue."""
    return _driver(
        context, pulling.site_of(context, wanted.host), lambda _: wanted.options, lambda: False
    )


def leashed(context: Context, host: Host, ended: Callable[[], bool]) -> Drive:
    """The same for a daemon, until `ended` says that it is gone.

    Nobody is there to name a server: it is the one that has the store, unless the environment says
    otherwise. A registry on this machine is asked over http, as everywhere.
    """
    found = target.find(target.url_of_store(host, os.environ), host, context.settings)
    if found.host is None and not os.environ.get("OLLAMA_HOST"):
        # What it would pull would come into somebody else's store.
        return lambda _, __: Driven(Result.FAILED, f"not pulled: {found.why}")

    def options(model: str) -> Options:
        return Options(insecure=server.is_loopback(names.to_model(model).host))

    return _driver(context, found, options, ended)


def _driver(
    context: Context, found: Target, options: Callable[[str], Options], ended: Callable[[], bool]
) -> Drive:
    def drive(model: str, why_stop: Why) -> Driven:
        with pulling.cancelled_by_signals() as signalled:

            def asked() -> bool:
                return signalled() or ended()

            one = Pull(found, model, options(model), lambda: asked() or bool(why_stop()))
            color = context.colored()
            with progress.display(json=context.json, quiet=context.quiet, color=color) as shown:
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
        why = "; ".join(filter(None, (one.end.text, cause.step, one.command)))
        return Driven(Result.FAILED, why, cause.passes or cause.hourly, pause)

    return drive

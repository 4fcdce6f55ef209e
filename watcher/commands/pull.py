"""``pull``, ``reset`` and what drives the queue: downloads through the server, to their end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from watcher import names
from watcher.commands.context import Context, complain
from watcher.errors import Exit, NoPermissionError, NoStoreError
from watcher.pull import site
from watcher.pull.causes import Cause
from watcher.pull.driver import Options, Pull, Site
from watcher.pull.queue import Driven, Result
from watcher.pull.running import Drive, Why
from watcher.pull.sharing import Sharing
from watcher.show import progress
from watcher.world import World


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line says of pulls."""

    host: str | None = None
    parallel: int = 1
    options: Options = field(default_factory=Options)


def pull(context: Context, models: tuple[str, ...], wanted: Wanted) -> Exit:
    """Download models through the server; a ctrl-C leaves what came resumable."""
    found = _site(context, wanted.host)
    sharing = Sharing()
    with _cancelled_by_signals() as cancelled:
        pulls = [
            Pull(found, model, wanted.options, cancelled, sharing)
            for model in dict.fromkeys(models)
        ]
        color = context.color is not False and not os.environ.get("NO_COLOR")
        shown = progress.display(json=context.json, quiet=context.quiet, color=color)
        with shown, ThreadPoolExecutor(max(1, wanted.parallel)) as pool:
            for done in [pool.submit(_drive, each, shown) for each in pulls]:
                done.result()
    return max(map(_told, pulls))


def _drive(one: Pull, shown: progress.Display) -> None:
    for update in one.updates():
        shown.show(one, update)
        sys.stdout.flush()


def _told(one: Pull) -> Exit:
    """Tell how a pull has ended, where it has not arrived."""
    cause = one.end.cause
    if cause is None:
        return Exit.HEALTHY
    shown = names.printable(one.name.shown)
    if cause is Cause.INTERRUPTED:
        complain(f"{shown}: interrupted; go on with: ollama-watch pull {shown}")
        return Exit.INTERRUPTED
    complain(f"ollama-watch: {shown} has not arrived: {one.end.text}\n  {cause.step}")
    return Exit.FAILED


def queued(context: Context, wanted: Wanted) -> Drive:
    """What drives an item of the queue."""
    found = _site(context, wanted.host)

    def drive(model: str, why_stop: Why) -> Driven:
        one = Pull(found, model, wanted.options, lambda: bool(why_stop()))
        with progress.display(json=context.json, quiet=context.quiet, color=False) as shown:
            _drive(one, shown)
        cause = one.end.cause
        if cause is None:
            return Driven(Result.DONE)
        if cause is Cause.INTERRUPTED:
            return Driven(Result.STOPPED, why_stop())
        return Driven(Result.FAILED, f"{one.end.text}; {cause.step}", cause.passes)

    return drive


def reset(context: Context, models: tuple[str, ...], *, yes: bool) -> Exit:
    """Forget downloads and remove what there is of them, after asking."""
    from watcher.pull.manager import ModelDownloadManager, StoreFiles

    (world,) = context.worlds(keeps=True)[:1]
    manager = ModelDownloadManager(StoreFiles(world.store), policy=context.policy)
    for model in models:
        partials = manager.detect_partial_downloads(model)
        size = sum(each["partial_size"] for each in partials)
        if not yes and not _agreed(model, len(partials), size):
            return Exit.USAGE if not _somebody_there() else Exit.FINDINGS
        manager.reset_download(model)
        if not context.quiet:
            shown = names.printable(model)
            sys.stdout.write(f"{shown}: reset, {size} bytes of {len(partials)} layers removed\n")
    return Exit.HEALTHY


def _agreed(model: str, layers: int, size: int) -> bool:
    shown = names.printable(model)
    if not _somebody_there():
        complain("nothing was done: nobody to ask here; say --yes to do it")
        return False
    import click

    question = f"Remove {size} bytes of {layers} unfinished layers of {shown}?"
    return click.confirm(question, default=False)


def _somebody_there() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _site(context: Context, host: str | None) -> Site:
    """The server, and its store where that is here."""
    url = site.server_url(host, os.environ)
    try:
        (found,) = context.places()[:1]
    except (NoStoreError, NoPermissionError):
        if context.stores:
            raise
        return site.find(url, None, context.policy)
    return site.find(url, World(found.path, found.by), context.policy)


@contextmanager
def _cancelled_by_signals() -> Iterator[Callable[[], bool]]:
    """Says whether SIGINT or SIGTERM has come; a second one ends the process as usual."""
    asked = threading.Event()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, _: FrameType | None) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, stop)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

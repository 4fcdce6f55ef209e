"""``pull``, ``reset`` and what drives the queue: downloads through the server, to their end."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from rich.filesize import decimal

from watcher import names, ollama
from watcher.commands.context import Context, complain
from watcher.errors import Exit, NoPermissionError, NoStoreError
from watcher.pull import site
from watcher.pull.causes import Cause
from watcher.pull.driver import Options, Pull
from watcher.pull.sharing import Sharing
from watcher.pull.site import Site
from watcher.show import progress
from watcher.show.lines import count
from watcher.world import World

if TYPE_CHECKING:
    from watcher.pull.queue import Driven
    from watcher.pull.running import Drive, Why

_NOTHING_TO_RESET = frozenset({"idle", "completed", "reset"})
_ONE_STORE = "a download is of one"
_SHOW_CURSOR = b"\033[?25h\n"


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
        shown = progress.display(json=context.json, quiet=context.quiet, color=context.colored())
        with shown:
            _drive_all(pulls, shown, wanted.parallel)
    return max(_told(context, each, wanted) for each in pulls)


def _drive_all(pulls: list[Pull], shown: progress.Display, parallel: int) -> None:
    if parallel <= 1 or len(pulls) == 1:
        for each in pulls:
            _drive(each, shown)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(parallel) as pool:
        for done in [pool.submit(_drive, each, shown) for each in pulls]:
            done.result()


def _drive(one: Pull, shown: progress.Display) -> None:
    """Drive a pull and show it. Where that can't be shown any more, it is ended in order first."""
    failed: list[OSError] = []
    asked = one.cancelled
    one.cancelled = lambda: bool(failed) or asked()
    if one.name.tag.endswith("cloud"):
        complain(f"{names.printable(one.name.shown)} runs in the cloud: little of it comes here")
    for update in one.updates():
        try:
            if not failed:
                shown.show(one, update)
                sys.stdout.flush()
        except OSError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def _told(context: Context, one: Pull, wanted: Wanted) -> Exit:
    """Tell how a pull has ended, where it has not arrived."""
    cause = one.end.cause
    if cause is None:
        return Exit.HEALTHY
    shown = names.printable(one.name.shown)
    if cause is Cause.INTERRUPTED:
        again = " ".join(map(shlex.quote, _same_pull(context, wanted)))
        complain(f"{shown}: interrupted; to go on: {names.printable(again)} {shown}")
        return Exit.INTERRUPTED
    complain(f"ollama-watch: {shown} has not arrived: {one.end.text}\n  {cause.step}")
    return Exit.FAILED


def _same_pull(context: Context, wanted: Wanted) -> Iterator[str]:
    """The words of a command line for the same kind of pull, without its model."""
    yield "ollama-watch"
    for store in context.stores:
        yield from ("--store", store)
    yield "pull"
    if wanted.options.insecure:
        yield "--insecure"
    if wanted.options.until_done:
        yield "--until-done"
    if wanted.host:
        yield from ("--host", wanted.host)


def queued(context: Context, wanted: Wanted) -> Drive:
    """What drives an item of the queue."""
    return _driver(context, _site(context, wanted.host), lambda _: wanted.options, lambda: False)


def leashed(context: Context, world: World, ended: Callable[[], bool]) -> Drive:
    """The same for a daemon, until `ended` says that it is gone.

    Nobody is there to name a server: it is the one that has the store, unless the environment says
    otherwise. A registry on this machine is asked over http, as everywhere.
    """
    found = site.find(site.url_of_store(world, os.environ), world, context.policy)

    def options(model: str) -> Options:
        return Options(insecure=ollama.is_loopback(names.to_model(model).host))

    return _driver(context, found, options, ended)


def _driver(
    context: Context, found: Site, options: Callable[[str], Options], ended: Callable[[], bool]
) -> Drive:
    from watcher.pull.queue import Driven, Result

    def drive(model: str, why_stop: Why) -> Driven:
        with _cancelled_by_signals() as signalled:

            def asked() -> bool:
                return signalled() or ended()

            one = Pull(found, model, options(model), lambda: asked() or bool(why_stop()))
            color = context.colored()
            with progress.display(json=context.json, quiet=context.quiet, color=color) as shown:
                _drive(one, shown)
        # Not before signals have their usual meaning again: none is lost between the two.
        if asked():
            raise KeyboardInterrupt  # what was driven is put back, and the run ends
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
    from watcher.show import documents

    store = context.only_place(_ONE_STORE).path
    manager = ModelDownloadManager(StoreFiles(store), policy=context.policy)
    done: list[documents.Reset] = []
    try:
        for model in models:
            found = manager.detect_partial_downloads(model)
            before = manager.get_download_state(model)["status"]
            layers = [each["digest"] for each in found]
            size = sum(each["partial_size"] for each in found)
            shown = names.printable(model)
            if not found and before in _NOTHING_TO_RESET:
                done.append(documents.Reset(model, before, (), 0))
                _say(context, f"{shown}: nothing of a download is here")
                continue
            what = f"{decimal(size)} of {count(len(layers), 'unfinished layer')}"
            if not yes and not _agreed(f"Remove {what} of {shown}?"):
                return Exit.FINDINGS if _somebody_there() else Exit.USAGE
            after = manager.reset_download(model)["status"]
            done.append(documents.Reset(model, after, tuple(layers), size))
            _say(context, f"{shown}: forgotten; {what} removed")
    finally:
        if context.json:
            context.document(documents.reset(store, done))
    return Exit.HEALTHY


def _say(context: Context, text: str) -> None:
    if not (context.quiet or context.json):
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def _agreed(question: str) -> bool:
    if not _somebody_there():
        complain("nothing was done: nobody to ask here; say --yes to do it")
        return False
    import click

    return click.confirm(question, default=False, err=True)


def _somebody_there() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _site(context: Context, host: str | None) -> Site:
    """The server, and its store where that is here."""
    url = site.server_url(host, os.environ)
    try:
        found = context.only_place(_ONE_STORE)
    except (NoStoreError, NoPermissionError):
        if context.stores:
            if not os.path.isdir(context.stores[0]):
                raise
            # The server makes its folders with the first pull.
            return site.find(url, World(os.path.abspath(context.stores[0])), context.policy)
        return site.find(url, None, context.policy)
    return site.find(url, World(found.path, found.by), context.policy)


@contextmanager
def _cancelled_by_signals() -> Iterator[Callable[[], bool]]:
    """Says whether SIGINT or SIGTERM has come; a second one ends the process at once."""
    asked = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(_: int, __: FrameType | None) -> None:
        if asked.is_set():
            # Threads that mend are not waited for: whatever they leave the next run finishes.
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), _SHOW_CURSOR)
            os._exit(Exit.INTERRUPTED)
        asked.set()

    for number in before:
        signal.signal(number, stop)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""What `pull` and the queue share: the server that is meant, one pull driven and shown, signals."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from watcher.commands.context import Context, complain
from watcher.errors import Exit, NoPermissionError, NoStoreError
from watcher.observe import place
from watcher.ollama import environment, names
from watcher.pull import target
from watcher.pull.account import Options
from watcher.pull.driver import Pull
from watcher.pull.failures import Cause
from watcher.show import progress
from watcher.system import stopping

_SHOW_CURSOR = b"\033[?25h\n"


def pull_all(
    context: Context, models: Sequence[str], host: str | None, parallel: int, options: Options
) -> Exit:
    """Download models through the server; a Ctrl-C leaves what came resumable."""
    from concurrent.futures import ThreadPoolExecutor

    found = site_of(context, host)
    with cancelled_by_signals() as cancelled:
        pulls = [Pull(found, each, options, cancelled) for each in dict.fromkeys(models)]
        with display(context) as shown:
            if parallel == 1 or len(pulls) == 1:
                for each in pulls:
                    drive(each, shown)
            else:
                with ThreadPoolExecutor(parallel) as pool:
                    for done in [pool.submit(drive, each, shown) for each in pulls]:
                        done.result()
    return max(_report(context, each) for each in pulls)


def display(context: Context) -> progress.Display:
    if context.json:
        return progress.JsonLines()
    if context.quiet:
        return progress.Display()
    return progress.Blocks(color=context.colored()) if sys.stdout.isatty() else progress.Lines()


def drive(one: Pull, shown: progress.Display) -> None:
    """Drive a pull and show it. Where that can't be shown any more, it is ended in order first."""
    failed: list[OSError] = []
    asked = one.cancelled
    one.cancelled = lambda: bool(failed) or asked()
    if one.name.tag.endswith("cloud"):
        complain(f"{names.printable(one.name.shown)} runs in the cloud: little of it is downloaded")
    for update in one.updates():
        try:
            if not failed:
                shown.show(one, update)
                sys.stdout.flush()
        except OSError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def _report(context: Context, one: Pull) -> Exit:
    cause = one.end.cause
    if cause is None:
        return Exit.HEALTHY
    shown = names.printable(one.name.shown)
    if one.fault is not None and context.verbose:
        complain("".join(traceback.format_exception(one.fault)))
    if cause is Cause.INTERRUPTED:
        complain(f"{shown}: interrupted; to continue:\n  -> {one.command}")
        return Exit.INTERRUPTED
    helps = f"\n  -> {one.command}" if one.command else ""
    failed = f"download of {shown} failed"
    what = f"{shown} was not verified" if cause is Cause.UNVERIFIED else failed
    complain(f"ollama-watch: {what}: {one.end.text}\n  {one.step}{helps}")
    return Exit.USAGE if cause is Cause.NO_MODEL else Exit.FAILED


def site_of(context: Context, host: str | None) -> target.Target:
    """The server, and its store where that is here."""
    found = None
    try:
        found = context.only_place("a download is of one")
    except (NoStoreError, NoPermissionError) as error:
        by, named = "--store", next(iter(context.stores), "")
        if not named and isinstance(error, NoStoreError):
            by, named = "OLLAMA_MODELS", environment.trimmed(os.environ.get("OLLAMA_MODELS", ""))
        if os.path.isdir(named):
            # Its folders are made with the first pull.
            found = place.Found(os.path.abspath(named), by)
            context.settle(found.path)
        elif context.stores:
            raise
        else:
            context.settle()
    of_store = None if found is None else context.host(found)
    if host is None and of_store is not None:
        return target.of_store(of_store, context.settings, os.environ)
    return target.find(target.server_url(host, os.environ), of_store, context.settings)


@contextmanager
def cancelled_by_signals() -> Iterator[Callable[[], bool]]:
    """Says whether SIGINT or SIGTERM has come; a second one ends the process at once."""
    asked = threading.Event()

    def stop(_: int, __: FrameType | None) -> None:
        if asked.is_set():
            # Threads that mend are not waited for: whatever they leave the next run finishes.
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), _SHOW_CURSOR)
            os._exit(Exit.INTERRUPTED)
        asked.set()
        stopping.ask()

    try:
        with stopping.handling({signal.SIGINT: stop, signal.SIGTERM: stop}):
            yield asked.is_set
    finally:
        stopping.withdraw()

"""``daemon``: the service in the foreground, as systemd wants it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from watcher import config
from watcher.commands import declare
from watcher.commands.context import Context, complain
from watcher.config import Settings
from watcher.errors import Exit, WatchError, named

if TYPE_CHECKING:
    from watcher.state.event_log import Event


@declare.command(
    examples=["daemon", "daemon --store /srv/models --json"],
    read_on="docs/service.md: systemd, cron, containers; docs/metrics.md",
)
def daemon(context: Context) -> Exit:
    """Watch the store, log events, repair downloads as they break.

    One store, until SIGTERM or Ctrl-C. A store that is named need not exist yet.
    """
    from dataclasses import replace

    from watcher.observe import place
    from watcher.service import daemon as service
    from watcher.system import privileges

    why = "each needs a daemon of its own"
    given = context.only_store(why)
    path = None if given is None else os.path.abspath(given)
    if path is None or (os.path.lexists(path) and not os.path.isdir(path)):
        found = context.only_place(why)
    else:
        context.settle(path)
        found = place.Found(path, "--store")
    host = replace(context.host(found), tell=_teller(context))
    first = [context.settings]  # as root has read them, before it became the owner

    def settings() -> Settings:
        return first.pop() if first else config.load(context.config_file, os.environ)

    file = config.SYSTEM_FILE if context.config_file is None else context.config_file
    readable = os.access(file, os.R_OK) or not os.path.lexists(file)
    if readable and privileges.can_start_anew():
        given_file = [] if context.config_file is None else ["--config", os.path.abspath(file)]
        isolated = ["-I"] if sys.flags.isolated else []
        words = ["--store", found.path, "-q", "queue", "run", "--leashed"]
        runner = [sys.executable, *isolated, "-m", "watcher", *given_file, *words]
        service.run(host, settings, runner)
        return Exit.HEALTHY
    # The user whom root has become can't start us again, or not with the same settings.
    from watcher.pull.queue_process import Starter  # not needed by all, and takes memory

    with contextlib.closing(Starter(lambda: _run_queue(context, found.path))) as starter:
        service.run(host, settings, starter)
    return Exit.HEALTHY


def _run_queue(context: Context, store: str) -> int:
    """Run the queue for a daemon, in a process that was forked."""
    from dataclasses import replace

    from watcher.commands import queueing

    own = replace(context, stores=(store,), stores_by="--store", quiet=True, json=False)
    try:
        return queueing.run_leashed(own)
    except WatchError as error:
        complain(f"ollama-watch: {error}")
        return error.exit_code
    except Exception as error:
        complain(f"ollama-watch: {named(error) or f'{type(error).__name__}: {error}'}")
        return Exit.FAILED


def _teller(context: Context) -> Callable[[Event], None]:
    """Where events go besides the logs: stdout as JSON, the journal as JSON, or a terminal."""
    if context.json or "JOURNAL_STREAM" in os.environ:
        fd = (sys.stdout if context.json else sys.stderr).fileno()

        def write(event: Event) -> None:
            os.write(fd, event.line)

        return write
    from watcher.show import log

    text = log.teller(color=sys.stderr.isatty())

    def tell(event: Event) -> None:
        complain(text(event).removesuffix("\n"))

    return tell

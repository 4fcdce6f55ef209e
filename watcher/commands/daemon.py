"""``daemon``: the service in the foreground, as systemd wants it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace

from watcher import daemon
from watcher.commands.context import Context
from watcher.errors import Exit
from watcher.events import Event
from watcher.observe import place


def run(context: Context) -> Exit:
    """Watch one store until SIGTERM or SIGINT. A store that is named need not be there yet."""
    named = context.only_store("each takes a daemon of its own")
    path = None if named is None else os.path.abspath(named)
    if path is None or (os.path.lexists(path) and not os.path.isdir(path)):
        found = context.only_place("each takes a daemon of its own")
    else:
        context.settle(path)
        found = place.Found(path, "--store")
    world = replace(context.world(found), tell=_teller(context))
    daemon.run(world, context.read_policy, _queue_run(context, found.path))
    return Exit.HEALTHY


def _queue_run(context: Context, store: str) -> list[str]:
    """The command line of who runs the queue for this daemon."""
    file = context.config_file
    config = [] if file is None else ["--config", os.path.abspath(file)]
    words = [*config, "--store", store, "-q", "queue", "run", "--leashed"]
    isolated = ["-I"] if sys.flags.isolated else []
    return [sys.executable, *isolated, "-m", "watcher", *words]


def _teller(context: Context) -> Callable[[Event], None]:
    """Where events go besides the logs: stdout as JSON, the journal as JSON, or a terminal."""
    if context.json:
        return _writer(sys.stdout.fileno())
    if "JOURNAL_STREAM" in os.environ:
        return _writer(sys.stderr.fileno())
    return _tell_people()


def _writer(fd: int) -> Callable[[Event], None]:
    def write(event: Event) -> None:
        os.write(fd, event.line)

    return write


def _tell_people() -> Callable[[Event], None]:
    from watcher import history
    from watcher.show import happened

    told = happened.teller(color=sys.stderr.isatty())

    def tell(event: Event) -> None:
        line = history.parse(event.line)
        if line is not None:
            sys.stderr.write(told(line))
            sys.stderr.flush()

    return tell

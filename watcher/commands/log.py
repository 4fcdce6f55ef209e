"""``log``: the event log; a daemon need not run."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from watcher import config
from watcher.commands import complete, declare
from watcher.commands.context import Context, complain
from watcher.errors import Exit, SettingsError
from watcher.ollama import names

if TYPE_CHECKING:
    from watcher.model import Known
    from watcher.observe.targets import Targets
    from watcher.state.event_log import Event

#: How often a followed log is looked at, and so much of its past is shown.
_POLL_SECONDS = 0.5
_TAIL = 10


@declare.command(
    examples=["log", "log llama3 --since 2h", "log --type download_interrupted -n 20"],
    read_on="docs/reference/events.md: every type of event",
)
@click.argument("target", required=False, metavar="[MODEL|DIGEST]", shell_complete=complete.targets)
@click.option(
    "--since",
    type=declare.Read("moment", lambda text: config.moment(text, time.time())),
    metavar="WHEN",
    help="Only events since then, such as 2h or 2026-11-24.",
)
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="TYPE",
    shell_complete=complete.event_types,
    help="Only events of this type (repeatable).",
)
@click.option("-f", "--follow", is_flag=True, help="Also follow new events until Ctrl-C.")
@click.option(
    "-n", "--lines", type=click.IntRange(min=0), metavar="N", help="Only the last N events."
)
def log(context: Context, target: str | None, follow: bool, lines: int | None, **only: Any) -> Exit:
    """Show the event log.

    Works without a daemon. With --json, prints the lines as they are stored.
    """
    from watcher.observe import place, targets

    stores = [found.path for found in context.places(knows=None if target is None else _known)]
    if follow and len(stores) > 1:
        raise SettingsError(f"{len(stores)} stores are named", "follow one at a time")
    about = None
    if target is not None:
        about = targets.among([*map(_known, stores), *context.elsewhere], [target])
    most = _TAIL if follow and lines is None and only["since"] is None else lines
    for store in stores:
        events = _Events(context, store, about, **only)
        try:
            wanted = events.wanted(to_the_end=not follow)
            found = wanted if most is None else deque(wanted, maxlen=most)
            if follow or context.json or context.quiet or most == 0:
                events.show(found)
            else:
                events.sum_up(found, f" of {target}" if target else "")
            known = ", ".join(names.printable(each) for each in sorted(events.types))
            for kind in sorted({*only["types"]} - events.types if events.types else ()):
                complain(f"the log has no event of type {names.printable(kind)}, only of {known}")
            while follow:
                time.sleep(_POLL_SECONDS)
                events.show(events.wanted())
        except PermissionError:
            raise place.no_permission(store) from None
        except KeyboardInterrupt:
            if not follow:
                raise
            return Exit.INTERRUPTED
    return Exit.HEALTHY


def _known(store: str) -> Known:
    """What a store and its log know. Raises NoPermissionError."""
    from watcher.model import Known
    from watcher.observe import place, targets
    from watcher.state.event_log import Log

    there = targets.known(store)
    models, digests = {shown: set(its) for shown, its in there.models.items()}, set(there.digests)
    try:
        for line in Log(store).read():
            about = line.digests
            digests |= about
            for shown in line.models:
                models.setdefault(shown, set()).update(about)
    except PermissionError:
        raise place.no_permission(store) from None
    digests_of = {shown: frozenset(its) for shown, its in models.items()}
    return Known(digests_of, frozenset(digests), there.unseen)


class _Events:
    """Those lines of a store's log that are wanted, on their way to stdout."""

    def __init__(self, context: Context, store: str, target: Targets | None, **only: Any) -> None:
        from watcher.show import log as shown
        from watcher.state.event_log import Log

        self._context, self._json = context, context.json
        self._text = shown.printer(color=context.colored())
        self._log, self._damaged = Log(store), 0
        self._since = -math.inf if only["since"] is None else only["since"]
        self._types = only["types"]
        self._target = target
        #: While a log is read, what belongs to a model is learned.
        self._digests = set() if target is None else set(target.digests)
        self.types: set[str] = set()  #: those that the log has at all

    def wanted(self, *, to_the_end: bool = False) -> Iterator[Event]:
        for line in self._log.read(to_the_end=to_the_end):
            self.types.add(line.event_type)
            is_of_type = not self._types or line.event_type in self._types
            if line.at >= self._since and is_of_type and self._is_about(line):
                yield line

    def _is_about(self, line: Event) -> bool:
        if self._target is None:
            return True
        if not self._target.models.isdisjoint(map(str.lower, line.models)):
            self._digests |= line.digests
            return True
        return not self._digests.isdisjoint(line.digests)

    def show(self, lines: Iterable[Event]) -> None:
        for line in lines:
            if self._json:
                sys.stdout.buffer.write(line.line)
            else:
                sys.stdout.write(self._text(line))
        self._end()

    def sum_up(self, lines: Iterable[Event], of: str) -> None:
        from watcher.show import log as shown

        first = last = None
        texts: list[str] = []
        for line in lines:
            first, last = first or line, line
            texts.append(self._text(line))
        span = None if first is None or last is None else (first.at, last.at)
        self._context.show([shown.verdict(len(texts), of, span)])
        sys.stdout.writelines(texts)
        self._end()

    def _end(self) -> None:
        sys.stdout.flush()
        damaged, self._damaged = self._log.damaged - self._damaged, self._log.damaged
        if damaged > 0:
            complain(f"skipped {damaged} damaged line{'' if damaged == 1 else 's'} of the log")

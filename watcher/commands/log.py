"""``log``: the event log; a daemon need not run."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from watcher.commands import complete, declare
from watcher.errors import Exit, SettingsError

if TYPE_CHECKING:
    from watcher.commands.context import Context
    from watcher.model import Known
    from watcher.observe.targets import Targets
    from watcher.state.history import Line, Log

#: How often a followed log is looked at, and so much of its past is shown.
_POLL_SECONDS = 0.5
_TAIL = 10


def _moment(value: Any) -> float:
    from watcher import config

    return config.moment(str(value), time.time())


class LogOptions(NamedTuple):
    """Which events are asked for."""

    #: A model, or a digest's beginning; None: all.
    target: str | None
    #: Seconds since the epoch.
    since: float | None
    #: Event types; empty: all.
    types: Collection[str]
    #: So many, the last ones; None: all.
    lines: int | None


@declare.command(
    examples=["log", "log llama3 --since 2h", "log --type download_interrupted -n 20"],
    read_on="docs/reference/events.md: every type of event",
)
@click.argument("target", required=False, metavar="[MODEL|DIGEST]", shell_complete=complete.targets)
@click.option(
    "--since",
    type=declare.Read("moment", _moment),
    metavar="WHEN",
    help="From this time on (2h, or 2026-11-24).",
)
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="TYPE",
    shell_complete=complete.event_types,
    help="Only this event type (repeatable).",
)
@click.option("-f", "--follow", is_flag=True, help="Also follow new events until Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(min=0), metavar="N", help="Only the last N.")
def log(
    context: Context,
    target: str | None,
    since: float | None,
    types: tuple[str, ...],
    follow: bool,
    lines: int | None,
) -> Exit:
    """Show the event log.

    No daemon needs to run. With --json it prints the lines as they are.
    """
    from watcher.observe import place

    wanted = LogOptions(target, since, types, lines)
    knows = None if target is None else _known
    stores = [found.path for found in context.places(knows=knows)]
    if follow and len(stores) > 1:
        raise SettingsError(f"{len(stores)} stores are named", "follow one at a time")
    about = None if target is None else _target(stores, target, context.elsewhere)
    for store in stores:
        try:
            _tell(context, store, wanted, about, follow=follow)
        except PermissionError:
            raise place.no_permission(store) from None
        except KeyboardInterrupt:
            if not follow:
                raise
            return Exit.INTERRUPTED
    return Exit.HEALTHY


def _target(stores: Iterable[str], text: str, elsewhere: Iterable[Known]) -> Targets:
    """What is meant, as stores and logs know it. Raises TargetError with the nearest names."""
    from watcher.observe import targets

    return targets.among([*map(_known, stores), *elsewhere], [text])


def _known(store: str) -> Known:
    """What a store and its log know. Raises NoPermissionError."""
    from watcher.model import Known
    from watcher.observe import place, targets
    from watcher.state.history import Log, known

    there = targets.known(store)
    try:
        logged = known(Log(store).read())
    except PermissionError:
        raise place.no_permission(store) from None
    models = {
        model: there.models.get(model, frozenset()) | logged.models.get(model, frozenset())
        for model in {*there.models, *logged.models}
    }
    return Known(models, there.digests | logged.digests, there.unseen)


def _tell(
    context: Context, store: str, wanted: LogOptions, target: Targets | None, *, follow: bool
) -> None:
    from watcher.commands.context import complain
    from watcher.ollama import names
    from watcher.state.history import Log

    choose = _Choice(wanted, target)
    source = Log(store)
    write = _writer(context)
    lines: Iterable[Line] = choose(source.read(to_the_end=not follow))
    most = _TAIL if follow and wanted.lines is None and wanted.since is None else wanted.lines
    count = write(lines if most is None else deque(lines, maxlen=most))
    told = _tell_damaged(source, 0)
    if not (count or follow or context.quiet or wanted.lines == 0):
        complain("the log has no such event" if choose.types else "the log is empty")
    unknown = sorted(set(wanted.types) - choose.types) if choose.types else []
    for kind in unknown:
        known = _listed(choose.types)
        complain(f"there is no event of type {names.printable(kind)}; known types: {known}")
    while follow:
        time.sleep(_POLL_SECONDS)
        write(choose(source.read()))
        told = _tell_damaged(source, told)


class _Choice:
    """Chooses the lines that are wanted; keeps in mind which types there are at all."""

    def __init__(self, wanted: LogOptions, target: Targets | None) -> None:
        self._wanted = wanted
        self._models = None if target is None else target.models
        #: While a log is read, what belongs to a model is learned.
        self._digests = set() if target is None else set(target.digests)
        self.types: set[str] = set()

    def __call__(self, lines: Iterable[Line]) -> Iterator[Line]:
        wanted = self._wanted
        for line in lines:
            self.types.add(line.event_type)
            if (
                (wanted.since is None or line.at >= wanted.since)
                and (not wanted.types or line.event_type in wanted.types)
                and self._is_about(line)
            ):
                yield line

    def _is_about(self, line: Line) -> bool:
        if self._models is None:
            return True
        digests = line.digests
        if not self._models.isdisjoint(map(str.lower, line.models)):
            self._digests |= digests
            return True
        return not self._digests.isdisjoint(digests)


def _listed(types: Iterable[str]) -> str:
    from watcher.ollama import names

    return ", ".join(names.printable(each) for each in sorted(types))


def _writer(context: Context) -> Callable[[Iterable[Line]], int]:
    from watcher.show import log as happened

    text = happened.teller(color=context.colored())

    def write(lines: Iterable[Line]) -> int:
        count = 0
        for count, line in enumerate(lines, 1):  # noqa: B007
            if context.json:
                sys.stdout.buffer.write(line.raw)
            else:
                sys.stdout.write(text(line))
        sys.stdout.flush()
        return count

    return write


def _tell_damaged(source: Log, told: int) -> int:
    """Tell how many lines could not be read, where there are more than were told; their number."""
    from watcher.commands.context import complain

    if source.damaged > told:
        count = source.damaged - told
        complain(f"skipped {count} damaged line{'' if count == 1 else 's'} of the log")
    return source.damaged

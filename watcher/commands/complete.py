"""What a shell completes: models, digests, labels and types of events, as the store has them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from watcher.commands.context import Context
from watcher.errors import WatchError
from watcher.ollama import names

if TYPE_CHECKING:
    from watcher.model import Known

Completes = Callable[[click.Context, click.Parameter, str], list[str]]


def _known(at: click.Context, look: Callable[[str], Known]) -> list[Known]:
    """What the stores know that the command line means so far; nothing where that fails."""
    context = at.ensure_object(Context)
    context.own = True
    try:
        context.begin()
        context.load()
        return context.known(look)
    except (WatchError, OSError, click.UsageError):
        return []


def _matching(start: str, found: Iterable[str]) -> list[str]:
    return sorted({each for each in found if each.lower().startswith(start.lower())})


def _names(look: Callable[[str], Known]) -> Completes:
    def complete(at: click.Context, _: click.Parameter, start: str) -> list[str]:
        return _matching(start, (model for each in _known(at, look) for model in each.models))

    return complete


def _in_store(store: str) -> Known:
    from watcher.observe import targets

    return targets.known(store)


def _in_queue(path: str) -> Known:
    from watcher.model import Known
    from watcher.pull import queue
    from watcher.state import folders

    with folders.opened_store(path) as store:
        line = queue.FILE.read(store).line
    return Known({item.model: frozenset() for item in line}, frozenset())


def kept(path: str) -> Known:
    """The labels of a store's quarantine, in place of models."""
    from watcher.model import Known
    from watcher.observe import blobs
    from watcher.state import folders, memory

    with folders.opened_store(path) as store:
        kept, _ = blobs.look_at_quarantine(store, memory.load(store))
    return Known({each.label: frozenset() for each in kept}, frozenset())


models, queued, labels = _names(_in_store), _names(_in_queue), _names(kept)


def targets(at: click.Context, parameter: click.Parameter, start: str) -> list[str]:
    """Models, and digests once one is begun."""
    found = models(at, parameter, start)
    if start:
        digests = {digest for each in _known(at, _in_store) for digest in each.digests}
        found += _matching(start, map(names.short, digests))
    return found


def event_types(_: click.Context, __: click.Parameter, start: str) -> list[str]:
    from watcher.state.event_log import EventType

    return _matching(start, map(str, EventType))


several = functools.partial(click.argument, nargs=-1)
#: Arguments of several commands.
MODELS = several("models", required=True, metavar="MODEL...", shell_complete=models)
TARGETS = several("targets", metavar="[MODEL|DIGEST]...", shell_complete=targets)

"""What a shell completes: models, digests, labels and types of events, as the store has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from watcher.commands.declare import Given
from watcher.errors import WatchError
from watcher.ollama import names

if TYPE_CHECKING:
    from watcher.model import Known


def models(at: click.Context, _: click.Parameter, start: str) -> list[str]:
    """Models of the store, downloads included."""
    return _matching(start, _found(at, _in_store)[0])


def targets(at: click.Context, _: click.Parameter, start: str) -> list[str]:
    """Models, and digests once one is begun."""
    models, digests = _found(at, _in_store)
    begun = _matching(start, map(names.short, digests)) if start else []
    return [*_matching(start, models), *begun]


def queued(at: click.Context, _: click.Parameter, start: str) -> list[str]:
    """Models of the queue."""
    return _matching(start, _found(at, _in_queue)[0])


def labels(at: click.Context, _: click.Parameter, start: str) -> list[str]:
    """Labels of the quarantine."""
    return _matching(start, _found(at, kept)[1])


def event_types(_: click.Context, __: click.Parameter, start: str) -> list[str]:
    """Types of events."""
    from watcher.state.event_log import EventType

    return _matching(start, map(str, EventType))


def _matching(start: str, found: Iterable[str]) -> list[str]:
    return sorted({each for each in found if each.lower().startswith(start.lower())})


def _found(at: click.Context, look: Callable[[str], Known]) -> tuple[set[str], set[str]]:
    """Models and digests of the stores that the command line means so far.

    Nothing where that fails.
    """
    given = at.ensure_object(Given)
    given.own = True
    try:
        given.begin()
        known = given.context().known(look)
    except (WatchError, OSError, click.UsageError):
        known = []
    models = {model for each in known for model in each.models}
    return models, {digest for each in known for digest in each.digests}


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
    """The labels of a store's quarantine, in place of digests."""
    from watcher.model import Known
    from watcher.observe import blobs
    from watcher.state import folders, memory

    with folders.opened_store(path) as store:
        kept = blobs.look_at_quarantine(store, memory.load(store)).kept
    return Known({}, frozenset(each.label for each in kept))

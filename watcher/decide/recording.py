"""What events say of the records of models whose downloads others drive. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from itertools import chain

from watcher.state.download_states import State
from watcher.state.event_log import Event
from watcher.state.memory import Memory

_BEGUN = frozenset({"download_started", "download_resumed"})
_BROKEN = frozenset({"download_interrupted", "partial_found"})
_GONE = frozenset({"model_removed", "partial_removed", "partial_cleaned"})


_NOT_RIGHT = "its manifest is written, but not all of its blobs are right"


def recording(
    told: Iterable[Event], memory: Memory, damaged: Set[str] = frozenset()
) -> Iterator[tuple[str, State, str]]:
    """For each model the state that its record goes to, in order, and why it is ``error``.

    `memory`: as it is after all of these events. `damaged`: the models of which a blob is known
    not to be right.
    """
    unfinished = set(chain.from_iterable(each.models for each in memory.downloads.values()))
    complete = (memory.models or {}).keys() - damaged
    for event in told:
        named = event.details.get("models")
        for model in named if isinstance(named, list | tuple) else ():
            if event.event_type in _BEGUN:
                yield model, State.DOWNLOADING, ""
            elif event.event_type in _BROKEN:
                why = f"{event.details['condition']}: {event.details['because']}"
                yield model, State.ERROR, why
            elif event.event_type == "manifest_written":
                right = model not in damaged
                yield (model, State.COMPLETED, "") if right else (model, State.ERROR, _NOT_RIGHT)
            elif event.event_type in _GONE and model not in unfinished:
                yield model, State.COMPLETED if model in complete else State.IDLE, ""

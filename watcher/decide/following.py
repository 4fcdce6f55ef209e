"""The records of models' downloads: what follows for them from events and from the store. Pure."""

from collections.abc import Iterable, Iterator, Set
from itertools import chain
from typing import NamedTuple

from watcher.decide import conditions
from watcher.model import Condition, Diagnosed
from watcher.ollama import names
from watcher.state.event_log import Event, EventType
from watcher.state.memory import Memory
from watcher.state.records import Record, Records, Seen, State

_DAMAGED = "its manifest is written, but some of its blobs are damaged"
_NOTHING_LEFT = "nothing unfinished of it is left, and it is not complete"


#: How a reason begins that a scan gave, and not the process that drove the download.
_OF_SCANS = (*(row.words for row in conditions.TABLE), _DAMAGED, _NOTHING_LEFT)


def from_events(logged: Iterable[Event], memory: Memory, damaged: Set[str]) -> Iterator[Seen]:
    """For each model the state that its record goes to, in order, and why it is ``error``."""
    unfinished = set(chain.from_iterable(each.models for each in memory.downloads.values()))
    complete = (memory.models or {}).keys() - damaged
    for event, name in ((each, name) for each in logged for name in sorted(each.models)):
        match event.event_type:
            case EventType.DOWNLOAD_STARTED | EventType.DOWNLOAD_RESUMED:
                yield name, State.DOWNLOADING, ""
            case EventType.DOWNLOAD_INTERRUPTED | EventType.PARTIAL_FOUND:
                assert isinstance(event.about, Diagnosed)
                yield name, State.ERROR, conditions.why(event.about)
            case EventType.MANIFEST_WRITTEN if name in damaged:
                yield name, State.ERROR, _DAMAGED
            case EventType.MANIFEST_WRITTEN:
                yield name, State.COMPLETED, ""
            case (
                EventType.MODEL_REMOVED | EventType.PARTIAL_REMOVED | EventType.PARTIAL_CLEANED
            ) if name not in unfinished:
                yield name, State.COMPLETED if name in complete else State.IDLE, ""


class Standing(NamedTuple):
    """What a store has of models, by their names."""

    #: Of each unfinished download its models and its condition.
    unfinished: tuple[tuple[tuple[str, ...], Condition], ...]
    #: The models with a manifest; None where not all of the store was seen.
    written: Set[str] | None
    damaged: Set[str]  #: those with a damaged blob


def restated(known: Records, standing: Standing) -> Iterator[Seen]:
    """The records whose reason was given by a scan and is no longer so, as they are now.

    Whatever the store was changed by: a repair, a cleaning, somebody's hands, another pull. What a
    driver of ours reported stays: it is how its try ended.
    """
    conditions_of: dict[str, set[Condition]] = {}
    for models, condition in standing.unfinished:
        for name in models:
            conditions_of.setdefault(names.to_model(name).key, set()).add(condition)
    damaged = {names.to_model(name).key for name in standing.damaged}
    complete = {names.to_model(name).key for name in standing.written or ()} - damaged
    for key, record in known.items():
        now = None
        if key in conditions_of:
            now = _unfinished(record, conditions_of[key])
        elif standing.written is not None:
            is_known = all(models for models, _ in standing.unfinished)
            now = _ended(record, key in damaged, key in complete, is_known=is_known)
        if now is not None and now != (record.state, record.error):
            yield key, *now


def _unfinished(record: Record, of_it: Set[Condition]) -> tuple[State, str] | None:
    if not _is_by_scan(record) or Condition.LIVE in of_it:
        return None
    words = conditions.row(max(of_it, key=conditions.badness)).words
    # The rest of the sentence says why; that need not be told anew.
    return None if record.error.startswith(words) else (State.ERROR, words)


def _ended(
    record: Record, damaged: bool, complete: bool, *, is_known: bool
) -> tuple[State, str] | None:
    if damaged:
        of_scan = record.state is State.COMPLETED or _is_by_scan(record)
        return (State.ERROR, _DAMAGED) if of_scan else None
    if not _is_by_scan(record):
        return None
    if complete:
        return State.COMPLETED, ""
    # One of a model that is not known may be its.
    return (State.ERROR, _NOTHING_LEFT) if is_known else None


def _is_by_scan(record: Record) -> bool:
    return record.state is State.ERROR and record.error.startswith(_OF_SCANS)

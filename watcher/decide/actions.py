"""The kinds of actions, one row each, in the order in which a plan does them. Pure."""

import functools
from typing import NamedTuple

from watcher.model import Action, ActionKind, Planned, Refusal
from watcher.ollama import names
from watcher.state.event_log import EventType


class Row(NamedTuple):
    kind: ActionKind
    does: str  #: what it does, with the name of its subject
    event: EventType | None = None  #: the event once it is done; None where it has none of its own
    command: str = "repair"  #: the command that does it
    of_download: bool = False  #: its subject is a digest whose download it changes


_repairs = functools.partial(Row, event=EventType.DOWNLOAD_REPAIRED, of_download=True)
_cleans = functools.partial(Row, event=EventType.PARTIAL_CLEANED, of_download=True)
#: First what finds out, then what repairs, then what frees; times last, since they cover new
#: progress files, too.
TABLE = (
    Row(ActionKind.ASK_REGISTRY, "ask the registry about {}"),
    Row(ActionKind.HASH, "hash {}"),
    Row(ActionKind.PROVE, "compare {} with the sums of its chunks", command="repair --prove"),
    _repairs(ActionKind.WRITE_SIDECARS, "repair the download of {}"),
    _repairs(
        ActionKind.GIVE_BACK,
        "give the download of {} back to the server",
        command="repair --give-back",
    ),
    _repairs(ActionKind.TAKE_OVER, "take over the server's download of {}", command="pull"),
    _repairs(
        ActionKind.FETCH_CHUNKS,
        "fetch what is wrong of the blob of {}",
        command="repair --fetch",
        of_download=False,
    ),
    Row(
        ActionKind.QUARANTINE_BLOB,
        "move the damaged blob of {} to quarantine",
        EventType.QUARANTINED,
    ),
    Row(ActionKind.RESTORE, "restore {} from quarantine", EventType.RESTORED, "quarantine restore"),
    Row(ActionKind.PURGE, "remove {} from quarantine", EventType.PURGED, "quarantine purge"),
    _cleans(ActionKind.REMOVE_SURPLUS, "remove redundant progress files of {}"),
    _cleans(ActionKind.REMOVE_DOWNLOAD, "remove the download of {}"),
    _cleans(ActionKind.REMOVE_TRANSFER, "remove ollama-watch's download of {}", command="clean"),
    Row(ActionKind.REMOVE_ORPHAN, "remove the orphaned blob {}", EventType.ORPHAN_REMOVED, "clean"),
    Row(
        ActionKind.REMOVE_TEMPORARY,
        "remove the temporary file {}",
        EventType.TEMPORARY_REMOVED,
        "clean",
    ),
    Row(ActionKind.REFRESH, "protect {} from pruning", EventType.REFRESHED),
)
_ROWS = {row.kind: row for row in TABLE}
ORDER = {row.kind: at for at, row in enumerate(TABLE)}
#: Those on a file that people know by its name.
_OF_FILES = frozenset(
    {ActionKind.REMOVE_ORPHAN, ActionKind.REMOVE_TEMPORARY, ActionKind.RESTORE, ActionKind.PURGE}
)


def row(kind: ActionKind) -> Row:
    return _ROWS[kind]


def subject(item: Planned) -> str:
    """What people know the subject of an action or a refusal by."""
    kind = item.kind if isinstance(item, Action) else item.action
    if kind in _OF_FILES:
        return item.subject
    return names.known_as(item.models, item.subject.removeprefix("sha256-"))


def does(item: Planned, subject: str) -> str:
    """What is done, or refused; the subject of a refusal about many files is their number."""
    kind = item.kind if isinstance(item, Action) else item.action
    if isinstance(item, Refusal) and item.entries and item.subject not in item.entries:
        return f"remove {subject}"
    return row(kind).does.format(subject)

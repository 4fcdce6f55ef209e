"""``models.json``: of each model the record of its download, from one process to the next.

A change is checked as a whole before anything is written: its keys, its values, and whether its
state may follow the one before. Within one download the progress never falls. A download begins
when a try follows a state other than ``error``: after an error the same one goes on.

The ways between states are those of the server's own statuses (`docs/store.md`, What a client
receives), and those that are inferred of downloads that others drive.
"""

import contextlib
import enum
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Self, TypeAlias

import orjson

from watcher.errors import RecordError
from watcher.ollama import names
from watcher.state import checks, fs, json_file, state_folder
from watcher.state.checks import kept, optional

SCHEMA = "ollama-watch/models/1"
NAME = "models.json"
DRIVEN = "driven"  #: locks of those who drive a download, one for each model


class State(enum.StrEnum):
    """Where a model's download is; `stage` are the words for people."""

    stage: str

    IDLE = "idle", "Not started"
    STARTING = "starting", "Waiting for manifest..."
    PULLING_MANIFEST = "pulling_manifest", "Pulling manifest from Ollama registry..."
    DOWNLOADING = "downloading", "Downloading model layers..."
    WRITING_MANIFEST = "writing_manifest", "Writing model manifest..."
    VERIFYING = "verifying", "Verifying download integrity..."
    COMPLETED = "completed", "Download complete"
    ERROR = "error", "Download interrupted"
    RESET = "reset", "Download reset"

    def __new__(cls, value: str, stage: str = "") -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.stage = stage
        return member

    @property
    def active(self) -> bool:
        return self in ACTIVE


#: How each active state goes on when all goes well, as the server's statuses show it.
_ONWARD = {
    State.STARTING: {State.PULLING_MANIFEST},
    # Straight to the check where nothing is missing, or where a download was too short to be seen;
    # straight to the manifest on the transfer path, which hashes layers as they arrive.
    State.PULLING_MANIFEST: {State.DOWNLOADING, State.VERIFYING, State.WRITING_MANIFEST},
    State.DOWNLOADING: {State.VERIFYING, State.WRITING_MANIFEST},
    State.VERIFYING: {State.WRITING_MANIFEST},
    State.WRITING_MANIFEST: set[State](),
}
ACTIVE = frozenset(_ONWARD)
#: Where every active state may go besides: the request is made again; the pull failed, or somebody
#: else's was interrupted; or the model is complete, since a server finishes alone what it has.
_FROM_ACTIVE = {State.STARTING, State.ERROR, State.COMPLETED}
#: Where every other state may go: a try begins, or somebody else's is seen; it can't even begin, or
#: nobody drives a download that is found; a reset; nothing of it is left in the store.
_FROM_RESTING = set(State) - {State.VERIFYING, State.WRITING_MANIFEST, State.COMPLETED}
#: From each state to those that may follow it. To stay is always possible.
WAYS: dict[State, frozenset[State]] = {
    **{state: frozenset(_FROM_ACTIVE | onward) - {state} for state, onward in _ONWARD.items()},
    **{state: frozenset(_FROM_RESTING) - {state} for state in State if state not in ACTIVE},
    # An interrupted download of somebody else's may have gone on and ended between two scans.
    State.ERROR: frozenset(_FROM_RESTING | {State.COMPLETED}) - {State.ERROR},
}

_OF_STATUS = (
    (re.compile("pulling manifest"), State.PULLING_MANIFEST),
    # The second and the third are those of the transfer path.
    (re.compile("pulling [0-9a-f]{12}|pulling model|sha256:.*"), State.DOWNLOADING),
    (re.compile("verifying sha256 digest"), State.VERIFYING),
    (re.compile("writing manifest|removing unused layers"), State.WRITING_MANIFEST),
    (re.compile("success"), State.COMPLETED),
)


def may_follow(before: State, after: State) -> bool:
    return before is after or after in WAYS[before]


def way(before: State, after: State) -> tuple[State, ...]:
    """The states to go through to one that was seen: a try, or its end, may lie in between."""
    if before is after:
        return ()
    if after in WAYS[before]:
        return (after,)
    return (State.ERROR if before.active else State.STARTING, after)


def of_status(status: str) -> State | None:
    """The state that a status of the server's stream shows; None for one that is not known."""
    return next((state for shape, state in _OF_STATUS if shape.fullmatch(status)), None)


def _state(value: object) -> State:
    try:
        return State(value)  # type: ignore[arg-type]
    except ValueError:
        raise ValueError(f"expected one of {', '.join(State)}") from None


def _text(value: object) -> str:
    return names.sayable(checks.text(value, 1 << 24))


@dataclass(frozen=True, slots=True)
class Record:
    """The download of one model; `docs/library.md` explains the fields."""

    state: State = kept(_state, default=State.IDLE)
    total_bytes: int | None = kept(optional(checks.whole), default=None)
    downloaded_bytes: int = kept(checks.whole, default=0)
    present_bytes: int = kept(checks.whole, default=0)
    progress_percent: float = kept(partial(checks.number, most=100.0), default=0.0)
    bytes_per_second: float | None = kept(optional(checks.number), default=None)
    lost_bytes: int = kept(checks.whole, later=True, default=0)
    resets: int = kept(checks.whole, later=True, default=0)
    stalls: int = kept(checks.whole, later=True, default=0)
    error: str = kept(_text, default="")
    manifest_pulled: bool = kept(checks.flag, default=False)
    resume_supported: bool = kept(checks.flag, default=False)
    started_at: float | None = kept(optional(checks.day), default=None)
    updated_at: float = kept(checks.day, default=0.0)


CHANGEABLE: Mapping[str, Callable[[object], Any]] = MappingProxyType(
    {each.name: each.metadata["check"] for each in fields(Record) if not each.name.endswith("_at")}
)
Records = Mapping[str, Record]  #: by `names.ModelName.key`
Changes = Mapping[str, object]  #: by the keys of `CHANGEABLE`


def read(store: int) -> Records:
    """All records of a store; none of a damaged file. Raises WatchError where it can't be read."""
    return _FILE.read(store)


def change(store: int, model: str, changes: Changes, *, detour: bool = False) -> Record:
    """Change the record of one model, and give back what it is then.

    A new state is on the disk when this returns; what else changes a power cut may lose. `detour`:
    where there is no way to the new state, by a new try, or by the end of the one that was. Raises
    TargetError for what is no model, RecordError for a change that can't be, and WatchError where
    the file can't be read or written.
    """
    key = names.to_model(model).key

    def changed(records: Records) -> Records:
        before, shown, now = records.get(key, Record()), names.printable(model), time.time()
        wanted = _checked(changes, shown).get("state", before.state)
        if detour and not may_follow(before.state, wanted):
            way = State.STARTING if wanted.active else State.ERROR
            before = after(before, {"state": way}, now, shown)
        return {**records, key: after(before, changes, now, shown)}

    return _FILE.change(store, changed)[key]


#: A model, the state that was seen of its download, and why that is ``error``.
Seen: TypeAlias = tuple[str, State, str]


def follow(
    store: int, seen: Sequence[Seen], restated: Callable[[Records], Iterable[Seen]], now: float
) -> None:
    """Bring the records of models to the states that were seen of downloads that others drive.

    `seen`: in order. `restated`: of the records that follow, those whose reason is no longer so. A
    record of which a process of ours holds `driving_lock` stays. Raises WatchError where the file
    can't be read or written.
    """
    free: dict[str, bool] = {}

    def changed(records: Records) -> Records:
        after_all = dict(records)
        for model, state, why in seen:
            key = names.to_model(model).key
            record = after_all.get(key, Record())
            steps = way(record.state, state) if _is_free(model, store, free) else ()
            for step in steps:
                error = {"error": why} if step is State.ERROR else {}
                record = after(record, {"state": step, **error}, now, model)
            if steps:
                after_all[key] = record
        for model, state, why in list(restated(after_all)):
            if _is_free(model, store, free):
                key = names.to_model(model).key
                after_all[key] = restate(after_all[key], state, why, now)
        return records if after_all == records else after_all

    _FILE.change(store, changed)


def restate(record: Record, state: State, why: str, now: float) -> Record:
    """A record as it is now, where what it said of a download is no longer so."""
    if state is State.COMPLETED:
        return after(record, {"state": state}, now, "")
    return replace(record, state=state, error=why, updated_at=now)


def _is_free(model: str, store: int, free: dict[str, bool]) -> bool:
    if model not in free:
        lock = driving_lock(model)
        free[model] = drive(lock, store)
        lock.release()
    return free[model]


def driving_lock(model: str) -> state_folder.LongLock:
    return state_folder.LongLock(f"{names.file_safe(names.to_model(model).key)}.lock", DRIVEN)


def drive(lock: state_folder.LongLock, store: int) -> bool:
    """Hold such a lock; False where another process does. True where there can be no record."""
    try:
        with contextlib.suppress(OSError):
            lock.hold(store)
    except fs.BusyError:
        return False
    return True


def after(before: Record, changes: Changes, now: float, model: str) -> Record:
    """The record that a change makes of another one. Raises RecordError, naming `model`."""
    given = _checked(changes, model)
    state = given.get("state", before.state)
    if not may_follow(before.state, state):
        ways = ", ".join(sorted(WAYS[before.state]))
        raise RecordError(f"{model}: status: {before.state} can't become {state}", f"only {ways}")
    if given.get("error") and state is not State.ERROR:
        raise RecordError(f"{model}: error: the state is {state}", "give it with the state error")
    goes_on = before.state is state or before.state.active
    if before.state is State.ERROR:
        goes_on = state not in (State.IDLE, State.RESET)
    record = before if goes_on else Record()
    percent = record.progress_percent
    if state is not State.ERROR:
        given["error"] = ""
    if state.active and record.started_at is None:
        given["started_at"] = now
    if not state.active:
        given["bytes_per_second"] = None
    record = replace(record, **given, updated_at=now)
    if state is State.COMPLETED:
        here = record.downloaded_bytes if record.total_bytes is None else record.total_bytes
        return replace(record, downloaded_bytes=here, progress_percent=100.0)
    if record.total_bytes:
        percent = max(percent, min(100.0, 100.0 * record.downloaded_bytes / record.total_bytes))
    return replace(record, progress_percent=max(percent, record.progress_percent))


def _checked(changes: Changes, model: str) -> dict[str, Any]:
    unknown = ", ".join(names.printable(str(key)) for key in changes if key not in CHANGEABLE)
    if unknown:
        raise RecordError(f"{model}: unknown: {unknown}", f"known: {', '.join(CHANGEABLE)}")
    checked = {}
    for key, value in changes.items():
        try:
            checked[key] = CHANGEABLE[key](value)
        except (ValueError, OverflowError) as error:
            shown = "status" if key == "state" else key
            raise RecordError(f"{model}: {shown} = {value!r}: {error}") from None
    return checked


class _File(json_file.File[Records]):
    schema = SCHEMA
    option = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE

    def decode(self, found: Mapping[str, Any]) -> Records:
        rows = found["models"].items()
        return {names.to_model(key).key: checks.from_keys(Record, each) for key, each in rows}

    def encode(self, value: Records) -> Mapping[str, object]:
        return {"models": dict(value)}

    def is_durable(self, before: Records, after: Records) -> bool:
        """Whether there is a new state: progress may be lost."""
        states = {key: each.state for key, each in before.items()}
        return any(states.get(key) != each.state for key, each in after.items())


_FILE = _File(NAME, MappingProxyType({}))

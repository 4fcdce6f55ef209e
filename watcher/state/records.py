"""``models.json``: of each model the record of its download, from one process to the next.

A change is checked as a whole before anything is written: its keys, its values, and whether its
state may follow the one before. Within one download the progress never falls. A download begins
when a try follows a state other than ``error``: after an error the same one goes on.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import orjson

from watcher.errors import RecordError
from watcher.ollama import names
from watcher.state import checks, download_states, fs, json_file, state_folder
from watcher.state.download_states import State

SCHEMA = "ollama-watch/models/1"
NAME = "models.json"
#: Locks of those who drive a download, one for each model.
DRIVEN = "driven"


@dataclass(frozen=True, slots=True)
class Record:
    """The download of one model; times are seconds since the epoch."""

    state: State = State.IDLE
    #: Of its layers and its config, each digest once; None before the manifest is known.
    total_bytes: int | None = None
    #: Bytes that are here, those included that were here before; they fall when an attempt is lost.
    downloaded_bytes: int = 0
    #: Bytes that were here when the manifest came.
    present_bytes: int = 0
    progress_percent: float = 0.0
    bytes_per_second: float | None = None
    #: Of the pull that brings it, or was the last to: bytes that came and were lost, how often that
    #: happened, and how often none came for long. Of others' pulls that is not known.
    lost_bytes: int = 0
    resets: int = 0
    stalls: int = 0
    #: Why it is in the state ``error``.
    error: str = ""
    manifest_pulled: bool = False
    resume_supported: bool = False
    started_at: float | None = None
    updated_at: float = 0.0

    @property
    def stage(self) -> str:
        """What people are told of its state."""
        return self.state.stage


#: By `names.ModelName.key`.
Records = Mapping[str, Record]


def read(store: int) -> Records:
    """All records of the store behind a descriptor.

    Empty where there are none or the file is damaged. Raises WatchError where it can't be read.
    """
    return _FILE.read(store)


def change(
    store: int,
    model: str,
    changes: Mapping[str, object],
    *,
    detour: bool = False,
    clock: Callable[[], float] = time.time,
) -> Record:
    """Change the record of one model, and give back what it is then.

    `changes` may have the keys of `CHANGEABLE`. A new state is on the disk when this returns; what
    else changes is whole after any kill, but a power cut may lose the file. `detour`: where there
    is no way to the new state, by a new try, or by the end of the one that was. Raises TargetError
    for what is no model, RecordError for a change that can't be, and WatchError where the file
    can't be read or written.
    """
    key = names.to_model(model).key

    def changed(records: Records) -> Records:
        before, shown, now = records.get(key, Record()), names.printable(model), clock()
        wanted = _checked(changes, shown).get("state", before.state)
        if detour and not download_states.may_follow(before.state, wanted):
            way = State.STARTING if wanted.active else State.ERROR
            before = after(before, {"state": way}, now, shown)
        return {**records, key: after(before, changes, now, shown)}

    return _FILE.change(store, changed)[key]


def follow(store: int, seen: Sequence[tuple[str, State, str]], clock: Callable[[], float]) -> None:
    """Bring the records of models to the states that were seen of downloads that others drive.

    `seen`: model, state and why it is ``error``, in order. A record of which a process of ours
    holds `driving` stays. Raises WatchError where the file can't be read or written.
    """
    free = set()
    for model in {each[0] for each in seen}:
        with driving(store, model) as free_now:
            free |= {model} if free_now else set()

    def changed(records: Records) -> Records:
        now = dict(records)
        for model, state, why in seen:
            key = names.to_model(model).key
            record = now.get(key, Record())
            steps = download_states.way(record.state, state) if model in free else ()
            for step in steps:
                error = {"error": why} if step is State.ERROR else {}
                record = after(record, {"state": step, **error}, clock(), model)
            if steps:
                now[key] = record
        return records if now == records else now

    _FILE.change(store, changed)


@contextmanager
def driven(store: int) -> Iterator[int]:
    """The folder of the locks of those who drive something. Raises OSError."""
    with state_folder.made(store) as folder, state_folder.made_in(DRIVEN, folder) as locks:
        yield locks


@contextmanager
def driving(store: int, model: str) -> Iterator[bool]:
    """Hold that this process writes the record of a model; False where another one does.

    True without a lock where the store can't be written: there is no record to be kept then.
    """
    lock = driving_lock(model)
    try:
        yield drive(lock, store)
    finally:
        lock.release()


def driving_lock(model: str) -> state_folder.LongLock:
    """The lock of who writes the record of a model."""
    return state_folder.LongLock(f"{names.file_safe(names.to_model(model).key)}.lock", DRIVEN)


def drive(lock: state_folder.LongLock, store: int) -> bool:
    """Hold such a lock from now on; False where another process does."""
    try:
        lock.hold(store, f"pid {os.getpid()}")
    except fs.BusyError:
        return False
    except OSError:
        pass
    return True


def after(before: Record, changes: Mapping[str, object], now: float, model: str) -> Record:
    """The record that a change makes of another one. Raises RecordError, naming `model`."""
    given = _checked(changes, model)
    state = given.get("state", before.state)
    if not download_states.may_follow(before.state, state):
        ways = ", ".join(sorted(download_states.WAYS[before.state]))
        raise RecordError(f"{model}: status: {before.state} can't become {state}", f"only {ways}")
    if given.get("error") and state is not State.ERROR:
        raise RecordError(f"{model}: error: the state is {state}", "give it with the state error")
    record = before if _goes_on(before.state, state) else Record()
    least = record.progress_percent
    if state is not State.ERROR:
        given["error"] = ""
    record = replace(record, **given, updated_at=now)
    if state.active and record.started_at is None:
        record = replace(record, started_at=now)
    if not state.active:
        record = replace(record, bytes_per_second=None)
    if state is State.COMPLETED:
        here = record.downloaded_bytes if record.total_bytes is None else record.total_bytes
        return replace(record, downloaded_bytes=here, progress_percent=100.0)
    return replace(record, progress_percent=max(least, record.progress_percent, _percent(record)))


def _goes_on(before: State, after: State) -> bool:
    """Whether two states are of the same download."""
    if before is after or before.active:
        return True
    return before is State.ERROR and after not in (State.IDLE, State.RESET)


def _percent(record: Record) -> float:
    if not record.total_bytes:
        return 0.0
    return min(100.0, 100.0 * record.downloaded_bytes / record.total_bytes)


# ---------------------------------------------------------------- values


def _state(value: object) -> State:
    try:
        return State(value)  # type: ignore[arg-type]
    except ValueError:
        raise ValueError(f"expected one of {', '.join(State)}") from None


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63:
        return value
    raise ValueError("expected a whole number, 0 or more")


def _number(value: object, most: float = math.inf) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
        if 0.0 <= number <= most and math.isfinite(number):
            return number
    raise ValueError(
        "expected a number, 0 or more" + ("" if most == math.inf else f", {most:g} at most")
    )


def _time(value: object) -> float:
    return _number(value, checks.LAST_DAY)


def _text(value: object) -> str:
    if isinstance(value, str):
        return names.sayable(value)
    raise ValueError("expected a text")


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("expected true or false")


def _or_none(check: Callable[[object], Any]) -> Callable[[object], Any]:
    return lambda value: None if value is None else check(value)


#: What a change may have, and how each value is checked.
CHANGEABLE: Mapping[str, Callable[[object], Any]] = MappingProxyType(
    {
        "state": _state,
        "total_bytes": _or_none(_count),
        "downloaded_bytes": _count,
        "present_bytes": _count,
        "progress_percent": lambda value: _number(value, 100.0),
        "bytes_per_second": _or_none(_number),
        "lost_bytes": _count,
        "resets": _count,
        "stalls": _count,
        "error": _text,
        "manifest_pulled": _flag,
        "resume_supported": _flag,
    }
)
#: What files from before don't have.
_LATER = frozenset({"lost_bytes", "resets", "stalls"})
_ALL = {**CHANGEABLE, "started_at": _or_none(_time), "updated_at": _time}


def _checked(changes: Mapping[str, object], model: str) -> dict[str, Any]:
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


# ---------------------------------------------------------------- the file


class _File(json_file.File[Records]):
    def decode(self, raw: bytes) -> Records:
        return {
            names.to_model(key).key: Record(
                **{
                    field: check(each[field])
                    for field, check in _ALL.items()
                    if field in each or field not in _LATER
                }
            )
            for key, each in json_file.document(raw, SCHEMA)["models"].items()
        }

    def encode(self, value: Records) -> bytes:
        document = {"schema": SCHEMA, "models": dict(value)}
        return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    def is_durable(self, before: Records, after: Records) -> bool:
        """Whether there is a new state: progress may be lost."""
        return any(
            each is not (known := before.get(key)) and (known is None or known.state != each.state)
            for key, each in after.items()
        )


_FILE = _File(NAME, MappingProxyType({}))

"""One JSON line for each thing that happened: appended, rotated by size, removed by age.

The five keys of a line are a contract: ``timestamp``, ``model_name``, ``event_type``, ``message``,
``details``. In ``details`` bytes end in ``_bytes`` and durations in ``_seconds``.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime

import orjson

from watcher.config import Settings
from watcher.model import DAY, Diagnosed, Outcome, Refusal
from watcher.ollama import names
from watcher.state import fs, state_folder

LOGS = "logs"
ALL = "events"
SUFFIX = ".jsonl"
#: Held while something is written there. Who may read a log could hold one on the log itself.
LOCK = "logs.lock"
#: To write takes milliseconds; who waits longer waits for a process that was stopped.
_PATIENCE_SECONDS = 10.0
#: Lines that are added in one write: a log is too large by no more than these.
_AT_ONCE = 100
#: So much may have been added by others since.
_SINCE_BYTES = 1 << 20


class Tone(enum.Enum):
    """How good the news of an event is."""

    PLAIN = enum.auto()
    GOOD = enum.auto()
    WARNING = enum.auto()
    BAD = enum.auto()


class EventType(enum.StrEnum):
    """The types of events, one row each; `docs/reference/events.md` says when they come."""

    tone: Tone

    SERVICE_STARTED = "service_started"
    SERVICE_STOPPED = "service_stopped"
    SETTINGS_READ = "settings_read"
    CHECK_STARTED = "check_started"
    CLOCK_JUMPED = "clock_jumped"
    PARTIAL_FOUND = "partial_found"
    PARTIAL_CHANGED = "partial_changed"
    PARTIAL_STALE = "partial_stale", Tone.WARNING
    PARTIAL_REMOVED = "partial_removed"
    DOWNLOAD_STARTED = "download_started"
    DOWNLOAD_RESUMED = "download_resumed"
    DOWNLOAD_PROGRESS = "download_progress"
    DOWNLOAD_STALLED = "download_stalled", Tone.WARNING
    DOWNLOAD_INTERRUPTED = "download_interrupted", Tone.WARNING
    DOWNLOAD_COMPLETED = "download_completed", Tone.GOOD
    DOWNLOAD_RESET = "download_reset"
    MANIFEST_WRITTEN = "manifest_written"
    MANIFEST_PULLED = "manifest_pulled"
    MODEL_REMOVED = "model_removed"
    STORE_PROBLEM = "store_problem", Tone.BAD
    BLOB_CORRUPT = "blob_corrupt", Tone.BAD
    ACT_STARTED = "act_started"
    DOWNLOAD_REPAIRED = "download_repaired", Tone.GOOD
    REFRESHED = "refreshed"
    PARTIAL_CLEANED = "partial_cleaned"
    ORPHAN_REMOVED = "orphan_removed"
    TEMPORARY_REMOVED = "temporary_removed"
    QUARANTINED = "quarantined", Tone.WARNING
    RESTORED = "restored", Tone.GOOD
    PURGED = "purged"
    REFUSED = "refused", Tone.WARNING
    RECOVERED = "recovered"
    PULL_COMPLETED = "pull_completed", Tone.GOOD
    PULL_FAILED = "pull_failed", Tone.BAD
    ERROR = "error", Tone.BAD

    def __new__(cls, value: str, tone: Tone = Tone.PLAIN) -> EventType:
        """A member is a string as it stands in the log, and has its tone."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.tone = tone
        return member


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at `at` (seconds since the epoch)."""

    at: float
    #: An `EventType`; a program that uses us as a library may have types of its own.
    event_type: str
    message: str
    #: None for an event of the store or of the service.
    model_name: str | None = None
    details: Mapping[str, object] = field(default_factory=dict)
    #: What it is about, as a value for those in this process: nothing reads `details` back.
    about: Diagnosed | Outcome | Refusal | None = field(default=None, compare=False, repr=False)

    @property
    def line(self) -> bytes:
        """The event as one line of JSON."""
        value = {
            "timestamp": rfc3339(self.at),
            "model_name": self.model_name,
            "event_type": self.event_type,
            "message": self.message,
            "details": dict(self.details),
        }
        try:
            return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
        except orjson.JSONEncodeError:  # a name that is no UTF-8
            return orjson.dumps(names.all_sayable(value), option=orjson.OPT_APPEND_NEWLINE)

    @property
    def models(self) -> tuple[str, ...]:
        """The models that its details name."""
        named = self.details.get("models")
        return tuple(map(str, named)) if isinstance(named, list | tuple) else ()

    @property
    def logs(self) -> tuple[str, ...]:
        """The logs that it goes to: the common one, and one for each of its models."""
        if self.model_name is None:
            return (ALL,)  # an event of the store or of the service
        shown = {self.model_name, *self.models}
        return (ALL, *sorted(names.file_safe(model) for model in shown))


def instant(at: float) -> datetime:
    """Seconds since the epoch in UTC; what no calendar has becomes its first or last day."""
    try:
        return datetime.fromtimestamp(at, UTC)
    except (ValueError, OverflowError, OSError):
        return _LAST if at > 0 else _FIRST


_FIRST = datetime(1, 1, 2, tzinfo=UTC)
_LAST = datetime(9999, 12, 30, tzinfo=UTC)


def rfc3339(at: float) -> str:
    """An instant as RFC 3339 in UTC, to the millisecond."""
    return instant(at).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def clock(at: float, now: float) -> str:
    """An instant for people: the local time, and the day where it is not today."""
    when, today = (instant(each).astimezone() for each in (at, now))
    return when.strftime("%H:%M" if when.date() == today.date() else "%Y-%m-%d %H:%M")


def write(store: int, events: Iterable[Event], settings: Settings) -> None:
    """Append events to the logs of the store behind a descriptor.

    Raises OSError (disk full), and BlockingIOError where another process writes for long.
    """
    logs: dict[str, list[Event]] = {}
    for event in events:
        for log in event.logs:
            logs.setdefault(log, []).append(event)
    if not logs:
        return
    with ExitStack() as opened:
        folder = _logs_folder(store, opened)
        for log, its in logs.items():
            for at in range(0, len(its), _AT_ONCE):
                some = its[at : at + _AT_ONCE]
                lines = b"".join(event.line for event in some)
                size = _append(log, folder, lines, some[-1].at)
                if size > settings.log_max_bytes:
                    _rotate(folder, log, some[-1].at, settings)


def write_missing(store: int, events: Sequence[Event]) -> None:
    """Append to each log what is not in it yet. Raises OSError.

    Looked for at the end of a log, and of what was set aside of it last.
    """
    logs: dict[str, list[Event]] = {}
    for event in events:
        for log in event.logs:
            logs.setdefault(log, []).append(event)
    with ExitStack() as opened:
        folder = _logs_folder(store, opened)
        asides = _last_asides(folder)
        for log, its in sorted(logs.items()):
            lines = [event.line for event in its]
            there = _at_end(folder, (asides.get(log, ""), f"{log}{SUFFIX}"), frozenset(lines))
            left = b"".join(line for line in lines if line not in there)
            if left:
                _append(log, folder, left, its[-1].at)


def _append(log: str, folder: int, lines: bytes, now: float) -> int:
    """Add lines to a log; the log's size in bytes."""
    try:
        return fs.append(f"{log}{SUFFIX}", folder, lines)
    except (PermissionError, fs.NoLogError):
        # One that another member of the group has made for himself alone is set aside.
        _set_aside(folder, log, now)
        return fs.append(f"{log}{SUFFIX}", folder, lines)


def _last_asides(folder: int) -> dict[str, str]:
    """What was set aside last, by log."""
    asides = sorted(
        (os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime_ns, name)
        for name in os.listdir(folder)
        if "@" in name and name.endswith(SUFFIX)
    )
    return {name.rpartition("@")[0]: name for _, name in asides}


def _at_end(folder: int, logs: Iterable[str], wanted: frozenset[bytes]) -> set[bytes]:
    """Those of some lines that stand at the ends of some files; "" is none."""
    size = sum(map(len, wanted)) + _SINCE_BYTES
    found: set[bytes] = set()
    for name in filter(None, logs):
        with contextlib.suppress(FileNotFoundError):
            fd = fs.open_ours(name, folder)
            with os.fdopen(fd, "rb") as stream:
                stream.seek(max(0, os.fstat(fd).st_size - size))
                # One by one: the end of a log would stay in the memory of a daemon.
                found.update(line for line in stream if line in wanted)
    return found


def _logs_folder(store: int, opened: ExitStack) -> int:
    """The folder of the logs, and their lock, while `opened` is."""
    folder = opened.enter_context(state_folder.made(store))
    logs = opened.enter_context(state_folder.made_in(LOGS, folder))
    _lock(folder, opened, _PATIENCE_SECONDS)
    return logs


def _lock(folder: int, opened: ExitStack, seconds: float) -> None:
    try:
        opened.enter_context(fs.locked(LOCK, folder, f"pid {os.getpid()}", seconds=seconds))
    except fs.BusyError as busy:
        raise BlockingIOError(errno.EAGAIN, f"{busy.owner} keeps {LOCK}") from None


def _rotate(folder: int, log: str, now: float, settings: Settings) -> None:
    """Set a full log aside under the time of its end."""
    with contextlib.suppress(FileNotFoundError):
        # Another process may have set it aside since we wrote to it.
        if os.stat(f"{log}{SUFFIX}", dir_fd=folder).st_size > settings.log_max_bytes:
            _set_aside(folder, log, now)


def _set_aside(folder: int, log: str, now: float) -> None:
    stamp = rfc3339(now).replace(":", "").replace(".", "")
    for turn in itertools.count():
        try:
            aside = f"{log}@{stamp}{f'-{turn}' if turn else ''}{SUFFIX}"
            fs.move(f"{log}{SUFFIX}", folder, aside, folder)
        except FileNotFoundError:
            return
        except FileExistsError:
            continue
        return


def expire(store: int, now: float, settings: Settings) -> None:
    """Remove all logs to which nothing was written for `settings.log_keep_days`. Raises OSError.

    Also those of models that are no more, to which nothing will be written again. What can't be
    removed (it is no file, somebody writes to it just now) stays.
    """
    with ExitStack() as opened, contextlib.suppress(FileNotFoundError, BlockingIOError):
        our_folder = opened.enter_context(state_folder.opened(store))
        folder = opened.enter_context(state_folder.opened_in(LOGS, our_folder))
        _lock(our_folder, opened, 0.0)
        for name in os.listdir(folder):
            if name.endswith(SUFFIX):
                with contextlib.suppress(OSError):
                    fs.remove_older(name, folder, now - settings.log_keep_days * DAY)

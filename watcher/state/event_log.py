"""One JSON line for each thing that happened: appended, rotated by size, removed by age, and read.

The five keys of a line are a contract. In ``details`` bytes end in ``_bytes`` and durations in
``_seconds``. What is read are whole lines in order, over all rotations.
"""

import contextlib
import enum
import errno
import itertools
import os
import re
import stat
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import BinaryIO, Self

import orjson

from watcher.config import Settings
from watcher.model import DAY, Diagnosed, Outcome, Refusal
from watcher.ollama import names
from watcher.state import folders, fs, json_file, state_folder
from watcher.state.checks import LAST_DAY

LOGS = "logs"
ALL = "events"
SUFFIX = ".jsonl"
LOCK = "logs.lock"  #: who may read a log could hold one on the log itself
_PATIENCE_SECONDS = 10.0  #: who waits longer waits for a process that was stopped
_AT_ONCE = 100  #: lines that are added in one write: a log is too large by no more than these
_SINCE_BYTES = 1 << 20  #: so much may have been added by others since
#: A log that was set aside: its name, the time of its end, and a number where that was not enough.
_ASIDE = re.compile(r"([^@]+)@(.+?)(?:-([0-9]{1,9}))?" + re.escape(SUFFIX), re.DOTALL)
#: What stands for the model of a download where that is not known; and a whole digest.
_SHORT = re.compile(r"sha256-[0-9a-fA-F]{12}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
#: What is longer is no line of ours; where none ends in so many times as much, it is no log.
_LONGEST_LINE = 1 << 24
_MOST_PIECES = 8
_FIRST_DAY = -62135510400.0  #: the second day of the year 1, seconds since the epoch


class Tone(enum.Enum):
    PLAIN = enum.auto()
    GOOD = enum.auto()
    WARNING = enum.auto()
    BAD = enum.auto()


class EventType(enum.StrEnum):
    """The types of events, one row each; `docs/reference/events.md` lists when they come."""

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
    DOWNLOAD_DISCARDED = "download_discarded", Tone.BAD
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

    def __new__(cls, value: str, tone: Tone = Tone.PLAIN) -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.tone = tone
        return member


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at `at` (seconds since the epoch)."""

    at: float
    event_type: str  #: an `EventType`; a program that uses us as a library may have others
    message: str
    model_name: str | None = None  #: None for an event of the store or of the service
    details: Mapping[str, object] = field(default_factory=dict)
    #: What it is about, as a value for those in this process: nothing reads `details` back.
    about: Diagnosed | Outcome | Refusal | None = field(default=None, compare=False, repr=False)
    #: Its line, where it was read from a log.
    raw: bytes = field(default=b"", compare=False, repr=False)

    @property
    def line(self) -> bytes:
        if self.raw:
            return self.raw
        value = {
            "timestamp": rfc3339(self.at),
            "model_name": self.model_name,
            "event_type": self.event_type,
            "message": self.message,
            "details": dict(self.details),
        }
        return json_file.line(value)

    def _named(self) -> Iterator[str]:
        several = self.details.get("models")
        for each in (self.model_name, *(several if isinstance(several, list | tuple) else ())):
            if isinstance(each, str):
                yield each

    @property
    def models(self) -> frozenset[str]:
        return frozenset(each for each in self._named() if not _SHORT.fullmatch(each))

    @property
    def digests(self) -> frozenset[str]:
        """The digests that it is about: their 64 digits in lower case."""
        several = self.details.get("subjects")
        named = [self.details.get("digest"), self.details.get("subject")]
        named += several if isinstance(several, list) else []
        found = (_DIGEST.search(each) for each in named if isinstance(each, str))
        return frozenset(match[0].lower() for match in found if match)

    @property
    def logs(self) -> tuple[str, ...]:
        """The logs that it goes to: the common one, and one for each of its models."""
        if self.model_name is None:
            return (ALL,)  # an event of the store or of the service
        return (ALL, *sorted({names.file_safe(model) for model in self._named()}))


def parse(raw: bytes) -> Event | None:
    """The event of a line, or None where that is damaged."""
    try:
        value = orjson.loads(raw)
        at = datetime.fromisoformat(value["timestamp"]).timestamp()
        name, details = value["model_name"], value["details"]
        kind, message = value["event_type"], value["message"]
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    texts = isinstance(kind, str) and isinstance(message, str)
    if not texts or not isinstance(name, str | None) or not isinstance(details, dict):
        return None
    return Event(at, kind, message, name, details, raw=raw)


def instant(at: float) -> datetime:
    """Seconds since the epoch in UTC; what no calendar has becomes its first or last day."""
    return datetime.fromtimestamp(max(_FIRST_DAY, min(at, LAST_DAY)), UTC)


def rfc3339(at: float) -> str:
    """An instant as RFC 3339 in UTC, to the millisecond."""
    return instant(at).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def clock(at: float, now: float) -> str:
    """An instant for people: the local time, and the day where it is not today."""
    when, today = (instant(each).astimezone() for each in (at, now))
    return when.strftime("%H:%M" if when.date() == today.date() else "%Y-%m-%d %H:%M")


def _by_log(events: Iterable[Event]) -> dict[str, list[Event]]:
    logs: dict[str, list[Event]] = {}
    for event in events:
        for log in event.logs:
            logs.setdefault(log, []).append(event)
    return logs


def write(store: int, events: Iterable[Event], settings: Settings) -> None:
    """Append events to the logs of a store. Raises OSError: BlockingIOError where others write."""
    logs = _by_log(events)
    if not logs:
        return
    with ExitStack() as opened:
        folder = _locked(store, opened)
        for log, its in logs.items():
            for at in range(0, len(its), _AT_ONCE):
                some = its[at : at + _AT_ONCE]
                lines = b"".join(event.line for event in some)
                size = _append(log, folder, lines, some[-1].at)
                if size > settings.log_max_bytes:
                    _set_aside(folder, log, some[-1].at)


def write_missing(store: int, events: Sequence[Event]) -> None:
    """Append to each log what is not at its end, nor at that of its last rotation. OSError."""
    with ExitStack() as opened:
        folder = _locked(store, opened)
        listed = os.listdir(folder)
        for log, its in sorted(_by_log(events).items()):
            lines = [event.line for event in its]
            since = sum(map(len, lines)) + _SINCE_BYTES
            left = dict.fromkeys(lines)
            for name, _ in _in_order(log, folder, listed)[-2:]:
                fd = fs.open_to_read(name, folder, ours=True)
                with os.fdopen(fd, "rb") as stream:
                    stream.seek(max(0, os.fstat(fd).st_size - since))
                    # One by one: the end of a log would stay in the memory of a daemon.
                    for line in stream:
                        left.pop(line, None)
            if left:
                _append(log, folder, b"".join(left), its[-1].at)


def _append(log: str, folder: int, lines: bytes, now: float) -> int:
    try:
        return fs.append(f"{log}{SUFFIX}", folder, lines)
    except (PermissionError, fs.NoLogError):
        # One that another member of the group has made for himself alone is set aside.
        _set_aside(folder, log, now)
        return fs.append(f"{log}{SUFFIX}", folder, lines)


def _locked(store: int, opened: ExitStack, seconds: float = _PATIENCE_SECONDS) -> int:
    folder = opened.enter_context(state_folder.made(store))
    logs = opened.enter_context(state_folder.made(store, LOGS))
    try:
        opened.enter_context(fs.locked(LOCK, folder, seconds=seconds))
    except fs.BusyError as busy:
        raise BlockingIOError(errno.EAGAIN, f"{busy.owner} keeps {LOCK}") from None
    return logs


def _set_aside(folder: int, log: str, now: float) -> None:
    stamp = rfc3339(now).replace(":", "").replace(".", "")
    for turn in itertools.count():
        aside = f"{log}@{stamp}{f'-{turn}' if turn else ''}{SUFFIX}"
        with contextlib.suppress(FileExistsError):
            with contextlib.suppress(FileNotFoundError):
                fs.move(f"{log}{SUFFIX}", folder, aside, folder)
            return


def expire(store: int, now: float, settings: Settings) -> None:
    """Remove all logs to which nothing was written for `settings.log_keep_days`. Raises OSError."""
    with ExitStack() as opened, contextlib.suppress(FileNotFoundError, BlockingIOError):
        opened.enter_context(state_folder.opened(store, LOGS))  # it is not made for this
        folder = _locked(store, opened, 0.0)
        before = now - settings.log_keep_days * DAY
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                is_log = name.endswith(SUFFIX) and stat.S_ISREG(found.st_mode)
                if is_log and found.st_mtime < before:
                    fs.remove(name, folder)


class Log:
    """One log of a store (a path; neither need be there yet), read on over every rotation.

    It begins with the `last` files, or with the first one.
    """

    def __init__(self, store: str, log: str = ALL, last: int | None = None) -> None:
        self._store, self._log = store, log
        self._last = last
        #: Device and inode of the file that was read last, and up to where.
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self.damaged = 0  #: lines that could not be read so far
        self.restarts = 0  #: so often it was read from the start, as what was read last is gone

    def read(self, *, to_the_end: bool = False) -> Iterator[Event]:
        """What has come since; a half line is left, or, `to_the_end`, damaged. PermissionError."""
        missing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with ExitStack() as opened, missing:
            folder = _opened_logs(self._store, opened)
            while not (yield from self._read_files(folder, to_the_end=to_the_end)):
                pass

    def _read_files(self, folder: int, *, to_the_end: bool) -> Generator[Event, None, bool]:
        there = _in_order(self._log, folder, os.listdir(folder))
        left = [number for number, (_, file) in enumerate(there) if file == self._file]
        self.restarts += self._file is not None and not left
        first = 0 if self._last is None else max(0, len(there) - self._last)
        for name, file in there[left[0] if left else first :]:
            try:
                fd = fs.open_to_read(name, folder)
            except FileNotFoundError:
                return False
            with os.fdopen(fd, "rb") as stream:
                status = os.fstat(fd)
                if (status.st_dev, status.st_ino) != file:
                    return False
                is_cut = file == self._file and self._offset > status.st_size
                self.restarts += is_cut
                if file != self._file or is_cut:
                    self._file, self._offset = file, 0
                stream.seek(self._offset)
                yield from self._lines(stream)
                if self._offset < stream.tell() and (to_the_end or "@" in name):
                    self.damaged += 1
        return True

    def _lines(self, stream: BinaryIO) -> Iterator[Event]:
        while raw := stream.readline(_LONGEST_LINE):
            line = parse(raw)
            for _ in range(_MOST_PIECES):
                if not raw or raw.endswith(b"\n"):
                    break
                line, raw = None, stream.readline(_LONGEST_LINE)
            else:
                stream.seek(0, os.SEEK_END)
            if not raw:
                return  # half a line, which may still be written
            self._offset = stream.tell()
            if line is None:
                self.damaged += 1
            else:
                yield line


def logs(store: str) -> list[str]:
    """The names of all logs of a store, sorted. Raises PermissionError."""
    listed: list[str] = []
    missing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
    with ExitStack() as opened, missing:
        listed = os.listdir(_opened_logs(store, opened))
    aside = {match[1] for match in map(_ASIDE.fullmatch, listed) if match}
    whole = {name for name in listed if name.endswith(SUFFIX) and not _ASIDE.fullmatch(name)}
    return sorted(aside | {name.removesuffix(SUFFIX) for name in whole})


def _opened_logs(store: str, opened: ExitStack) -> int:
    folder = opened.enter_context(folders.opened_store(store))
    try:
        return opened.enter_context(state_folder.opened(folder, LOGS))
    except state_folder.ForeignError as error:
        raise state_folder.refusal(store, error) from None


def _in_order(log: str, folder: int, listed: list[str]) -> list[tuple[str, tuple[int, int]]]:
    found = [match for match in map(_ASIDE.fullmatch, listed) if match and match[1] == log]
    found.sort(key=lambda match: (match[2], int(match[3] or 0)))
    there: list[tuple[str, tuple[int, int]]] = []
    above = os.fstat(folder)
    for name in (*(match[0] for match in found), f"{log}{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode) and fs.is_trusted(status, above):
                there.append((name, (status.st_dev, status.st_ino)))
    return there

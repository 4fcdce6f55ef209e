"""What the event logs say: whole lines in order, over all rotations, whatever else is in there."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Generator, Iterable, Iterator, Mapping
from datetime import datetime
from typing import BinaryIO, NamedTuple

import orjson

from watcher.model import Known
from watcher.state import folders, fs, state_folder
from watcher.state.event_log import ALL, LOGS, SUFFIX, Event

#: A log that was set aside: its name, the time of its end, and a number where that was not enough.
_ASIDE = re.compile(r"([^@]+)@(.+?)(?:-([0-9]{1,9}))?" + re.escape(SUFFIX), re.DOTALL)
#: What stands for the model of a download where that is not known; and a whole digest.
_SHORT = re.compile(r"sha256-[0-9a-fA-F]{12}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
#: What is longer is no line of ours.
_LONGEST_LINE = 1 << 24
#: Where none ends in so many times as much, it is no log: it may be terabytes of nothing.
_MOST_PIECES = 8


class Line(NamedTuple):
    """One event as it was written down."""

    raw: bytes
    #: Seconds since the epoch.
    at: float
    event_type: str
    model_name: str | None
    message: str
    details: Mapping[str, object]

    @property
    def event(self) -> Event:
        """The event that it tells of."""
        return Event(self.at, self.event_type, self.message, self.model_name, self.details)

    @property
    def models(self) -> frozenset[str]:
        """The models that it is about, as they are shown."""
        named = self.details.get("models")
        said = [self.model_name, *(named if isinstance(named, list) else ())]
        shown = (each for each in said if isinstance(each, str))
        return frozenset(each for each in shown if not _SHORT.fullmatch(each))

    @property
    def digests(self) -> frozenset[str]:
        """The digests that it is about: their 64 digits in lower case."""
        several = self.details.get("subjects")
        said = [self.details.get("digest"), self.details.get("subject")]
        said += several if isinstance(several, list) else []
        found = (_DIGEST.search(each) for each in said if isinstance(each, str))
        return frozenset(match[0].lower() for match in found if match)


def parse(raw: bytes) -> Line | None:
    """An event's line, or None where it is damaged."""
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
    return Line(raw, at, kind, name, message, details)


class Log:
    """One log of a store, read on from where it was left, over every rotation.

    `store` is a path; neither it nor the log need be there yet.
    """

    def __init__(self, store: str, log: str = ALL) -> None:
        self._store, self._log = store, log
        #: Device and inode of the file that was read last, and up to where.
        self._file: tuple[int, int] | None = None
        self._offset = 0
        #: Lines that could not be read so far.
        self.damaged = 0

    def read(self, *, to_the_end: bool = False) -> Iterator[Line]:
        """What has come since it was read last. Raises PermissionError.

        A half line at the end is left for the next time, or, `to_the_end`, counted as damaged.
        """
        missing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with contextlib.ExitStack() as opened, missing:
            folder = _opened_logs(self._store, opened)
            whole = False
            while not whole:
                whole = yield from self._read_files(folder, to_the_end=to_the_end)

    def _read_files(self, folder: int, *, to_the_end: bool) -> Generator[Line, None, bool]:
        """Read all from the file where it was left; False where one was set aside meanwhile."""
        there = _in_order(folder, self._log)
        left = [number for number, (_, file) in enumerate(there) if file == self._file]
        for name, file in there[left[0] if left else 0 :]:
            try:
                fd = fs.open_to_read(name, folder)
            except FileNotFoundError:
                return False
            with os.fdopen(fd, "rb") as stream:
                status = os.fstat(fd)
                if (status.st_dev, status.st_ino) != file:
                    return False
                if file != self._file or self._offset > status.st_size:
                    self._file, self._offset = file, 0
                stream.seek(self._offset)
                yield from self._lines(stream)
                if self._offset < stream.tell() and (to_the_end or "@" in name):
                    self.damaged += 1
        return True

    def _lines(self, stream: BinaryIO) -> Iterator[Line]:
        """All whole lines from here on."""
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
    found: set[str] = set()
    missing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
    with contextlib.ExitStack() as opened, missing:
        folder = _opened_logs(store, opened)
        for name in os.listdir(folder):
            aside = _ASIDE.fullmatch(name)
            if aside is not None or name.endswith(SUFFIX):
                found.add(aside[1] if aside is not None else name.removesuffix(SUFFIX))
    return sorted(found)


def _opened_logs(store: str, opened: contextlib.ExitStack) -> int:
    """The folder of a store's logs. Raises RefusedError where our folder is somebody else's."""
    folder = opened.enter_context(folders.opened_store(store))
    try:
        our_folder = opened.enter_context(state_folder.opened(folder))
    except state_folder.ForeignError as error:
        raise state_folder.refusal(store, error) from None
    return opened.enter_context(state_folder.opened_in(LOGS, our_folder))


def _in_order(folder: int, log: str) -> list[tuple[str, tuple[int, int]]]:
    """Name and identity of a log's files, the oldest first and the one that is written to last."""
    found: list[tuple[str, int, str]] = []
    for name in os.listdir(folder):
        match = _ASIDE.fullmatch(name)
        if match is not None and match[1] == log:
            found.append((match[2], int(match[3] or 0), name))
    there: list[tuple[str, tuple[int, int]]] = []
    above = os.fstat(folder)
    for name in (*(name for *_, name in sorted(found)), f"{log}{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode) and fs.is_trusted(status, above):
                there.append((name, (status.st_dev, status.st_ino)))
    return there


def known(lines: Iterable[Line]) -> Known:
    """What can be asked for, as far as these lines know it."""
    models: dict[str, set[str]] = {}
    digests: set[str] = set()
    for line in lines:
        about = line.digests
        digests |= about
        for shown in line.models:
            models.setdefault(shown, set()).update(about)
    return Known({shown: frozenset(its) for shown, its in models.items()}, frozenset(digests))

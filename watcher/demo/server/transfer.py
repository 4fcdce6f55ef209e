"""Fetching the missing parts of a layer, up to 16 at once."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from watcher.demo.server.client import ask
from watcher.demo.server.context import Context
from watcher.demo.server.errors import (
    CanceledError,
    EngineError,
    NoSpaceError,
    StalledError,
    UnexpectedEndError,
    told,
)
from watcher.demo.server.gojson import int64
from watcher.demo.server.log import log
from watcher.demo.server.parts import PARTS, Part
from watcher.demo.server.settings import retry_seconds, stall_seconds

MAX_TRIES = 6


@dataclass
class Attempt:
    """One connection for one part; `heard` is when it began or last brought something."""

    part: Part
    context: Context
    heard: float = field(default_factory=time.monotonic)


class Transfer:
    """Brings the parts of one layer into one file.

    `label` names the layer in the log; `count` is told of bytes that came, and with a negative
    number of bytes that don't count after all.
    """

    def __init__(self, path: str, label: str, count: Callable[[int], None]) -> None:
        self._path = path
        self._label = label
        self._count = count
        self._descriptor = -1
        self._errors: list[EngineError] = []
        self._lock = threading.Lock()
        self._attempts: list[Attempt] = []

    @property
    def writing(self) -> list[Part]:
        """Parts with an attempt under way."""
        with self._lock:
            return [attempt.part for attempt in self._attempts]

    @contextlib.contextmanager
    def opened(self, size: int) -> Iterator[None]:
        """Make the file, and as long as it will be; close it at the end."""
        with told("open", self._path):
            self._descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, size)
            yield
        finally:
            os.close(self._descriptor)

    def run(self, context: Context, url: str, parts: Sequence[Part]) -> None:
        """Fetch what is missing; the first failure ends all, and is raised once all have ended."""
        with Context(context) as group, ThreadPoolExecutor(PARTS) as pool:
            threading.Thread(target=self._watch, args=(group,), daemon=True).start()
            for part in parts:
                if part.completed != part.size:
                    pool.submit(self._fetch_or_end_all, url, part, group)
        if self._errors:
            raise self._errors[0]

    def _fetch_or_end_all(self, url: str, part: Part, group: Context) -> None:
        try:
            self._fetch(url, part, group)
        except Exception as error:
            cause = error if isinstance(error, EngineError) else EngineError(repr(error))
            self._errors.append(cause)
            group.cancel(cause)

    def _fetch(self, url: str, part: Part, group: Context) -> None:
        """Try until the part is there: a stall starts anew at once and as often as it happens;
        other failures six times, each wait twice the last, and not cut short by giving up."""
        tries = 0
        while True:
            try:
                self._attempt(url, part, group)
                return
            except StalledError:
                log(f"{self._label} part {part.number} stalled; retrying")
            except (CanceledError, NoSpaceError):
                raise
            except EngineError as error:
                pause = retry_seconds() * 2**tries
                log(
                    f"{self._label} part {part.number} attempt {tries} failed: {error}, "
                    f"retrying in {pause:g}s"
                )
                time.sleep(pause)
                tries += 1
                if tries == MAX_TRIES:
                    raise EngineError(f"max retries exceeded: {error}") from error

    def _attempt(self, url: str, part: Part, group: Context) -> None:
        with Context(group) as context:
            attempt = Attempt(part, context)
            with self._lock:
                self._attempts.append(attempt)
            try:
                self._copy(url, attempt)
            except (StalledError, CanceledError):
                raise
            except EngineError as error:
                # The real server may still wait for one more retry here: two threads race.
                if group.canceled:
                    raise CanceledError from error
                raise
            finally:
                with self._lock:
                    self._attempts.remove(attempt)

    def _copy(self, url: str, attempt: Attempt) -> None:
        """Write what comes behind what is there. The sidecar is rewritten only where the attempt
        ends well, in an unexpected EOF, or because the last request or the server ended; else its
        bytes don't count, nor after a stall or a sibling's failure (seen on a real server)."""
        part = attempt.part
        start = int64(part.offset + part.completed)
        stop = int64(part.offset + part.size)
        copied, ended = 0, None
        # The answer's status is not looked at: an error page is data like any other.
        with ask(attempt.context, "GET", url, {"Range": f"bytes={start}-{stop - 1}"}) as answer:
            try:
                for data in answer.read_exactly(stop - start):
                    self._write(data, start + copied)
                    copied += len(data)
                    attempt.heard = time.monotonic()
                    self._count(len(data))
            except (CanceledError, UnexpectedEndError) as error:
                ended = error
            except EngineError:
                self._count(-copied)
                raise
            part.completed += copied
            part.write()
        if ended:
            raise ended

    def _write(self, data: bytes, offset: int) -> None:
        if offset < 0:
            raise EngineError(f"writeat {self._path}: negative offset")
        with told("write", self._path):
            view = memoryview(data)
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written

    def _watch(self, group: Context) -> None:
        """Give up attempts of which nothing came for too long."""
        limit = stall_seconds()
        with contextlib.suppress(EngineError):
            while True:
                group.wait(min(1.0, limit / 2))
                now = time.monotonic()
                with self._lock:
                    stalled = [each for each in self._attempts if now - each.heard > limit]
                for attempt in stalled:
                    attempt.context.cancel(StalledError())

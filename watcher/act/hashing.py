"""Learning what a file's content is: hashed on all cores, in big reads, sparing others' page cache.

No lock is held meanwhile and nothing is changed; what was found out goes to the memory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from watcher.model import Action, Entry, Outcome, Result
from watcher.observe import scan
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.state import folders, fs

#: Fits into a core's own cache together with what hashes it.
_READ = 1 << 20
_WATCH_SECONDS = 0.5


@dataclass(slots=True)
class Progress:
    """How far the hashing of many files has come; shared by its threads."""

    total: int
    done: int = 0
    stopped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int) -> None:
        """Note that so many bytes more were read."""
        with self._lock:
            self.done += count


class _StoppedError(Exception):
    """The time is over; the rest comes another time."""


def find_out(store: int, actions: Sequence[Action], host: Host) -> Iterator[Outcome]:
    """Hash each action's one file; its outcome has the hash, as soon as it is there.

    What is not done when `host.stops` has no outcome. `host.watch` is called now and then.
    """
    progress = Progress(sum(action.expects[0].size for action in actions))
    with (
        folders.opened_blobs(store, foreign_too=True) as blobs,
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
    ):

        def over() -> bool:
            return progress.stopped or host.stops()

        try:
            futures = [pool.submit(_outcome, blobs, each, progress, over) for each in actions]
            for future in futures:
                while True:
                    try:
                        outcome = future.result(timeout=_WATCH_SECONDS)
                        break
                    except TimeoutError:
                        host.watch(progress.done, progress.total)
                if outcome is not None:
                    yield outcome
        finally:
            progress.stopped = True


def _outcome(
    blobs: int, action: Action, progress: Progress, over: Callable[[], bool]
) -> Outcome | None:
    entry = action.expects[0]
    if over():
        return None
    try:
        found = _sha256(blobs, entry, progress, over)
    except _StoppedError:
        return None
    except FileNotFoundError:
        found = None
    except _ReadError as error:
        return _unread(action, f"read error at byte {error}")
    except OSError as error:
        return _unread(action, f"it can't be read: {error.strerror}")
    if found is None:
        return Outcome(action, Result.REFUSED, "it has changed meanwhile")
    right = found == action.subject.lower()
    message = (
        "checksum verified" if right else f"checksum mismatch: its hash is {names.short(found)}"
    )
    return Outcome(action, Result.DONE, message, sha256=found)


def _unread(action: Action, why: str) -> Outcome:
    shown = names.printable(action.expects[0].name)
    return Outcome(action, Result.FAILED, f"{shown}: {why}")


class _ReadError(OSError):
    """The disk can't give back a file's bytes; the text is the offset."""


def _sha256(blobs: int, entry: Entry, progress: Progress, over: Callable[[], bool]) -> str | None:
    """The hash of a file's content; None where it is not the one meant, or changed meanwhile."""
    fd = _open(entry.name, blobs)
    try:
        digest, at = hashlib.sha256(), 0
        buffer = memoryview(bytearray(min(_READ, entry.size + 1)))
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while True:
            if over():
                raise _StoppedError
            try:
                count = os.preadv(fd, [buffer], at)
            except OSError:
                raise _ReadError(str(at)) from None
            if not count:
                break
            digest.update(buffer[:count])
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, at, count, os.POSIX_FADV_DONTNEED)
            at += count
            progress.add(count)
        if not os.path.samestat(os.fstat(fd), os.stat(entry.name, dir_fd=blobs)):
            return None
    finally:
        os.close(fd)
    now = scan.content(entry.name, blobs)
    same = now is not None and (now.identity, now.size, now.mtime_ns) == (
        entry.identity,
        entry.size,
        entry.mtime_ns,
    )
    return digest.hexdigest() if same else None


def _open(name: str, blobs: int) -> int:
    """The file that is read under a name; a link is followed, as the server does."""
    try:
        return fs.open_to_read(name, blobs)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return fs.open_behind(name, blobs)

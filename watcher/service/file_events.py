"""What changes in a store's folders, by watchdog, and why there would be no events.

inotify reports names that come, go, are renamed or closed after writing; a running pull's writes
themselves are filtered out in the kernel and cost nothing. What the kernel or watchdog loses (its
queue is full, a thread died, a folder is another one now) is reported as `lost`; then call `watch`
again, and scan everything.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver
from watchdog.utils import BaseThread

from watcher.observe import place
from watcher.ollama import names
from watcher.state import folders, fs
from watcher.state.state_folder import FOLDER
from watcher.system import advice

#: What comes, goes or is replaced: a symlink to a folder is a file here.
_NAMES = [
    *(DirCreatedEvent, DirDeletedEvent, DirMovedEvent),
    *(FileCreatedEvent, FileDeletedEvent, FileMovedEvent),
]
_NAMES_AND_CLOSES = [FileClosedEvent, *_NAMES]
#: How often it is tried again to watch folders that go meanwhile.
_TURNS = 5
_CLOSE_SECONDS = 5.0
#: The limits that inotify meets, by error number; how they are named, and what to set them to.
_LIMITS = {
    errno.ENOSPC: ("max_user_watches", 524288),
    errno.EMFILE: ("max_user_instances", 1024),
}


class Callbacks(NamedTuple):
    """What is called for which event, in threads of watchdog's."""

    #: A name under ``blobs/``, and whether it was closed after writing.
    blob: Callable[[str, bool], None]
    #: Something under ``manifests/``.
    manifests: Callable[[], None]
    #: A folder of the store came, went or was replaced.
    places: Callable[[], None]
    #: Events were lost.
    lost: Callable[[], None]


class FileEvents:
    """The file events of one store, from `watch` to `close`."""

    def __init__(self, store: str, callbacks: Callbacks, proc: str = "/proc") -> None:
        self._store, self._callbacks, self._proc = store, callbacks, proc
        self._observer: BaseObserver | None = None
        self._threads: tuple[threading.Thread, ...] = ()
        self._places: tuple[object, ...] = ()
        #: Folders that are watched besides.
        self._others: dict[str, Callable[[], None]] = {}
        #: Why some events are missing; "" where none are.
        self.blind = ""

    def watch(self) -> None:
        """Watch what is there now of the store, and above it whatever may bring it back."""
        for turn in range(_TURNS):
            self.close()
            # Taken first, so that what changes from here on is seen by `sound` at the latest.
            self._places = self._look()
            try:
                self._start()
            except OSError as error:
                self.close()
                self.blind = f"no file events: {self._why(error)}"
                if isinstance(error, FileNotFoundError | NotADirectoryError) and turn < _TURNS - 1:
                    continue
            else:
                self.blind = self._silent()
            return

    def watch_also(self, folder: str, callback: Callable[[], None]) -> None:
        """Call it, in another thread, when a file in a folder was closed after writing.

        That names no scope. It may be missed where there are no events, or events were lost.
        """
        if folder not in self._others:
            self._others[folder] = callback
            self.watch()

    def sound(self) -> bool:
        """Whether what is watched is what is there, and all of watchdog's threads are alive."""
        alive = all(thread.is_alive() for thread in self._threads)
        return alive and self._places == self._look()

    def close(self) -> None:
        """Report nothing more."""
        observer, self._observer, self._threads = self._observer, None, ()
        if observer is not None:
            # In a thread of its own: one of watchdog's that has died may have kept a lock.
            closing = threading.Thread(target=_end, args=(observer,), daemon=True)
            closing.start()
            closing.join(_CLOSE_SECONDS)

    # ------------------------------------------------------------ what to watch

    def _look(self) -> tuple[object, ...]:
        """What stands for each folder, and for those above it."""
        paths = self._paths()
        watched = sorted({*paths, *_above(paths), *self._others})
        return tuple((path, _identity(path)) for path in watched)

    def _paths(self) -> set[str]:
        """Where the store's folders are: every symlink on the way to them, and their end."""
        folder, name = os.path.split(self._store)
        store = os.path.join(os.path.realpath(folder), name)
        real = os.path.realpath(store)
        inside = {os.path.join(real, name) for name in ("blobs", "manifests")}
        return {store, real, *inside, *map(os.path.realpath, inside)}

    def _start(self) -> None:
        """Raises OSError where there are no events."""
        before = set(threading.enumerate())
        self._observer = observer = Observer()
        observer.start()
        # The many come first: watchdog passes over what it can't watch below a folder, but where
        # the limit was reached there the next one raises.
        for name, callback in (("manifests", self._on_manifests), ("blobs", self._on_blobs)):
            path = os.path.realpath(os.path.join(self._store, name))
            if os.path.isdir(path):
                self._schedule(path, callback, _NAMES_AND_CLOSES, recursive=name == "manifests")
        for path, notify in self._others.items():
            if os.path.isdir(path):
                self._schedule(path, partial(_call, notify), [FileClosedEvent])
        paths = self._paths()
        for above in _above(paths):
            # Without these the next full scan finds a folder that was recreated.
            if os.access(above, os.R_OK) or not os.path.isdir(self._store):
                self._schedule(above, partial(self._on_above, paths), _NAMES)
        self._threads = tuple(
            thread
            for thread in threading.enumerate()
            if isinstance(thread, BaseThread) and thread not in before
        )

    def _schedule(
        self,
        path: str,
        callback: Callable[[FileSystemEvent], None],
        kinds: list[type[FileSystemEvent]],
        *,
        recursive: bool = False,
    ) -> None:
        assert self._observer is not None
        if not os.access(path, os.R_OK):  # watchdog would take it for watched
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        self._observer.schedule(_Handler(callback), path, recursive=recursive, event_filter=kinds)

    # ------------------------------------------------------------ events

    def _on_blobs(self, event: FileSystemEvent) -> None:
        for path in _paths(event):
            self._callbacks.blob(os.path.basename(path), isinstance(event, FileClosedEvent))

    def _on_manifests(self, event: FileSystemEvent) -> None:
        if isinstance(event, DirCreatedEvent | DirMovedEvent):
            # watchdog doesn't report whether it could watch a new folder, and where folders come
            # and go quickly its books fall into disorder.
            self._callbacks.places()
        self._callbacks.manifests()

    def _on_above(self, ours: Iterable[str], event: FileSystemEvent) -> None:
        # Of our own folder only its end counts: the daemon's lock goes with it.
        ends = isinstance(event, DirDeletedEvent | DirMovedEvent)
        if ends and os.path.basename(os.fsdecode(event.src_path)) == FOLDER:
            self._callbacks.places()
        if any(f"{our}/".startswith(f"{path}/") for our in ours for path in _paths(event)):
            self._callbacks.places()

    # ------------------------------------------------------------ why there are no events

    def _why(self, error: OSError) -> str:
        if error.errno not in _LIMITS:
            where = f"{names.printable(str(error.filename))}: " if error.filename else ""
            return f"{where}{error.strerror}"
        limit, more = _LIMITS[error.errno]
        now = ""
        with contextlib.suppress(OSError), open(f"{self._proc}/sys/fs/inotify/{limit}") as file:
            now = f" = {file.read().strip()}"
        limit = f"fs.inotify.{limit}"
        command = advice.as_root("sysctl", "-w", f"{limit}={more}")
        return f"the limit {limit}{now} is reached; raise it: {command}"

    def _silent(self) -> str:
        if folders.begins_further_on(self._store):
            shown = names.printable(self._store)
            return f"the owner of {shown} can't reach it, so there are no file events"
        for name in ("", "blobs", "manifests"):
            path = os.path.join(self._store, name).rstrip("/")
            kind = place.silent(path, self._proc)
            if kind:
                shown = names.printable(path)
                return f"{shown} is on {kind}, which reports no events of other machines"
        return ""


def _end(observer: BaseObserver) -> None:
    """End all threads. A watch whose books are in disorder raises, and is passed the next time."""
    for _ in range(len(observer.emitters) + 1):
        with contextlib.suppress(KeyError, OSError, RuntimeError):
            observer.stop()
            observer.join()
            return


class _Handler(FileSystemEventHandler):
    def __init__(self, callback: Callable[[FileSystemEvent], None]) -> None:
        self._callback = callback

    def on_any_event(self, event: FileSystemEvent) -> None:
        self._callback(event)


def _call(callback: Callable[[], None], _: FileSystemEvent) -> None:
    callback()


def _paths(event: FileSystemEvent) -> list[str]:
    return [os.fsdecode(path) for path in (event.src_path, event.dest_path) if path]


def _above(paths: Iterable[str]) -> set[str]:
    """For each path the nearest folder above it that is there."""
    found: set[str] = set()
    for path in paths:
        above = os.path.dirname(path)
        while not os.path.isdir(above):
            above = os.path.dirname(above)
        found.add(above)
    return found


def _identity(path: str) -> tuple[int, int, int] | None:
    """Device, inode and birth: a recreated folder often gets the old one's inode."""
    try:
        with fs.opened_folder(path) as folder:
            status = os.fstat(folder)
            return status.st_dev, status.st_ino, fs.born(".", folder)
    except OSError:
        return None


class _Complaints(logging.Handler):
    """What watchdog logs; it reports a full queue nowhere else."""

    def __init__(self, lost: Callable[[], None]) -> None:
        super().__init__(logging.WARNING)
        self._lost = lost

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "watchdog.observers.inotify_c":
            self._lost()


@contextlib.contextmanager
def complaints(lost: Callable[[], None]) -> Iterator[None]:
    """Catch what goes wrong in watchdog's threads, and keep it from stderr.

    `lost` is called from those threads: their queue was full, or one of them died. For the
    whole process, so for one at a time.
    """
    before = threading.excepthook

    def died(died: threading.ExceptHookArgs) -> None:
        if isinstance(died.thread, BaseThread):
            lost()
        else:
            before(died)

    handler = _Complaints(lost)
    logger = logging.getLogger("watchdog")
    with warnings.catch_warnings():
        # It warns of its own books where folders come and go quickly; as an error that would end
        # its thread.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"watchdog\.")
        logger.addHandler(handler)
        threading.excepthook = died
        try:
            yield
        finally:
            threading.excepthook = before
            logger.removeHandler(handler)

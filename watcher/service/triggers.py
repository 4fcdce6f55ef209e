"""When to scan what: file events and deadlines as one iterator of scopes.

Events are gathered for a moment, so that one scan serves many. Where there are none, or some may be
missed, scans come at intervals instead. All waiting is by the monotonic clock, so that a wall clock
that jumps delays nothing. What the kernel or watchdog loses (its queue is full, a thread died, a
folder is another one now) starts watching again, and a full scan.
"""

import contextlib
import errno
import logging
import math
import os
import select
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Self

from watchdog import events
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver
from watchdog.utils import BaseThread

from watcher.model import Due
from watcher.observe import place
from watcher.ollama import names
from watcher.state import folders, fs
from watcher.state.state_folder import FOLDER
from watcher.system import advice

FULL_SECONDS = 600.0  #: a full scan, whatever the events
BLIND_SECONDS = 30.0  #: the same where there are no events, or not all
#: Events are gathered until none has come for the pause, and no longer than the maximum.
PAUSE_SECONDS = 0.02
MOST_SECONDS = 0.25
SIDECAR_SECONDS = 5.0
AGAIN_SECONDS = 1.0  #: a scan that failed is repeated after this, and one looks for what was missed
MOST_DIGESTS = 1000  #: so many digests at once are worth a full scan, and no more are remembered

#: What comes, goes or is replaced: a symlink to a folder is a file here.
_NAMES = [
    *(events.DirCreatedEvent, events.DirDeletedEvent, events.DirMovedEvent),
    *(events.FileCreatedEvent, events.FileDeletedEvent, events.FileMovedEvent),
]
_NAMES_AND_CLOSES = [events.FileClosedEvent, *_NAMES]
_TURNS = 5  #: how often it is tried again to watch folders that go meanwhile
_CLOSE_SECONDS = 5.0
#: The limits that inotify meets, by error number; how they are named, and what to set them to.
_LIMITS = {errno.ENOSPC: ("max_user_watches", 524288), errno.EMFILE: ("max_user_instances", 1024)}

#: What is called with an event, and the kinds of events that it is called with.
Notify = Callable[[events.FileSystemEvent], None]
Kinds = list[type[events.FileSystemEvent]]
Digest = frozenset[str]  #: of one layer
Digests = frozenset[str] | None  #: what to scan: some digests, or None for the whole store


class Triggers:
    """An iterator of scopes over one store; ends after `stop`.

    The first scope is the whole store. `deadlines` is called with what is due by a plan. Calls
    from other threads and from signal handlers only add to a set, set a flag and send a wakeup;
    each is one step for the interpreter, and waits for no lock.
    """

    def __init__(
        self, store: str, proc: str = "/proc", named: Callable[[Digest], None] = lambda _: None
    ) -> None:
        """`named` is called, in another thread, when a pull gives a layer its name."""
        #: Where they are blind, scans come at intervals. Watching is tried again at each full scan.
        self.events = FileEvents(store, self, proc)
        self._proc, self._named = proc, named
        self._open = contextlib.ExitStack()
        self._wakeup, self._sender = socket.socketpair()
        for end in (self._wakeup, self._sender):
            end.setblocking(False)
        self._poll = select.poll()
        self._due: dict[str, float] = {}  #: when which digest is due, on the monotonic clock
        self._full_at = 0.0
        #: Whether watching must start again then, and when it last did since events were lost.
        self._anew = True
        self._rewatched_at = -math.inf
        self._stopped = False
        # What was reported, and not yet taken up by the iteration.
        self._digests: set[str] = set()
        self._sidecars: set[str] = set()
        self._all = self._moved = self._lost = False
        self._ended: set[str] = set()  #: data closed after writing: not taken up yet
        self._asked: frozenset[str] = frozenset()

    def __enter__(self) -> Self:
        self._open.enter_context(self._wakeup)
        self._open.enter_context(self._sender)
        self._poll.register(self._wakeup, select.POLLIN)
        with contextlib.suppress(OSError):
            # The kernel reports mounts by it; no file event does.
            mounts = self._open.enter_context(open(f"{self._proc}/self/mountinfo", "rb"))
            self._poll.register(mounts, select.POLLPRI)
        self._open.enter_context(complaints(self.on_lost))
        self._open.callback(self.events.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def stop(self) -> None:
        """End the iteration. Safe in a signal handler and in any thread."""
        self._stopped = True
        self._wake()

    def is_stopped(self) -> bool:
        return self._stopped

    def wake(self, scope: Digests) -> None:
        """Scan a scope soon. Safe in a signal handler and in any thread."""
        if scope is None:
            self._all = True
        else:
            self._digests |= scope
        self._wake()

    def deadlines(self, scope: Digests, due: Iterable[Due]) -> None:
        """Remember when which digest of a scope is due, in place of what was due of it before."""
        for digest in list(self._due) if scope is None else scope:
            self._due.pop(digest, None)
        self._asked = frozenset()
        ahead = time.monotonic() - time.time()
        for each in due:
            self._at(each.digest, each.at + ahead)

    def again(self, scope: Digests) -> None:
        """Scan a scope again soon: this time the scan failed."""
        soon = time.monotonic() + AGAIN_SECONDS
        if scope is None:
            self._full_at = min(self._full_at, soon)
        for digest in scope or ():
            self._at(digest, soon)
        self._ended |= self._asked
        self._asked = frozenset()

    def ended(self) -> frozenset[str]:
        """The digests whose data file was closed after writing, since the last call."""
        self._asked = frozenset(_taken(self._ended))
        return self._asked

    def __iter__(self) -> Iterator[Digests]:
        while not self._stopped:
            if self._full_at <= time.monotonic():
                if self._anew or self.events.blind or not self.events.sound():
                    self._anew = False
                    self.events.watch()
                interval = BLIND_SECONDS if self.events.blind else FULL_SECONDS
                self._full_at = time.monotonic() + interval
                yield None
                continue
            scope = self._gather()
            if scope is None:
                self._full_at = 0.0
            elif scope:
                yield scope

    def on_blob(self, name: str, closed: bool) -> None:
        """A name under ``blobs/``, and whether it was closed after writing."""
        parsed = names.parse_blob(name)
        if not parsed.digest:
            return
        is_data = parsed.role in (names.Role.DATA, names.Role.TRANSFER)
        if closed and is_data and len(self._ended) < MOST_DIGESTS:
            self._ended.add(parsed.digest)
        # A pull writes progress files by the dozen; its data file reports what matters, too.
        digests = self._sidecars if parsed.role is names.Role.SIDECAR else self._digests
        digests.add(parsed.digest)
        if len(digests) > MOST_DIGESTS:
            self._all = True
            digests.clear()
        self._wake()

    def on_moved(self, name: str, to: str) -> None:
        """A name under ``blobs/`` has become another one."""
        before, after = names.parse_blob(name), names.parse_blob(to)
        if (before.role, after.role) == (names.Role.DATA, names.Role.BLOB):
            self._named(frozenset({after.digest}))

    def on_places(self) -> None:
        """A folder of the store came, went or was replaced."""
        self._moved = True
        self._wake()

    def on_lost(self) -> None:
        self._lost = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # a wakeup waits already, or nobody is left to take it
            self._sender.send(b"\0")

    def _gather(self) -> Digests:
        """Wait for the first event or deadline, and gather what follows; empty: nothing to do."""
        until = min([self._full_at, *self._due.values()])
        last = math.inf
        while not self._stopped and self._woken(until):
            now = time.monotonic()
            last = min(last, now + MOST_SECONDS)
            until = min(last, now + PAUSE_SECONDS)
            if until <= now:
                break
        now = time.monotonic()
        if self._lost:
            self._lost = False
            self._anew = True
            # Soon, but not over and over where much is lost for long.
            soon = max(now + AGAIN_SECONDS, self._rewatched_at + BLIND_SECONDS)
            self._full_at = self._rewatched_at = min(self._full_at, soon)
        for digest in _taken(self._sidecars):
            self._at(digest, now + SIDECAR_SECONDS)
        digests = _taken(self._digests)
        for digest in [digest for digest, at in self._due.items() if at <= now]:
            del self._due[digest]
            digests.add(digest)
        if self._moved or self._all:
            self._anew |= self._moved
            self._moved = self._all = False
            return None
        return frozenset(digests)

    def _woken(self, until: float) -> bool:
        """Wait for a wakeup, or for a mount that changes what is there; False: none till then."""
        woken = False
        while not woken:
            wait = max(0.0, until - time.monotonic())
            ready = self._poll.poll(math.ceil(wait * 1000))
            if not ready:
                return False
            for fd, _ in ready:
                if fd == self._wakeup.fileno():
                    woken = True
                    with contextlib.suppress(BlockingIOError):
                        self._wakeup.recv(1 << 16)
                elif not self.events.sound():
                    woken = self._moved = True
        return True

    def _at(self, digest: str, at: float) -> None:
        self._due[digest] = min(at, self._due.get(digest, at))


def _taken(found: set[str]) -> set[str]:
    """Take everything out of a set that others add to meanwhile."""
    taken: set[str] = set()
    with contextlib.suppress(KeyError):
        while True:
            taken.add(found.pop())
    return taken


class FileEvents:
    """The file events of one store by watchdog, from `watch` to `close`."""

    def __init__(self, store: str, triggers: Triggers, proc: str) -> None:
        self._store, self._triggers, self._proc = store, triggers, proc
        self._observer: BaseObserver | None = None
        self._threads: tuple[threading.Thread, ...] = ()
        self._places: tuple[object, ...] = ()
        self._others: dict[str, Notify] = {}  #: more folders
        self.blind = ""  #: why some events are missing; "" where none are

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

    def watch_also(self, folder: str, callback: Notify) -> None:
        """Call it, in another thread, when a file in a folder was closed, if that event arrives."""
        if folder not in self._others:
            self._others[folder] = callback
            self.watch()

    def sound(self) -> bool:
        """Whether what is watched is what is there, and all of watchdog's threads are alive."""
        alive = all(thread.is_alive() for thread in self._threads)
        return alive and self._places == self._look()

    def close(self) -> None:
        observer, self._observer, self._threads = self._observer, None, ()
        if observer is not None:
            # In a thread of its own: one of watchdog's that has died may have kept a lock.
            closing = threading.Thread(target=_end, args=(observer,), daemon=True)
            closing.start()
            closing.join(_CLOSE_SECONDS)

    def _look(self) -> tuple[object, ...]:
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
                self._schedule(path, callback, _NAMES_AND_CLOSES, deep=name == "manifests")
        for path, notify in self._others.items():
            if os.path.isdir(path):
                self._schedule(path, notify, [events.FileClosedEvent])
        paths = self._paths()
        for above in _above(paths):
            # Without these the next full scan finds a folder that was recreated.
            if os.access(above, os.R_OK) or not os.path.isdir(self._store):
                self._schedule(above, partial(self._on_above, paths), _NAMES)
        # One may have ended by now: its folder went at once, and a new one can look the same.
        begun = {*threading.enumerate(), *observer.emitters} - before
        self._threads = tuple(thread for thread in begun if isinstance(thread, BaseThread))

    def _schedule(self, path: str, notify: Notify, kinds: Kinds, *, deep: bool = False) -> None:
        assert self._observer is not None
        if not os.access(path, os.R_OK):  # watchdog would take it for watched
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        self._observer.schedule(_Handler(notify), path, recursive=deep, event_filter=kinds)

    def _on_blobs(self, event: events.FileSystemEvent) -> None:
        if isinstance(event, events.FileMovedEvent):
            self._triggers.on_moved(*map(os.path.basename, _paths(event)))
        closed = isinstance(event, events.FileClosedEvent)
        for path in _paths(event):
            self._triggers.on_blob(os.path.basename(path), closed)

    def _on_manifests(self, event: events.FileSystemEvent) -> None:
        if isinstance(event, events.DirCreatedEvent | events.DirMovedEvent):
            # watchdog doesn't report whether it could watch a new folder, and where folders come
            # and go quickly its books fall into disorder.
            self._triggers.on_places()
        self._triggers.wake(None)  # a pull ends, or a model goes: it may be about any digest

    def _on_above(self, ours: Iterable[str], event: events.FileSystemEvent) -> None:
        # Of our own folder only its end counts: the daemon's lock goes with it.
        ends = isinstance(event, events.DirDeletedEvent | events.DirMovedEvent)
        if ends and os.path.basename(os.fsdecode(event.src_path)) == FOLDER:
            self._triggers.on_places()
        if any(f"{our}/".startswith(f"{path}/") for our in ours for path in _paths(event)):
            self._triggers.on_places()

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


class _Handler(events.FileSystemEventHandler):
    def __init__(self, callback: Notify) -> None:
        self._callback = callback

    def on_any_event(self, event: events.FileSystemEvent) -> None:
        self._callback(event)


def _paths(event: events.FileSystemEvent) -> list[str]:
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


@contextlib.contextmanager
def complaints(lost: Callable[[], None]) -> Iterator[None]:
    """Keep what watchdog's threads report from stderr; call `lost` where events are lost."""
    before = threading.excepthook

    def died(died: threading.ExceptHookArgs) -> None:
        if isinstance(died.thread, BaseThread):
            lost()
        else:
            before(died)

    def overflowed(_: logging.LogRecord) -> bool:
        lost()
        return False

    handler = logging.NullHandler()
    logger, inotify = map(logging.getLogger, ("watchdog", "watchdog.observers.inotify_c"))
    with warnings.catch_warnings():
        # It warns of its own books where folders come and go quickly; as an error that would end
        # its thread.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"watchdog\.")
        logger.addHandler(handler)
        inotify.addFilter(overflowed)  # a full queue is reported nowhere else
        threading.excepthook = died
        try:
            yield
        finally:
            threading.excepthook = before
            inotify.removeFilter(overflowed)
            logger.removeHandler(handler)

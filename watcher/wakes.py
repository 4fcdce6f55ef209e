"""When to look, and at what: file events and deadlines as one iterator of scopes.

inotify tells of names that come, go, are renamed or closed after writing; a running pull's writes
themselves are filtered out in the kernel and cost nothing. Events are gathered for a moment, so
that one look serves many. Where inotify can't be had, looks come at intervals instead.
"""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

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

from watcher import names
from watcher.model import Due

#: A full look, whatever the events say.
FULL_SECONDS = 600.0
#: The same where there are no events.
BLIND_SECONDS = 30.0
#: Events are gathered until none has come for the pause, and no longer than the maximum.
PAUSE_SECONDS = 0.02
SIDECAR_SECONDS = 5.0
#: What could not be looked at is tried again after this.
AGAIN_SECONDS = 1.0
MOST_SECONDS = 0.25

_FOLDERS = [DirCreatedEvent, DirDeletedEvent, DirMovedEvent]
_FILES = [FileClosedEvent, FileCreatedEvent, FileDeletedEvent, FileMovedEvent]

#: What is worth a look: some digests, or None for the whole store.
Scope = frozenset[str] | None


@dataclass(slots=True)
class _News:
    """What the events of a moment come to."""

    digests: set[str] = field(default_factory=set)
    manifests_changed: bool = False
    #: The store, ``blobs`` or ``manifests`` themselves are gone, new or replaced.
    folders_changed: bool = False


class Wakes(FileSystemEventHandler):
    """An iterator of scopes over one store; ends after `stop`.

    The first scope is the whole store. `deadlines` is called with what a plan says is due.
    """

    def __init__(self, store: str) -> None:
        self._store = store
        self._inbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._observer = Observer()
        self._due: dict[str, float] = {}
        self._stopped = False
        self._ended: set[str] = set()
        #: When the next full look is due, on the monotonic clock.
        self._full_at = 0.0
        #: Why there are no events; "" where there are.
        self.blind = ""

    def __enter__(self) -> Self:
        self._observer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._observer.stop()
        self._observer.join()

    def stop(self) -> None:
        """End the iteration. Safe in a signal handler."""
        self._stopped = True
        self._inbox.put(None)

    def look_at_all(self) -> None:
        """Look at the whole store at once. Safe in a signal handler."""
        self._full_at = 0.0
        self._inbox.put(None)

    def deadlines(self, scope: Scope, due: Iterable[Due]) -> None:
        """Remember when which digest of a scope is due, in place of what was due of it before."""
        for digest in list(self._due) if scope is None else scope:
            self._due.pop(digest, None)
        for each in due:
            self._due[each.digest] = min(each.at, self._due.get(each.digest, each.at))

    def again(self, scope: Scope) -> None:
        """Look at a scope again soon: this time it could not be looked at."""
        soon = time.time() + AGAIN_SECONDS
        if scope is None:
            self._full_at = min(self._full_at, time.monotonic() + AGAIN_SECONDS)
        for digest in scope or ():
            self._due[digest] = min(soon, self._due.get(digest, soon))

    def __iter__(self) -> Iterator[Scope]:
        self._arm()
        while not self._stopped:
            if self._full_at <= time.monotonic():
                interval = BLIND_SECONDS if self.blind else FULL_SECONDS
                self._full_at = time.monotonic() + interval
                yield None
                continue
            news = self._gather(self._full_at - time.monotonic())
            if news.folders_changed:
                self._arm()
            if news.folders_changed or news.manifests_changed:
                self._full_at = 0.0
            elif news.digests:
                yield frozenset(news.digests)

    def ended(self) -> frozenset[str]:
        """The digests whose data file somebody has closed after writing, since this was asked."""
        ended, self._ended = frozenset(self._ended), set()
        return ended

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Called by watchdog's thread."""
        if isinstance(event, FileClosedEvent):
            parsed = names.parse_blob(os.path.basename(os.fsdecode(event.src_path)))
            if parsed.role in (names.Role.DATA, names.Role.TRANSFER):
                self._ended.add(parsed.digest)
        self._inbox.put(os.fsdecode(event.src_path))
        if event.dest_path:
            self._inbox.put(os.fsdecode(event.dest_path))

    # ------------------------------------------------------------ waiting

    def _gather(self, wait: float) -> _News:
        """Wait for the first event or deadline, `wait` seconds at most, and gather what follows."""
        if self._due:
            wait = min(wait, max(0.0, min(self._due.values()) - time.time()))
        news = _News()
        until = None
        while wait >= 0 and not self._stopped:
            try:
                path = self._inbox.get(timeout=wait)
            except queue.Empty:
                break
            if path is not None:
                self._note(path, news)
            now = time.monotonic()
            until = until or now + MOST_SECONDS
            wait = min(PAUSE_SECONDS, until - now)
        now = time.time()
        for digest in [digest for digest, at in self._due.items() if at <= now]:
            del self._due[digest]
            news.digests.add(digest)
        return news

    def _note(self, path: str, news: _News) -> None:
        inside = os.path.relpath(path, self._store).split(os.sep)
        if len(inside) == 2 and inside[0] == "blobs":
            parsed = names.parse_blob(inside[1])
            if parsed.role is names.Role.SIDECAR:
                # A pull writes them by the dozen; what matters of it, its data file tells, too.
                later = time.time() + SIDECAR_SECONDS
                self._due[parsed.digest] = min(later, self._due.get(parsed.digest, later))
            elif parsed.digest:
                news.digests.add(parsed.digest)
        elif len(inside) > 1 and inside[0] == "manifests":
            # It ends a pull, or takes a model away: any digest may be concerned.
            news.manifests_changed = True
        elif inside in (["."], ["blobs"], ["manifests"]) or self._store.startswith(f"{path}/"):
            news.folders_changed = True

    # ------------------------------------------------------------ watches

    def _arm(self) -> None:
        """Watch what is there of the store, and above it whatever may bring it back."""
        self._observer.unschedule_all()
        self.blind = ""
        try:
            above = os.path.dirname(self._store)
            while not os.path.isdir(above):
                above = os.path.dirname(above)
            self._watch(above, _FOLDERS)
            if os.path.isdir(self._store):
                self._watch(self._store, _FOLDERS)
            for name, recursive in (("blobs", False), ("manifests", True)):
                path = os.path.join(self._store, name)
                if os.path.isdir(path):
                    kinds = [*_FILES, *_FOLDERS] if recursive else _FILES
                    self._watch(path, kinds, recursive=recursive)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._observer.unschedule_all()
            self.blind = f"no file events to be had: {error.strerror}"

    def _watch(
        self, path: str, kinds: list[type[FileSystemEvent]], *, recursive: bool = False
    ) -> None:
        self._observer.schedule(self, path, recursive=recursive, event_filter=kinds)

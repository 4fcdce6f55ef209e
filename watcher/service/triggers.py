"""When to scan what: file events and deadlines as one iterator of scopes.

Events are gathered for a moment, so that one scan serves many. Where there are none, or some may be
missed, scans come at intervals instead. All waiting is by the monotonic clock, so that a wall clock
that jumps delays nothing. It stands still while the machine is suspended, and the next full scan
finds what is overdue then.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Self

from watcher.model import Due
from watcher.ollama import names
from watcher.service.file_events import Callbacks, FileEvents, complaints

#: A full scan, whatever the events say.
FULL_SECONDS = 600.0
#: The same where there are no events, or not all.
BLIND_SECONDS = 30.0
#: Events are gathered until none has come for the pause, and no longer than the maximum.
PAUSE_SECONDS = 0.02
MOST_SECONDS = 0.25
SIDECAR_SECONDS = 5.0
#: A scan that failed is repeated after this, and one looks for what was missed.
AGAIN_SECONDS = 1.0
#: So many digests at once are worth a full scan, and no more are remembered.
MOST_DIGESTS = 1000

#: What to scan: some digests, or None for the whole store.
Digests = frozenset[str] | None


class Triggers:
    """An iterator of scopes over one store; ends after `stop`.

    The first scope is the whole store. `deadlines` is called with what a plan says is due. Calls
    from other threads and from signal handlers only add to a set, set a flag and send a wakeup;
    each is one step for the interpreter, and waits for no lock.
    """

    def __init__(self, store: str, proc: str = "/proc") -> None:
        callbacks = Callbacks(self._on_blob, self._on_manifests, self._on_places, self._on_lost)
        #: Where they are blind, scans come at intervals. Watching is tried again at each full scan.
        self.events = FileEvents(store, callbacks, proc)
        self._proc = proc
        self._open = contextlib.ExitStack()
        self._wakeup, self._sender = socket.socketpair()
        for end in (self._wakeup, self._sender):
            end.setblocking(False)
        self._poll = select.poll()
        #: When which digest is due, and when the next full scan is, on the monotonic clock.
        self._due: dict[str, float] = {}
        self._full_at = 0.0
        #: Whether watching must start again then, and when it last did since events were lost.
        self._anew = True
        self._rewatched_at = -math.inf
        self._stopped = False
        # What was reported, and not yet taken up by the iteration.
        self._digests: set[str] = set()
        self._sidecars: set[str] = set()
        self._all = self._moved = self._lost = False
        #: Digests whose data was closed after writing: not yet taken, and last taken.
        self._ended: set[str] = set()
        self._asked: frozenset[str] = frozenset()

    def __enter__(self) -> Self:
        self._open.enter_context(self._wakeup)
        self._open.enter_context(self._sender)
        self._poll.register(self._wakeup, select.POLLIN)
        with contextlib.suppress(OSError):
            # The kernel reports mounts by it; no file event does.
            mounts = self._open.enter_context(open(f"{self._proc}/self/mountinfo", "rb"))
            self._poll.register(mounts, select.POLLPRI)
        self._open.enter_context(complaints(self._on_lost))
        self._open.callback(self.events.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def stop(self) -> None:
        """End the iteration. Safe in a signal handler and in any thread."""
        self._stopped = True
        self._wake()

    def is_stopped(self) -> bool:
        """Whether the iteration is to end."""
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

    # ------------------------------------------------------------ from other threads

    def _on_blob(self, name: str, closed: bool) -> None:
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

    def _on_manifests(self) -> None:
        # It ends a pull, or removes a model: any digest may be concerned.
        self._all = True
        self._wake()

    def _on_places(self) -> None:
        self._moved = True
        self._wake()

    def _on_lost(self) -> None:
        self._lost = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # a wakeup waits already, or nobody is left to take it
            self._sender.send(b"\0")

    # ------------------------------------------------------------ waiting

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

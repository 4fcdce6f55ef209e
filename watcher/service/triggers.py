"""When to look, and at what: file events and deadlines as one iterator of scopes.

Events are gathered for a moment, so that one look serves many. Where none come, and where some may
be missed, looks come at intervals instead. All waiting is by the monotonic clock, so that a wall
clock that jumps puts nothing off; it stands still while the machine is suspended, and what has
fallen due meanwhile is then found by the next full look.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from watcher.model import Due
from watcher.ollama import names
from watcher.service.file_events import Ears, FileEvents, complaints

#: A full look, whatever the events say.
FULL_SECONDS = 600.0
#: The same where there are no events, or not all.
BLIND_SECONDS = 30.0
#: Events are gathered until none has come for the pause, and no longer than the maximum.
PAUSE_SECONDS = 0.02
MOST_SECONDS = 0.25
SIDECAR_SECONDS = 5.0
#: What could not be looked at is tried again after this, and what was missed is looked for.
AGAIN_SECONDS = 1.0
#: So many digests at once are worth a full look, and no more are kept in mind.
MOST_DIGESTS = 1000

#: What is worth a look: some digests, or None for the whole store.
Digests = frozenset[str] | None


class Triggers:
    """An iterator of scopes over one store; ends after `stop`.

    The first scope is the whole store. `deadlines` is called with what a plan says is due. What is
    told from other threads and from signal handlers only adds to a set, sets a flag and rings a
    bell; each of that is one step for the interpreter, and no lock is waited for.
    """

    def __init__(self, store: str, proc: str = "/proc") -> None:
        ears = Ears(self._on_blob, self._on_manifests, self._on_places, self._on_lost)
        self._events = FileEvents(store, ears, proc)
        self._proc = proc
        self._open = contextlib.ExitStack()
        self._bell, self._ringer = socket.socketpair()
        for end in (self._bell, self._ringer):
            end.setblocking(False)
        self._poll = select.poll()
        #: When which digest is due, and when the next full look is, on the monotonic clock.
        self._due: dict[str, float] = {}
        self._full_at = 0.0
        #: Whether it has to be watched anew then, and when that was last so since events were lost.
        self._anew = True
        self._mended_at = -math.inf
        self._stopped = False
        # What was told, and not yet taken up by the iteration.
        self._digests: set[str] = set()
        self._sidecars: set[str] = set()
        self._all = self._moved = self._lost = False
        #: Digests whose data was closed after writing: not yet asked for, and last asked for.
        self._ended: set[str] = set()
        self._asked: frozenset[str] = frozenset()

    @property
    def blind(self) -> str:
        """Why there are no events, or not all, so that looks come at intervals; "" where all come.

        Watching is tried anew at each full look, so this changes.
        """
        return self._events.blind

    def __enter__(self) -> Self:
        self._open.enter_context(self._bell)
        self._open.enter_context(self._ringer)
        self._poll.register(self._bell, select.POLLIN)
        with contextlib.suppress(OSError):
            # The kernel tells by it that something was mounted or unmounted; no event does.
            mounts = self._open.enter_context(open(f"{self._proc}/self/mountinfo", "rb"))
            self._poll.register(mounts, select.POLLPRI)
        self._open.enter_context(complaints(self._on_lost))
        self._open.callback(self._events.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def stop(self) -> None:
        """End the iteration. Safe in a signal handler and in any thread."""
        self._stopped = True
        self._ring()

    def is_stopped(self) -> bool:
        """Whether the iteration is to end."""
        return self._stopped

    def wake(self, scope: Digests) -> None:
        """Look at a scope soon. Safe in a signal handler and in any thread."""
        if scope is None:
            self._all = True
        else:
            self._digests |= scope
        self._ring()

    def hear(self, folder: str, hear: Callable[[], None]) -> None:
        """Call `hear`, in another thread, when a file in a folder was closed after writing.

        That names no scope. It may be missed where there are no events, or events were lost.
        """
        self._events.watch_also(folder, hear)

    def deadlines(self, scope: Digests, due: Iterable[Due]) -> None:
        """Remember when which digest of a scope is due, in place of what was due of it before."""
        for digest in list(self._due) if scope is None else scope:
            self._due.pop(digest, None)
        self._asked = frozenset()
        ahead = time.monotonic() - time.time()
        for each in due:
            self._at(each.digest, each.at + ahead)

    def again(self, scope: Digests) -> None:
        """Look at a scope again soon: this time it could not be looked at."""
        soon = time.monotonic() + AGAIN_SECONDS
        if scope is None:
            self._full_at = min(self._full_at, soon)
        for digest in scope or ():
            self._at(digest, soon)
        self._ended |= self._asked
        self._asked = frozenset()

    def ended(self) -> frozenset[str]:
        """The digests whose data file somebody has closed after writing, since this was asked."""
        self._asked = frozenset(_taken(self._ended))
        return self._asked

    def __iter__(self) -> Iterator[Digests]:
        while not self._stopped:
            if self._full_at <= time.monotonic():
                if self._anew or self.blind or not self._events.sound():
                    self._anew = False
                    self._events.watch()
                interval = BLIND_SECONDS if self.blind else FULL_SECONDS
                self._full_at = time.monotonic() + interval
                yield None
                continue
            scope = self._gather()
            if scope is None:
                self._full_at = 0.0
            elif scope:
                yield scope

    # ------------------------------------------------------------ told by others

    def _on_blob(self, name: str, closed: bool) -> None:
        parsed = names.parse_blob(name)
        if not parsed.digest:
            return
        is_data = parsed.role in (names.Role.DATA, names.Role.TRANSFER)
        if closed and is_data and len(self._ended) < MOST_DIGESTS:
            self._ended.add(parsed.digest)
        # A pull writes sidecars by the dozen; what matters of it, its data file tells, too.
        told = self._sidecars if parsed.role is names.Role.SIDECAR else self._digests
        told.add(parsed.digest)
        if len(told) > MOST_DIGESTS:
            self._all = True
            told.clear()
        self._ring()

    def _on_manifests(self) -> None:
        # It ends a pull, or takes a model away: any digest may be concerned.
        self._all = True
        self._ring()

    def _on_places(self) -> None:
        self._moved = True
        self._ring()

    def _on_lost(self) -> None:
        self._lost = True
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # it rings already, or there is nobody left to hear it
            self._ringer.send(b"\0")

    # ------------------------------------------------------------ waiting

    def _gather(self) -> Digests:
        """Wait for the first event or deadline, and gather what follows; empty: nothing to do."""
        until = min([self._full_at, *self._due.values()])
        last = math.inf
        while not self._stopped and self._rung(until):
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
            soon = max(now + AGAIN_SECONDS, self._mended_at + BLIND_SECONDS)
            self._full_at = self._mended_at = min(self._full_at, soon)
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

    def _rung(self, until: float) -> bool:
        """Wait for the bell, or for a mount that changes what is there; False: none till then."""
        rung = False
        while not rung:
            wait = max(0.0, until - time.monotonic())
            told = self._poll.poll(math.ceil(wait * 1000))
            if not told:
                return False
            for fd, _ in told:
                if fd == self._bell.fileno():
                    rung = True
                    with contextlib.suppress(BlockingIOError):
                        self._bell.recv(1 << 16)
                elif not self._events.sound():
                    rung = self._moved = True
        return True

    def _at(self, digest: str, at: float) -> None:
        self._due[digest] = min(at, self._due.get(digest, at))


def _taken(told: set[str]) -> set[str]:
    """Take everything out of a set that others add to meanwhile."""
    taken: set[str] = set()
    with contextlib.suppress(KeyError):
        while True:
            taken.add(told.pop())
    return taken

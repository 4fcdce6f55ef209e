"""Bringing to the disk what is relied upon: before it is claimed, or behind claims under a note.

What a server has written lies in memory for half a minute and longer, and a sidecar of ours is on
the disk at once. A power cut in between would leave a claim without its data, on which the next
pull loses all of it. So the data is written back first. Who can't wait for that (the moment of a
server's death, or of its start) has `Policy.sync_behind`: the memory notes, on the disk and before
the claims, in which start of the machine they are made, and `sync_noted` comes behind them. A note
from another start has every look read the data for what is not there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from watcher import files, folders, memory, names, ranges, sidecars
from watcher.decide import learn
from watcher.errors import WatchError
from watcher.events import Event
from watcher.journal import Journal, locked
from watcher.memory import Memory, Remembered
from watcher.model import MIB, Action, Entry, Outcome, Plan, Policy, Ranges, Result, Verb
from watcher.observe import place, scan
from watcher.world import World

#: So much is written at once; whether to stop is asked in between.
SLICE = 16 * MIB
#: How soon a child that syncs is looked at: seconds, doubled each time up to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05
_LOCK_SECONDS = 10.0


class Written(NamedTuple):
    """What came of bringing some bytes of a file to the disk."""

    #: Somebody said to stop, or it is another file now.
    cut_short: bool = False
    #: Bytes that the disk did not take, and the first error; one without bytes may be about any.
    refused: Ranges = ()
    error: OSError | None = None


class Settled(NamedTuple):
    """A plan once what it relies on is on the disk."""

    #: What can be done now, and what has come of the rest: an error of the disk's.
    plan: Plan
    outcomes: tuple[Outcome, ...] = ()
    #: By digest: what the disk did not take of downloads that are to be mended: to plan anew.
    refused: tuple[tuple[str, Written], ...] = ()


# ---------------------------------------------------------------- one file


def write_back(blobs: int, entry: Entry, wanted: Ranges, stop: Callable[[], bool]) -> Written:
    """Bring some bytes of a file under ``blobs/`` to the disk."""
    try:
        fd = files.open_to_read(entry.name, blobs)
    except OSError:
        return Written(cut_short=True)
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != entry.identity:
            return Written(cut_short=True)
        written = _written(fd, wanted, stop)
        if written.error is not None:
            files.drop_cache(fd)
        return written
    finally:
        os.close(fd)


def _written(fd: int, wanted: Ranges, stop: Callable[[], bool]) -> Written:
    refused: list[tuple[int, int]] = []
    first: OSError | None = None
    for start, end in _slices(wanted):
        if stop():
            return Written(True, tuple(refused), first)
        try:
            files.write_back(fd, start, end)
        except OSError as error:
            first = first or error
            refused.append((start, end))
    code = _rest_synced(fd, stop)
    if code:
        first = first or OSError(code, os.strerror(code))
    return Written(code is None, ranges.normal(refused), first)


def _slices(wanted: Ranges) -> Iterator[tuple[int, int]]:
    for start, end in wanted:
        for low in range(start, end, SLICE):
            yield low, min(low + SLICE, end)


def _rest_synced(fd: int, stop: Callable[[], bool]) -> int | None:
    """Wait for what tells where the data lies; the errno, or None where the wait was cut short."""
    ended = files.data_synced(fd)
    pause = _FIRST_PAUSE
    while (code := ended()) is None:
        if stop():
            return None
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return code


# ---------------------------------------------------------------- before anything is done


def settle(world: World, planned: Plan, stop: Callable[[], bool], *, behind: bool) -> Settled:
    """Bring to the disk what a plan relies on. No lock is held meanwhile.

    `behind`: the claims of repairs come first, under a note.
    """
    if not any(_need(action, behind=behind) for action in planned.actions):
        return Settled(planned)
    kept: list[Action] = []
    outcomes: list[Outcome] = []
    refused: list[tuple[str, Written]] = []
    with folders.opened_store(world.store) as store, folders.opened_blobs(store) as blobs:
        for action in planned.actions:
            need = _need(action, behind=behind)
            written = write_back(blobs, *need, stop) if need is not None else Written()
            if written.error is not None and action.verb is Verb.WRITE_SIDECARS:
                refused.append((action.subject, written))
                outcomes.append(_failed(action, written.error))
            elif written.error is not None:
                outcomes.append(_failed(action, written.error))
            elif not (written.cut_short and stop()):
                kept.append(action)  # what is another file now is refused as changed
    return Settled(replace(planned, actions=tuple(kept)), tuple(outcomes), tuple(refused))


def _need(action: Action, *, behind: bool) -> tuple[Entry, Ranges] | None:
    """The file, and the bytes of it, that have to be on the disk before an action."""
    if action.relies_on is not None:
        return action.relies_on, ((0, action.relies_on.size),)
    if action.verb is not Verb.WRITE_SIDECARS or behind:
        return None
    name = names.data(action.subject)
    data = next((entry for entry in action.expects if entry.name == name), None)
    claims = sidecars.claims(action.parts)
    return None if data is None or not claims else (data, claims)


def _failed(action: Action, error: OSError) -> Outcome:
    why = f"what it relies on can't be brought to the disk: {error.strerror}"
    return Outcome(action, Result.FAILED, why)


def keep_refused(journal: Journal, now: float, refused: tuple[tuple[str, Written], ...]) -> bool:
    """Remember and tell what the disk did not take: it counts as missing. The lock is held.

    Whether it could be remembered.
    """
    known = journal.recall()
    for digest, written in refused:
        record = known.downloads.get(digest)
        if record is not None and written.error is not None:
            known = learn.synced(known, digest, record, written.refused, lost=True)
            journal(_told(now, digest, record, written.refused, written.error))
    return journal.save(known)


def _told(at: float, digest: str, record: Remembered, lost: Ranges, error: OSError) -> Event:
    who = names.known_as(record.models, digest)
    amount = f"{ranges.size(lost)} bytes" if lost else "some"
    message = f"the disk did not take {amount} of the download of {who}: {error.strerror}"
    details = {"digest": f"sha256:{digest}", "refused_bytes": ranges.size(lost)}
    return Event(at, "error", f"{message}; what is not there counts as missing", who, details)


# ---------------------------------------------------------------- behind claims


def noted(known: Memory, boot: str) -> list[tuple[str, Remembered]]:
    """The downloads whose claims this start of the machine has made ahead of their data.

    The most valuable first.
    """
    found = [(key, each) for key, each in known.downloads.items() if boot and each.unsynced == boot]
    return sorted(found, key=lambda each: (-each[1].claimed, each[0]))


def sync_noted(world: World, policy: Policy, stop: Callable[[], bool]) -> frozenset[str]:
    """Bring to the disk what claims stand for, and take the notes back.

    Gives back the digests of which the disk did not take all: they are worth another look.
    Raises WatchError and OSError where the store can't be read or written.
    """
    refused: set[str] = set()
    boot = place.boot(world)
    with folders.opened_store(world.store) as store, folders.opened_blobs(store) as blobs:
        for digest, record in noted(memory.load(store), boot):
            if stop():
                break
            data = scan.look(names.data(digest), blobs)
            if data is None or data.inode != record.inode:
                continue  # it is finished, or gone, and the next look forgets it
            written = write_back(blobs, data, sidecars.claims(record.partition), stop)
            if written.error is not None:
                refused.add(digest)
            if written.error is not None or not written.cut_short:
                _keep(world, policy, store, (digest, record, written))
    return frozenset(refused)


def _keep(world: World, policy: Policy, store: int, what: tuple[str, Remembered, Written]) -> None:
    digest, record, written = what
    with locked(store, _LOCK_SECONDS):
        journal = Journal(store, policy, world)
        if written.error is not None:
            keep_refused(journal, world.clock(), ((digest, written),))
        else:
            journal.save(learn.synced(journal.recall(), digest, record))


class Behind:
    """One thread at most, that brings to the disk what is claimed already."""

    def __init__(
        self,
        world: World,
        trouble: Callable[[str], None],
        again: Callable[[frozenset[str]], None],
    ) -> None:
        """`trouble` is told what could not be done, `again` what is worth another look."""
        self._world, self._trouble, self._again = world, trouble, again
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wanted: Policy | None = None

    def want(self, policy: Policy) -> None:
        """Begin, or once more after what is under way."""
        with self._lock:
            self._wanted = policy
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(target=self._run, name="behind", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End within the writing of a slice; what is left is noted still."""
        self._stopped.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while (policy := self._next()) is not None:
            try:
                refused = sync_noted(self._world, policy, self._stopped.is_set)
                if refused:
                    self._again(refused)
            except (WatchError, OSError) as error:
                self._trouble(f"what is claimed can't be brought to the disk yet: {error}")

    def _next(self) -> Policy | None:
        with self._lock:
            policy, self._wanted = self._wanted, None
            if policy is None or self._stopped.is_set():
                self._thread = None
                return None
            return policy

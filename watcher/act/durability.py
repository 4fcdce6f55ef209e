"""Bringing to the disk what is relied upon: before it is claimed, or behind claims under a note.

A power cut between a sidecar of ours and its data would leave a claim on which the next pull loses
all of it. Who can't wait for the data has `Mode.sync_behind`; ``docs/safety.md`` describes how.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.filesize import decimal

from watcher.act.journal import Journal, locked
from watcher.config import Settings
from watcher.decide import transitions
from watcher.model import MIB, Action, ActionKind, Entry, Evidence, Outcome, Plan, Ranges, Result
from watcher.observe import place, scan
from watcher.observe.host import Host
from watcher.ollama import names, ranges, sidecars
from watcher.state import folders, fs, memory
from watcher.state.event_log import Event, EventType

SLICE = 16 * MIB  #: so much is written at once; whether to stop is asked in between
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05  #: seconds, doubled each time up to the longest
_LOCK_SECONDS = 10.0
_MOST_FILES = 100  #: files that share one wait; each is open meanwhile


class Written(NamedTuple):
    """What came of bringing some bytes of a file to the disk."""

    cut_short: bool = False  #: somebody asked to stop, or ended the child that syncs
    gone: bool = False  #: it is another file now
    #: Bytes that the disk did not take, and the first error; one without bytes may be about any.
    refused: Ranges = ()
    error: OSError | None = None


class Need(NamedTuple):
    """Bytes of a file under ``blobs/`` that have to be on the disk, by the claims of `digest`."""

    entry: Entry
    wanted: Ranges
    digest: str = ""
    record: memory.Remembered | None = None


def write_back(blobs: int, needs: Sequence[Need], stop: Callable[[], bool]) -> Iterator[Written]:
    """Bring some bytes of each file to the disk; small files share the wait for the rest."""
    for batch in _batches(needs):
        yield from _batch_written(blobs, batch, stop)


def _batches(needs: Sequence[Need]) -> Iterator[list[Need]]:
    batch: list[Need] = []
    for need in needs:
        batch.append(need)
        size = sum(ranges.size(each.wanted) for each in batch)
        if size >= SLICE or len(batch) >= _MOST_FILES or need is needs[-1]:
            yield batch
            batch = []


def _batch_written(
    blobs: int, batch: Sequence[Need], stop: Callable[[], bool]
) -> Iterator[Written]:
    with contextlib.ExitStack() as opened:
        each: list[tuple[int | None, Written]] = []
        for entry, wanted, *_ in batch:
            with contextlib.suppress(OSError):
                fd = opened.enter_context(fs.closing(fs.open_to_read(entry.name, blobs)))
                status = os.fstat(fd)
                if (status.st_dev, status.st_ino) == entry.identity:
                    each.append((fd, _slices_written(fd, wanted, stop)))
                    continue
            each.append((None, Written(gone=True)))
        code = _rest_synced([fd for fd, _ in each if fd is not None], stop)
        rest = OSError(code, os.strerror(code)) if code else None
        for file, written in each:
            if file is None:
                yield written
                continue
            error = written.error or rest
            if error is not None:
                fs.drop_cache(file)
            yield written._replace(cut_short=written.cut_short or code is None, error=error)


def _slices_written(fd: int, wanted: Ranges, stop: Callable[[], bool]) -> Written:
    refused: list[tuple[int, int]] = []
    first: OSError | None = None
    for start, end in wanted:
        for low in range(start, end, SLICE):
            if stop():
                return Written(cut_short=True, refused=ranges.normal(refused), error=first)
            high = min(low + SLICE, end)
            try:
                fs.write_back(fd, low, high)
            except OSError as error:
                first = first or error
                refused.append((low, high))
    return Written(refused=ranges.normal(refused), error=first)


def _rest_synced(fds: Sequence[int], stop: Callable[[], bool]) -> int | None:
    """Wait for the map of where the data lies; the errno, or None where the wait was cut short."""
    if stop():
        return None
    ended = fs.data_synced(fds)
    pause = _FIRST_PAUSE
    while (code := ended()) is None:
        if stop():
            return None
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return None if code == errno.EINTR else code


def settle(
    host: Host, planned: Plan, *, behind: bool
) -> tuple[Plan, tuple[Outcome, ...], list[tuple[str, Written]]]:
    """Bring to the disk what a plan relies on, unlocked; `behind`: but not what it claims.

    Returns what can be done now, the errors of the disk for the rest, and, by digest, what it did
    not take of downloads that are to be repaired: to plan anew.
    """
    needed = [_need(action, behind=behind) for action in planned.actions]
    needs = [need for need in needed if need]
    if not needs:
        return planned, (), []
    with folders.opened_store(host.store) as store, folders.opened_blobs(store) as blobs:
        written = dict(zip(needs, write_back(blobs, needs, host.stops), strict=True))
    kept: list[Action] = []
    outcomes: list[Outcome] = []
    refused: list[tuple[str, Written]] = []
    for action, need in zip(planned.actions, needed, strict=True):
        came = written[need] if need else Written()
        if came.error is not None:
            why = f"what it relies on can't be brought to the disk: {came.error.strerror}"
            outcomes.append(Outcome(action, Result.FAILED, why))
            if action.kind is ActionKind.WRITE_SIDECARS:
                refused.append((action.subject, came))
        elif not came.cut_short:
            kept.append(action)  # what is another file now is refused as changed
    return planned._replace(actions=tuple(kept)), tuple(outcomes), refused


def _need(action: Action, *, behind: bool) -> Need | None:
    if action.relies_on is not None:
        return Need(action.relies_on, ((0, action.relies_on.size),))
    if action.kind is not ActionKind.WRITE_SIDECARS or behind:
        return None
    claims, name = sidecars.claims(action.parts), names.data(action.subject)
    data = (entry for entry in action.expects if claims and entry.name == name)
    return next((Need(each, claims) for each in data), None)


def keep_refused(journal: Journal, now: float, refused: Iterable[tuple[str, Written]]) -> bool:
    """Remember and log what the disk did not take, under the lock; whether it could be."""
    known = journal.recall()
    for digest, written in refused:
        record, error = known.downloads.get(digest), written.error
        if record is None or error is None:
            continue
        known = transitions.synced(known, digest, record, written.refused, lost=True)
        who, lost = names.known_as(record.models, digest), ranges.size(written.refused)
        what = decimal(lost) if written.refused else "some"
        failed = f"the disk did not take {what} of the download of {who}: {error.strerror}"
        message = f"{failed}; what is not there counts as missing"
        details = {"digest": f"sha256:{digest}", "refused_bytes": lost}
        journal(Event(now, EventType.ERROR, message, who, details))
    return journal.save(known)


def still_doubted(known: memory.Memory, seen: Evidence) -> list[str]:
    """The digests that another start of the machine has noted, and that a look did not read."""
    return [
        each.digest
        for each in seen.downloads
        if (record := known.downloads.get(each.digest)) is not None
        and record.unsynced not in ("", seen.boot)
        and not each.trust.zeros_read
    ]


def sync_noted(host: Host, settings: Settings) -> frozenset[str]:
    """Bring to the disk what claims stand for; the digests of which it did not take all."""
    refused: set[str] = set()
    with contextlib.ExitStack() as opened:
        store = opened.enter_context(folders.opened_store(host.store))
        boot, records = place.boot(host), memory.load(store).downloads
        notes = [(key, each) for key, each in records.items() if boot and each.unsynced == boot]
        if not notes:
            return frozenset()
        notes.sort(key=lambda each: (-each[1].claimed, each[0]))  # the most valuable first
        blobs = opened.enter_context(folders.opened_blobs(store))
        needs: list[Need] = []
        for digest, record in notes:
            data = scan.look(names.data(digest), blobs)
            if data is not None and data.inode == record.inode:
                needs.append(Need(data, sidecars.claims(record.partition), digest, record))
        for batch in _batches(needs):
            if host.stops():
                break
            results = list(zip(batch, _batch_written(blobs, batch, host.stops), strict=True))
            lost = [(need.digest, written) for need, written in results if written.error]
            refused.update(digest for digest, _ in lost)
            with locked(store, _LOCK_SECONDS):
                journal = Journal(store, settings, host)
                known = journal.recall()
                for need, written in results:
                    if written == Written() and need.record is not None:
                        known = transitions.synced(known, need.digest, need.record)
                journal.save(known)
                if lost:
                    keep_refused(journal, host.clock(), lost)
    return frozenset(refused)

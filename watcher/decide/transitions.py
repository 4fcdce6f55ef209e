"""What to remember of a scan, and the events that follow from it: once for each cause. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from rich.filesize import decimal

from watcher.decide import actions, conditions, events, finding_kinds
from watcher.model import (
    DAY,
    LIVE_LOOK_SECONDS,
    ActionKind,
    Ahead,
    Clock,
    Condition,
    Diagnosed,
    Diagnosis,
    Download,
    Evidence,
    Finding,
    Outcome,
    Part,
    Plan,
    Ranges,
    Result,
    Severity,
)
from watcher.ollama import names, ranges, sidecars
from watcher.state.event_log import Event, EventType
from watcher.state.hashes import Hashed
from watcher.state.memory import REFUSED, Asked, Memory, Remembered, Sample, bound_to

#: A pull that receives nothing for so long is reported once. The server starts a part anew after
#: 30 s without a byte.
STALL_SECONDS = 60.0
_SAMPLE_SECONDS = 10.0
_MOST_SAMPLES = 7


class Occasion(NamedTuple):
    """What is special about a scan."""

    #: A service has just begun: it reports each unfinished download once more.
    first: bool = False
    #: Digests whose data a process has just closed after writing: a pull, seen or not.
    ended: frozenset[str] = frozenset()


_USUAL = Occasion()


class _Change(NamedTuple):
    """A download as it is, and as it was remembered."""

    diagnosed: Diagnosed
    before: Remembered | None
    now: Remembered
    at: float

    @property
    def who(self) -> str:
        return names.known_as(self.diagnosed.download.models, self.diagnosed.digest)

    def event(self, kind: EventType, message: str) -> Event:
        return events.of_download(self.at, kind, message, self.diagnosed)


def learn(
    memory: Memory,
    evidence: Evidence,
    diagnosis: Diagnosis,
    finished: Mapping[str, int],
    occasion: Occasion = _USUAL,
) -> tuple[Memory, tuple[Event, ...]]:
    """The memory after this scan, and the events since the last one.

    `finished`: of remembered downloads that are gone, those whose blob is there, with its size.
    """
    downloads = _Downloads(memory, evidence, finished, occasion)
    for each in diagnosis.diagnosed:
        downloads.take(each)
    hidden = _hides_names(evidence)
    if not hidden:  # a name that is not visible may still be there
        downloads.drop_gone({each.download.key for each in diagnosis.diagnosed})
    there = _names(evidence)
    learnt = replace(
        memory,
        downloads=downloads.records,
        touched={
            name: each
            for name, each in memory.touched.items()
            if hidden or evidence.scope is not None or name in there
        },
        unproven=memory.unproven | downloads.unproven(),
        clock=_clock(memory.clock, evidence),
    )
    happened = [*downloads.events, *events.clock_jumped(evidence)]
    if evidence.scope is None:
        learnt, of_store = _of_store(learnt, evidence, diagnosis)
        happened += of_store
    return learnt, tuple(happened)


@dataclass(slots=True)
class _Downloads:
    """The records of downloads as one scan changes them, and the events that this makes."""

    _memory: Memory
    _evidence: Evidence
    _finished: Mapping[str, int]
    _occasion: Occasion
    records: dict[str, Remembered] = field(init=False)
    events: list[Event] = field(init=False, default_factory=list)
    #: When the progress of a layer was last reported, by its models.
    _reported: dict[tuple[str, ...], float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.records = dict(self._memory.downloads)
        for each in self.records.values():
            last = self._reported.get(each.models, each.told_at)
            self._reported[each.models] = max(each.told_at, last)

    def take(self, diagnosed: Diagnosed) -> None:
        """Remember a download, and report what is new about it."""
        known = self.records.get(diagnosed.download.key)
        before = _same_file(known, diagnosed.download)
        now = _record(diagnosed, self._evidence, before, known)
        change = self._progress(_Change(diagnosed, before, now, self._evidence.now))
        self.events.extend(_news(change, self._occasion))
        self.records[diagnosed.download.key] = change.now

    def drop_gone(self, seen: set[str]) -> None:
        """Forget the downloads in the scope of the scan that it has not seen."""
        scope = self._evidence.scope
        for key in sorted(set(self.records) - seen):
            digest = key.removesuffix(".tmp")
            if scope is None or digest in scope:
                size = self._finished.get(digest)
                gone = events.gone(digest, self.records.pop(key), size, self._evidence.now)
                self.events.append(gone)

    def unproven(self) -> set[str]:
        """The digests of blobs that were finished from repaired progress files."""
        return {
            digest
            for digest, record in self._memory.downloads.items()
            if record.mended and digest in self._finished and digest not in self.records
        }

    def _progress(self, change: _Change) -> _Change:
        """Take a sample of a pull; report its progress once a minute, or once that it stalls."""
        _, before, now, at = change
        if not now.pulling:
            return change
        if before is not None and before.pulling:
            samples, told_at, stalled = before.samples, before.told_at, before.stalled
        else:
            samples, told_at, stalled = (), at, False
        if not samples or at - samples[-1].at >= _SAMPLE_SECONDS:
            samples = (*samples, Sample(at, now.allocated))[-_MOST_SAMPLES:]
        silent = at - now.progress_at
        stalls = silent >= STALL_SECONDS
        now = replace(now, samples=samples, told_at=told_at, stalled=stalls)
        change = change._replace(now=now)
        if stalls:
            if not stalled:
                message = f"{change.who}: no bytes for {silent:.0f} s"
                self.events.append(change.event(EventType.DOWNLOAD_STALLED, message))
            return change
        # The layers of a model may come side by side: one of them reports for all.
        last = max(told_at, self._reported.get(now.models, told_at))
        self._reported[now.models] = last
        if at - last < LIVE_LOOK_SECONDS:
            return change
        self._reported[now.models] = at
        self.events.append(events.progress(at, change.diagnosed, now, rate(samples)))
        return change._replace(now=replace(now, told_at=at))


def _news(change: _Change, occasion: Occasion) -> Iterator[Event]:
    """What is new about a download besides its progress."""
    diagnosed, before, now, _ = change
    who, live = change.who, diagnosed.condition is Condition.LIVE
    ended = diagnosed.digest in occasion.ended
    if before is None and live:
        yield change.event(EventType.DOWNLOAD_STARTED, _started(diagnosed, who))
    elif before is None or (occasion.first and not live):
        yield change.event(EventType.PARTIAL_FOUND, _found(diagnosed, who))
    elif now.pulling and not before.pulling:
        yield change.event(EventType.DOWNLOAD_RESUMED, f"the download of {who} resumed")
    elif not live and (before.pulling or ended):
        if not before.pulling:
            message = f"the download of {who} resumed between two scans"
            yield change.event(EventType.DOWNLOAD_RESUMED, message)
        words = conditions.row(diagnosed.condition).words
        message = f"the download of {who} was interrupted: {words} ({diagnosed.because})"
        yield change.event(EventType.DOWNLOAD_INTERRUPTED, message)
    elif (before.condition, before.models) != (now.condition, now.models):
        because = "" if before.condition is now.condition else f" ({diagnosed.because})"
        message = conditions.sentence(now.condition, diagnosed.download)
        yield change.event(EventType.PARTIAL_CHANGED, f"{message}{because}")
    if diagnosed.stale and not (before is not None and before.stale):
        days = diagnosed.age / DAY
        message = f"the download of {who} is stale: no bytes for {days:.0f} days"
        yield change.event(EventType.PARTIAL_STALE, message)


def _started(diagnosed: Diagnosed, who: str) -> str:
    total = diagnosed.download.total
    layer = [names.short(diagnosed.digest)] if diagnosed.download.models else []
    of = ", ".join([*layer, *([] if total is None else [decimal(total)])])
    return f"download of {who} started ({of})" if of else f"download of {who} started"


def _found(diagnosed: Diagnosed, who: str) -> str:
    """The words are a contract: programs read them."""
    trust = diagnosed.download.trust
    size = ranges.size(trust.present) if trust.zeros_read else diagnosed.download.allocated
    return (
        f"Found partial download for model: {who}. Partial size: {size} bytes. "
        f"Can resume: {conditions.resumes(diagnosed.condition)}"
    )


def _of_store(
    memory: Memory, evidence: Evidence, diagnosis: Diagnosis
) -> tuple[Memory, list[Event]]:
    """What a scan of the whole store shows besides downloads: models, and what is wrong."""
    models, now = _models(memory, evidence), evidence.now
    problems = frozenset(
        (each.kind, each.path)
        for each in diagnosis.findings
        if finding_kinds.row(each.kind).logged and each.severity is not Severity.INFO
    )
    happened = [
        *events.of_models(memory, models, damaged(diagnosis.findings), now),
        *events.problems(diagnosis.findings, problems - memory.problems, now),
    ]
    learnt = replace(memory, models=models, problems=problems, looked_at=now)
    return learnt, happened


def _clock(before: Clock | None, evidence: Evidence) -> Clock | None:
    """The clocks as they are remembered: a narrow look writes down only what has changed."""
    now = evidence.clock
    if now is None or before is None or evidence.scope is None:
        return now
    return now if now.jump or now.boot != before.boot else before


def _models(memory: Memory, evidence: Evidence) -> dict[str, tuple[int, int]]:
    """The models that have a manifest. One that can't be read just now has not gone."""
    census = evidence.census
    models = dict(census.models)
    unread = {odd.model for odd in census.odd_manifests}
    for name, known in (memory.models or {}).items():
        if name not in models and (census.hides_manifests or name in unread):
            models[name] = known
    return models


def damaged(found: Iterable[Finding]) -> frozenset[str]:
    """The models of which a blob is not what its name says, or may not be."""
    errors = (each for each in found if each.severity is Severity.ERROR)
    return frozenset(
        model for each in errors if each.kind.startswith("blob_") for model in each.models
    )


def _hides_names(evidence: Evidence) -> bool:
    """Whether names under ``blobs/`` may be there that this look could not see."""
    census = evidence.census
    unseen = (each.path for each in census.unseen)
    return "blobs" in census.unlisted or any(path.startswith("blobs") for path in unseen)


def _names(evidence: Evidence) -> set[str]:
    """Every name whose time we may have set."""
    downloads = (entry for download in evidence.downloads for entry in download.entries)
    census = evidence.census
    return {entry.name for entry in (*downloads, *census.unnamed, *census.unprotected)}


def stage(memory: Memory, plan: Plan, now: float, note: str) -> Memory:
    """What has to be remembered before a plan is carried out, so that a kill can't lose it.

    The bytes that a repair does not believe, the parts that it writes, and, as `note`, the start
    of the machine in which it claims what the disk may not have yet; "" where it has.
    """
    records = dict(memory.downloads)
    for action in plan.actions:
        record = records.get(action.subject)
        if action.kind is ActionKind.WRITE_SIDECARS and record is not None:
            records[action.subject] = replace(
                record,
                doubted=ranges.union(ranges.union(record.doubted, action.doubts), record.lost),
                partition=action.parts,
                mended=True,
                checked_at=now,
                unsynced=note,
            )
    return replace(memory, downloads=records)


def unstage(now: Memory, before: Memory, plan: Plan, outcomes: Iterable[Outcome]) -> Memory:
    """The memory without what was foreseen of repairs of a plan that did not come about.

    What has failed may have been decided all the same, and is finished by the next run.
    """
    records = dict(now.downloads)
    begun = {
        outcome.action.subject
        for outcome in outcomes
        if outcome.action.kind is ActionKind.WRITE_SIDECARS and outcome.result is not Result.REFUSED
    }
    for action in plan.actions:
        was = before.downloads.get(action.subject)
        if (
            action.kind is ActionKind.WRITE_SIDECARS
            and action.subject not in begun
            and was is not None
        ):
            records[action.subject] = was
    return replace(now, downloads=records)


def _same_file(record: Remembered | None, download: Download) -> Remembered | None:
    """What is remembered, if it is of this very file: the digest may have begun anew."""
    if record is None or not download.entries:
        return None
    anchor = download.entries[0].identity
    return record if record.is_of(*anchor, download.born_ns) else None


def _record(
    diagnosed: Diagnosed, evidence: Evidence, before: Remembered | None, known: Remembered | None
) -> Remembered:
    """What to remember of a download. `known`: what is remembered of its digest, `before` if it is
    of this very file: a copy is to be doubted as much as what it was made of."""
    download = diagnosed.download
    anchor = download.entries[0].identity if download.entries else (0, 0)
    claimed = ranges.size(download.trust.claimed)
    allocated = download.data.allocated if download.data is not None else 0
    # Never by way of an age: rounding would make a new memory of each look.
    progress_at = _last_progress(download, before, evidence.now)
    live = diagnosed.condition is Condition.LIVE
    arrived = before is not None and (
        live or before.pulling or allocated > before.allocated or claimed > before.claimed
    )
    if arrived and not _mended_since(before, download):
        progress_at = _last_progress(download, None, evidence.now)
    certain = download.total_from in ("sidecars", "manifest")
    pulling = live and (before is None or before.pulling or bool(download.writers))
    return Remembered(
        device=anchor[0],
        inode=anchor[1],
        born_ns=download.born_ns,
        condition=before.condition
        if before and _says_less(diagnosed, before, pulling=pulling)
        else diagnosed.condition,
        stale=diagnosed.stale,
        pulling=pulling,
        total=download.total if certain or before is None else (before.total or download.total),
        claimed=claimed,
        allocated=allocated,
        progress_at=progress_at,
        models=download.models,
        partition=_partition(download) or (before.partition if before is not None else ()),
        doubted=_doubted(known, download),
        mended=known is not None and known.mended,
        # A clock that was ahead then would make a later start of the machine seem an earlier one.
        checked_at=before.checked_at if before and before.checked_at <= evidence.now else 0.0,
        ahead=_ahead(download, evidence),
        unsynced=_unsynced(diagnosed, evidence, known),
        lost=before.lost if before is not None else (),
        # Who writes through a mapping changes bytes, and no time for a while.
        reads=None if download.writers else download.reads,
    )


def _unsynced(diagnosed: Diagnosed, evidence: Evidence, known: Remembered | None) -> str:
    """The note as it stands after a look; one that was looked into and found right is done with."""
    note = known.unsynced if known is not None else ""
    trust = diagnosed.download.trust
    looked_through = trust.rebooted and trust.zeros_read
    if note in ("", evidence.boot) or diagnosed.condition is Condition.LIVE or not looked_through:
        return note
    return note if ranges.difference(trust.claimed, trust.trusted) else ""


def _says_less(diagnosed: Diagnosed, before: Remembered, *, pulling: bool) -> bool:
    """Whether this look tells less of the condition than what is remembered.

    Live by a change alone may have been anybody's; and what could not be read through looks as if
    only what is claimed were there.
    """
    if diagnosed.condition is Condition.LIVE:
        return not pulling
    return not diagnosed.download.trust.zeros_read and before.condition is not Condition.LIVE


def _ahead(download: Download, evidence: Evidence) -> Ahead | None:
    """Since when times in the future have been seen as they are."""
    latest, known = download.changed_at, download.ahead
    if latest is None or latest <= evidence.now or not evidence.boot:
        return None
    if known is not None and known.still(latest, evidence.boot):
        return known
    return Ahead(latest, evidence.uptime, evidence.boot)


def rate(samples: Sequence[Sample]) -> float | None:
    """Bytes a second over some samples; None where they tell nothing."""
    if len(samples) < 2 or samples[-1].at <= samples[0].at:
        return None
    arrived = samples[-1].allocated - samples[0].allocated
    return max(0.0, arrived / (samples[-1].at - samples[0].at))


def _last_progress(download: Download, before: Remembered | None, now: float) -> float:
    """When bytes last arrived: as remembered, else as the files' times say; never in the future."""
    if before is not None:
        return max(before.progress_at, min(now, download.progress_at or 0.0))
    return now if download.changed_at is None else min(now, download.changed_at)


def _doubted(before: Remembered | None, download: Download) -> Ranges:
    """What must not be believed later either, whatever becomes of the sidecars meanwhile.

    What is there and not trusted now, and where attempts start now; a claim settles it.
    """
    trust = download.trust
    untrusted = ranges.difference(trust.present, trust.trusted)
    starts = sidecars.heads(_partition(download))
    known = before.doubted if before is not None else ()
    return ranges.difference(ranges.union(known, ranges.union(untrusted, starts)), trust.claimed)


def _mended_since(before: Remembered | None, download: Download) -> bool:
    """Whether the claims grew because we wrote them, not because bytes have arrived."""
    return before is not None and before.mended and before.partition == _partition(download)


def _partition(download: Download) -> tuple[Part, ...]:
    """The parts of a sound set of sidecars."""
    if download.faults:
        return ()
    return tuple(sidecar.part for sidecar in download.sidecars if sidecar.part is not None)


def proved(
    memory: Memory, outcomes: Iterable[Outcome], now: float, boot: str, started_at: float
) -> Memory:
    """The memory with what was found out by hashing and asking in that start of the machine."""
    asked = {digest: each for digest, each in memory.asked.items() if each.counts(now)}
    found: dict[str, Hashed] = {}
    unproven = set(memory.unproven)
    for outcome in outcomes:
        if outcome.sha256 is not None:
            entry = outcome.action.expects[0]
            read = "" if entry.ctime_ns / 1e9 < started_at else boot
            found[entry.name] = Hashed(
                entry.inode, entry.size, bound_to(entry), outcome.sha256, read
            )
            unproven.discard(outcome.action.subject)
        if outcome.action.kind is ActionKind.ASK_REGISTRY:
            why = outcome.message if outcome.length is None else ""
            asked[outcome.action.subject] = Asked(outcome.length, now, why)
    hashes = memory.hashes.plus(found)
    return replace(memory, hashes=hashes, asked=asked, unproven=frozenset(unproven))


def synced(
    memory: Memory, key: str, claimed: Remembered, refused: Ranges = (), *, lost: bool = False
) -> Memory:
    """The memory once the data behind some claims is on the disk, as far as the disk took it.

    `claimed`: the download as it was remembered when that began. `lost`: the disk did not take all
    of it, `refused` for sure, and whatever is found not to be there.
    """
    record = memory.downloads.get(key)
    if record is None or not record.is_of(claimed.device, claimed.inode, claimed.born_ns):
        return memory
    if lost:
        now = replace(record, unsynced=REFUSED, lost=ranges.union(record.lost, refused), reads=None)
    elif (record.checked_at, record.unsynced) == (claimed.checked_at, claimed.unsynced):
        now = replace(record, unsynced="")
    else:
        return memory  # somebody has claimed more since
    return replace(memory, downloads={**memory.downloads, key: now})


def drop(memory: Memory, outcomes: Iterable[Outcome]) -> Memory:
    """The memory after our own acts: what their events have told is no news to the next look.

    Without the downloads that we have removed; those that we have repaired are as they became.
    """
    done = [each.action for each in outcomes if each.result is Result.DONE]
    removed = actions.row(ActionKind.REMOVE_DOWNLOAD).event
    gone = {each.subject for each in done if actions.row(each.kind).event is removed}
    repaired = {each.subject for each in done if each.kind is ActionKind.WRITE_SIDECARS}
    kept = {
        key: replace(each, condition=conditions.row(each.condition).repaired, lost=())
        if key in repaired
        else each
        for key, each in memory.downloads.items()
        if key.removesuffix(".tmp") not in gone
    }
    return replace(memory, downloads=kept)

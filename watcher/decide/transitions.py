"""What to remember of a look, and what to tell of it: once for each cause."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import chain, groupby

from watcher.model import (
    CLOCK_SETTLED_SECONDS,
    LIVE_LOOK_SECONDS,
    Action,
    ActionKind,
    Ahead,
    Clock,
    Condition,
    Diagnosed,
    Diagnosis,
    Download,
    Evidence,
    Finding,
    Kind,
    Outcome,
    Part,
    Plan,
    Ranges,
    Result,
    Severity,
)
from watcher.ollama import names, ranges, sidecars
from watcher.state.event_log import Event
from watcher.state.memory import REFUSED, Asked, Hashed, Memory, Remembered, Sample, bound_to
from watcher.system import advice

#: Told as ``can_resume``: Ollama alone goes on from what the sidecars claim. In ``behind`` and
#: ``whole`` that may be less than is there, down to nothing.
RESUMABLE = frozenset({Condition.LIVE, Condition.PAUSED, Condition.BEHIND, Condition.WHOLE})

_MOST_SUBJECTS = 20
#: Findings that are told as events of the store; the others have events of their own.
_PROBLEMS = (
    "store_",
    "manifest_",
    "blob_missing",
    "blob_short",
    "blob_long",
    "blob_dangling",
    "blob_no_file",
)
#: A pull of which nothing has arrived for so long is told once. The server starts a part anew
#: after 30 s without a byte.
TELL_STALL_SECONDS = 60.0
_SAMPLE_SECONDS = 10.0
_MOST_SAMPLES = 7
_REMOVALS = frozenset({ActionKind.REMOVE_DOWNLOAD, ActionKind.REMOVE_SURPLUS})
#: What a repair makes of a condition; of all others, `paused`.
_REPAIRED = {Condition.WHOLE: Condition.WHOLE}
_OF_DOWNLOADS = frozenset(
    {ActionKind.REMOVE_DOWNLOAD, ActionKind.REMOVE_SURPLUS, ActionKind.WRITE_SIDECARS}
)
_DONE_EVENT = {
    ActionKind.REMOVE_DOWNLOAD: "partial_cleaned",
    ActionKind.REMOVE_SURPLUS: "partial_cleaned",
    ActionKind.REMOVE_ORPHAN: "orphan_removed",
    ActionKind.REMOVE_TEMPORARY: "temporary_removed",
    ActionKind.WRITE_SIDECARS: "download_repaired",
    ActionKind.QUARANTINE_BLOB: "quarantined",
    ActionKind.RESTORE: "restored",
    ActionKind.PURGE: "purged",
}


def learn(
    memory: Memory,
    evidence: Evidence,
    diagnosis: Diagnosis,
    finished: Mapping[str, int],
    *,
    first_look: bool = False,
    ended: frozenset[str] = frozenset(),
) -> tuple[Memory, tuple[Event, ...]]:
    """The memory after this look, and the events that tell what has changed since the last one.

    `finished`: of remembered downloads that are gone, those whose blob is there, with its size.
    `first_look`: a service has just begun, and tells each unfinished download once more.
    `ended`: digests whose data somebody has just closed after writing: a pull, seen or not.
    """
    records = dict(memory.downloads)
    told: list[Event] = []
    seen: set[str] = set()
    last_told = _last_told(records.values())
    for diagnosed in diagnosis.diagnosed:
        key = diagnosed.download.key
        seen.add(key)
        before = _same_file(records.get(key), diagnosed.download)
        now = _record(diagnosed, evidence, before, records.get(key))
        now, progress = _progress(diagnosed, before, now, last_told, evidence.now)
        told.extend(progress)
        told.extend(
            _told(
                diagnosed,
                before,
                now,
                evidence.now,
                first_look=first_look,
                ended=diagnosed.digest in ended,
            )
        )
        records[key] = now
    # What could not be looked at has not gone.
    hidden = _hides_names(evidence)
    for key in sorted(set(records) - seen) if not hidden else ():
        digest = key.removesuffix(".tmp")
        if evidence.scope is None or digest in evidence.scope:
            told.append(_gone(digest, records.pop(key), finished, evidence.now))
    unproven = memory.unproven | {
        digest
        for digest, record in memory.downloads.items()
        if record.mended and digest in finished and digest not in records
    }
    there = _names(evidence)
    touched = {
        name: each
        for name, each in memory.touched.items()
        if hidden or evidence.scope is not None or name in there
    }
    learnt = replace(
        memory,
        downloads=records,
        touched=touched,
        unproven=frozenset(unproven),
        clock=_clock(memory.clock, evidence),
    )
    told.extend(_clock_told(evidence))
    if evidence.scope is None:
        learnt, of_store = _of_store(learnt, evidence, diagnosis)
        told.extend(of_store)
    return learnt, tuple(told)


def _clock(before: Clock | None, evidence: Evidence) -> Clock | None:
    """The clocks as they are remembered: a narrow look writes down only what has changed."""
    now = evidence.clock
    if now is None or before is None or evidence.scope is None:
        return now
    return now if now.jump or now.boot != before.boot else before


def _clock_told(evidence: Evidence) -> Iterator[Event]:
    clock = evidence.clock
    if clock is None or not clock.jump:
        return
    way = "ahead" if clock.jump > 0 else "back"
    by = advice.duration(abs(clock.jump))
    details = {
        "jump_seconds": round(clock.jump, 3),
        "believed_after_seconds": CLOCK_SETTLED_SECONDS,
    }
    message = f"the clock has jumped {way} by {by}: until it has stayed so for hours, it makes"
    yield Event(evidence.now, "clock_jumped", f"{message} nothing old enough to go", None, details)


def _of_store(
    memory: Memory, evidence: Evidence, diagnosis: Diagnosis
) -> tuple[Memory, Iterator[Event]]:
    """What a look at the whole store shows besides downloads: models, and what is wrong."""
    models = _models(memory, evidence)
    problems = frozenset(
        (each.kind, each.path)
        for each in diagnosis.findings
        if each.kind.startswith(_PROBLEMS) and each.severity is not Severity.INFO
    )
    told = chain(
        _models_told(memory, models, damaged(diagnosis.findings), evidence.now),
        _problems_told(diagnosis.findings, problems - memory.problems, evidence.now),
    )
    learnt = replace(memory, models=models, problems=problems, looked_at=evidence.now)
    return learnt, told


def _models(memory: Memory, evidence: Evidence) -> dict[str, tuple[int, int]]:
    """The models that have a manifest. One that can't be read just now has not gone."""
    census = evidence.census
    models = {each.name: (each.inode, each.mtime_ns) for each in census.models}
    unseen = (*census.unlisted, *(each.path for each in census.unseen))
    blind = any(path.startswith("manifests") for path in unseen)
    unread = {odd.model for odd in census.odd_manifests}
    for name, known in (memory.models or {}).items():
        if name not in models and (blind or name in unread):
            models[name] = known
    return models


def damaged(found: Iterable[Finding]) -> frozenset[str]:
    """The models of which a blob is not what its name says, or may not be."""
    errors = (each for each in found if each.severity is Severity.ERROR)
    return frozenset(
        model for each in errors if each.kind.startswith("blob_") for model in each.models
    )


def _models_told(
    memory: Memory, models: Mapping[str, tuple[int, int]], damaged: Set[str], at: float
) -> Iterator[Event]:
    if memory.models is None:
        return  # the first look: nothing is known to have happened
    for name in sorted(models.keys() | memory.models.keys()):
        details: dict[str, object] = {"models": [name]}
        if name not in models:
            message = f"{name} is removed: it has no manifest any more"
            yield Event(at, "model_removed", message, name, details)
        elif models[name] != memory.models.get(name):
            message = f"{name} is complete: its manifest is written"
            if name in damaged:
                message = f"the manifest of {name} is written, but not all of its blobs are right"
            yield Event(at, "manifest_written", message, name, details)


def _problems_told(
    found: Iterable[Finding], new: frozenset[tuple[str, str]], at: float
) -> Iterator[Event]:
    """One event for each kind of problem that has come up since the last look."""
    fresh = sorted(
        (each for each in found if (each.kind, each.path) in new),
        key=lambda each: (each.kind, each.path),
    )
    for kind, group in groupby(fresh, key=lambda each: each.kind):
        alike = list(group)
        more = f" (and {len(alike) - 1} more)" if len(alike) > 1 else ""
        details = {
            "kind": kind,
            "severity": alike[0].severity.value,
            "paths": [names.exact(each.path) for each in alike[:_MOST_SUBJECTS]],
            "count": len(alike),
            "models": sorted({model for each in alike for model in each.models}),
            "command": alike[0].command,
        }
        yield Event(at, "store_problem", f"{alike[0].message}{more}", details=details)


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


def _last_told(known: Iterable[Remembered]) -> dict[tuple[str, ...], float]:
    """When the progress of a layer was last told, by its models."""
    last: dict[tuple[str, ...], float] = {}
    for each in known:
        last[each.models] = max(each.told_at, last.get(each.models, each.told_at))
    return last


def _progress(
    diagnosed: Diagnosed,
    before: Remembered | None,
    now: Remembered,
    last_told: dict[tuple[str, ...], float],
    at: float,
) -> tuple[Remembered, list[Event]]:
    """How a pull gets on: its samples, and an event a minute, or one where nothing arrives."""
    if not now.pulling:
        return now, []
    if before is not None and before.pulling:
        samples, told_at, stalled = before.samples, before.told_at, before.stalled
    else:
        samples, told_at, stalled = (), at, False
    if not samples or at - samples[-1].at >= _SAMPLE_SECONDS:
        samples = (*samples, Sample(at, now.allocated))[-_MOST_SAMPLES:]
    now = replace(now, samples=samples, told_at=told_at, stalled=stalled)
    who = names.known_as(diagnosed.download.models, diagnosed.digest)
    if at - now.progress_at >= TELL_STALL_SECONDS:
        if now.stalled:
            return now, []
        message = f"nothing of {who} has arrived for {at - now.progress_at:.0f} s"
        return replace(now, stalled=True), [_event(at, "download_stalled", message, diagnosed)]
    now = replace(now, stalled=False)
    # The layers of a model may come side by side: one of them tells for all.
    last = last_told[now.models] = max(now.told_at, last_told.get(now.models, now.told_at))
    if at - last < LIVE_LOOK_SECONDS:
        return now, []
    last_told[now.models] = at
    event = _event(at, "download_progress", f"{who}: {now.allocated} bytes are here", diagnosed)
    speed = rate(samples)
    left = None if not speed or now.total is None else max(0, now.total - now.allocated) / speed
    paced = {
        "per_second_bytes": None if speed is None else round(speed),
        "left_seconds": None if left is None else round(left, 1),
    }
    return replace(now, told_at=at), [replace(event, details={**event.details, **paced})]


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


def _told(
    diagnosed: Diagnosed,
    before: Remembered | None,
    now: Remembered,
    at: float,
    *,
    first_look: bool,
    ended: bool,
) -> Iterator[Event]:
    live = diagnosed.condition is Condition.LIVE
    who = names.known_as(diagnosed.download.models, diagnosed.digest)
    if before is None and live:
        layer = _layer(diagnosed.download.models, diagnosed.digest, diagnosed.download.total)
        yield _event(at, "download_started", f"{layer} is being downloaded", diagnosed)
    elif before is None or (first_look and not live):
        trust = diagnosed.download.trust
        size = ranges.size(trust.present) if trust.zeros_read else diagnosed.download.allocated
        yield _event(
            at,
            "partial_found",
            f"Found partial download for model: {who}. Partial size: {size} bytes. "
            f"Can resume: {diagnosed.condition in RESUMABLE}",
            diagnosed,
        )
    elif now.pulling and not before.pulling:
        yield _event(at, "download_resumed", f"the download of {who} goes on", diagnosed)
    elif not live and (before.pulling or ended):
        if not before.pulling:
            # It went on and was broken off between two looks.
            yield _event(at, "download_resumed", f"the download of {who} had gone on", diagnosed)
        yield _event(
            at,
            "download_interrupted",
            f"the download of {who} was interrupted: {diagnosed.condition.value},"
            f" {diagnosed.because}",
            diagnosed,
        )
    elif (before.condition, before.models) != (now.condition, now.models):
        same = before.condition is now.condition
        state = now.condition.value if same else f"{now.condition.value}, {diagnosed.because}"
        yield _event(at, "partial_changed", f"the download of {who} is {state}", diagnosed)
    if diagnosed.stale and not (before is not None and before.stale):
        days = diagnosed.age / 86400
        message = f"the download of {who} has made no progress for {days:.0f} days"
        yield _event(at, "partial_stale", message, diagnosed)


def _layer(models: tuple[str, ...], digest: str, size: int | None) -> str:
    """A layer among the others of its model, in words."""
    known = f"{models[0]}: {names.short(digest)}" if models else names.short(digest)
    return known if size is None else f"{known}, {size} bytes,"


def _event(at: float, event_type: str, message: str, diagnosed: Diagnosed) -> Event:
    download = diagnosed.download
    return Event(
        at,
        event_type,
        message,
        names.known_as(download.models, diagnosed.digest),
        {
            "digest": f"sha256:{diagnosed.digest}",
            "models": list(download.models),
            "condition": diagnosed.condition.value,
            "because": diagnosed.because,
            "can_resume": diagnosed.condition in RESUMABLE,
            "total_bytes": download.total,
            "claimed_bytes": ranges.size(download.trust.claimed),
            "present_bytes": ranges.size(download.trust.present),
            "allocated_bytes": download.allocated,
            "age_seconds": round(diagnosed.age, 3),
        },
    )


def _gone(digest: str, record: Remembered, finished: Mapping[str, int], at: float) -> Event:
    who = names.known_as(record.models, digest)
    details: dict[str, object] = {"digest": f"sha256:{digest}", "models": list(record.models)}
    if digest in finished:
        details["total_bytes"] = finished[digest]
        layer = _layer(record.models, digest, finished[digest])
        return Event(at, "download_completed", f"{layer} is downloaded", who, details)
    details["allocated_bytes"] = record.allocated
    message = f"the partial download of {who} was removed by somebody else"
    return Event(at, "partial_removed", message, who, details)


def proved(
    memory: Memory, outcomes: Iterable[Outcome], now: float, boot: str, started_at: float
) -> Memory:
    """The memory with what was found out by hashing and asking in that start of the machine."""
    asked = {digest: each for digest, each in memory.asked.items() if each.counts(now)}
    hashes, unproven = dict(memory.hashes), set(memory.unproven)
    for outcome in outcomes:
        if outcome.sha256 is not None:
            entry = outcome.action.expects[0]
            read = "" if entry.ctime_ns / 1e9 < started_at else boot
            hashes[entry.name] = Hashed(
                entry.inode, entry.size, bound_to(entry), outcome.sha256, read
            )
            unproven.discard(outcome.action.subject)
        if outcome.action.kind is ActionKind.ASK_REGISTRY:
            why = outcome.message if outcome.length is None else ""
            asked[outcome.action.subject] = Asked(outcome.length, now, why)
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
    gone = {each.subject for each in done if each.kind in _REMOVALS}
    repaired = {each.subject for each in done if each.kind is ActionKind.WRITE_SIDECARS}
    kept = {
        key: replace(each, condition=_REPAIRED.get(each.condition, Condition.PAUSED), lost=())
        if key in repaired
        else each
        for key, each in memory.downloads.items()
        if key.removesuffix(".tmp") not in gone
    }
    return replace(memory, downloads=kept)


# ---------------------------------------------------------------- acts


def begun(action: Action, at: float) -> Event:
    """The event that an action begins."""
    message = f"{action.kind.value.replace('_', ' ')}: {action.because}"
    return Event(at, "act_started", message, _of(action), _details(action))


def ended(outcome: Outcome, at: float) -> Event:
    """The event that tells how an action ended, and what it freed."""
    action = outcome.action
    kind = {
        Result.DONE: _DONE_EVENT[action.kind],
        Result.REFUSED: "refused",
        Result.FAILED: "error",
    }[outcome.result]
    details = {**_details(action), "freed_bytes": outcome.freed}
    if outcome.refusal is not None:
        details["kind"] = outcome.refusal.kind.value
    return Event(at, kind, outcome.message, _of(action), details)


def refreshed(outcomes: Sequence[Outcome], at: float) -> Event:
    """One event for all the times that were set together: they change nothing of worth."""
    failed = [outcome.message for outcome in outcomes if outcome.result is not Result.DONE]
    if failed:
        message = f"the times of wanted files can't be kept fresh: {failed[0]}"
        return Event(at, "error", message, details={"failed": len(failed)})
    subjects = [names.exact(outcome.action.subject) for outcome in outcomes]
    many = "1 wanted thing was" if len(subjects) == 1 else f"{len(subjects)} wanted things were"
    message = f"{many} kept from the server's clean-up"
    return Event(at, "refreshed", message, details={"subjects": subjects[:_MOST_SUBJECTS]})


def hashed(outcome: Outcome, at: float) -> Event | None:
    """The event that a file can't be read, or that a blob's hash is wrong; None where all is well.

    Of an unfinished download a wrong hash is no news.
    """
    if outcome.result is Result.FAILED:
        details = {"digest": f"sha256:{outcome.action.subject}"}
        return Event(at, "error", outcome.message, details=details)
    entry = outcome.action.expects[0] if outcome.action.expects else None
    if entry is None or outcome.sha256 in (None, outcome.action.subject.lower()):
        return None
    if not names.is_blob(entry.name):
        return None
    details = {"digest": f"sha256:{outcome.action.subject}", "hashed": f"sha256:{outcome.sha256}"}
    return Event(at, "blob_corrupt", f"{entry.name[:19]}: {outcome.message}", details=details)


def _of(action: Action) -> str | None:
    if action.kind in _OF_DOWNLOADS:
        return names.known_as(action.models, action.subject)
    return None


def _details(action: Action) -> dict[str, object]:
    files = [entry for entry in action.expects if entry.kind is Kind.FILE]
    return {
        "verb": action.kind.value,
        "subject": names.exact(action.subject),
        "models": list(action.models),
        "files": len(files),
        "frees_bytes": action.frees,
        "saves_bytes": action.saves,
    }

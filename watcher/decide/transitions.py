"""What to remember of a scan, and the events that follow from it: once for each cause. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from rich.filesize import decimal

from watcher import model
from watcher.decide import conditions, events, finding_kinds
from watcher.model import ActionKind, Condition, Diagnosed, Download, Evidence, Outcome, Ranges
from watcher.ollama import names, ranges, sidecars
from watcher.state.event_log import Event, EventType
from watcher.state.hashes import Hashed
from watcher.state.memory import REFUSED, Asked, Memory, Remembered, Sample, bound_to
from watcher.system import advice

#: A pull that receives nothing for so long is reported once. The server starts a part anew after
#: 30 s without a byte.
STALL_SECONDS = 60.0
_SAMPLE_SECONDS = 10.0
_MOST_SAMPLES = 7


class Occasion(NamedTuple):
    first: bool = False  #: a service has just begun: it reports each unfinished download once more
    #: Digests whose data a process has just closed after writing: a pull, seen or not.
    ended: frozenset[str] = frozenset()


USUAL = Occasion()


def learn(
    memory: Memory,
    evidence: Evidence,
    diagnosis: model.Diagnosis,
    finished: Mapping[str, int],
    occasion: Occasion = USUAL,
) -> tuple[Memory, tuple[Event, ...]]:
    """The memory after this scan, and the events. `finished`: the sizes of new blobs."""
    now, census = evidence.now, evidence.census
    records, happened = _downloads(memory, evidence, diagnosis.diagnosed, occasion)
    unseen = (each.path for each in census.unseen)
    hidden = "blobs" in census.unlisted or any(path.startswith("blobs") for path in unseen)
    if not hidden:  # a name that is not visible may still be there
        for key in sorted(records.keys() - {each.download.key for each in diagnosis.diagnosed}):
            digest, is_ours = model.digest_of(key), key.endswith(model.OURS)
            if is_ours and (evidence.transfers_unseen or evidence.quarantine_unseen):
                continue
            if evidence.scope is None or digest in evidence.scope:
                size, record = finished.get(digest), records.pop(key)
                # Our own pull reports what it has completed, and one without bytes is none.
                if not is_ours or (size is None and record.allocated):
                    happened.append(events.gone(digest, record, size, now))
    # Blobs that were finished from repaired progress files.
    mended = {key for key, record in memory.downloads.items() if record.mended}
    unproven = memory.unproven | ((mended & finished.keys()) - records.keys())
    clocks = _clocks(memory.clocks, evidence)
    learnt = replace(memory, downloads=records, unproven=unproven, clocks=clocks)
    if not hidden and evidence.scope is None:
        in_downloads = (entry for each in evidence.downloads for entry in each.entries)
        there = {each.name for each in (*in_downloads, *census.unnamed, *census.unprotected)}
        touched = {name: each for name, each in memory.touched.items() if name in there}
        digests = {each.digest for each in evidence.downloads} if evidence.boot else set()
        proven = {digest: each for digest, each in memory.proven.items() if digest in digests}
        learnt = replace(learnt, touched=touched, proven=proven)
    if evidence.clock is not None and evidence.clock.jump:
        happened.append(events.clock_jumped(evidence.clock.jump, now))
    if evidence.scope is None:
        learnt, of_store = _of_store(learnt, evidence, diagnosis)
        happened += of_store
    return learnt, tuple(happened)


def _downloads(
    memory: Memory, evidence: Evidence, diagnosed: Iterable[Diagnosed], occasion: Occasion
) -> tuple[dict[str, Remembered], list[Event]]:
    """The records with those of the downloads that were seen, and what is new about these."""
    records, happened = dict(memory.downloads), list[Event]()
    # When the progress of a layer was last reported, by its models.
    reported: dict[tuple[str, ...], float] = {}
    for record in records.values():
        last = reported.get(record.models, record.told_at)
        reported[record.models] = max(record.told_at, last)
    for each in diagnosed:
        download, before = each.download, None
        if download.may_be_right:
            continue  # it goes, or it is reported
        known = _renamed(download, records) or records.get(download.key)
        if known is not None and download.entries:
            # The digest may have begun anew, with another file.
            is_same = known.is_of(*download.entries[0].identity, download.born_ns)
            before = known if is_same else None
        now = _record(each, evidence, before, known)
        if now.pulling:
            now, event = _sampled(each, before, now, evidence.now, reported)
            happened += [] if event is None else [event]
        for kind, message in _news(each, before, now, occasion):
            happened.append(events.of_download(evidence.now, kind, message, each))
        records[download.key] = now
    return records, happened


def _renamed(download: Download, records: dict[str, Remembered]) -> Remembered | None:
    """What is remembered of the transfer of ours, or the download, that one was made of."""
    key = download.digest if download.ours else f"{download.digest}{model.OURS}"
    own = records.get(key)
    if own is None or not download.data or download.transfer:
        return None
    if not own.is_of(*download.data.identity, download.born_ns):
        return None
    del records[key]
    if download.by_server:  # between two scans a server has finished and removed it
        return None
    now = Condition.TRANSFER if download.ours else conditions.row(own.condition).repaired
    return replace(own, condition=now, pulling=False)


def _sampled(
    diagnosed: Diagnosed,
    before: Remembered | None,
    now: Remembered,
    at: float,
    reported: dict[tuple[str, ...], float],
) -> tuple[Remembered, Event | None]:
    """A pull with a sample taken; `reported`: when that of its models was reported last."""
    samples: tuple[Sample, ...] = ()
    told_at, stalled = at, False
    if before is not None and before.pulling:
        samples, told_at, stalled = before.samples, before.told_at, before.stalled
    if not samples or at - samples[-1].at >= _SAMPLE_SECONDS:
        samples = (*samples, Sample(at, now.allocated))[-_MOST_SAMPLES:]
    silent = at - now.progress_at
    stalls = silent >= STALL_SECONDS
    now = replace(now, samples=samples, told_at=told_at, stalled=stalls)
    if stalls:
        message = f"{_who(diagnosed)}: no bytes for {silent:.0f} s"
        event = events.of_download(at, EventType.DOWNLOAD_STALLED, message, diagnosed)
        return now, None if stalled else event
    # The layers of a model may come side by side: one of them reports for all.
    last = max(told_at, reported.get(now.models, told_at))
    reported[now.models] = last
    if at - last < model.LIVE_LOOK_SECONDS:
        return now, None
    reported[now.models] = at
    return replace(now, told_at=at), events.progress(at, diagnosed, now, rate(samples))


def _who(diagnosed: Diagnosed) -> str:
    return names.known_as(diagnosed.download.models, diagnosed.digest)


def _news(
    diagnosed: Diagnosed, before: Remembered | None, now: Remembered, occasion: Occasion
) -> Iterator[tuple[EventType, str]]:
    download, who = diagnosed.download, _who(diagnosed)
    live = diagnosed.condition is Condition.LIVE
    ended = diagnosed.digest in occasion.ended and not download.ours
    if download.ours and live:
        return  # our own pull reports it
    if download.ours and before is not None and before.condition is Condition.LIVE:
        before = None
    if before is None and live:
        layer = [names.short(diagnosed.digest)] if download.models else []
        total = [] if download.total is None else [decimal(download.total)]
        of = f" ({', '.join([*layer, *total])})" if layer or total else ""
        yield EventType.DOWNLOAD_STARTED, f"download of {who} started{of}"
    elif before is None and download.discarded:
        what = f"the server discarded its finished download of {who}: checksum mismatch"
        kept = f"ollama-watch has kept its {decimal(download.allocated)}"
        message = f"{what}; {kept}: `ollama-watch audit` shows how to use them"
        yield EventType.DOWNLOAD_DISCARDED, message
    elif before is None or (occasion.first and not live):
        yield EventType.PARTIAL_FOUND, _found(diagnosed, who)
    elif now.pulling and not before.pulling:
        yield EventType.DOWNLOAD_RESUMED, f"the download of {who} resumed"
    elif not live and (before.pulling or ended):
        if not before.pulling:
            yield EventType.DOWNLOAD_RESUMED, f"the download of {who} resumed between two scans"
        message = f"the download of {who} was interrupted: {conditions.why(diagnosed)}"
        yield EventType.DOWNLOAD_INTERRUPTED, message
    elif (before.condition, before.models) != (now.condition, now.models):
        because = "" if before.condition is now.condition else f" ({diagnosed.because})"
        message = conditions.sentence(now.condition, diagnosed.download)
        yield EventType.PARTIAL_CHANGED, f"{message}{because}"
    if diagnosed.stale and not (before is not None and before.stale):
        age = advice.duration(diagnosed.age)
        message = f"the download of {who} is stale: no bytes for {age}"
        yield EventType.PARTIAL_STALE, message


def _found(diagnosed: Diagnosed, who: str) -> str:
    """The words are a contract: programs read them."""
    trust = diagnosed.download.trust
    size = ranges.size(trust.present) if trust.zeros_read else diagnosed.download.allocated
    found = f"Found partial download for model: {who}. Partial size: {size} bytes."
    return f"{found} Can resume: {conditions.resumes(diagnosed.condition)}"


def _of_store(
    memory: Memory, evidence: Evidence, diagnosis: model.Diagnosis
) -> tuple[Memory, list[Event]]:
    """What a scan of the whole store shows besides downloads: models, and what is wrong."""
    census, now = evidence.census, evidence.now
    models = dict(census.models)
    unread = {odd.model for odd in census.odd_manifests}
    for name, known in (memory.models or {}).items():
        # One that can't be read just now has not gone.
        if name not in models and (census.hides_manifests or name in unread):
            models[name] = known
    logged = (each for each in diagnosis.findings if finding_kinds.row(each.kind).logged)
    problems = frozenset((each.kind, each.path) for each in logged if each.severity.rank)
    happened = [
        *events.of_models(memory, models, damaged(diagnosis.findings), now),
        *events.problems(diagnosis.findings, problems - memory.problems, now),
    ]
    return replace(memory, models=models, problems=problems, looked_at=now), happened


def _clocks(before: tuple[model.Clock, ...], evidence: Evidence) -> tuple[model.Clock, ...]:
    """The clocks as they are remembered: a narrow look writes down only what has changed."""
    now = evidence.clock
    if now is None:
        return ()
    known = before and before[-1].boot == now.boot
    if known and evidence.scope is not None and not now.jump:
        return before
    return (*evidence.other_clocks, now._replace(others=()))


def damaged(found: Iterable[model.Finding]) -> frozenset[str]:
    """The models of which a blob does not match its name, or may not be."""
    errors = (each for each in found if each.severity is model.Severity.ERROR)
    return frozenset(
        model for each in errors if each.kind.startswith("blob_") for model in each.models
    )


def stage(memory: Memory, plan: model.Plan, now: float, note: str) -> Memory:
    """What has to be remembered before a plan is carried out, so that a kill can't lose it.

    The bytes that a repair does not believe, the parts that it writes, and, as `note`, the start
    of the machine in which it claims what the disk may not have yet; "" where it has.
    """
    records = dict(memory.downloads)
    for action in plan.actions:
        key = _staged_as(action)
        record = records.get(key)
        if record is not None:
            records[key] = replace(
                record,
                doubted=ranges.union(ranges.union(record.doubted, action.doubts), record.lost),
                partition=action.parts,
                mended=True,
                checked_at=now,
                unsynced=note,
            )
    return replace(memory, downloads=records)


def _staged_as(action: model.Action) -> str:
    """The key of what is remembered of the download that progress files are written for."""
    match action.kind:
        case ActionKind.WRITE_SIDECARS:
            return action.subject
        case ActionKind.GIVE_BACK:
            return f"{action.subject}{model.OURS}"
    return ""


def unstage(now: Memory, before: Memory, plan: model.Plan, outcomes: Iterable[Outcome]) -> Memory:
    """The memory without what was foreseen of repairs of a plan that did not come about.

    What has failed may have been decided all the same, and is finished by the next run.
    """
    begun = {
        _staged_as(each.action) for each in outcomes if each.result is not model.Result.REFUSED
    }
    staged = {_staged_as(each) for each in plan.actions} & before.downloads.keys()
    undone = {key: before.downloads[key] for key in staged - begun}
    return replace(now, downloads={**now.downloads, **undone})


def _record(
    diagnosed: Diagnosed, evidence: Evidence, before: Remembered | None, known: Remembered | None
) -> Remembered:
    """What to remember of a download. `known`: what is remembered of its digest, `before` if it is
    of this very file: a copy is to be doubted as much as what it was made of."""
    download, condition = diagnosed.download, diagnosed.condition
    anchor = download.entries[0].identity if download.entries else (0, 0)
    claimed, partition = ranges.size(download.trust.claimed), _partition(download)
    allocated = download.data.allocated if download.data is not None else 0
    # Never by way of an age: rounding would make a new memory of each look.
    progress_at = _last_progress(download, before, evidence.now)
    live = condition is Condition.LIVE
    pulling = live and (before is None or before.pulling or bool(download.writers))
    pulling = pulling and not download.ours
    total = download.total
    if before is not None:
        arrived = live or before.pulling
        arrived |= allocated > before.allocated or claimed > before.claimed
        # Claims that grew because we wrote them are no bytes that arrived.
        if arrived and not (before.mended and before.partition == partition):
            progress_at = _last_progress(download, None, evidence.now)
        if download.total_from not in ("sidecars", "manifest"):
            total = before.total or download.total
        # Live by a change alone may have been anybody's; and what could not be read through looks
        # as if only what is claimed were there.
        unread = not download.trust.zeros_read and before.condition is not Condition.LIVE
        sees_less = not pulling if live else unread
        condition = before.condition if sees_less else condition
    return Remembered(
        device=anchor[0],
        inode=anchor[1],
        born_ns=download.born_ns,
        condition=condition,
        stale=diagnosed.stale,
        pulling=pulling,
        total=total,
        claimed=claimed,
        allocated=allocated,
        progress_at=progress_at,
        models=download.models,
        partition=partition or (before.partition if before is not None else ()),
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
    note, trust = known.unsynced if known is not None else "", diagnosed.download.trust
    looked_through = trust.rebooted and trust.zeros_read
    if note in ("", evidence.boot) or diagnosed.condition is Condition.LIVE or not looked_through:
        return note
    return note if ranges.difference(trust.claimed, trust.trusted) else ""


def _ahead(download: Download, evidence: Evidence) -> model.Ahead | None:
    """Since when times in the future have been seen as they are."""
    latest, known = download.changed_at, download.ahead
    if latest is None or latest <= evidence.now or not evidence.boot:
        return None
    if known is not None and known.still(latest, evidence.boot):
        return known
    return model.Ahead(latest, evidence.uptime, evidence.boot)


def rate(samples: Sequence[Sample]) -> float | None:
    """Bytes a second over some samples; None where they show nothing."""
    if len(samples) < 2 or samples[-1].at <= samples[0].at:
        return None
    arrived = samples[-1].allocated - samples[0].allocated
    return max(0.0, arrived / (samples[-1].at - samples[0].at))


def _last_progress(download: Download, before: Remembered | None, now: float) -> float:
    """When bytes last arrived: as remembered, else by the files' times; never in the future."""
    if before is not None:
        return max(before.progress_at, min(now, download.progress_at or 0.0))
    return now if download.changed_at is None else min(now, download.changed_at)


def _doubted(before: Remembered | None, download: Download) -> Ranges:
    """What no later scan may believe either: what is not trusted, and where attempts start."""
    trust = download.trust
    untrusted = ranges.difference(trust.present, trust.trusted)
    starts = sidecars.heads(_partition(download))
    known = before.doubted if before is not None else ()
    return ranges.difference(ranges.union(known, ranges.union(untrusted, starts)), trust.claimed)


def _partition(download: Download) -> tuple[model.Part, ...]:
    if download.faults:
        return ()
    return tuple(sidecar.part for sidecar in download.sidecars if sidecar.part is not None)


def proved(
    memory: Memory, outcomes: Iterable[Outcome], now: float, boot: str, started_at: float
) -> Memory:
    """The memory with what was found out by hashing and asking in that start of the machine."""
    asked = {digest: each for digest, each in memory.asked.items() if each.counts(now)}
    found: dict[str, Hashed] = {}
    unproven, proven = set(memory.unproven), dict(memory.proven)
    for outcome in outcomes:
        if outcome.sha256 is not None:
            entry = outcome.action.expects[0]
            is_lasting = entry.ctime_ns / 1e9 < started_at and outcome.sha256 != model.UNREADABLE
            read = "" if is_lasting else boot
            found[entry.name] = Hashed(
                entry.inode, entry.size, bound_to(entry), outcome.sha256, read, outcome.wrong
            )
            unproven.discard(outcome.action.subject)
            if outcome.wrong and not names.is_blob(entry.name):
                proven[outcome.action.subject] = _proven(outcome, boot)
        if outcome.action.kind is ActionKind.ASK_REGISTRY:
            why = outcome.message if outcome.length is None else ""
            asked[outcome.action.subject] = Asked(outcome.length, now, why)
        if outcome.right and not names.is_blob(outcome.action.expects[0].name):
            proven[outcome.action.subject] = _proven(outcome, boot)
    hashes, in_doubt = memory.hashes.plus(found), frozenset(unproven)
    return replace(memory, hashes=hashes, asked=asked, unproven=in_doubt, proven=proven)


def _proven(outcome: Outcome, boot: str) -> model.Proven:
    data = outcome.action.expects[0]
    at = data.inode, data.size, bound_to(data), boot
    return model.Proven(*at, outcome.right, outcome.wrong)


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
    """The memory after our own acts: what their events report is no news to the next scan."""
    done = [each.action for each in outcomes if each.result is model.Result.DONE]
    removed = (ActionKind.REMOVE_DOWNLOAD, ActionKind.REMOVE_SURPLUS)
    gone = {each.subject for each in done if each.kind in removed}
    ours = (each.subject for each in done if each.kind is ActionKind.REMOVE_TRANSFER)
    gone |= {f"{digest}{model.OURS}" for digest in ours}
    repaired = {each.subject for each in done if each.kind is ActionKind.WRITE_SIDECARS}
    kept: dict[str, Remembered] = {}
    for key, each in memory.downloads.items():
        if key in repaired:
            each = replace(each, condition=conditions.row(each.condition).repaired, lost=())
        if key.removesuffix(".tmp") not in gone:
            kept[key] = each
    return replace(memory, downloads=kept)

"""What is worth nothing and can go: stale downloads, orphans, left-overs. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from watcher.decide import findings, safety
from watcher.model import (
    BLINDING,
    CLOCK_SETTLED_SECONDS,
    CLOCK_TOLERANCE_SECONDS,
    HOUR,
    Action,
    Condition,
    Entry,
    Evidence,
    Judged,
    Kind,
    Policy,
    Refusal,
    RefusalKind,
    Spared,
    Verb,
)
from watcher.ollama import names
from watcher.system import advice

#: Manifests that protect blobs which nobody can tell.


def of_download(judged: Judged, evidence: Evidence) -> Iterator[Action | Refusal]:
    """What goes of a stale download."""
    match judged.condition:
        case Condition.LIVE | Condition.UNKNOWN:
            return
        case Condition.REDUNDANT:
            yield from surplus(judged, evidence)
        case _:
            yield _removal(judged, evidence, Verb.REMOVE_DOWNLOAD, judged.download.entries)


def surplus(judged: Judged, evidence: Evidence) -> Iterator[Action | Refusal]:
    """What is left of a download beside its finished blob."""
    download = judged.download
    blob = download.finished
    if download.data is None:
        yield _removal(judged, evidence, Verb.REMOVE_SURPLUS, download.entries)
    elif blob is not None and blob.sha256 == judged.digest.lower():
        step = _removal(judged, evidence, Verb.REMOVE_DOWNLOAD, download.entries)
        yield step._replace(relies_on=blob) if isinstance(step, Action) else step
    else:
        known = blob is not None and blob.sha256 is not None
        why = safety.Why(
            RefusalKind.UNPROVEN,
            "the finished blob is corrupt, so the partial data may be needed"
            if known
            else "the finished blob was not hashed yet, so the partial data may be needed",
            "have the blob replaced by a good one" if known else "have the blob hashed",
            command=advice.watch(evidence, "repair", names.short(judged.digest)),
        )
        yield safety.refusal(why, judged, Verb.REMOVE_DOWNLOAD)


def _removal(
    judged: Judged, evidence: Evidence, verb: Verb, expects: tuple[Entry, ...]
) -> Action | Refusal:
    why = safety.why_not_take(judged, evidence)
    if why is not None:
        return safety.refusal(why, judged, verb)._replace(frees=_freed(expects))
    return Action(
        verb=verb,
        subject=judged.digest,
        because=f"{judged.condition.value}, no progress for {advice.duration(judged.age)}",
        expects=expects,
        frees=_freed(expects),
        models=judged.download.models,
        wait_seconds=safety.guard_seconds(evidence),
    )


def _freed(entries: Iterable[Entry]) -> int:
    return sum(entry.freed for entry in entries)


def spared(judged: Iterable[Judged], evidence: Evidence, policy: Policy) -> tuple[Spared, ...]:
    """What a clean-up would remove if it were old enough, the oldest first.

    Downloads that are not stale yet, and orphaned blobs that are as young.
    """
    kept = [
        each
        for each in judged
        if not each.stale and each.condition not in (Condition.LIVE, Condition.UNKNOWN)
    ]
    found = [
        Spared(each.digest, each.download.models, each.age, each.download.freed) for each in kept
    ]
    for entry in evidence.census.unnamed:
        age, digest = evidence.age_of(entry.changed_at), names.parse_blob(entry.name).digest
        if age < policy.stale_after:
            found.append(Spared(digest, evidence.known_as.get(digest, ()), age, entry.freed))
    return tuple(sorted(found, key=lambda each: (-each.age, each.digest)))


def orphans(evidence: Evidence, policy: Policy) -> Iterator[Action | Refusal]:
    """Finished blobs that no manifest names, and that no unfinished pull counts on any more."""
    there = [entry for entry in evidence.census.unnamed if entry.kind is Kind.FILE]
    aged = [(evidence.age_of(entry.changed_at), entry) for entry in there]
    old = [(age, entry) for age, entry in aged if age >= policy.stale_after]
    changed = ((entry.changed_at, entry) for entry in there)
    yield from _too_soon(changed, policy.stale_after, evidence, Verb.REMOVE_ORPHAN)
    if not old:
        return
    why = orphans_forbidden(evidence)
    if why is not None:
        yield _refused_all(why, Verb.REMOVE_ORPHAN, [entry for _, entry in old])
        return
    for age, entry in old:
        because = f"no manifest names it, {age / (24 * HOUR):.0f} days old"
        yield Action(Verb.REMOVE_ORPHAN, entry.name, because, (entry,), entry.freed)


def by_the_clock(judged: Judged, evidence: Evidence, policy: Policy) -> Iterator[Refusal]:
    """A download that only a clock which was set makes stale."""
    why = _clock_forbids(evidence)
    if why is None:
        return
    download = judged.download
    since = download.changed_at if download.progress_at is None else download.progress_at
    never = judged.stale or judged.condition in (Condition.LIVE, Condition.UNKNOWN)
    if not never and since is not None and evidence.now - since >= policy.stale_after:
        yield safety.refusal(why, judged, Verb.REMOVE_DOWNLOAD)


def _too_soon(
    changed: Iterable[tuple[float, Entry]], enough: float, evidence: Evidence, verb: Verb
) -> Iterator[Refusal]:
    """The same of single files: those that only a clock which was set makes old."""
    why = _clock_forbids(evidence)
    if why is None:
        return
    young = [entry for at, entry in changed if evidence.age_of(at) < enough <= evidence.now - at]
    if young:
        yield _refused_all(why, verb, young)


def _clock_forbids(evidence: Evidence) -> safety.Why | None:
    """Why the wall clock makes nothing old: it has moved on, and the machine has not counted it."""
    clock = evidence.clock
    if clock is None or evidence.now - clock.certain <= CLOCK_TOLERANCE_SECONDS:
        return None
    left = max(0.0, CLOCK_SETTLED_SECONDS - clock.held)
    ahead = advice.duration(evidence.now - clock.certain)
    return safety.Why(
        RefusalKind.CLOCK,
        f"the clock alone makes it old: it is ahead by {ahead} of what this machine has counted",
        f"the clock is believed if it stays so: try again in {advice.duration(left)}",
        left,
    )


#: What several files are called, by what is done with them.
_MANY = {Verb.REMOVE_ORPHAN: "orphaned blob", Verb.REMOVE_TEMPORARY: "left-over"}


def _refused_all(why: safety.Why, verb: Verb, old: list[Entry]) -> Refusal:
    """One refusal about many files."""
    of_create = " of ollama create" if verb is Verb.REMOVE_TEMPORARY else ""
    return Refusal(
        why.kind,
        f"{len(old)} {_MANY[verb]}{'s' if len(old) > 1 else ''}{of_create}",
        verb,
        why.reason,
        why.remedy,
        why.left,
        entries=tuple(entry.name for entry in old),
        frees=_freed(old),
        command=why.command,
    )


def orphans_forbidden(evidence: Evidence) -> safety.Why | None:
    """Why no finished blob may be removed: something may name it, or be about to."""
    for odd in evidence.census.odd_manifests:
        if odd.fault in BLINDING:
            who = odd.model or names.printable(odd.path)
            return safety.Why(
                RefusalKind.MANIFESTS,
                f"the manifest of {who} is {odd.fault.value}: it may name any of them",
                "mend that manifest first",
                command=findings.odd_manifest(odd, evidence).command,
            )
    for path in (*evidence.census.unlisted, *(each.path for each in evidence.census.unseen)):
        return safety.Why(
            RefusalKind.MANIFESTS,
            f"{names.printable(path)} can't be listed: a manifest in it may name any of them",
            "make that folder readable first",
            command=findings.made_listable(path, evidence),
        )
    for path in evidence.sharing.unread:
        where = f"{names.printable(path)} of another store with its blobs in the same folder"
        return safety.Why(
            RefusalKind.MANIFESTS,
            f"{where} can't be read: it may name any of them",
            "run it as a user who may read it",
        )
    if evidence.census.manifests == 0:
        return safety.Why(
            RefusalKind.MANIFESTS,
            "there is not a single manifest: more likely manifests/ is missing than all is waste",
            "bring manifests/ back, or remove the store by hand",
        )
    return safety.idle_forbids(evidence)


def temporaries(evidence: Evidence) -> Iterator[Action | Refusal]:
    """Files that ``ollama create`` or an upload has left behind."""
    there = [each.entry for each in evidence.census.temporaries if each.entry.kind is Kind.FILE]
    old = [entry for entry in there if evidence.age_of(entry.mtime) >= HOUR]
    changed = ((entry.mtime, entry) for entry in there)
    yield from _too_soon(changed, HOUR, evidence, Verb.REMOVE_TEMPORARY)
    if not old:
        return
    why = safety.idle_forbids(evidence)
    if why is not None:
        yield _refused_all(why, Verb.REMOVE_TEMPORARY, old)
        return
    for entry in old:
        because = "a left-over of ollama create"
        yield Action(Verb.REMOVE_TEMPORARY, entry.name, because, (entry,), entry.freed)

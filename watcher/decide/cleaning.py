"""What can be removed: stale downloads, orphaned blobs, temporary files. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from watcher.decide import actions, conditions, findings, safety
from watcher.decide.conditions import Step
from watcher.model import (
    BLINDING,
    CLOCK_SETTLED_SECONDS,
    CLOCK_TOLERANCE_SECONDS,
    DAY,
    HOUR,
    Action,
    ActionKind,
    Diagnosed,
    Entry,
    Evidence,
    Kind,
    Plan,
    Refusal,
    RefusalKind,
    Rules,
    Spared,
)
from watcher.ollama import names
from watcher.system import advice


def of_download(diagnosed: Diagnosed, evidence: Evidence) -> Iterator[Action | Refusal]:
    """What goes of a stale download."""
    match conditions.row(diagnosed.condition).clean:
        case Step.REMOVE_SURPLUS:
            yield from surplus(diagnosed, evidence)
        case Step.REMOVE:
            yield _removal(diagnosed, evidence, ActionKind.REMOVE_DOWNLOAD)


def surplus(diagnosed: Diagnosed, evidence: Evidence) -> Iterator[Action | Refusal]:
    """What is left of a download beside its finished blob."""
    download = diagnosed.download
    blob = download.finished
    if download.data is None:
        yield _removal(diagnosed, evidence, ActionKind.REMOVE_SURPLUS)
    elif blob is not None and blob.sha256 == diagnosed.digest.lower():
        step = _removal(diagnosed, evidence, ActionKind.REMOVE_DOWNLOAD)
        yield step._replace(relies_on=blob) if isinstance(step, Action) else step
    else:
        known = blob is not None and blob.sha256 is not None
        why = safety.Why(
            RefusalKind.UNPROVEN,
            f"the finished blob is {'corrupt' if known else 'not yet verified'}, so the partial "
            "data may be needed",
            "replace the blob first" if known else "verify the blob first",
            command=advice.watch(evidence, "repair", names.short(diagnosed.digest)),
        )
        yield safety.refusal(why, diagnosed, ActionKind.REMOVE_DOWNLOAD)


def _removal(diagnosed: Diagnosed, evidence: Evidence, kind: ActionKind) -> Action | Refusal:
    download, why = diagnosed.download, safety.why_not_take(diagnosed, evidence)
    if why is not None:
        return safety.refusal(why, diagnosed, kind)._replace(frees=download.freed)
    words = conditions.row(diagnosed.condition).words
    return Action(
        kind=kind,
        subject=diagnosed.digest,
        because=f"{words}, no bytes for {advice.duration(diagnosed.age)}",
        expects=download.entries,
        frees=download.freed,
        models=download.models,
        wait_seconds=safety.guard_seconds(evidence),
    )


def spared(diagnosed: Iterable[Diagnosed], evidence: Evidence, rules: Rules) -> tuple[Spared, ...]:
    """What `clean` would remove if it were old enough, the oldest first.

    Downloads that are not stale yet, and orphaned blobs that are as young.
    """
    found = [
        Spared(each.digest, each.download.models, each.age, each.download.freed)
        for each in diagnosed
        if not each.stale and conditions.is_cleanable(each)
    ]
    for entry in evidence.census.unnamed:
        age, digest = evidence.age_of(entry.changed_at), names.parse_blob(entry.name).digest
        if age < rules.settings.stale_after:
            found.append(Spared(digest, evidence.known_as.get(digest, ()), age, entry.freed))
    return tuple(sorted(found, key=lambda each: (-each.age, each.digest)))


def orphans(evidence: Evidence, rules: Rules) -> Iterator[Action | Refusal]:
    """Finished blobs that no manifest names, and that no unfinished pull counts on any more."""
    there = [entry for entry in evidence.census.unnamed if entry.kind is Kind.FILE]
    aged = [(evidence.age_of(entry.changed_at), entry) for entry in there]
    old = [(age, entry) for age, entry in aged if age >= rules.settings.stale_after]
    changed = ((entry.changed_at, entry) for entry in there)
    yield from _too_soon(changed, rules.settings.stale_after, evidence, ActionKind.REMOVE_ORPHAN)
    if not old:
        return
    why = orphans_forbidden(evidence)
    if why is not None:
        yield _refused_all(why, ActionKind.REMOVE_ORPHAN, [entry for _, entry in old])
        return
    for age, entry in old:
        because = f"no manifest names it, {age / DAY:.0f} days old"
        yield Action(ActionKind.REMOVE_ORPHAN, entry.name, because, (entry,), entry.freed)


def by_the_clock(diagnosed: Diagnosed, evidence: Evidence, rules: Rules) -> Iterator[Refusal]:
    """A download that only a clock which was set makes stale."""
    why = _clock_forbids(evidence)
    if why is None:
        return
    download = diagnosed.download
    since = download.changed_at if download.progress_at is None else download.progress_at
    may_go = not diagnosed.stale and conditions.is_cleanable(diagnosed)
    if may_go and since is not None and evidence.now - since >= rules.settings.stale_after:
        yield safety.refusal(why, diagnosed, ActionKind.REMOVE_DOWNLOAD)


def _too_soon(
    changed: Iterable[tuple[float, Entry]], enough: float, evidence: Evidence, kind: ActionKind
) -> Iterator[Refusal]:
    """The same of single files: those that only a clock which was set makes old."""
    why = _clock_forbids(evidence)
    if why is None:
        return
    young = [entry for at, entry in changed if evidence.age_of(at) < enough <= evidence.now - at]
    if young:
        yield _refused_all(why, kind, young)


def _clock_forbids(evidence: Evidence) -> safety.Why | None:
    """Why the wall clock makes nothing old: it has moved on, and the machine has not counted it."""
    clock = evidence.clock
    if clock is None or evidence.now - clock.certain <= CLOCK_TOLERANCE_SECONDS:
        return None
    left = max(0.0, CLOCK_SETTLED_SECONDS - clock.held)
    ahead = advice.duration(evidence.now - clock.certain)
    return safety.Why(
        RefusalKind.CLOCK,
        f"only the clock makes it old: the clock is {ahead} ahead of this machine's own count",
        f"the clock counts once it has been steady: try again in {advice.duration(left)}",
        left,
    )


def _refused_all(why: safety.Why, kind: ActionKind, old: list[Entry]) -> Refusal:
    """One refusal about many files."""
    of_create = " of ollama create" if kind is ActionKind.REMOVE_TEMPORARY else ""
    return Refusal(
        why.kind,
        f"{len(old)} {actions.row(kind).many}{'s' if len(old) > 1 else ''}{of_create}",
        kind,
        why.reason,
        why.remedy,
        why.left,
        entries=tuple(entry.name for entry in old),
        frees=sum(entry.freed for entry in old),
        command=why.command,
    )


def orphans_forbidden(evidence: Evidence) -> safety.Why | None:
    """Why no finished blob may be removed: something may name it, or be about to."""
    for odd in evidence.census.odd_manifests:
        if odd.fault in BLINDING:
            who = odd.model or names.printable(odd.path)
            return safety.Why(
                RefusalKind.MANIFESTS,
                f"the manifest of {who} is {odd.fault.value}: it may name any blob",
                "fix that manifest first",
                command=findings.odd_manifest(odd, evidence).command,
            )
    for path in (*evidence.census.unlisted, *(each.path for each in evidence.census.unseen)):
        return safety.Why(
            RefusalKind.MANIFESTS,
            f"{names.printable(path)} can't be listed: a manifest in it may name any blob",
            "make that folder readable first",
            command=findings.made_listable(path, evidence),
        )
    for path in evidence.sharing.unread:
        where = f"{names.printable(path)} of another store, which shares the folder of its blobs,"
        return safety.Why(
            RefusalKind.MANIFESTS,
            f"{where} can't be read: it may name any blob",
            "run it as a user who can read it",
        )
    if evidence.census.manifests == 0:
        return safety.Why(
            RefusalKind.MANIFESTS,
            "the store has no manifest: manifests/ is probably missing",
            "restore manifests/, or remove the store by hand",
        )
    return safety.idle_forbids(evidence)


def temporaries(evidence: Evidence) -> Iterator[Action | Refusal]:
    """Files that ``ollama create`` or an upload left behind."""
    there = [each.entry for each in evidence.census.temporaries if each.entry.kind is Kind.FILE]
    old = [entry for entry in there if evidence.age_of(entry.mtime) >= HOUR]
    changed = ((entry.mtime, entry) for entry in there)
    yield from _too_soon(changed, HOUR, evidence, ActionKind.REMOVE_TEMPORARY)
    if not old:
        return
    why = safety.idle_forbids(evidence)
    if why is not None:
        yield _refused_all(why, ActionKind.REMOVE_TEMPORARY, old)
        return
    for entry in old:
        because = "a temporary file of ollama create"
        yield Action(ActionKind.REMOVE_TEMPORARY, entry.name, because, (entry,), entry.freed)


# ---------------------------------------------------------------- how much is enough


def until_free(planned: Plan, wanted: int) -> Plan:
    """The part of a plan that leaves `wanted` bytes free, the oldest first, then the largest.

    All of what frees anything where that is not enough.
    """
    chosen: set[Action] = set()
    free = planned.free
    for action in sorted(planned.actions, key=_least_needed_first):
        if free >= wanted:
            break
        if action.frees:
            chosen.add(action)
            free += action.frees
    return planned.filtered(lambda each: each in chosen)


def _least_needed_first(action: Action) -> tuple[int, int, str]:
    """By the day of the last change, so that the size counts among those of a day."""
    changed = max((entry.changed_at for entry in action.expects), default=0.0)
    return int(changed // DAY), -action.frees, action.subject

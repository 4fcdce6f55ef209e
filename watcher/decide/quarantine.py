"""What goes into quarantine, and what leaves it: back to its place, or for good. Pure."""

from collections.abc import Iterator

from rich.filesize import decimal

from watcher import model
from watcher.decide import blob_findings, findings, safety
from watcher.model import Action, ActionKind, Diagnosed, Evidence, Kept, OddBlob, RefusalKind, Rules
from watcher.ollama import names, ranges
from watcher.system import advice

_DISCARDED = (
    "the server discarded it; what the registry's sums of its chunks show as wrong is fetched, or "
    "all of it where the registry has none"
)


def damaged_blobs(evidence: Evidence, rules: Rules) -> Iterator[model.Planned]:
    """Damaged blobs go to quarantine if they can be downloaded again; of a link, the link."""
    most = rules.settings.quarantine_max_bytes
    room = most - _size(evidence)
    for odd in evidence.census.odd:
        if odd.fault not in model.WRONG or odd.entry is None:
            continue
        if rules.mode.online and odd.models and not odd.asked:
            continue  # its registry is asked first
        why = _blob_stays(odd, evidence)
        if why is None and rules.mode.fetch:
            continue  # `fetched` puts it aside
        if why is None and odd.entry.allocated > room:
            why = _no_room(evidence, most)
        name = names.blob(odd.digest)
        if why is not None:
            yield why.refusal(name, ActionKind.QUARANTINE_BLOB, odd.models)
            continue
        room -= odd.entry.allocated
        pull = advice.pull(evidence, odd.models[0], by_server=True)
        fetch = advice.watch(evidence, "repair", "--fetch", names.short(odd.digest))
        because = f"{blob_findings.damage(odd)}, and the registry has it"
        because = f"{because}: {pull} downloads this layer only, and {fetch} too"
        kind, files = ActionKind.QUARANTINE_BLOB, (odd.entry,)
        yield Action(kind, name, because, files, models=odd.models)


def fetched(
    diagnosed: tuple[Diagnosed, ...], evidence: Evidence, rules: Rules
) -> Iterator[model.Planned]:
    """What replaces damaged and missing blobs by right ones, as far as it is known by now."""
    room = rules.settings.quarantine_max_bytes - _size(evidence)
    odd_ones = (*evidence.census.odd, *_discarded(evidence)) if rules.mode.fetch else ()
    for odd in odd_ones:
        is_missing = odd.fault is model.BlobFault.MISSING and odd.lies is None
        if not (odd.fault in model.WRONG or is_missing) or not odd.models or not odd.wanted:
            continue
        if odd.asked and odd.entry and _blob_stays(odd, evidence):
            continue  # the refusal is that of its quarantine
        if odd.asked and (unknown := _unconfirmed(odd, evidence)):
            yield unknown.refusal(odd.digest, ActionKind.FETCH_CHUNKS, odd.models)
            continue
        ours = [each for each in evidence.downloads if each.digest == odd.digest and each.ours]
        here = sum(ranges.size(each.trust.trusted) for each in ours)
        sure = (ranges.difference(each.trust.trusted, each.doubted) for each in ours)
        left = odd.wanted - sum(map(ranges.size, sure))
        wrong = min(left, ranges.size(ranges.within(odd.wrong, 0, odd.wanted)))
        why = safety.store_forbids(evidence) or safety.pulled(odd.digest, diagnosed, evidence)
        free = max(0, evidence.place.free_bytes - evidence.place.reserve_bytes)
        if why is None and odd.wanted - here > free:
            beside = f"{decimal(free)} free beside the reserve"
            reason = f"it needs {decimal(odd.wanted - here)}, and the disk has only {beside}"
            uses, remedy = advice.watch(evidence, "df"), "free space, then run it again"
            why = safety.Why(RefusalKind.ROOM, reason, remedy, command=uses)
        if why is not None:
            yield why.refusal(odd.digest, ActionKind.FETCH_CHUNKS, odd.models)
            continue
        goes = odd.entry is not None and odd.entry.allocated > room
        room -= 0 if odd.entry is None or goes else odd.entry.allocated
        found = () if odd.entry is None else (odd.entry,)
        because = f"{blob_findings.damage(odd)}; what is wrong of it is fetched from its registry"
        yield Action(
            ActionKind.FETCH_CHUNKS,
            odd.digest,
            _DISCARDED if any(each.by_server for each in ours) else because,
            found,
            sum(each.freed for each in found) if goes else 0,
            models=odd.models,
            surplus=found if goes else (),
            # Of sums by which too little was wrong nothing is believed.
            fetches=wrong if odd.wrong and not any(each.is_refuted for each in ours) else left,
            needs=odd.wanted,
            doubts=odd.wrong,
            content=odd.content,
        )


def _discarded(evidence: Evidence) -> Iterator[OddBlob]:
    """What a server has finished and removed, before any manifest names it, as missing blobs."""
    known = {odd.digest for odd in evidence.census.odd}
    for each in evidence.downloads:
        if each.by_server and each.finished is None and each.digest not in known:
            yield OddBlob(each.digest, model.BlobFault.MISSING, each.total, None, each.models)


def _size(evidence: Evidence) -> int:
    return sum(kept.entry.allocated for kept in evidence.quarantine)


def _no_room(evidence: Evidence, most: int) -> safety.Why:
    """The quarantine is bounded: what does not fit into it stays where it is."""
    replaced = any(kept.replaced for kept in evidence.quarantine)
    return safety.Why(
        RefusalKind.ROOM,
        f"the quarantine is limited to {decimal(most)}, and this would exceed it",
        "purge it, or raise quarantine_max_size in the settings",
        command=advice.watch(evidence, "quarantine", "purge" if replaced else "ls"),
    )


def _blob_stays(odd: OddBlob, evidence: Evidence) -> safety.Why | None:
    """A damaged blob stays where no registry has confirmed that it can be downloaded again."""
    if why := _unconfirmed(odd, evidence):
        return why._replace(reason=f"it is damaged but may be the only copy: {why.reason}")
    if evidence.view.visibility is not model.Visibility.FULL:
        return safety.unseen(evidence)
    return safety.store_forbids(evidence)


def _unconfirmed(odd: OddBlob, evidence: Evidence) -> safety.Why | None:
    """Why it is not known that a blob can be downloaded again."""
    if odd.registry is not None and odd.registry == odd.wanted:
        return None
    command = ""
    if not odd.models:
        why, remedy = "no model names it", "pull or create its model again"
    elif odd.registry is not None:
        both = ranges.in_words(odd.registry, odd.wanted or 0)
        why = "its registry has {}, the manifest says {}".format(*both)
        remedy = "create the model again, or pull its newer version"
    else:
        command = advice.watch(evidence, "repair", names.short(odd.digest))
        why, remedy = "its registry was not asked", "ask it"
        if odd.asked:
            why = "its registry did not answer, or does not have it"
            remedy = "make the registry reachable and run this again, or create the model again"
    return safety.Why(RefusalKind.REGISTRY, why, remedy, command=command)


def steps(evidence: Evidence, rules: Rules) -> Iterator[model.Planned]:
    mode, known = rules.mode, {kept.label for kept in evidence.quarantine}
    unknown = safety.Why(
        RefusalKind.UNKNOWN,
        "nothing in quarantine has that label",
        "list the labels",
        command=advice.watch(evidence, "quarantine", "ls"),
    )
    for kind, labels in (ActionKind.RESTORE, mode.restore), (ActionKind.PURGE, mode.purge):
        yield from (unknown.refusal(label, kind) for label in sorted(labels - known))
    purged = mode.purge | _expired(evidence, rules)
    for kept in evidence.quarantine:
        if kept.label in mode.restore:
            yield _restore(kept, evidence)
        elif kept.label in purged:
            because = "a valid blob replaced it" if kept.replaced else "as asked"
            stays = kept.there if kept.replaced else None
            files, frees = (kept.entry,), kept.entry.freed
            yield Action(ActionKind.PURGE, kept.label, because, files, frees, relies_on=stays)


def _expired(evidence: Evidence, rules: Rules) -> set[str]:
    """What a valid blob has replaced and may go now: nothing ever expires before it was."""
    settings, mode = rules.settings, rules.mode
    if not (mode.clean or mode.purge_replaced):
        return set()
    excess = _size(evidence) - settings.quarantine_max_bytes
    expired: set[str] = set()
    for kept in sorted(evidence.quarantine, key=lambda each: each.entry.ctime_ns):
        age = evidence.age_of(kept.entry.ctime_ns / 1e9)  # it changed last when it was moved here
        due = mode.purge_replaced or age >= settings.quarantine_keep or excess > 0
        if kept.replaced and due:
            expired.add(kept.label)
            excess -= kept.entry.allocated
    return expired


def _restore(kept: Kept, evidence: Evidence) -> model.Planned:
    name, why = names.printable(kept.name), safety.store_forbids(evidence)
    if why is None and kept.there is not None:
        why = safety.Why(
            RefusalKind.CHANGED,
            f"its place is taken by a new {name}",
            "purge it, or move the new file away",
            command=advice.watch(evidence, "quarantine", "purge", kept.label),
        )
    if why is None and not kept.place_seen:
        why = safety.Why(
            RefusalKind.PERMISSION,
            f"it is unknown whether its place, blobs/{name}, is free",
            "make blobs/ readable first",
            command=findings.made_listable("blobs", evidence),
        )
    if why is not None:
        return why.refusal(kept.label, ActionKind.RESTORE)
    return Action(ActionKind.RESTORE, kept.label, f"back to blobs/{name}", (kept.entry,))

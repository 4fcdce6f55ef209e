"""What lets an interrupted download resume with as little as possible to download again. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from rich.filesize import decimal

from watcher.decide import at_risk, cleaning, conditions, findings, quarantine, questions, safety
from watcher.decide.conditions import Step, settled_condition
from watcher.model import (
    QUIET_SECONDS,
    WRONG,
    Action,
    ActionKind,
    Condition,
    Diagnosed,
    Entry,
    Evidence,
    Kind,
    OddBlob,
    Part,
    Ranges,
    Refusal,
    RefusalKind,
    Rules,
    Visibility,
)
from watcher.ollama import names, ranges, sidecars
from watcher.system import advice

#: More sidecars than this are absurd, and brought down.
MOST_SIDECARS = 1000


def of_download(
    diagnosed: Diagnosed, evidence: Evidence, rules: Rules
) -> Iterator[Action | Refusal]:
    """What repairs a download, if anything has to be repaired."""
    match conditions.row(diagnosed.condition).repair:
        case Step.WAIT:
            yield from _not_quiet_yet(diagnosed)
        case Step.REMOVE_SURPLUS:
            yield from cleaning.surplus(diagnosed, evidence)
        case Step.WRITE_SIDECARS:
            yield from _write_sidecars(diagnosed, evidence, rules)


def _is_rewritten(condition: Condition) -> bool:
    return conditions.row(condition).repair is Step.WRITE_SIDECARS


def _not_quiet_yet(diagnosed: Diagnosed) -> Iterator[Refusal]:
    """A download that counts as live only because it changed lately, and needs repair then."""
    download = diagnosed.download
    if download.writers or not _is_rewritten(settled_condition(download)[0]):
        return
    left = max(0.0, QUIET_SECONDS - diagnosed.quiet)
    why = safety.Why(
        RefusalKind.NOT_QUIET,
        f"{diagnosed.because}; a pull may be running",
        f"try again in {advice.duration(left)}",
        left,
    )
    yield safety.refusal(why, diagnosed, ActionKind.WRITE_SIDECARS)


def _write_sidecars(
    diagnosed: Diagnosed, evidence: Evidence, rules: Rules
) -> Iterator[Action | Refusal]:
    download = diagnosed.download
    if not download.total:
        yield safety.refusal(_no_length(diagnosed, evidence), diagnosed, ActionKind.WRITE_SIDECARS)
        return
    trusted = download.trust.trusted
    if not download.trust.zeros_read:
        return  # what was not looked through is not believed; `repair` reads without a limit
    if diagnosed.condition is Condition.WHOLE and not questions.believed(diagnosed):
        assert download.data is not None
        if download.data.sha256 is None and rules.mode.hash:
            return  # it is hashed first; who may not hash goes by what can be trusted
        if download.data.sha256 == diagnosed.digest.lower():
            trusted = ((0, download.total),)
    parts = sidecars.from_trusted(trusted, download.total, _at_least(diagnosed))
    if parts == tuple(sidecar.part for sidecar in download.sidecars):
        return  # it claims just what can be believed
    wanted = {names.sidecar(diagnosed.digest, part.number) for part in parts}
    surplus = tuple(
        sidecar.entry for sidecar in download.sidecars if sidecar.entry.name not in wanted
    )
    problem = (
        safety.why_not_take(diagnosed, evidence)
        if surplus
        else safety.why_not_add(diagnosed, evidence)
    ) or _owner_forbids(download.entries, evidence)
    if problem is None and rules.mode.patient:
        problem = safety.another_is_live(diagnosed, evidence)
    if problem is not None:
        yield safety.refusal(problem, diagnosed, ActionKind.WRITE_SIDECARS)
        return
    claims = sidecars.claims(parts)
    yield Action(
        kind=ActionKind.WRITE_SIDECARS,
        subject=diagnosed.digest,
        because=f"{conditions.row(diagnosed.condition).words} ({diagnosed.because})",
        expects=download.entries,
        models=download.models,
        wait_seconds=safety.guard_seconds(evidence),
        parts=parts,
        surplus=surplus,
        saves=_saves(diagnosed, claims),
        doubts=_doubts(parts, download.trust.present, claims),
    )


def _at_least(diagnosed: Diagnosed) -> int:
    """So many parts that every sidecar is replaced and none is left over."""
    numbers = [
        sidecar.number for sidecar in diagnosed.download.sidecars if sidecar.number is not None
    ]
    return min(max(numbers, default=0) + 1, MOST_SIDECARS)


def _saves(diagnosed: Diagnosed, claims: Ranges) -> int:
    """Bytes that Ollama alone would have downloaded again."""
    total = diagnosed.download.total or 0
    rest = total - ranges.size(claims)
    alone = total if diagnosed.cost_alone is None else diagnosed.cost_alone
    return max(0, alone - rest)


def _doubts(parts: tuple[Part, ...], present: Ranges, claims: Ranges) -> Ranges:
    """What must stay doubtful: where attempts will start, and what is there and not claimed."""
    return ranges.union(sidecars.heads(parts), ranges.difference(present, claims))


def _no_length(diagnosed: Diagnosed, evidence: Evidence) -> safety.Why:
    """Nothing here tells the length of a layer: its model's registry would."""
    models, doubt = diagnosed.download.models, diagnosed.download.doubted_length
    if doubt:
        return safety.Why(
            RefusalKind.LENGTH,
            f"its length is unknown: {doubt}",
            "pull its model again, or clean it once it is stale",
        )
    if models:
        return safety.Why(
            RefusalKind.LENGTH,
            f"its length is unknown, and the registry of {models[0]} did not report it",
            "run it again when the registry is reachable, or clean it once it is stale",
            command=advice.watch(evidence, "repair", names.short(diagnosed.digest)),
        )
    return safety.Why(
        RefusalKind.LENGTH,
        "its length and its model are unknown",
        f"{findings.NAMED}; or clean it once it is stale",
    )


def _owner_forbids(entries: tuple[Entry, ...], evidence: Evidence) -> safety.Why | None:
    """The server must own the progress files: it fails at the end if it can't rewrite them."""
    owner = entries[0].uid
    if evidence.uid == owner:
        return None
    why = f"its files belong to user id {owner}, but new ones would belong to {evidence.uid}"
    if evidence.caller.uid != 0 and evidence.place.owner == owner:
        return safety.Why(RefusalKind.OWNER, why, "run it as root, or as that user")
    theirs = [entry for entry in entries if entry.uid != evidence.place.owner]
    given = findings.given_to(evidence.place.owner, theirs, evidence)
    return safety.Why(RefusalKind.OWNER, why, "give them to the owner of the store", command=given)


def damaged_blobs(evidence: Evidence, rules: Rules) -> Iterator[Action | Refusal]:
    """Damaged blobs go to quarantine, if they can be downloaded again.

    A link goes itself, never what it leads to.
    """
    room = rules.settings.quarantine_max_bytes - quarantine.size(evidence)
    for odd in evidence.census.odd:
        if odd.fault not in WRONG or odd.entry is None:
            continue
        if rules.mode.online and odd.models and not odd.asked:
            continue  # its registry is asked first
        why = _blob_stays(odd, evidence)
        if why is None and odd.entry.allocated > room:
            why = _no_room(evidence, rules)
        name = names.blob(odd.digest)
        if why is not None:
            yield _refused(why, name, odd)
            continue
        room -= odd.entry.allocated
        yield Action(
            ActionKind.QUARANTINE_BLOB,
            name,
            f"{findings.damage(odd)}, and the registry has it: "
            f"{advice.ollama(evidence, 'pull', odd.models[0])} downloads this layer only",
            (odd.entry,),
            models=odd.models,
        )


def _refused(why: safety.Why, name: str, odd: OddBlob) -> Refusal:
    return Refusal(
        why.kind,
        name,
        ActionKind.QUARANTINE_BLOB,
        why.reason,
        why.remedy,
        why.left,
        odd.models,
        command=why.command,
    )


def _no_room(evidence: Evidence, rules: Rules) -> safety.Why:
    """The quarantine is bounded: what does not fit into it stays where it is."""
    most = rules.settings.quarantine_max_bytes
    replaced = any(kept.replaced for kept in evidence.quarantine)
    return safety.Why(
        RefusalKind.ROOM,
        f"the quarantine is limited to {decimal(most)}, and this would exceed it",
        "purge it, or raise quarantine_max_size in the settings",
        command=advice.watch(evidence, "quarantine", "purge" if replaced else "ls"),
    )


def _blob_stays(odd: OddBlob, evidence: Evidence) -> safety.Why | None:
    if odd.registry is None or odd.registry != odd.wanted:
        return _not_to_be_had(odd, evidence)
    if evidence.view.visibility is not Visibility.FULL:
        return safety.unseen(evidence)
    return safety.store_forbids(evidence)


def _not_to_be_had(odd: OddBlob, evidence: Evidence) -> safety.Why:
    """A damaged blob stays where no registry has said that it can be downloaded again."""
    stays = "it is damaged but may be the only copy"
    command = advice.watch(evidence, "repair", names.short(odd.digest))
    if not odd.models:
        return safety.Why(
            RefusalKind.REGISTRY, f"{stays}: no model names it", "pull or create its model again"
        )
    if odd.registry is not None:
        return safety.Why(
            RefusalKind.REGISTRY,
            f"{stays}: its registry has {odd.registry} bytes, the manifest says {odd.wanted}",
            "create the model again, or pull its newer version",
        )
    if not odd.asked:
        why = f"{stays}: its registry was not asked"
        return safety.Why(RefusalKind.REGISTRY, why, "ask it", command=command)
    why = f"{stays}: its registry did not answer, or does not have it"
    remedy = "make the registry reachable and ask again, or create the model again"
    return safety.Why(RefusalKind.REGISTRY, why, remedy, command=command)


# ---------------------------------------------------------------- times


def refresh(diagnosed: tuple[Diagnosed, ...], evidence: Evidence, rules: Rules) -> Iterator[Action]:
    """Set the times of what is at risk, so that no start of the server deletes it.

    Besides, those of stale downloads that are repaired. All files of a download go together. Root
    leaves alone what has a second name: that may lie outside of the store.
    """
    if evidence.place.foreign:
        return
    every = [*at_risk.of_downloads(diagnosed), *at_risk.of_blobs(evidence, rules)]
    if rules.mode.repair_stale:
        stale = (each for each in diagnosed if each.stale and _is_rewritten(each.condition))
        every += [
            at_risk.AtRisk(each.digest, each.download.entries, each.download.models)
            for each in stale
        ]
    for each in every:
        entries = tuple(
            entry for entry in each.entries if entry.kind is Kind.FILE and evidence.uid == entry.uid
        )
        if at_risk.fades(entries, evidence.now) and _alone(entries, evidence):
            yield Action(
                ActionKind.REFRESH,
                each.subject,
                "soon old enough for the server to prune it",
                entries,
                models=each.models,
            )


def _alone(entries: tuple[Entry, ...], evidence: Evidence) -> bool:
    return evidence.uid != 0 or all(entry.links == 1 for entry in entries)

"""What lets an interrupted download resume with as little as possible to download again. Pure.

That is: what has to be hashed, or asked of a registry, before; progress files; times.
"""

from collections.abc import Iterator

from rich.filesize import decimal

from watcher import model
from watcher.decide import at_risk, cleaning, conditions, findings, safety
from watcher.decide.conditions import Step, settled_condition
from watcher.model import Action, ActionKind, Diagnosed, Evidence, Planned, RefusalKind, Rules
from watcher.ollama import names, ranges, sidecars
from watcher.state import sums
from watcher.system import advice

MOST_SIDECARS = 1000  #: more sidecars than this are absurd, and brought down
_UNKNOWN_LENGTH = safety.Why(RefusalKind.LENGTH, "its length is unknown", findings.NAMED)


def of_download(diagnosed: Diagnosed, evidence: Evidence, rules: Rules) -> Iterator[Planned]:
    match conditions.row(diagnosed.condition).repair:
        case Step.WAIT:
            yield from _not_quiet_yet(diagnosed)
        case Step.REMOVE_SURPLUS:
            yield cleaning.surplus(diagnosed, evidence)
        case Step.WRITE_SIDECARS:
            yield from _write_sidecars(diagnosed, evidence, rules)


def _not_quiet_yet(diagnosed: Diagnosed) -> Iterator[Planned]:
    """A download that counts as live only because it changed lately, and needs repair then."""
    settled, _ = settled_condition(diagnosed.download)
    if diagnosed.download.writers or conditions.row(settled).repair is not Step.WRITE_SIDECARS:
        return
    left = max(0.0, model.QUIET_SECONDS - diagnosed.quiet)
    reason = f"{diagnosed.because}; a pull may be running"
    why = safety.Why(RefusalKind.NOT_QUIET, reason, f"try again in {advice.duration(left)}", left)
    yield why.of_download(diagnosed, ActionKind.WRITE_SIDECARS)


def _write_sidecars(diagnosed: Diagnosed, evidence: Evidence, rules: Rules) -> Iterator[Planned]:
    download, trust, kind = diagnosed.download, diagnosed.download.trust, ActionKind.WRITE_SIDECARS
    total, trusted = download.total, trust.trusted
    if not total:
        yield _no_length(diagnosed, evidence).of_download(diagnosed, kind)
        return
    if not trust.zeros_read:
        return  # what was not looked through is not believed; `repair` reads without a limit
    if diagnosed.condition is model.Condition.WHOLE and not _is_believed(diagnosed):
        assert download.data is not None
        if download.data.sha256 is None and rules.mode.hash:
            return  # it is hashed first; who may not hash goes by what can be trusted
        if download.data.sha256 == diagnosed.digest.lower():
            trusted = ((0, total),)
    # So many parts that every sidecar is replaced and none is left over.
    numbers = [each.number for each in download.sidecars if each.number is not None]
    parts = sidecars.from_trusted(trusted, total, min(max(numbers, default=0) + 1, MOST_SIDECARS))
    if parts == tuple(sidecar.part for sidecar in download.sidecars):
        return  # it claims just what can be believed
    wanted = {names.sidecar(diagnosed.digest, part.number) for part in parts}
    surplus = tuple(each.entry for each in download.sidecars if each.entry.name not in wanted)
    forbids = safety.why_not_take if surplus else safety.why_not_add
    why = forbids(diagnosed, evidence) or _owner_forbids(download.entries, evidence)
    if why is None and rules.mode.patient:
        why = safety.another_is_live(diagnosed, evidence)
    if why is not None:
        yield why.of_download(diagnosed, kind)
        return
    claims = sidecars.claims(parts)
    alone = total if diagnosed.cost_alone is None else diagnosed.cost_alone
    yield safety.action(diagnosed, evidence, kind, conditions.why(diagnosed))._replace(
        parts=parts,
        surplus=surplus,
        saves=max(0, alone - (total - ranges.size(claims))),
        # Where attempts will start, and what is there and not claimed.
        doubts=ranges.union(sidecars.heads(parts), ranges.difference(trust.present, claims)),
    )


def prove(diagnosed: Diagnosed, evidence: Evidence, rules: Rules) -> Iterator[model.Planned]:
    """Compare what a server has left with the sums of its chunks, before its next pull does."""
    download, kind, data = diagnosed.download, ActionKind.PROVE, diagnosed.download.data
    passed = (model.Condition.REDUNDANT, model.Condition.UNKNOWN)
    is_other = download.ours or download.transfer or diagnosed.condition in passed
    if is_other or data is None or download.proven is not None:
        return
    why = safety.why_not_add(diagnosed, evidence)
    if why is None and not rules.mode.online:
        reason = "its registry may not be asked for the sums of its chunks"
        why = safety.Why(RefusalKind.REGISTRY, reason, "run it again without --offline")
    if why is None and not download.total:
        why = _no_length(diagnosed, evidence)
    if why is None and not download.models:
        reason = "its model is unknown, so no registry can be asked for the sums of its chunks"
        remedy = "run `ollama-watch repair --prove MODEL` with the name of its model"
        why = safety.Why(RefusalKind.REGISTRY, reason, remedy)
    if why is not None:
        yield why.of_download(diagnosed, kind)
        return
    because, trusted = "to find damage before its next pull does", download.trust.trusted
    action = Action(kind, diagnosed.digest, because, (data,), models=download.models)
    yield action._replace(doubts=trusted, length=download.total or 0)


def give_back(diagnosed: Diagnosed, evidence: Evidence) -> model.Planned:
    """What makes a transfer of ours a download that the server resumes."""
    download, kind, total = diagnosed.download, ActionKind.GIVE_BACK, diagnosed.download.total
    trusted = download.trust.trusted
    why = _not_worth_it(diagnosed) or _is_discarded(diagnosed, evidence)
    why = why or safety.why_not_give_back(diagnosed, evidence)
    why = why or _owner_forbids(download.entries, evidence) or _is_not_servers(download, evidence)
    if why is not None or not total:
        return (why or _UNKNOWN_LENGTH).of_download(diagnosed, kind)
    parts = sidecars.from_trusted(trusted, total)
    because = f"{decimal(ranges.size(trusted))} that the server can resume"
    return safety.action(diagnosed, evidence, kind, because)._replace(
        parts=parts, saves=ranges.size(sidecars.claims(parts)), doubts=sidecars.heads(parts)
    )


def is_left(diagnosed: Diagnosed) -> bool:
    """Whether it is a server's, with bytes of worth to a transfer of ours."""
    download = diagnosed.download
    is_strange = diagnosed.condition is model.Condition.UNKNOWN or download.has_old_names
    is_other = download.transfer or download.ours or download.data is None
    return bool(download.trust.trusted) and not (is_strange or is_other)


def take_over(diagnosed: Diagnosed, evidence: Evidence) -> model.Planned:
    """What makes a server's download a transfer of ours, which must be able to write to it."""
    download, kind, data = diagnosed.download, ActionKind.TAKE_OVER, diagnosed.download.data
    assert data is not None
    # What time does not help against comes first.
    why = _owner_forbids((data,), evidence)
    if why is None and data.links > 1:
        reason = "its data has another name elsewhere"
        why = safety.Why(RefusalKind.LINKED, reason, "remove that name")
    if why is None and not data.mode & 0o200:
        reason = "its data may not be written to"
        why = safety.Why(RefusalKind.PERMISSION, reason, "let its owner write to it")
    if why is None and not download.trust.zeros_read:
        reason = "the power may have failed, and it was not read in full since"
        why = safety.Why(RefusalKind.UNPROVEN, reason, "repair it first")
    if why is None and not download.total:
        why = _UNKNOWN_LENGTH
    why = why or safety.why_not_take_over(diagnosed, evidence)
    if why is not None:
        return why.of_download(diagnosed, kind)
    trusted = ranges.size(download.trust.trusted)
    because = f"{decimal(trusted)} that ollama-watch can resume"
    action = safety.action(diagnosed, evidence, kind, because)
    return action._replace(saves=trusted, relies_on=data)


def _not_worth_it(diagnosed: Diagnosed) -> safety.Why | None:
    match diagnosed.condition:
        case model.Condition.TRANSFER if not diagnosed.download.trust.trusted:
            return safety.Why(RefusalKind.UNKNOWN, diagnosed.because, "clean it once it is stale")
        case model.Condition.UNKNOWN:
            return safety.Why(RefusalKind.UNKNOWN, diagnosed.because, "see `ollama-watch audit`")
        case model.Condition.REDUNDANT:
            return safety.Why(RefusalKind.CHANGED, diagnosed.because, "nothing needs to be done")
    return None


def _is_discarded(diagnosed: Diagnosed, evidence: Evidence) -> safety.Why | None:
    """A server that had discarded it would do that again, and then nobody may keep its bytes."""
    if not diagnosed.download.discarded:
        return None
    reason, remedy = "its hash is wrong: the server would discard it again", "repair it instead"
    command = findings.helps(diagnosed, evidence)
    return safety.Why(RefusalKind.UNPROVEN, reason, remedy, command=command)


def _no_length(diagnosed: Diagnosed, evidence: Evidence) -> safety.Why:
    """Nothing here gives the length of a layer: its model's registry would."""
    download, kind = diagnosed.download, RefusalKind.LENGTH
    if download.doubted_length:
        reason = f"its length is unknown: {download.doubted_length}"
        return safety.Why(kind, reason, "pull its model again, or clean it once it is stale")
    if not download.models:
        remedy = f"{findings.NAMED}; or clean it once it is stale"
        return safety.Why(kind, "its length and its model are unknown", remedy)
    registry = f"the registry of {download.models[0]}"
    return safety.Why(
        kind,
        f"its length is unknown, and {registry} did not report it",
        "run it again when the registry is reachable, or clean it once it is stale",
        command=advice.watch(evidence, "repair", names.short(diagnosed.digest)),
    )


def _owner_forbids(entries: tuple[model.Entry, ...], evidence: Evidence) -> safety.Why | None:
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


def _is_not_servers(download: model.Download, evidence: Evidence) -> safety.Why | None:
    """The server's user must be able to write to what is given back."""
    owner = evidence.place.owner
    if download.entries[0].uid == owner:
        return None
    why = f"its data belongs to user id {download.entries[0].uid}, and the store to {owner}"
    given = findings.given_to(owner, download.entries, evidence)
    return safety.Why(RefusalKind.OWNER, why, "give it to the owner of the store", command=given)


def questions_of(diagnosed: Diagnosed) -> Iterator[Action]:
    """What of a download has to be hashed before it can be repaired."""
    data, blob = diagnosed.download.data, diagnosed.download.finished
    redundant = diagnosed.condition is model.Condition.REDUNDANT
    if data is not None and redundant and blob is not None and blob.sha256 is None:
        because = "to find out whether its partial data can be removed"
        yield _hash(blob, diagnosed.digest, because)
    whole = diagnosed.condition is model.Condition.WHOLE and not _is_believed(diagnosed)
    if data is not None and whole and data.sha256 is None:
        yield _hash(data, diagnosed.digest, "to find out whether the download is complete")


def _is_believed(diagnosed: Diagnosed) -> bool:
    """Whether every byte of a download can be trusted without a look at its hash."""
    return diagnosed.download.trust.trusted == ((0, diagnosed.download.total),)


def questions_to_registries(
    diagnosed: tuple[Diagnosed, ...], evidence: Evidence, rules: Rules
) -> Iterator[Action]:
    """What only the registry that a model came from knows: a lost length, a corrupt blob's."""
    ask = ActionKind.ASK_REGISTRY
    for download in (each.download for each in diagnosed):
        if download.total is None and download.models and download.registry is None:
            because, files = "its length is unknown", download.entries
            yield Action(ask, download.digest, because, files, models=download.models)
    yield from _damage_unmeasured(evidence, rules)
    because = "to find out whether a damaged blob can be downloaded again"
    for odd in _damaged_and_unheard(evidence, missing_too=rules.mode.fetch):
        yield Action(ask, odd.digest, because, (), models=odd.models)


def _damage_unmeasured(evidence: Evidence, rules: Rules) -> Iterator[Action]:
    """How much of what is damaged is wrong, where the registry's sums of its chunks may say that.

    That is, of blobs, and of layers that a server has discarded.
    """
    for odd in evidence.census.odd if rules.mode.fetch else ():
        if odd.fault is model.BlobFault.CORRUPT and not odd.wrong:
            yield from _measure(odd.digest, odd.content, odd.wanted or 0, odd.models)
    for each in evidence.downloads if rules.mode.fetch else ():
        if each.discarded and each.proven is None:
            yield from _measure(each.digest, each.data, each.total or 0, each.models)


def _measure(
    digest: str, content: model.Entry | None, length: int, models: tuple[str, ...]
) -> Iterator[Action]:
    if content is not None and models and length >= sums.FROM:
        because = "to find out how much of it is wrong"
        action = Action(ActionKind.PROVE, digest, because, (content,), models=models)
        yield action._replace(length=length, doubts=((0, length),))


def _damaged_and_unheard(evidence: Evidence, *, missing_too: bool) -> Iterator[model.OddBlob]:
    faults = model.WRONG | {model.BlobFault.MISSING} if missing_too else model.WRONG
    for odd in evidence.census.odd:
        if odd.fault in faults and odd.models and odd.registry is None:
            yield odd


def blobs_in_doubt(evidence: Evidence) -> Iterator[Action]:
    """Blobs that may not match their names, and were not hashed as they are now."""
    for entry in evidence.census.unproven:
        digest = names.parse_blob(entry.name).digest
        yield _hash(entry, digest, "it was finished from repaired progress files, or changed")
    for odd in evidence.census.odd:
        if odd.fault in model.DOUBTFUL and odd.content is not None:
            yield _hash(odd.content, odd.digest, "its size differs from its manifest")


def all_blobs(evidence: Evidence) -> Iterator[Action]:
    """Every blob that a manifest names and nobody has hashed as it is; not those in doubt."""
    known = {each.subject for each in blobs_in_doubt(evidence)}
    unknown = (None, model.UNREADABLE)
    named = [content for content, _ in evidence.census.named if content.sha256 in unknown]
    for entry in sorted(named, key=lambda entry: entry.mtime_ns):
        digest = names.parse_blob(entry.name).digest
        if digest not in known:
            yield _hash(entry, digest, "not hashed in its present state")


def open_questions(evidence: Evidence, *, missing_too: bool) -> frozenset[str]:
    """The digests of blobs that have to be hashed, or that a registry has not been heard about."""
    unheard = {odd.digest for odd in _damaged_and_unheard(evidence, missing_too=missing_too)}
    unheard |= {each.digest for each in evidence.downloads if missing_too and each.discarded}
    return frozenset(unheard | {each.subject for each in blobs_in_doubt(evidence)})


def _hash(entry: model.Entry, digest: str, because: str) -> Action:
    return Action(ActionKind.HASH, digest, because, (entry,))


def refresh(diagnosed: tuple[Diagnosed, ...], evidence: Evidence, rules: Rules) -> Iterator[Action]:
    """Set the times of what is at risk, so that no start of the server deletes it.

    Besides, those of stale downloads that are repaired. All files of a download go together. Root
    leaves alone what has a second name: that may lie outside of the store.
    """
    if evidence.place.foreign or evidence.place.read_only:
        return
    every = [*at_risk.of_downloads(diagnosed), *at_risk.of_blobs(evidence, rules)]
    every.extend(
        at_risk.AtRisk(each.digest, each.download.entries, each.download.models)
        for each in diagnosed
        if rules.mode.repair_stale
        and each.stale
        and conditions.row(each.condition).repair is Step.WRITE_SIDECARS
    )
    for needed in every:
        mine = (entry for entry in needed.entries if entry.uid == evidence.uid)
        files = tuple(entry for entry in mine if entry.kind is model.Kind.FILE)
        fades = at_risk.fades(files, evidence.now)
        if fades and (evidence.uid != 0 or all(entry.links == 1 for entry in files)):
            because = "a server start deletes files that are one hour old"
            yield Action(ActionKind.REFRESH, needed.subject, because, files, models=needed.models)

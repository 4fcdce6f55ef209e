"""The findings about blobs and manifests, and about what lies in the wrong place. Pure."""

from collections.abc import Iterable, Iterator

from rich.filesize import decimal

from watcher import model
from watcher.decide import at_risk, findings
from watcher.decide.at_risk import Doomed
from watcher.decide.finding_kinds import BEHIND_LINK, found, row
from watcher.decide.findings import path_of, sizes
from watcher.model import BlobFault, Evidence, Finding, Kind, ManifestFault, OddBlob, Rules
from watcher.ollama import names, ranges
from watcher.system import advice


def of_blobs(
    evidence: Evidence, diagnosed: Iterable[model.Diagnosed], rules: Rules, doomed: Doomed | None
) -> Iterator[Finding]:
    """Odd and unnamed blobs. `doomed`: what a start deletes; None where that is not known."""
    for odd in evidence.census.odd:
        if odd.lies is None:  # else `astray` reports it
            yield _odd_blob(odd, evidence)
    for entry in evidence.census.unproven:
        name = entry.name[:19]
        yield found("blob_unproven", f"blobs/{entry.name}", name=name)._replace(
            command=advice.watch(evidence, "repair", name), sizes=sizes([entry])
        )
    pulling = any(not each.stale for each in diagnosed)
    unread = findings.is_blind(evidence)
    for entry in evidence.census.unnamed:
        path, name = f"blobs/{entry.name}", entry.name[:19]
        young = at_risk.is_young(entry, evidence, rules)
        models = evidence.known_as.get(names.parse_blob(entry.name).digest, ())
        of = f"a layer of {', '.join(models[:3])}, whose manifest is missing" if models else ""
        waits = "an unfinished pull may need it" if young else ""
        goes = not (young or unread) and entry.kind is Kind.FILE
        manifest = "readable manifest" if unread else "manifest"
        orphan = found("blob_orphan", path, manifest=manifest, name=name)
        yield orphan._replace(
            # The finished layers of a pull under way are nothing to worry about.
            severity=model.Severity.INFO if young and pulling else orphan.severity,
            evidence="; ".join(filter(None, (of, waits))),
            alone="" if doomed is None else _kept_or_not(path, doomed),
            command=advice.watch(evidence, "clean", name) if goes else "",
            sizes=sizes([entry]),
            models=models,
        )


def at_risk_of_start(evidence: Evidence, rules: Rules, doomed: Doomed) -> Iterator[Finding]:
    """One finding for all needed blobs that a start deletes now, one for those of a later one."""
    now: list[at_risk.AtRisk] = []
    later: list[at_risk.AtRisk] = []
    for each in at_risk.of_blobs(evidence, rules):
        for at in at_risk.unwatched(at_risk.ends(each.entries, doomed), evidence):
            (now if at <= evidence.now else later).append(each)
    for alike in filter(None, (now, later)):
        what, them, known_as = f"{len(alike):,} finished blobs are", "them", ""
        if len(alike) == 1:
            what, them = "a finished blob is", "it"
            known_as = names.short(names.parse_blob(alike[0].subject).digest)
        entries = tuple(entry for each in alike for entry in each.entries)
        usual = found("blob_at_risk", f"blobs/{entries[0].name}", what=what, them=them)
        when = at_risk.ends(entries, doomed)
        usual = usual._replace(sizes=sizes(entries))
        yield at_risk.finding(usual, entries, when, known_as, evidence)


def _kept_or_not(path: str, doomed: Doomed) -> str:
    """What a start of the server does to a file that no manifest keeps."""
    return "a server start deletes it once it is one hour old" if path in doomed else "it stays"


def damage(odd: OddBlob) -> str:
    """What is wrong with a blob, in a clause about it."""
    if odd.fault is BlobFault.CORRUPT:
        return "checksum mismatch"
    if odd.fault is not BlobFault.NO_FILE:
        return row(f"blob_{odd.fault.value}").message.replace("a blob of {who}", "it")
    there = odd.entry if odd.behind is None else odd.behind
    kind = "not a file" if there is None else f"{there.kind.words}, not a file"
    return f"it is {'a symlink to ' if odd.behind is not None else ''}{kind}"


def _odd_blob(odd: OddBlob, evidence: Evidence) -> Finding:
    short = names.short(odd.digest)
    who = names.known_as(odd.models, odd.digest)
    finding = found(f"blob_{odd.fault.value}", f"blobs/{names.blob(odd.digest)}", who=who)
    command = ""
    if odd.models and odd.fault is BlobFault.MISSING:
        command = _completed(odd, evidence)
    elif odd.models and odd.fault is not BlobFault.SYMLINK:
        command = advice.watch(evidence, "repair", short)
    remedy = "" if odd.models else "no model names it: pull or create its model again"
    return finding._replace(
        remedy=finding.remedy or remedy,
        evidence=_evidence_of(odd),
        command=command,
        sizes=sizes([odd.entry] if odd.entry else []),
        models=odd.models,
        wrong=odd.wrong,
    )


def _completed(odd: OddBlob, evidence: Evidence) -> str:
    """What fetches a missing blob: the pull of an unfinished model does, with the rest of it."""
    if any(not each.ours and set(each.models) & set(odd.models) for each in evidence.downloads):
        return advice.pull(evidence, odd.models[0], by_server=True)
    return advice.watch(evidence, "repair", "--fetch", names.short(odd.digest))


def _evidence_of(odd: OddBlob) -> str:
    """What was seen of a blob, and whether that was through a link."""
    if odd.fault is BlobFault.DANGLING:
        return ""  # the message has it all
    if odd.fault is BlobFault.NO_FILE:
        return damage(odd)
    content = odd.content
    sizes = [each for each in (odd.wanted, content and content.size) if each is not None]
    words = ranges.in_words(*sizes)
    expected = "" if odd.wanted is None else f"expected {words[0]}, "
    seen = f"{expected}found {'nothing' if content is None else words[-1]}"
    if odd.fault is BlobFault.CORRUPT and content is not None:
        differs = "" if odd.wanted in (None, content.size) else f"; {seen}"
        seen = f"its hash is {names.short(content.sha256 or '')}{differs}"
        if content.sha256 == model.UNREADABLE:
            seen = f"the disk can't give all of it back{differs}"
        if odd.wrong:
            many = "" if len(odd.wrong) == 1 else f" in {len(odd.wrong):,} ranges"
            damaged, start = decimal(ranges.size(odd.wrong)), decimal(odd.wrong[0][0])
            seen += f"; damaged: {damaged}{many}, starting at {start}"
    elif odd.fault in model.DOUBTFUL:
        seen += "; not hashed, so the manifest can also be wrong"
    return f"{seen}; read through a symlink" if odd.behind is not None else seen


# ---------------------------------------------------------------- manifests

#: Manifests that a pull replaces.
_PULLED = frozenset(
    {ManifestFault.CORRUPT, ManifestFault.BAD_DIGEST, ManifestFault.EMPTY, ManifestFault.WRONG_SIZE}
)

_CORRECTED = "the model's publisher must correct it: pull it later, or choose another tag"


def of_manifests(evidence: Evidence) -> Iterator[Finding]:
    """Files under ``manifests/`` that are no manifest in its place."""
    # What lies in a store in the store is reported together, by `astray`.
    for odd in evidence.census.odd_manifests:
        is_nested = any(_is_in(odd.path, each) for each in evidence.census.nested)
        if not odd.barred and not is_nested:
            yield odd_manifest(odd, evidence)


def odd_manifest(odd: model.OddManifest, evidence: Evidence) -> Finding:
    path, models = names.printable(odd.path), (odd.model,) if odd.model else ()
    who = odd.model or path
    finding = found(f"manifest_{odd.fault.value}", odd.path, who=who, path=path)
    finding = finding._replace(evidence=odd.why, models=models)
    if odd.hidden:
        return finding._replace(
            severity=model.Severity.ERROR,
            kind="manifest_unreadable",
            message=f"this user can't read the manifest of {who}",
            alone="nothing: the server's user can read it",
            command=advice.watch(evidence, "audit", root=True),
        )
    remedy = BEHIND_LINK if findings.is_led_away(odd.path, evidence) else ""
    if odd.published:
        same = f"{odd.why}; its registry's manifest was as wrong when it was asked last"
        return finding._replace(evidence=same, remedy=_CORRECTED)
    if odd.fault in _PULLED:
        pull = advice.pull(evidence, odd.model, by_server=True) if odd.model else ""
        if odd.model and odd.fault is ManifestFault.WRONG_SIZE:
            # Ours: then it is known whether the registry's own manifest is as wrong.
            pull = advice.pull(evidence, odd.model)
        return finding._replace(command=pull, remedy=remedy)
    return finding._replace(command="" if remedy else _fixed(odd, evidence), remedy=remedy)


def _fixed(odd: model.OddManifest, evidence: Evidence) -> str:
    """The command that lets the server go on without, or with, a manifest; "" where none does."""
    path, owner = path_of(evidence, odd.path), evidence.place.owner
    match odd.fault:
        case ManifestFault.UNREADABLE:
            return advice.shell(evidence, "chmod", "u+r", path, owner=owner)
        case ManifestFault.DANGLING | ManifestFault.BAD_NAME:
            return advice.shell(evidence, "rm", path, owner=owner)
        case ManifestFault.CASE:
            # The second of two models gets a name of its own; nothing is lost.
            own, other = odd.path.split("/"), odd.why.split("/")
            at = next(at for at, (a, b) in enumerate(zip(own, other, strict=True)) if a != b)
            here = path_of(evidence, "/".join(own[: at + 1]))
            return advice.shell(evidence, "mv", "-nT", here, f"{here}-2", owner=owner)
        case _:
            return ""


# ---------------------------------------------------------------- what lies in the wrong place


def of_leftovers(evidence: Evidence, doomed: Doomed) -> Iterator[Finding]:
    """Temporary files of the server's own, foreign files, and names of older servers."""
    for each in evidence.census.temporaries:
        name = names.printable(each.entry.name)
        yield found("file_temporary", each.path, name=name)._replace(
            alone=_kept_or_not(each.path, doomed),
            command=advice.watch(evidence, "clean")
            if findings.is_old_temporary(each, evidence)
            else "",
            sizes=sizes([each.entry]),
        )
    for entry in evidence.census.foreign:
        path = f"blobs/{entry.name}"
        yield found("file_foreign", path, name=names.printable(entry.name))._replace(
            alone=_kept_or_not(path, doomed), sizes=sizes([entry])
        )
    lying = {odd.lies.path for odd in evidence.census.odd if odd.lies is not None}
    for path, entry in evidence.census.old_names:
        if path not in lying:
            old = found("blob_old_name", path, name=names.printable(entry.name))
            yield old._replace(sizes=sizes([entry]))


def astray(evidence: Evidence) -> Iterator[Finding]:
    """What lies where no server looks, that of one folder or spelling together."""
    for finding in _astray(evidence):
        away = findings.is_led_away(finding.path, evidence)
        yield finding._replace(command="", remedy=BEHIND_LINK) if away else finding


def _astray(evidence: Evidence) -> Iterator[Finding]:
    groups: dict[str, list[OddBlob]] = {}
    stores = evidence.census.nested
    yield from (_nested(each, evidence) for each in stores)
    for odd in evidence.census.odd:
        if odd.lies is not None and not any(_is_in(odd.lies.path, each) for each in stores):
            folder = odd.lies.path.rpartition("/")[0]
            if folder == "blobs":  # by the spelling or the case of the name
                folder = "sha256:" if odd.lies.entry.name.startswith("sha256:") else ""
            groups.setdefault(folder, []).append(odd)
    for folder, group in sorted(groups.items()):
        if folder == "sha256:":
            yield _old(group, evidence)
        elif folder:
            where = f"in {names.printable(folder)}, where no server looks"
            yield _lying(group, where, advice.brought_up(evidence, folder))
        else:
            yield from (_case(odd, evidence) for odd in group)


def _is_in(path: str, nested: model.Nested) -> bool:
    """Whether something lies in a store in the store."""
    return path.startswith((f"{nested.path}/blobs/", f"{nested.path}/manifests/"))


def _nested(nested: model.Nested, evidence: Evidence) -> Finding:
    """A store in the store, with what is missing outside of it."""
    lying = ((odd, odd.lies) for odd in evidence.census.odd if odd.lies is not None)
    lost = [(odd, lies) for odd, lies in lying if _is_in(lies.path, nested)]
    every = (*nested.blobs, *nested.manifests)
    parts = [("blobs", "file", nested.blobs), ("manifests", "manifest", nested.manifests)]
    parts = [each for each in parts if each[-1]]
    counted = " and ".join(
        f"{len(files):,} {word}{'s' if len(files) > 1 else ''}" for _, word, files in parts
    )
    # Of a copy in blobs/ itself not all that is in there.
    whole = nested.path not in ("blobs", "manifests")
    places = [nested.path] if whole else [f"{nested.path}/{part}" for part, *_ in parts]
    shown = " and ".join(names.printable(f"{place}/") for place in places)
    finding = found("blob_astray", (*(lies for _, lies in lost), *every)[0].path, what="")
    if lost:
        severity, alone = model.Severity.ERROR, finding.alone
        seen = f"this store lacks {len(lost):,} of them"
    else:
        severity, alone = model.Severity.WARNING, "nothing: they stay and use the space"
        twins = len(every) - nested.apart
        are = "are" if twins > 1 else "is"
        seen = f"{f'{twins:,}' if twins else 'none'} of them {are} also in this store"
    kind = "blob_astray" if nested.blobs else "manifest_misplaced"
    if nested.path == "blobs" and not nested.manifests and not lost:
        kind = "file_foreign"  # of files that are nobody's one kind of finding is enough
    command, remedy = _moved_up(nested, [part for part, *_ in parts], shown, evidence)
    return finding._replace(
        severity=severity,
        kind=kind,
        message=f"{counted} of a store {'are' if len(every) > 1 else 'is'} in {shown}, where no "
        "server looks",
        evidence=seen,
        alone=alone,
        command=command,
        sizes=sizes(located.entry for located in every),
        models=tuple(sorted({model for odd, _ in lost for model in odd.models})),
        remedy=remedy,
    )


def _moved_up(
    nested: model.Nested, parts: list[str], shown: str, evidence: Evidence
) -> tuple[str, str]:
    """The command that moves a store in the store to its place, and what else there is to do."""
    if nested.used:
        return "", "a server runs on it: leave it, or stop that server first"
    if not nested.apart:
        return "", f"if it is a failed copy, inspect and remove {shown}"
    command = advice.moved_up(evidence, nested.path, parts, finished=nested.collides)
    return command, "files that this store already has stay there"


def _old(group: list[OddBlob], evidence: Evidence) -> Finding:
    where = "under names of older servers (sha256:…)"
    finding = _lying(group, where, advice.new_spellings(evidence))
    place = evidence.place
    sealed = place.read_only or place.blobs_linked or evidence.census.sealed
    if sealed or any(server.ours for server in evidence.servers):
        return finding
    alone = "the next server start renames them"
    return finding._replace(severity=model.Severity.INFO, alone=alone)


def _case(odd: OddBlob, evidence: Evidence) -> Finding:
    assert odd.lies is not None
    here = path_of(evidence, odd.lies.path)
    there = path_of(evidence, f"blobs/{names.blob(odd.digest)}")
    # A name that another manifest has stays.
    words = ("mv", "-nT") if odd.lies.entry in evidence.census.unprotected else ("ln", "-T")
    command = advice.shell(evidence, *words, here, there, owner=evidence.place.owner)
    return _lying([odd], "under a name that differs by case", command)


def _lying(group: list[OddBlob], where: str, command: str) -> Finding:
    what = f"{len(group):,} blobs of models are"
    if len(group) == 1:
        what = f"a blob of {names.known_as(group[0].models, group[0].digest)} is"
    lies = [odd.lies for odd in group if odd.lies is not None]
    paths = [names.printable(each.path) for each in lies]
    more = f", and {len(paths) - 3:,} more" if len(paths) > 3 else ""
    return found("blob_astray", lies[0].path, what=f"{what} {where}")._replace(
        evidence=", ".join(paths[:3]) + more,
        command=command,
        sizes=sizes(each.entry for each in lies),
        models=tuple(sorted({model for odd in group for model in odd.models})),
    )

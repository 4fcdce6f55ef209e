"""Everything worth telling about a store: what, the evidence, what Ollama alone would do. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import inf
from typing import assert_never

from watcher.model import (
    BLINDING,
    DOUBTFUL,
    HOUR,
    BlobFault,
    Condition,
    Diagnosed,
    Download,
    Entry,
    Evidence,
    Finding,
    Forecast,
    Kind,
    ManifestFault,
    OddBlob,
    OddManifest,
    Rules,
    Severity,
    Sizes,
    Temporary,
)
from watcher.ollama import names, ranges
from watcher.state.event_log import clock
from watcher.state.memory import FOLDER as OURS
from watcher.system import advice

_SEVERITY = {
    Condition.LIVE: Severity.INFO,
    Condition.PAUSED: Severity.INFO,
    Condition.BEHIND: Severity.WARNING,
    Condition.HOLLOW: Severity.ERROR,
    Condition.BLOCKED: Severity.ERROR,
    Condition.UNCLAIMED: Severity.WARNING,
    Condition.WHOLE: Severity.WARNING,
    Condition.REDUNDANT: Severity.WARNING,
    Condition.UNKNOWN: Severity.ERROR,
}
_LOOK_AT_DISK = "look at the kernel's log, and at the modes of the folders on the way"
#: Said of what lies behind somebody else's symlink, in place of a command.
BEHIND_LINK = "it lies behind somebody else's symlink: look at where that leads"
_STARTS_DELETE = "the next start of the server deletes it once it is an hour old"
#: How the model of a download is found out.
NAMED = "`repair MODEL`, with the model's name, asks its registry"


def sizes(entries: Iterable[Entry]) -> Sizes:
    """The three sizes of entries together."""
    apparent = allocated = freed = 0
    for entry in entries:
        apparent += entry.size
        allocated += entry.allocated
        freed += entry.freed
    return Sizes(apparent, allocated, freed)


# ---------------------------------------------------------------- downloads


def of_download(
    diagnosed: Diagnosed, evidence: Evidence, rules: Rules, doomed: Mapping[str, float]
) -> Iterator[Finding]:
    """What there is to tell about one unfinished download.

    `doomed`: paths that the next start of the server deletes, and from when on.
    """
    download = diagnosed.download
    who = names.known_as(download.models, download.digest)
    path = f"blobs/{download.entries[0].name}" if download.entries else "blobs"
    size = sizes(download.entries)
    fate = fate_of(download, evidence.now, doomed)
    yield Finding(
        severity=_SEVERITY[diagnosed.condition],
        kind=f"download_{diagnosed.condition.value}",
        path=path,
        message=f"the download of {who} is {diagnosed.condition.value}",
        evidence=diagnosed.because,
        alone="; ".join(filter(None, (_alone(diagnosed), fate))),
        command=helps(diagnosed, evidence),
        sizes=size,
        models=download.models,
        remedy=in_words(diagnosed),
    )
    if diagnosed.stale:
        yield Finding(
            severity=Severity.WARNING,
            kind="download_stale",
            path=path,
            message=f"the download of {who} has made no progress for"
            f" {advice.duration(diagnosed.age)}",
            evidence=f"stale after {advice.duration(rules.settings.stale_after)}",
            alone=fate,
            command=helps(diagnosed, evidence),
            sizes=size,
            models=download.models,
        )


def helps(diagnosed: Diagnosed, evidence: Evidence) -> str:
    """The command that helps a download on, or clears it away; "" where none does."""
    download, condition = diagnosed.download, diagnosed.condition
    if condition is Condition.LIVE:
        return ""
    if condition is Condition.UNKNOWN:
        return ""
    if diagnosed.stale:
        short, owner = names.short(diagnosed.digest), _owner(download)
        return advice.watch(evidence, "clean", short, owner=owner)
    if condition is Condition.PAUSED:
        return advice.ollama(evidence, "pull", download.models[0]) if download.models else ""
    if condition is not Condition.REDUNDANT and not (download.total or download.models):
        return ""  # no repair can tell how long it is
    return protects(diagnosed, evidence)


def protects(diagnosed: Diagnosed, evidence: Evidence) -> str:
    """The command that repairs a download, and makes it too young for the server to prune."""
    download = diagnosed.download
    known_as = names.known_as(download.models, diagnosed.digest)
    return advice.watch(evidence, "repair", known_as, owner=_owner(download))


def _owner(download: Download) -> int | None:
    """The user whose files they are; None where they have none, or several."""
    owners = {entry.uid for entry in download.entries}
    return owners.pop() if len(owners) == 1 else None


def in_words(diagnosed: Diagnosed) -> str:
    """What helps besides the command, or in its place."""
    if diagnosed.download.models or diagnosed.condition in (Condition.LIVE, Condition.REDUNDANT):
        return ""
    return f"nothing here says which model it belongs to; {NAMED}"


def _alone(diagnosed: Diagnosed) -> str:
    """What the next pull would do with it."""
    match diagnosed.condition:
        case Condition.LIVE:
            return "goes on"
        case Condition.PAUSED:
            return "the next pull resumes it"
        case Condition.BEHIND:
            return "the next pull downloads again what the sidecars don't claim"
        case Condition.HOLLOW:
            return "the next pull ends in a digest mismatch and discards everything"
        case Condition.BLOCKED:
            return "each pull of it fails, or cuts the data short"
        case Condition.UNCLAIMED:
            return "the next pull starts again at 0"
        case Condition.WHOLE:
            return "the next pull downloads what the sidecars don't claim, though it is there"
        case Condition.REDUNDANT:
            return "it stays, and one left sidecar blocks a later pull"
        case Condition.UNKNOWN:
            return "can't be told"
        case _:
            assert_never(diagnosed.condition)


def doomed(foreseen: Forecast) -> dict[str, float]:
    """The paths that a start of the server deletes, each with when it is old enough to go."""
    return {located.path: 0.0 for located in foreseen.deletes} | {
        located.path: at for at, located in foreseen.later
    }


def fate_of(download: Download, now: float, doomed: Mapping[str, float]) -> str:
    """What the next server start does to a download's files; "" where that is nothing."""
    when = [doomed.get(f"blobs/{entry.name}", inf) for entry in download.entries]
    gone = sum(at <= now for at in when)
    if when and gone == len(when):
        return "the next server start deletes it"
    if gone:
        return f"the next server start deletes {gone} of its {len(when)} files and breaks it"
    first = min(when, default=inf)
    if first == inf:
        return ""
    return f"the next server start after {clock(first, now)} deletes it"


def given_to(owner: int, entries: Iterable[Entry], evidence: Evidence) -> str:
    """The command that gives some of a download's files, and nothing else, to a user."""
    if is_led_away("blobs", evidence):
        return ""
    paths = (path_of(evidence, f"blobs/{entry.name}") for entry in entries)
    # Never through a link: who may write there may put one in a file's place.
    return advice.shell(evidence, "chown", "-h", str(owner), *paths)


def is_led_away(path: str, evidence: Evidence) -> bool:
    """Whether somebody else's symlink lies on the way to a path below the store.

    No command about it is printed: root would paste it, and do it wherever the symlink leads.
    """
    behind = evidence.census.behind_foreign
    return evidence.place.foreign is not None or any(
        path == each or path.startswith(f"{each}/") for each in behind
    )


def path_of(evidence: Evidence, path: str) -> str:
    """The whole path of what lies at `path` below the store."""
    return f"{evidence.place.path}/{path}"


# ---------------------------------------------------------------- the store itself


def of_store(
    evidence: Evidence, diagnosed: tuple[Diagnosed, ...], foreseen: Forecast, rules: Rules
) -> Iterator[Finding]:
    """What is wrong with the store as a whole."""
    place, census = evidence.place, evidence.census
    shown = names.printable(place.path)
    if evidence.forgotten:
        yield Finding(
            Severity.INFO,
            "state_forgotten",
            ".ollama-watch/state.json",
            "what was found out before is not known: blobs that were corrupt may seem right",
            evidence=evidence.forgotten,
            command=advice.watch(evidence, "verify"),
        )
    if foreseen.start_fails:
        yield Finding(
            Severity.ERROR,
            "store_start_fails",
            "",
            "no server can start on this store",
            evidence="; ".join(foreseen.why[:3]),
            alone="the server ends with an error at each start",
        )
    yield from _unlisted(evidence)
    for unseen in census.unseen:
        yield Finding(
            Severity.ERROR,
            "store_unseen",
            names.printable(unseen.path),
            f"{names.printable(unseen.path)} could not be looked at",
            evidence=unseen.why,
            alone="the server can't read it either, if it runs as the same user",
            remedy=_LOOK_AT_DISK,
        )
    yield from _unseen_quarantine(evidence)
    if census.unnamed and not census.manifests and not is_blind(evidence):
        yield Finding(
            Severity.ERROR,
            "store_no_manifests",
            "manifests",
            "there are blobs and not a single manifest",
            alone="the next start of the server deletes every blob that is an hour old",
            remedy="bring manifests/ back before the server starts",
        )
    if place.globbed:
        yield Finding(
            Severity.ERROR,
            "store_globbed",
            "",
            f"the store's path has characters of a glob pattern in it: {shown}",
            alone="the server finds neither manifests nor sidecars: a start deletes every blob "
            "that is an hour old, and each pull starts at 0",
            remedy="move the store to a path without [ and \\",
        )
    if place.foreign is not None:
        yield Finding(
            Severity.WARNING,
            "store_foreign",
            "",
            f"{names.of_link(place.foreign)}: it is looked at and not changed",
            evidence=f"it leads to {names.printable(place.foreign.target)}",
            remedy=names.TRUST_LINK,
        )
    if evidence.census.elsewhere:
        yield Finding(
            Severity.WARNING,
            "store_shared",
            "blobs",
            "its blobs lie in the same folder as those of another store, which alone names"
            f" {len(evidence.census.elsewhere)} of them",
            evidence=", ".join(map(names.printable, evidence.sharing.stores)),
            alone="a start of a server on one store deletes what only the other's manifests name",
            sizes=sizes(evidence.census.elsewhere),
        )
    yield from _foreign_intents(evidence)
    ours = [server for server in evidence.servers if server.ours]
    if len(ours) > 1:
        pids = ", ".join(str(server.pid) for server in ours)
        yield Finding(
            Severity.WARNING,
            "store_two_servers",
            "",
            f"{len(ours)} servers run on this store (pid {pids})",
            alone="each removes or truncates what the other writes",
        )
    if place.network:
        yield Finding(
            Severity.INFO,
            "store_network",
            "",
            f"the store lies on a network file system ({place.file_system})",
            evidence="who writes from other machines can't be seen",
        )
    yield from _state(evidence)
    yield from _room(evidence, diagnosed, rules)
    yield from _no_holes(diagnosed)


def _unlisted(evidence: Evidence) -> Iterator[Finding]:
    """The folders that we can't list, and that the server's user may."""
    census = evidence.census
    failing = {each.path: each.why for each in census.failing}
    for path in census.unlisted:
        if path in census.unlisted_by_server:
            continue  # told with what keeps the server from it
        why = failing.get(path, "")
        if not why:
            alone = "nothing: the server's user may list it"
        elif path.startswith("manifests"):
            alone = "what only its manifests name is deleted at the next start of the server"
        else:
            alone = "the server's start ends there with an error"
        yield Finding(
            Severity.ERROR,
            "store_unlisted",
            path,
            f"the folder {names.printable(path)} can't be listed",
            evidence=why or "this user may not list it",
            alone=alone,
            command=made_listable(path, evidence),
            remedy=_LOOK_AT_DISK if why else "",
        )


def _unseen_quarantine(evidence: Evidence) -> Iterator[Finding]:
    """What was put aside can't be listed."""
    unseen, ours = evidence.quarantine_unseen, evidence.place.state_owner
    if unseen is None or (ours is not None and ours[2]):
        return  # told with whose it is
    yield Finding(
        Severity.ERROR,
        "store_unseen",
        unseen.path,
        "what lies in quarantine can't be listed",
        evidence=f"{unseen.path}: {unseen.why}",
        alone="nothing: the server ignores it",
        command=made_listable(unseen.path, evidence) if unseen.forbidden else "",
        remedy="" if unseen.forbidden else _LOOK_AT_DISK,
    )


def is_blind(evidence: Evidence) -> bool:
    """Whether some manifest may name blobs that nobody can tell."""
    census = evidence.census
    paths = (*census.unlisted, *(each.path for each in census.unseen))
    read = {model.name for model in census.models}
    return any(path.startswith("manifests") for path in paths) or any(
        odd.fault in BLINDING and odd.model not in read for odd in census.odd_manifests
    )


#: Told where there is something to mend that can't be.
OF_READ_ONLY = Finding(
    Severity.WARNING,
    "store_read_only",
    "",
    "the file system is mounted read-only: nothing here can be mended",
    remedy="mount it for writing; then another audit prints the commands that help",
)


def made_listable(path: str, evidence: Evidence) -> str:
    """The command that lets a folder of the store be listed; "" where none does."""
    owner = evidence.place.owner
    if is_led_away(path, evidence):
        return ""
    if any(each.path == path for each in (*evidence.census.failing, *evidence.census.unseen)):
        return ""
    if path not in evidence.census.unlisted_by_server and evidence.caller.uid not in (0, owner):
        return _looked_at(evidence)
    whole = path_of(evidence, path)
    return advice.shell(evidence, "chmod", "u+rx", whole, owner=owner)


def _looked_at(evidence: Evidence) -> str:
    """The command that looks at what this user may not read."""
    return advice.watch(evidence, "audit", root=True)


def _state(evidence: Evidence) -> Iterator[Finding]:
    """Whether our own folder is whose it has to be."""
    if evidence.place.state_owner is None:
        return
    found, (user, group), foreign = evidence.place.state_owner
    yield Finding(
        Severity.ERROR,
        "state_owner",
        OURS,
        f"{OURS} belongs to user id {found}, and not to {user}, who owns the blobs",
        evidence="nothing in it is believed, and nothing is done"
        if foreign
        else f"user id {user} can't write there, so nothing is remembered or done",
        alone="nothing: the server ignores it",
        command=advice.shell(evidence, "chown", "-hR", f"{user}:{group}", path_of(evidence, OURS)),
        remedy="see what is in it first; if it may count:" if foreign else "",
    )


def _foreign_intents(evidence: Evidence) -> Iterator[Finding]:
    """Acts that ollama-watch has not begun so, whoever says it has; they are kept for a look."""
    place = evidence.place
    for odd in evidence.intents:
        aside = odd.path.replace("/intents/", "/foreign-intent-")
        yield Finding(
            Severity.WARNING,
            "store_foreign_intent",
            odd.path,
            f"{odd.path} is not an act that ollama-watch began: {odd.why}",
            evidence="nothing in it is carried out, put back or removed",
            command=advice.shell(
                evidence,
                *("mv", "-n", f"{place.path}/{odd.path}", f"{place.path}/{aside}"),
                owner=place.owner,
            ),
        )


def lacking(diagnosed: Iterable[Diagnosed]) -> int:
    """Bytes that unfinished downloads still have to bring to the disk; stale ones count no more."""
    return sum(
        each.download.total - ranges.size(each.download.trust.present)
        for each in diagnosed
        if each.download.total is not None
        and not each.stale
        and each.condition is not Condition.REDUNDANT
    )


def _room(evidence: Evidence, diagnosed: tuple[Diagnosed, ...], rules: Rules) -> Iterator[Finding]:
    """Whether the disk has room for the rest of all unfinished downloads together."""
    missing = lacking(diagnosed)
    free = evidence.place.free_bytes
    if missing > free:
        yield Finding(
            Severity.WARNING,
            "store_no_room",
            "",
            "the disk has not enough room for all unfinished downloads",
            evidence=f"{missing} bytes are missing, {free} are free",
            alone="the last of them fail with `no space left on device`",
            command=advice.watch(evidence, "clean")
            if _cleanable(evidence, diagnosed, rules)
            else "",
            remedy="remove models that are not needed: ollama list, ollama rm",
        )


def _cleanable(evidence: Evidence, diagnosed: tuple[Diagnosed, ...], rules: Rules) -> bool:
    """Whether a clean-up would find anything to free."""
    never = (Condition.LIVE, Condition.UNKNOWN)
    return (
        any(each.stale and each.condition not in never for each in diagnosed)
        or any(_is_old_orphan(entry, evidence, rules) for entry in evidence.census.unnamed)
        or any(_is_old_leftover(each, evidence) for each in evidence.census.temporaries)
        or any(kept.replaced for kept in evidence.quarantine)
    )


def _is_old_orphan(entry: Entry, evidence: Evidence, rules: Rules) -> bool:
    return entry.kind is Kind.FILE and not _is_young(entry, evidence, rules)


def _is_young(entry: Entry, evidence: Evidence, rules: Rules) -> bool:
    """As for `clean`: a time that we have set to keep it makes it no younger."""
    return evidence.age_of(entry.changed_at) < rules.settings.stale_after


def _is_old_leftover(left: Temporary, evidence: Evidence) -> bool:
    return left.entry.kind is Kind.FILE and evidence.age_of(left.entry.mtime) >= HOUR


def _no_holes(diagnosed: tuple[Diagnosed, ...]) -> Iterator[Finding]:
    for each in diagnosed:
        download = each.download
        unfinished = each.condition not in (Condition.WHOLE, Condition.REDUNDANT, Condition.LIVE)
        who = names.known_as(download.models, download.digest)
        if unfinished and download.data and download.sidecars and not download.trust.holes_tell:
            yield Finding(
                Severity.INFO,
                "download_no_holes",
                f"blobs/{download.data.name}",
                f"the data of {who} has no holes, though it is unfinished",
                evidence="a file system without them, or a copy; the last non-zero byte of each "
                "part is taken for what is there",
                models=download.models,
            )


# ---------------------------------------------------------------- blobs and manifests


def of_blobs(
    evidence: Evidence,
    diagnosed: tuple[Diagnosed, ...],
    rules: Rules,
    doomed: Mapping[str, float],
    *,
    blind: bool,
) -> Iterator[Finding]:
    """Blobs that are not as their manifests want them, and those that no manifest names.

    `blind`: which blobs the next start of the server keeps is not known.
    """
    for odd in evidence.census.odd:
        if odd.lies is None:  # else `astray` tells of it
            yield _odd_blob(odd, evidence)
    for entry in evidence.census.unproven:
        yield Finding(
            Severity.INFO,
            "blob_unproven",
            f"blobs/{entry.name}",
            f"{entry.name[:19]} was finished on repaired sidecars, or found corrupt before it "
            "changed, and was not hashed since",
            alone="the server has hashed it, if its pull ended with success",
            command=advice.watch(evidence, "repair", entry.name[:19]),
            sizes=sizes([entry]),
        )
    for found in _orphans(evidence, diagnosed, rules):
        yield found._replace(alone="" if blind else _kept_or_not(found.path, doomed))


def _orphans(
    evidence: Evidence, diagnosed: tuple[Diagnosed, ...], rules: Rules
) -> Iterator[Finding]:
    pulling = any(not each.stale for each in diagnosed)
    blind = is_blind(evidence)
    manifest = "manifest that can be read" if blind else "manifest"
    for entry in evidence.census.unnamed:
        young = _is_young(entry, evidence, rules)
        waits = "a pull that is not finished may count on it" if young else ""
        models = evidence.known_as.get(names.parse_blob(entry.name).digest, ())
        yield Finding(
            # The finished layers of a pull under way are nothing to worry about.
            Severity.INFO if young and pulling else Severity.WARNING,
            "blob_orphan",
            f"blobs/{entry.name}",
            f"no {manifest} names {entry.name[:19]}",
            evidence="; ".join(filter(None, (_layer_of(models), waits))),
            command=advice.watch(evidence, "clean", entry.name[:19])
            if not (young or blind) and entry.kind is Kind.FILE
            else "",
            sizes=sizes([entry]),
            models=models,
        )


def _kept_or_not(path: str, doomed: Mapping[str, float]) -> str:
    """What a start of the server does to a file that no manifest keeps."""
    return _STARTS_DELETE if path in doomed else "it stays"


def _layer_of(models: tuple[str, ...]) -> str:
    return f"a layer of {', '.join(models[:3])}, whose manifest is not here" if models else ""


_KINDS = {
    Kind.FILE: "a file",
    Kind.FOLDER: "a folder",
    Kind.SYMLINK: "a symlink",
    Kind.OTHER: "a device, a pipe or a socket",
}


def damage(odd: OddBlob) -> str:
    """What is wrong with a blob, in a clause about it."""
    if odd.fault is BlobFault.NO_FILE:
        there = odd.entry if odd.behind is None else odd.behind
        kind = "no file" if there is None else f"{_KINDS[there.kind]}, no file"
        return f"it is {'a link to ' if odd.behind is not None else ''}{kind}"
    return {
        BlobFault.CORRUPT: "its bytes are not those of its name",
        BlobFault.SHORT: "it is cut short",
        BlobFault.LONG: "it is too long",
        BlobFault.MISSING: "it is missing",
        BlobFault.SYMLINK: "it is a symlink",
        BlobFault.DANGLING: "it is a link to nothing",
    }[odd.fault]


def _odd_blob(odd: OddBlob, evidence: Evidence) -> Finding:
    who = odd.models[0] if odd.models else names.short(odd.digest)
    message = {
        BlobFault.CORRUPT: f"a blob of {who} is corrupt: its bytes are not those of its name",
        BlobFault.SHORT: f"a blob of {who} is cut short",
        BlobFault.LONG: f"a blob of {who} is too long",
        BlobFault.MISSING: f"a blob of {who} is missing",
        BlobFault.SYMLINK: f"a blob of {who} is a symlink",
        BlobFault.DANGLING: f"a blob of {who} is a link to nothing",
        BlobFault.NO_FILE: f"a blob of {who} is no file",
    }[odd.fault]
    return Finding(
        severity=Severity.INFO if odd.fault is BlobFault.SYMLINK else Severity.ERROR,
        kind=f"blob_{odd.fault.value}",
        path=f"blobs/{names.blob(odd.digest)}",
        message=message,
        evidence=_evidence_of(odd),
        alone=_alone_with(odd.fault),
        command=_cure(odd, evidence),
        sizes=sizes([odd.entry] if odd.entry else []),
        models=odd.models,
    )


def _evidence_of(odd: OddBlob) -> str:
    """What was seen of a blob, and whether that was through a link."""
    content = odd.content
    if odd.fault is BlobFault.CORRUPT and content is not None:
        size = "" if odd.wanted in (None, content.size) else f"; {_bytes(odd, content)}"
        seen = f"hashed: sha256:{content.sha256}{size}"
    elif odd.fault in (BlobFault.DANGLING, BlobFault.NO_FILE):
        return damage(odd)
    else:
        seen = _bytes(odd, content)
        if odd.fault in DOUBTFUL:
            seen += "; not hashed, so the manifest may be wrong, too"
    return f"{seen}; read through a link" if odd.behind is not None else seen


def _bytes(odd: OddBlob, content: Entry | None) -> str:
    found = "nothing" if content is None else f"{content.size} bytes"
    are = "is" if content is None else "are"
    return f"{odd.wanted} bytes are wanted, {found} {are} there"


def _alone_with(fault: BlobFault) -> str:
    """What Ollama alone does with such a blob."""
    return {
        BlobFault.MISSING: "a pull fetches just that layer",
        BlobFault.DANGLING: "a pull fetches just that layer, and puts it in the place of the link",
        BlobFault.SYMLINK: "it is used as it is",
    }.get(fault, "a pull says success and repairs nothing")


def _cure(odd: OddBlob, evidence: Evidence) -> str:
    """The command that helps a blob; "" where none does, or none is needed."""
    if not odd.models or odd.fault is BlobFault.SYMLINK:
        return ""
    if odd.fault is BlobFault.MISSING:
        return advice.ollama(evidence, "pull", odd.models[0])
    return advice.watch(evidence, "repair", names.short(odd.digest))


def of_manifests(evidence: Evidence) -> Iterator[Finding]:
    """Files under ``manifests/`` that are no manifest in its place."""
    nested = [
        f"{each.path}/{part}" for each in evidence.census.nested for part in ("blobs", "manifests")
    ]
    # What lies in a store in the store is told together, by `astray`.
    told = (
        odd
        for odd in evidence.census.odd_manifests
        if not odd.barred and not any(f"{odd.path}/".startswith(f"{each}/") for each in nested)
    )
    return (odd_manifest(odd, evidence) for odd in told)


def odd_manifest(odd: OddManifest, evidence: Evidence) -> Finding:
    """What there is to tell about a file that is no manifest in its place."""
    shown = names.printable(odd.path)
    if odd.hidden:
        return Finding(
            Severity.ERROR,
            "manifest_unreadable",
            odd.path,
            f"the manifest of {odd.model or shown} can't be read by this user",
            evidence=odd.why,
            alone="nothing: the server's user may read it",
            command=_looked_at(evidence),
            models=(odd.model,) if odd.model else (),
        )
    away = is_led_away(odd.path, evidence)
    full, owner = path_of(evidence, odd.path), evidence.place.owner
    who = odd.model or shown
    pull = advice.ollama(evidence, "pull", odd.model) if odd.model else ""
    off = "no start of the server cleans up any more"
    message, severity, alone, command = {
        ManifestFault.CORRUPT: (
            f"the manifest of {who} is corrupt",
            Severity.ERROR,
            f"the model is gone from `ollama list`; {off}",
            pull,
        ),
        ManifestFault.UNREADABLE: (
            f"the manifest of {who} can't be read",
            Severity.ERROR,
            off,
            advice.shell(evidence, "chmod", "u+r", full, owner=owner),
        ),
        ManifestFault.DANGLING: (
            f"the manifest of {who} is a symlink to nothing",
            Severity.ERROR,
            f"`ollama list`, pull and rm fail, list until a restart; {off}",
            advice.shell(evidence, "rm", full, owner=owner),
        ),
        ManifestFault.BAD_NAME: (
            f"{shown} has no valid model name",
            Severity.ERROR,
            off,
            advice.shell(evidence, "rm", full, owner=owner),
        ),
        ManifestFault.BAD_DIGEST: (
            f"the manifest of {who} names what can't be a blob",
            Severity.ERROR,
            "the model can't be loaded, or is listed with a wrong size",
            pull,
        ),
        ManifestFault.EMPTY: (
            f"the manifest of {who} is no model's",
            Severity.ERROR,
            "the model is listed, and can't be loaded",
            pull,
        ),
        ManifestFault.WRONG_SIZE: (
            f"the manifest of {who} gives a blob a wrong size",
            Severity.WARNING,
            "the server uses the blob as it is",
            pull,
        ),
        ManifestFault.MISPLACED: (
            f"{shown} is at the wrong depth",
            Severity.WARNING,
            "the server does not see it, and it protects no blob",
            "",
        ),
        ManifestFault.CASE: (
            f"two models differ by case alone: {who} is the second",
            Severity.WARNING,
            "the server takes one or the other for both names, by chance",
            _told_apart(odd, evidence),
        ),
    }[odd.fault]
    return Finding(
        severity,
        f"manifest_{odd.fault.value}",
        odd.path,
        message,
        evidence=odd.why,
        alone=alone,
        command="" if away and command != pull else command,
        remedy=BEHIND_LINK if away else "",
        models=(odd.model,) if odd.model else (),
    )


def _told_apart(odd: OddManifest, evidence: Evidence) -> str:
    """The command that gives the second of two models a name of its own; nothing is lost."""
    own, other = odd.path.split("/"), odd.why.split("/")
    at = next(at for at, (a, b) in enumerate(zip(own, other, strict=True)) if a != b)
    here = path_of(evidence, "/".join(own[: at + 1]))
    return advice.shell(evidence, "mv", "-nT", here, f"{here}-2", owner=evidence.place.owner)


# ---------------------------------------------------------------- what does not belong there


def of_leftovers(evidence: Evidence, doomed: Mapping[str, float]) -> Iterator[Finding]:
    """Left-overs of the server's own work, foreign files, and names of older servers."""
    for temporary in evidence.census.temporaries:
        yield Finding(
            Severity.WARNING,
            "file_temporary",
            temporary.path,
            f"{names.printable(temporary.entry.name)} is a left-over of ollama create",
            alone=_kept_or_not(temporary.path, doomed),
            command=advice.watch(evidence, "clean")
            if _is_old_leftover(temporary, evidence)
            else "",
            sizes=sizes([temporary.entry]),
        )
    for entry in evidence.census.foreign:
        yield Finding(
            Severity.INFO,
            "file_foreign",
            f"blobs/{entry.name}",
            f"{names.printable(entry.name)} does not belong into blobs/",
            alone=_kept_or_not(f"blobs/{entry.name}", doomed),
            sizes=sizes([entry]),
        )
    astray = {odd.lies.path for odd in evidence.census.odd if odd.lies is not None}
    for old in evidence.census.old_names:
        if old.path not in astray:
            yield Finding(
                Severity.INFO,
                "blob_old_name",
                old.path,
                f"{names.printable(old.entry.name)} has a name of older servers",
                alone="the next start of the server renames it, over what has the name of today",
                sizes=sizes([old.entry]),
            )

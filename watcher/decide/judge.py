"""Evidence to conditions and findings: what a thing is, and what Ollama alone would do with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import assert_never

from watcher import names, ranges
from watcher.model import (
    QUIET_SECONDS,
    BlobFault,
    Condition,
    Download,
    Entry,
    Evidence,
    Finding,
    Judged,
    Kind,
    ManifestFault,
    OddBlob,
    OddManifest,
    Policy,
    Severity,
    Sight,
    Sizes,
    Verdict,
)

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


def judge(evidence: Evidence, policy: Policy) -> Verdict:
    """Give each download its one condition, and tell everything else that is worth telling."""
    judged = tuple(_judge(download, evidence, policy) for download in evidence.downloads)
    found = [finding for each in judged for finding in _download_findings(each, policy)]
    found.extend(_store_findings(evidence))
    found.extend(_blob_finding(odd) for odd in evidence.census.odd)
    found.extend(_orphan_findings(evidence, judged, policy))
    found.extend(_manifest_finding(odd) for odd in evidence.census.odd_manifests)
    found.extend(_leftover_findings(evidence))
    found.sort(key=lambda each: (-each.severity.rank, -each.sizes.allocated, each.path, each.kind))
    return Verdict(judged, tuple(found))


# ---------------------------------------------------------------- conditions


def _judge(download: Download, evidence: Evidence, policy: Policy) -> Judged:
    changed_at = download.changed_at
    quiet = 0.0 if changed_at is None else max(0.0, evidence.now - changed_at)
    since = download.progress_at if download.progress_at is not None else changed_at
    age = 0.0 if since is None else max(0.0, evidence.now - since)
    condition, because = condition_of(download, evidence, quiet)
    stale = condition is not Condition.LIVE and age >= policy.stale_after
    return Judged(
        download=download,
        condition=condition,
        stale=stale,
        because=because,
        age=age,
        quiet=quiet,
        cost_alone=_cost_alone(download, condition),
        cost_repaired=_cost_repaired(download, condition),
    )


def condition_of(download: Download, evidence: Evidence, quiet: float) -> tuple[Condition, str]:
    """The one condition of a download, and why. `quiet`: seconds since any entry of it changed."""
    alive = _why_alive(download, evidence, quiet)
    if alive:
        return Condition.LIVE, alive
    strange = _why_strange(download)
    if strange:
        return Condition.UNKNOWN, strange
    trust, total = download.trust, download.total
    finished = download.finished
    if finished is not None and finished.kind is Kind.FILE and total in (None, finished.size):
        return Condition.REDUNDANT, "the finished blob is there as well"
    if download.transfer:
        return Condition.PAUSED, "a layer of the transfer path, which goes on by its size"
    if download.data is not None and total and ranges.size(trust.present) == total:
        return Condition.WHOLE, "no byte of it is absent on the disk"
    if not download.sidecars:
        return Condition.UNCLAIMED, "data without a single sidecar"
    if download.faults:
        return Condition.BLOCKED, "; ".join(download.faults[:3])
    hollow = ranges.size(ranges.difference(trust.claimed, trust.trusted))
    if hollow:
        what = "there is no data file" if download.data is None else "the data does not have them"
        return Condition.HOLLOW, f"{hollow} claimed bytes are not there: {what}"
    beyond = ranges.size(ranges.difference(trust.trusted, trust.claimed))
    if beyond:
        return Condition.BEHIND, f"{beyond} bytes are on the disk beyond what the sidecars claim"
    return Condition.PAUSED, "the sidecars are complete and true"


def _why_alive(download: Download, evidence: Evidence, quiet: float) -> str:
    if download.writers:
        first = download.writers[0]
        return f"{first.process} ({first.pid}) has it open for writing"
    if quiet >= QUIET_SECONDS:
        return ""
    ago = f"it changed {quiet:.0f} s ago"
    if evidence.servers:
        return f"a server runs (pid {evidence.servers[0].pid}), and {ago}"
    if evidence.view.sight is Sight.PARTIAL:
        return f"a server may run unseen ({evidence.view.why}), and {ago}"
    return ""


def _why_strange(download: Download) -> str:
    if download.unreadable:
        return f"it can't be read: {download.unreadable}"
    for entry in download.entries:
        if entry.kind is not Kind.FILE:
            return f"{names.printable(entry.name)} is a {entry.kind.value}, no file"
    return ""


def _cost_alone(download: Download, condition: Condition) -> int | None:
    """Bytes that Ollama alone would still download; None where it can't arrive or isn't known."""
    total = download.total
    if total is None:
        return None
    claimed = ranges.size(download.trust.claimed)
    match condition:
        case Condition.PAUSED | Condition.BEHIND | Condition.LIVE:
            return total - claimed
        case Condition.WHOLE if not download.faults:
            return total - claimed
        case Condition.HOLLOW:
            # The rest first, then the mismatch discards everything and it starts again.
            return total - claimed + total
        case Condition.UNCLAIMED:
            return total
        case Condition.REDUNDANT:
            return 0
        case Condition.BLOCKED | Condition.UNKNOWN | Condition.WHOLE:
            return None
        case _:
            assert_never(condition)


def _cost_repaired(download: Download, condition: Condition) -> int | None:
    """Bytes that a pull would download after a repair; None where no repair is possible."""
    if download.total is None or condition in (Condition.LIVE, Condition.UNKNOWN):
        return None
    if condition in (Condition.WHOLE, Condition.REDUNDANT):
        return 0
    return download.total - ranges.size(download.trust.trusted)


# ---------------------------------------------------------------- findings


def sizes(entries: Iterable[Entry]) -> Sizes:
    """The three sizes of entries together."""
    apparent = allocated = freed = 0
    for entry in entries:
        apparent += entry.size
        allocated += entry.allocated
        freed += entry.freed
    return Sizes(apparent, allocated, freed)


def _alone(judged: Judged) -> str:
    match judged.condition:
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
            assert_never(judged.condition)


def _download_findings(judged: Judged, policy: Policy) -> Iterator[Finding]:
    download = judged.download
    shown = download.entries[0].name if download.entries else names.data(download.digest)
    path = f"blobs/{shown}"
    who = download.models[0] if download.models else names.short(download.digest)
    size = sizes(download.entries)
    yield Finding(
        severity=_SEVERITY[judged.condition],
        kind=f"download_{judged.condition.value}",
        path=path,
        message=f"the download of {who} is {judged.condition.value}",
        evidence=judged.because,
        alone=_alone(judged),
        sizes=size,
        models=download.models,
    )
    if judged.stale:
        yield Finding(
            severity=Severity.WARNING,
            kind="download_stale",
            path=path,
            message=f"the download of {who} has made no progress for {_days(judged.age)}",
            evidence=f"stale after {_days(policy.stale_after)}",
            alone="the next start of the server deletes it, unless its clean-up is kept off",
            command=f"ollama-watch clean {names.short(download.digest)}",
            sizes=size,
            models=download.models,
        )


def _days(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.0f} days"
    return f"{seconds / 3600:.0f} hours" if seconds >= 7200 else f"{seconds:.0f} s"


def _store_findings(evidence: Evidence) -> Iterator[Finding]:
    place, census = evidence.place, evidence.census
    if evidence.scope is not None:
        return
    for path in census.unlisted:
        yield Finding(
            Severity.ERROR,
            "store_unlisted",
            path,
            f"the folder {names.printable(path)} can't be listed",
            alone="the server's start stops there, or deletes what only its manifests name",
            command=f"chmod u+rx {names.printable(path)}",
        )
    if census.unnamed and not census.manifests:
        yield Finding(
            Severity.ERROR,
            "store_no_manifests",
            "manifests",
            "there are blobs and not a single manifest",
            alone="the next start of the server deletes every blob that is an hour old",
            command="bring manifests/ back before the server starts",
        )
    if place.globbed:
        yield Finding(
            Severity.ERROR,
            "store_globbed",
            "",
            f"the path {names.printable(place.path)} has characters of a glob pattern in it",
            alone="the server finds neither manifests nor sidecars: its start deletes old blobs",
            command="move the store to a path without [ ] and \\",
        )


def _blob_finding(odd: OddBlob) -> Finding:
    who = odd.models[0] if odd.models else names.short(odd.digest)
    found = "nothing" if odd.entry is None else f"{odd.entry.size} bytes"
    message = {
        BlobFault.SHORT: f"a blob of {who} is cut short",
        BlobFault.LONG: f"a blob of {who} is too long",
        BlobFault.MISSING: f"a blob of {who} is missing",
        BlobFault.SYMLINK: f"a blob of {who} is a symlink",
        BlobFault.NO_FILE: f"a blob of {who} is no file",
    }[odd.fault]
    alone = "a pull says success and repairs nothing"
    if odd.fault is BlobFault.MISSING:
        alone = "a pull fetches just that layer"
    symlink = odd.fault is BlobFault.SYMLINK
    return Finding(
        severity=Severity.INFO if symlink else Severity.ERROR,
        kind=f"blob_{odd.fault.value}",
        path=f"blobs/{names.blob(odd.digest)}",
        message=message,
        evidence=f"{odd.wanted} bytes are wanted, {found} is there",
        alone="it is used as it is" if symlink else alone,
        command=f"ollama pull {who}" if odd.fault is BlobFault.MISSING else "",
        sizes=sizes([odd.entry] if odd.entry else []),
        models=odd.models,
    )


def _orphan_findings(
    evidence: Evidence, judged: tuple[Judged, ...], policy: Policy
) -> Iterator[Finding]:
    pulling = any(not each.stale for each in judged)
    for entry in evidence.census.unnamed:
        young = evidence.now - entry.mtime < policy.stale_after
        # The finished layers of a pull under way: nothing to worry about.
        expected = young and pulling
        yield Finding(
            Severity.INFO if expected else Severity.WARNING,
            "blob_orphan",
            f"blobs/{names.printable(entry.name)}",
            f"no manifest names {entry.name[:19]}",
            evidence="a pull that is not finished may count on it" if young else "",
            alone="the next start of the server deletes it once it is an hour old",
            command="" if young else "ollama-watch clean",
            sizes=sizes([entry]),
        )


def _manifest_finding(odd: OddManifest) -> Finding:
    who = odd.model or names.printable(odd.path)
    mend = f"ollama pull {odd.model}" if odd.model else ""
    message, severity, alone, command = {
        ManifestFault.CORRUPT: (
            f"the manifest of {who} is corrupt",
            Severity.ERROR,
            "the model is gone from `ollama list`; no start cleans up any more",
            mend,
        ),
        ManifestFault.UNREADABLE: (
            f"the manifest of {who} can't be read",
            Severity.ERROR,
            "no start cleans up any more",
            f"chmod u+r {names.printable(odd.path)}",
        ),
        ManifestFault.DANGLING: (
            f"the manifest of {who} is a symlink to nothing",
            Severity.ERROR,
            "`ollama list`, pull and rm fail, list until a restart",
            f"rm {names.printable(odd.path)}",
        ),
        ManifestFault.BAD_NAME: (
            f"{who} has no valid model name",
            Severity.ERROR,
            "no start cleans up any more",
            f"rm {names.printable(odd.path)}",
        ),
        ManifestFault.BAD_DIGEST: (
            f"the manifest of {who} names what can't be a blob",
            Severity.ERROR,
            "the model can't be loaded",
            mend,
        ),
        ManifestFault.MISPLACED: (
            f"{names.printable(odd.path)} is at the wrong depth",
            Severity.WARNING,
            "the server does not see it, and it protects no blob",
            "",
        ),
    }[odd.fault]
    return Finding(
        severity,
        f"manifest_{odd.fault.value}",
        names.printable(odd.path),
        message,
        evidence=odd.why,
        alone=alone,
        command=command,
        models=(odd.model,) if odd.model else (),
    )


def _leftover_findings(evidence: Evidence) -> Iterator[Finding]:
    for temporary in evidence.census.temporaries:
        yield Finding(
            Severity.WARNING,
            "file_temporary",
            names.printable(temporary.path),
            f"{names.printable(temporary.entry.name)} is a left-over of ollama create",
            alone="the next start of the server deletes it once it is an hour old",
            command="ollama-watch clean",
            sizes=sizes([temporary.entry]),
        )
    for entry in evidence.census.foreign:
        folder = entry.kind is Kind.FOLDER
        yield Finding(
            Severity.INFO,
            "file_foreign",
            f"blobs/{names.printable(entry.name)}",
            f"{names.printable(entry.name)} does not belong into blobs/",
            alone="it stays"
            if folder
            else "the next start of the server deletes it once it is an hour old",
            sizes=sizes([entry]),
        )
    for entry in evidence.census.old_names:
        yield Finding(
            Severity.INFO,
            "blob_old_name",
            f"blobs/{names.printable(entry.name)}",
            f"{names.printable(entry.name)} has a name of older servers",
            alone="the next start of the server renames it",
            sizes=sizes([entry]),
        )

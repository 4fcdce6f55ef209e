"""What has to be hashed, or asked of a registry, before anything can be done about it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from watcher import names
from watcher.model import Action, BlobFault, Condition, Entry, Evidence, Judged, Verb


def of_download(judged: Judged) -> Iterator[Action]:
    """What of a download has to be hashed before it can be mended."""
    download = judged.download
    data, blob = download.data, download.finished
    if data is None:
        return
    if judged.condition is Condition.REDUNDANT:
        if blob is not None and blob.sha256 is None:
            yield _hash(blob, judged.digest, "whether its partial data can go")
    elif judged.condition is Condition.WHOLE and data.sha256 is None and not believed(judged):
        yield _hash(data, judged.digest, "whether the download is whole")


def of_registry(judged: tuple[Judged, ...], evidence: Evidence) -> Iterator[Action]:
    """What only the registry that a model came from can tell: a lost length, a corrupt blob's."""
    for each in judged:
        download = each.download
        if download.total is None and download.models and download.registry is None:
            because = "its true length is not known"
            yield Action(Verb.ASK_REGISTRY, each.digest, because, (), models=download.models)
    for odd in evidence.census.odd:
        if odd.fault is BlobFault.CORRUPT and odd.models and odd.registry is None:
            because = "whether a corrupt blob can be had again"
            yield Action(Verb.ASK_REGISTRY, odd.digest, because, (), models=odd.models)


def believed(judged: Judged) -> bool:
    """Whether every byte of a download can be trusted without a look at its hash."""
    return judged.download.trust.trusted == ((0, judged.download.total),)


def unproven(evidence: Evidence) -> Iterator[Action]:
    """Blobs that were finished on sidecars of ours, and not hashed since."""
    for entry in evidence.census.unproven:
        digest = names.parse_blob(entry.name).digest
        yield _hash(entry, digest, "it was finished on repaired sidecars")


def all_blobs(evidence: Evidence) -> Iterator[Action]:
    """Every blob that a manifest names and that was not hashed as it is now; the oldest first.

    Those that are `unproven` are hashed as such.
    """
    known = {entry.name for entry in evidence.census.unproven}
    for entry in sorted(evidence.census.unhashed, key=lambda entry: entry.mtime_ns):
        if entry.name in known:
            continue
        yield _hash(entry, names.parse_blob(entry.name).digest, "not hashed as it is now")


def _hash(entry: Entry, digest: str, because: str) -> Action:
    return Action(Verb.HASH, digest, because, (entry,))

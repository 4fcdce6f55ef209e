"""What has to be hashed, or asked of a registry, before anything can be done about it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from watcher.model import (
    DOUBTFUL,
    WRONG,
    Action,
    ActionKind,
    Condition,
    Diagnosed,
    Entry,
    Evidence,
    OddBlob,
)
from watcher.ollama import names


def of_download(diagnosed: Diagnosed) -> Iterator[Action]:
    """What of a download has to be hashed before it can be repaired."""
    download = diagnosed.download
    data, blob = download.data, download.finished
    if data is None:
        return
    if diagnosed.condition is Condition.REDUNDANT:
        if blob is not None and blob.sha256 is None:
            yield _hash(
                blob, diagnosed.digest, "to find out whether its partial data can be removed"
            )
    elif diagnosed.condition is Condition.WHOLE and data.sha256 is None and not believed(diagnosed):
        yield _hash(data, diagnosed.digest, "to find out whether the download is complete")


def of_registry(diagnosed: tuple[Diagnosed, ...], evidence: Evidence) -> Iterator[Action]:
    """What only the registry that a model came from can tell: a lost length, a corrupt blob's."""
    for each in diagnosed:
        download = each.download
        if download.total is None and download.models and download.registry is None:
            because = "its length is unknown"
            files = download.entries
            yield Action(
                ActionKind.ASK_REGISTRY, each.digest, because, files, models=download.models
            )
    for odd in evidence.census.odd:
        if odd.fault in WRONG and odd.models and odd.registry is None:
            because = "to find out whether a damaged blob can be downloaded again"
            yield Action(ActionKind.ASK_REGISTRY, odd.digest, because, (), models=odd.models)


def believed(diagnosed: Diagnosed) -> bool:
    """Whether every byte of a download can be trusted without a look at its hash."""
    return diagnosed.download.trust.trusted == ((0, diagnosed.download.total),)


def blobs_in_doubt(evidence: Evidence) -> Iterator[Action]:
    """Blobs that may not be what their names say, and were not hashed as they are now."""
    for entry in evidence.census.unproven:
        digest = names.parse_blob(entry.name).digest
        yield _hash(entry, digest, "it was finished from repaired progress files, or changed")
    for odd in evidence.census.odd:
        content = _undecided(odd)
        if content is not None:
            yield _hash(content, odd.digest, "its size differs from its manifest")


def _undecided(odd: OddBlob) -> Entry | None:
    """The file whose hash decides whether a blob or its manifest is wrong; None where none does."""
    return odd.content if odd.fault in DOUBTFUL else None


def all_blobs(evidence: Evidence) -> Iterator[Action]:
    """Every blob that a manifest names and that was not hashed as it is now; the oldest first.

    Those that are in doubt are hashed as such.
    """
    known = {entry.name for entry in evidence.census.unproven}
    known |= {names.blob(odd.digest) for odd in evidence.census.odd if _undecided(odd)}
    named = [content for content, _ in evidence.census.named if content.sha256 is None]
    for entry in sorted(named, key=lambda entry: entry.mtime_ns):
        if entry.name not in known:
            yield _hash(
                entry, names.parse_blob(entry.name).digest, "not hashed in its present state"
            )


def open_questions(evidence: Evidence) -> frozenset[str]:
    """The digests of blobs that have to be hashed, or that a registry has not been heard about."""
    in_doubt = {each.subject for each in blobs_in_doubt(evidence)}
    unheard = {
        odd.digest
        for odd in evidence.census.odd
        if odd.fault in WRONG and odd.models and odd.registry is None
    }
    return frozenset(in_doubt | unheard)


def _hash(entry: Entry, digest: str, because: str) -> Action:
    return Action(ActionKind.HASH, digest, because, (entry,))

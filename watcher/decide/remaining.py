"""What is wrong still after a plan was carried out, and what could not even be looked at. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

from watcher import names
from watcher.model import (
    Evidence,
    Finding,
    ManifestFault,
    OddManifest,
    Severity,
    Unseen,
    Verdict,
)

#: Whether something of these models, or with these digests or names, is meant.
Meant: TypeAlias = Callable[[Iterable[str], Iterable[str]], bool]

#: Manifests that name blobs which nobody can tell.
_BLINDING = {
    ManifestFault.CORRUPT: "its manifest is corrupt, so what it names is not known",
    ManifestFault.UNREADABLE: "its manifest can't be read, so what it names is not known",
    ManifestFault.DANGLING: "its manifest is a link to nothing, so what it names is not known",
    ManifestFault.BAD_DIGEST: "its manifest names what can't be a blob",
}
#: Findings about what a repair would mend if it could, and about what it could not look at.
_OF_REPAIRS = ("blob_", "manifest_", "download_unknown", "store_unlisted", "store_unseen")
_OF_SIGHT = ("download_unknown", "store_unlisted", "store_unseen")


class Remaining(NamedTuple):
    """What an act has left."""

    findings: tuple[Finding, ...] = ()
    #: Something of what was meant could not be looked at.
    blind: bool = False


def everything(_: Iterable[str], __: Iterable[str]) -> bool:
    """What is meant where nothing was named."""
    return True


def of_repair(seen: Evidence, verdict: Verdict, told: Iterable[str], meant: Meant) -> Remaining:
    """What a repair has left. `told`: subjects of which it has told something already."""
    blind = any(unseen(seen, meant, parsed=False)) or any(
        each.unreadable and meant(each.models, (each.digest,)) for each in seen.downloads
    )
    return Remaining(tuple(_left(verdict, _OF_REPAIRS, frozenset(told), meant)), blind)


def of_cleaning(verdict: Verdict, meant: Meant) -> Remaining:
    """What a clean-up could not look at."""
    found = tuple(_left(verdict, _OF_SIGHT, frozenset(), meant))
    return Remaining(found, bool(found))


def _left(
    verdict: Verdict, kinds: tuple[str, ...], known: frozenset[str], meant: Meant
) -> Iterator[Finding]:
    for finding in verdict.findings:
        name = finding.path.rpartition("/")[2]
        if finding.severity is not Severity.ERROR or not finding.kind.startswith(kinds):
            continue
        subjects = {name, names.parse_blob(name).digest}
        if known.isdisjoint(subjects) and meant(finding.models, subjects):
            yield finding


def unseen(seen: Evidence, meant: Meant, *, parsed: bool = True) -> Iterator[Unseen]:
    """What a look could not see of what is meant: names, folders, manifests.

    `parsed`: also what manifests name that is no blob.
    """
    census = seen.census
    whole = meant is everything
    for path in census.unlisted:
        if whole or not path.startswith("manifests"):
            yield Unseen(path, "this folder can't be listed")
    for each in census.unseen:
        in_blobs = each.path.startswith("blobs/")
        if whole or (in_blobs and meant((), (each.path.removeprefix("blobs/"),))):
            yield each
    read = {model.name for model in census.models}
    for odd in census.odd_manifests:
        if odd.fault is ManifestFault.BAD_DIGEST and not parsed:
            continue
        why = _BLINDING.get(odd.fault)
        if why is not None and _is_blind(odd, read) and meant((odd.model or "",), ()):
            yield Unseen(odd.path, f"{why}: {odd.why}")


def _is_blind(odd: OddManifest, read: set[str]) -> bool:
    """Whether it is we who can't make sense of a manifest, and not just the server's user."""
    return odd.fault is not ManifestFault.UNREADABLE or odd.model not in read

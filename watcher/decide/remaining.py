"""What is wrong still after a plan was carried out, and what could not even be looked at. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

from watcher.model import (
    Condition,
    Diagnosis,
    Evidence,
    Finding,
    ManifestFault,
    OddManifest,
    Severity,
    Unseen,
)
from watcher.ollama import names

#: Whether something of these models, or with these digests or names, is meant.
Meant: TypeAlias = Callable[[Iterable[str], Iterable[str]], bool]

#: Manifests that name blobs which nobody can tell.
_BLINDING = {
    ManifestFault.CORRUPT: "its manifest is corrupt, so what it names is not known",
    ManifestFault.UNREADABLE: "its manifest can't be read, so what it names is not known",
    ManifestFault.DANGLING: "its manifest is a link to nothing, so what it names is not known",
    ManifestFault.BAD_DIGEST: "its manifest names what can't be a blob",
    ManifestFault.EMPTY: "its manifest is no model's",
}
_PARSED = frozenset({ManifestFault.BAD_DIGEST, ManifestFault.EMPTY})
#: Findings about what could not be looked at.
_OF_SIGHT = ("store_unlisted", "store_unseen")
#: And about downloads that nothing is done about: they can't be read, or are no files.
_UNTOUCHED = ("download_unknown", *_OF_SIGHT)
#: And about what a repair would mend if it could.
_OF_REPAIRS = ("blob_", "manifest_", "store_unreadable", "store_unwritable", *_UNTOUCHED)
#: Downloads in these conditions are none that the next pull goes on with.
_NO_PULL = (Condition.REDUNDANT, Condition.UNKNOWN)


class Remaining(NamedTuple):
    """What an act has left."""

    findings: tuple[Finding, ...] = ()
    #: Something of what was meant could not be looked at.
    blind: bool = False


def everything(_: Iterable[str], __: Iterable[str]) -> bool:
    """What is meant where nothing was named."""
    return True


def of_repair(seen: Evidence, diagnosis: Diagnosis, told: Iterable[str], meant: Meant) -> Remaining:
    """What a repair has left. `told`: subjects of which it has told something already."""
    blind = any(unseen(seen, meant, parsed=False)) or _unread(seen, meant)
    pulled = {
        model
        for each in diagnosis.diagnosed
        if each.condition not in _NO_PULL
        for model in each.download.models
    }
    found = _left(diagnosis, _OF_REPAIRS, frozenset(told), meant)
    return Remaining(tuple(each for each in found if not _comes(each, pulled)), blind)


def of_cleaning(seen: Evidence, diagnosis: Diagnosis, meant: Meant) -> Remaining:
    """What a clean-up could not look at, or does nothing about."""
    found = tuple(_left(diagnosis, _UNTOUCHED, frozenset(), meant))
    blind = any(each.kind in _OF_SIGHT for each in found) or _unread(seen, meant)
    return Remaining(found, blind)


def _unread(seen: Evidence, meant: Meant) -> bool:
    return any(each.unreadable and meant(each.models, (each.digest,)) for each in seen.downloads)


def _comes(finding: Finding, pulled: set[str]) -> bool:
    """Whether it is a blob that the pull of an unfinished model fetches with the rest of it."""
    return finding.kind == "blob_missing" and set() < set(finding.models) <= pulled


def _left(
    diagnosis: Diagnosis, kinds: tuple[str, ...], known: frozenset[str], meant: Meant
) -> Iterator[Finding]:
    for finding in diagnosis.findings:
        name = finding.path.rpartition("/")[2]
        if finding.severity is not Severity.ERROR or not finding.kind.startswith(kinds):
            continue
        subjects = {name, names.parse_blob(name).digest}
        if known.isdisjoint(subjects) and meant(finding.models, subjects):
            yield finding


def out_of_sight(seen: Evidence) -> tuple[Unseen, ...]:
    """What a look at the whole store could not see: names, folders, manifests, the quarantine."""
    aside = () if seen.quarantine_unseen is None else (seen.quarantine_unseen,)
    lists = {ManifestFault.CORRUPT, ManifestFault.DANGLING, ManifestFault.BAD_DIGEST}
    seen_well = {odd.path for odd in seen.census.odd_manifests if odd.fault in lists}
    found = unseen(seen, everything, parsed=False)
    return (*(each for each in found if each.path not in seen_well), *aside)


def quarantine_unseen(seen: Evidence) -> tuple[Unseen, ...]:
    """What keeps a look from what lies in quarantine, or from the places that it came from."""
    found = () if seen.quarantine_unseen is None else (seen.quarantine_unseen,)
    if all(kept.place_seen for kept in seen.quarantine):
        return found
    return (*found, *(each for each in unseen(seen, everything) if each.path.startswith("blobs")))


def opening(found: Iterable[Unseen], diagnosis: Diagnosis) -> tuple[str, ...]:
    """The commands that let be looked at what could not be."""
    paths = {each.path for each in found}
    kinds = (*_OF_SIGHT, "manifest_unreadable")
    told = (each for each in diagnosis.findings if each.kind in kinds and each.path in paths)
    return tuple(dict.fromkeys(each.command for each in told if each.command))


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
        if odd.fault in _PARSED and not parsed:
            continue
        why = _BLINDING.get(odd.fault)
        if why is not None and _is_blind(odd, read) and meant((odd.model or "",), ()):
            yield Unseen(odd.path, f"{why}: {odd.why}")


def _is_blind(odd: OddManifest, read: set[str]) -> bool:
    """Whether it is we who can't make sense of a manifest, and not just the server's user."""
    return odd.fault is not ManifestFault.UNREADABLE or odd.model not in read

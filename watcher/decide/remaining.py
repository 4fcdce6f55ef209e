"""What is still wrong after a plan was carried out, and what could not be inspected. Pure."""

from collections.abc import Callable, Iterable, Iterator, Set
from typing import NamedTuple, TypeAlias

from watcher import model
from watcher.decide import conditions, finding_kinds
from watcher.model import WRONG, BlobFault, Diagnosis, Evidence, Finding, ManifestFault, Unseen
from watcher.ollama import names

#: Whether something of these models, or with these digests or names, is meant.
Meant: TypeAlias = Callable[[Iterable[str], Iterable[str]], bool]

#: Manifests whose layers are unknown, and why.
_BLINDING = {
    ManifestFault.CORRUPT: "its manifest is corrupt, so its layers are unknown",
    ManifestFault.UNREADABLE: "its manifest can't be read, so its layers are unknown",
    ManifestFault.DANGLING: "its manifest is a dangling symlink, so its layers are unknown",
    ManifestFault.BAD_DIGEST: "its manifest has an invalid layer",
    ManifestFault.EMPTY: "its manifest names nothing",
}


class Remaining(NamedTuple):
    findings: tuple[Finding, ...] = ()
    blind: bool = False  #: something of what was meant could not be inspected


def everything(_: Iterable[str], __: Iterable[str]) -> bool:
    """What is meant where nothing was named."""
    return True


def of_repair(
    seen: Evidence, diagnosis: Diagnosis, known: Iterable[str], meant: Meant
) -> Remaining:
    """What a repair has left. `known`: subjects that it has reported already."""
    blind = any(unseen(seen, meant, model.BLINDING)) or _unread(seen, meant)
    pulled = {
        name
        for each in diagnosis.diagnosed
        if conditions.row(each.condition).next_pull is not conditions.NextPull.IGNORES
        for name in each.download.models
    }
    reported = frozenset(known)

    def is_left(finding: Finding) -> bool:
        # The pull of an unfinished model fetches a missing blob with the rest of it.
        comes = finding.kind == "blob_missing" and set() < set(finding.models) <= pulled
        left = finding_kinds.row(finding.kind).left is not finding_kinds.Left.NONE
        return left and reported.isdisjoint(_subjects(finding)) and not comes

    return Remaining(tuple(filter(is_left, _errors(diagnosis, meant))), blind)


def of_cleaning(seen: Evidence, diagnosis: Diagnosis, meant: Meant) -> Remaining:
    """What `clean` could not inspect, or does nothing about."""
    rows = ((each, finding_kinds.row(each.kind)) for each in _errors(diagnosis, meant))
    left = [(each, row) for each, row in rows if row.left is finding_kinds.Left.BY_BOTH]
    blind = any(row.hides for _, row in left) or _unread(seen, meant)
    return Remaining(tuple(each for each, _ in left), blind)


def _unread(seen: Evidence, meant: Meant) -> bool:
    return any(each.unreadable and meant(each.models, (each.digest,)) for each in seen.downloads)


def _errors(diagnosis: Diagnosis, meant: Meant) -> Iterator[Finding]:
    for finding in diagnosis.findings:
        is_unfetched = finding_kinds.row(finding.kind).left is finding_kinds.Left.UNFETCHED
        is_left = is_unfetched or finding.severity is model.Severity.ERROR
        if is_left and meant(finding.models, _subjects(finding)):
            yield finding


def _subjects(finding: Finding) -> set[str]:
    *above, name = finding.path.split("/")  # a transfer of ours has its digest as its folder
    return {name, names.parse_blob(name).digest, *above[-1:]}


def out_of_sight(seen: Evidence) -> tuple[Unseen, ...]:
    """What a look at the whole store could not see: names, folders, manifests, the quarantine."""
    aside = filter(None, (seen.quarantine_unseen, seen.transfers_unseen))
    return (*unseen(seen, everything, frozenset({ManifestFault.UNREADABLE})), *aside)


def quarantine_unseen(seen: Evidence) -> tuple[Unseen, ...]:
    """What keeps a look from what lies in quarantine, or from the places that it came from."""
    found = () if seen.quarantine_unseen is None else (seen.quarantine_unseen,)
    if all(kept.place_seen for kept in seen.quarantine):
        return found
    return (*found, *(each for each in unseen(seen, everything) if each.path.startswith("blobs")))


def opening(found: Iterable[Unseen], diagnosis: Diagnosis) -> tuple[str, ...]:
    """The commands that let be looked at what could not be."""
    paths = {each.path for each in found}
    hiding = (each for each in diagnosis.findings if finding_kinds.row(each.kind).hides)
    opens = (each.command for each in hiding if each.path in paths)
    return tuple(dict.fromkeys(filter(None, opens)))


def unseen(
    seen: Evidence, meant: Meant, faults: Set[ManifestFault] = _BLINDING.keys()
) -> Iterator[Unseen]:
    """What a look could not see of what is meant: names, folders, manifests with these faults."""
    census = seen.census
    whole = meant is everything
    for path in census.unlisted:
        if whole or not path.startswith("manifests"):
            yield Unseen(path, "the folder can't be listed")
    for each in census.unseen:
        in_blobs = each.path.startswith("blobs/")
        if whole or (in_blobs and meant((), (each.path.removeprefix("blobs/"),))):
            yield each
    for odd in census.odd_manifests:
        # Whether it is we who can't make sense of it, and not just the server's user.
        blind = odd.fault is not ManifestFault.UNREADABLE or odd.model not in census.models
        if odd.fault in faults and blind and meant((odd.model or "",), ()):
            yield Unseen(odd.path, f"{_BLINDING[odd.fault]}: {odd.why}")


class Verified(NamedTuple):
    """How many blobs were compared with their names, and what came of it."""

    #: Blobs that were read just now, and blobs that have not changed since they were.
    read: int
    unchanged: int
    #: Blobs that don't match their names, the missing ones among them.
    wrong: tuple[model.OddBlob, ...]
    left: int  #: so many blobs nobody came to, since the time was over
    unseen: tuple[Unseen, ...]  #: what could not be checked, and why

    @property
    def checked(self) -> int:
        """Blobs whose bytes are known, as they are now."""
        return self.read + self.unchanged

    @property
    def unchecked(self) -> int:
        """Blobs, manifests and folders of which nothing is known."""
        return self.left + len(self.unseen)


def of_verified(diagnosis: Diagnosis, done: Verified) -> list[Finding]:
    wrong = {(f"blob_{odd.fault.value}", f"blobs/{names.blob(odd.digest)}") for odd in done.wrong}
    # One finding is about all that lie in the same place.
    astray = any(odd.lies is not None for odd in done.wrong)
    return [
        each
        for each in diagnosis.findings
        if (each.kind, each.path) in wrong or (astray and each.kind == "blob_astray")
    ]


def verified(evidence: Evidence, outcomes: Iterable[model.Outcome], meant: Meant) -> Verified:
    """What is known of the blobs that are meant, after what was hashed for it just now."""
    hashed = {
        each.action.subject: each for each in outcomes if each.action.kind is model.ActionKind.HASH
    }
    right = {digest for digest, outcome in hashed.items() if outcome.sha256 is not None}
    census = evidence.census
    named = [(names.parse_blob(blob.name).digest, blob, models) for blob, models in census.named]
    digests = {digest for digest, _, models in named if meant(models, (digest,))}
    known = {digest for digest, blob, _ in named if blob.sha256 is not None}
    # Those that no manifest names: in doubt all the same.
    unnamed = {digest for digest in hashed if meant((), (digest,))} - digests
    unnamed |= {names.parse_blob(each.name).digest for each in census.unproven} - digests
    faults = WRONG | {BlobFault.MISSING}
    odd_blobs = (odd for odd in census.odd if odd.fault in faults)
    wrong = [odd for odd in odd_blobs if meant(odd.models, (odd.digest,))]
    known |= {odd.digest for odd in wrong if odd.fault is BlobFault.CORRUPT} | (unnamed & right)
    checked = (digests | unnamed | {odd.digest for odd in wrong}) & known
    unread = [hashed.get(digest) for digest in sorted((digests | unnamed) - known)]
    as_it_was = {blob for _, blob, _ in named}
    unchecked = list(unseen(evidence, meant))
    for outcome in filter(None, unread):
        name = outcome.action.expects[0].name
        why = outcome.message
        if outcome.result is model.Result.DONE:
            # One that is just as it was hashed would be known, had its hash been kept.
            lost = outcome.action.expects[0] in as_it_was
            why = "its hash could not be remembered" if lost else "it changed meanwhile"
        unchecked.append(Unseen(f"blobs/{name}", why.removeprefix(f"{name}: ")))
    return Verified(
        read=len(checked & right),
        unchanged=len(checked - right),
        wrong=tuple(wrong),
        left=unread.count(None),
        unseen=tuple(unchecked),
    )

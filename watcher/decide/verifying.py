"""What a verification has found, and what it could not check. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from watcher.decide import remaining
from watcher.model import (
    WRONG,
    ActionKind,
    BlobFault,
    Diagnosis,
    Evidence,
    Finding,
    OddBlob,
    Outcome,
    Result,
    Unseen,
)
from watcher.ollama import names


class Verified(NamedTuple):
    """How many blobs were compared with their names, and what came of it."""

    #: Blobs that were read just now, and blobs that have not changed since they were.
    read: int
    unchanged: int
    #: Blobs that are not what their names say, the missing ones among them.
    wrong: tuple[OddBlob, ...]
    #: So many blobs nobody came to, since the time was over.
    left: int
    #: What could not be checked, and why.
    unseen: tuple[Unseen, ...]

    @property
    def checked(self) -> int:
        """Blobs whose bytes are known, as they are now."""
        return self.read + self.unchanged

    @property
    def unchecked(self) -> int:
        """Blobs, manifests and folders of which nothing is known."""
        return self.left + len(self.unseen)


def told(diagnosis: Diagnosis, done: Verified) -> list[Finding]:
    """The findings about the blobs that are wrong."""
    wrong = {(f"blob_{odd.fault.value}", f"blobs/{names.blob(odd.digest)}") for odd in done.wrong}
    # One finding is about all that lie in the same place.
    astray = any(odd.lies is not None for odd in done.wrong)
    return [
        each
        for each in diagnosis.findings
        if (each.kind, each.path) in wrong or (astray and each.kind == "blob_astray")
    ]


def verified(evidence: Evidence, outcomes: Iterable[Outcome], meant: remaining.Meant) -> Verified:
    """What is known of the blobs that are meant, after what was hashed for it just now."""
    hashed = {each.action.subject: each for each in outcomes if each.action.kind is ActionKind.HASH}
    census = evidence.census
    digests, known = set(), set()
    for content, models in census.named:
        digest = names.parse_blob(content.name).digest
        if meant(models, (digest,)):
            digests.add(digest)
        if content.sha256 is not None:
            known.add(digest)
    # Those that no manifest names: in doubt all the same.
    unnamed = {digest for digest in hashed if meant((), (digest,))} - digests
    unnamed |= {names.parse_blob(each.name).digest for each in census.unproven} - digests
    wrong = [
        odd
        for odd in census.odd
        if odd.fault in WRONG | {BlobFault.MISSING} and meant(odd.models, (odd.digest,))
    ]
    known |= {odd.digest for odd in wrong if odd.fault is BlobFault.CORRUPT}
    known |= {digest for digest in unnamed & hashed.keys() if hashed[digest].sha256 is not None}
    checked = (digests | unnamed | {odd.digest for odd in wrong}) & known
    read = {digest for digest in checked if digest in hashed and hashed[digest].sha256 is not None}
    unread = [hashed.get(digest) for digest in sorted((digests | unnamed) - known)]
    return Verified(
        read=len(read),
        unchanged=len(checked) - len(read),
        wrong=tuple(wrong),
        left=sum(each is None for each in unread),
        unseen=(
            *remaining.unseen(evidence, meant),
            *(_unread(each) for each in unread if each is not None),
        ),
    )


def _unread(outcome: Outcome) -> Unseen:
    name = outcome.action.expects[0].name
    why = outcome.message if outcome.result is not Result.DONE else "it changed meanwhile"
    return Unseen(f"blobs/{name}", why.removeprefix(f"{name}: "))

"""What of the quarantine goes back to its place, or goes for good. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from watcher import names
from watcher.decide import safety
from watcher.model import Action, Evidence, Kept, Policy, Refusal, RefusalKind, Verb


def steps(evidence: Evidence, policy: Policy) -> Iterator[Action | Refusal]:
    """The actions on those kept things that the policy names."""
    known = {kept.label for kept in evidence.quarantine}
    for verb, labels in ((Verb.RESTORE, policy.restore), (Verb.PURGE, policy.purge)):
        for label in sorted(labels - known):
            why = "nothing of that label is in quarantine"
            yield Refusal(RefusalKind.UNKNOWN, label, verb, why, "ollama-watch quarantine ls")
    for kept in evidence.quarantine:
        if kept.label in policy.restore:
            yield _restore(kept, evidence)
        elif kept.label in policy.purge or (policy.purge_replaced and kept.replaced):
            yield _purge(kept)


def _restore(kept: Kept, evidence: Evidence) -> Action | Refusal:
    unsafe = safety.store_forbids(evidence)
    if unsafe is None and kept.in_its_place:
        unsafe = (
            RefusalKind.CHANGED,
            f"there is a new {names.printable(kept.name)} in its place",
            "purge it, or move the new one away",
            None,
        )
    if unsafe is not None:
        return Refusal(unsafe[0], kept.label, Verb.RESTORE, unsafe[1], unsafe[2])
    because = f"back to blobs/{names.printable(kept.name)}"
    return Action(Verb.RESTORE, kept.label, because, (kept.entry,))


def _purge(kept: Kept) -> Action:
    because = "a good one is in its place" if kept.replaced else "removed for good"
    return Action(Verb.PURGE, kept.label, because, (kept.entry,), kept.entry.freed)

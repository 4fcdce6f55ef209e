"""What leaves the quarantine: back to its place, or for good. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from watcher.decide import findings, safety
from watcher.model import Action, ActionKind, Evidence, Kept, Refusal, RefusalKind, Rules
from watcher.ollama import names
from watcher.system import advice


def steps(evidence: Evidence, rules: Rules) -> Iterator[Action | Refusal]:
    """The actions on the kept files that the rules name."""
    known = {kept.label for kept in evidence.quarantine}
    for kind, labels in (
        (ActionKind.RESTORE, rules.mode.restore),
        (ActionKind.PURGE, rules.mode.purge),
    ):
        for label in sorted(labels - known):
            why = "nothing in quarantine has that label"
            listed = advice.watch(evidence, "quarantine", "ls")
            remedy = "list the labels"
            yield Refusal(RefusalKind.UNKNOWN, label, kind, why, remedy, command=listed)
    expired = _expired(evidence, rules)
    for kept in evidence.quarantine:
        if kept.label in rules.mode.restore:
            yield _restore(kept, evidence)
        elif kept.label in rules.mode.purge or kept.label in expired:
            yield _purge(kept)


def _expired(evidence: Evidence, rules: Rules) -> set[str]:
    """What a valid blob has replaced and may go now: nothing ever expires before it was."""
    if not (rules.mode.clean or rules.mode.purge_replaced):
        return set()
    room = size(evidence) - rules.settings.quarantine_max_bytes
    expired: set[str] = set()
    for kept in sorted(evidence.quarantine, key=lambda each: each.entry.ctime_ns):
        age = evidence.age_of(kept.entry.ctime_ns / 1e9)  # it changed last when it was moved here
        if kept.replaced and (
            rules.mode.purge_replaced or age >= rules.settings.quarantine_keep or room > 0
        ):
            expired.add(kept.label)
            room -= kept.entry.allocated
    return expired


def size(evidence: Evidence) -> int:
    """Bytes on the disk of everything in quarantine."""
    return sum(kept.entry.allocated for kept in evidence.quarantine)


def _restore(kept: Kept, evidence: Evidence) -> Action | Refusal:
    unsafe = safety.store_forbids(evidence)
    if unsafe is None and kept.in_its_place:
        unsafe = safety.Why(
            RefusalKind.CHANGED,
            f"its place is taken by a new {names.printable(kept.name)}",
            "purge it, or move the new file away",
            command=advice.watch(evidence, "quarantine", "purge", kept.label),
        )
    if unsafe is None and not kept.place_seen:
        unsafe = safety.Why(
            RefusalKind.PERMISSION,
            f"it is unknown whether its place, blobs/{names.printable(kept.name)}, is free",
            "make blobs/ readable first",
            command=findings.made_listable("blobs", evidence),
        )
    if unsafe is not None:
        why, remedy = unsafe.reason, unsafe.remedy
        command = unsafe.command
        return Refusal(unsafe.kind, kept.label, ActionKind.RESTORE, why, remedy, command=command)
    because = f"back to blobs/{names.printable(kept.name)}"
    return Action(ActionKind.RESTORE, kept.label, because, (kept.entry,))


def _purge(kept: Kept) -> Action:
    because = "a valid blob replaced it" if kept.replaced else "as asked"
    return Action(
        ActionKind.PURGE,
        kept.label,
        because,
        (kept.entry,),
        kept.entry.freed,
        relies_on=kept.there if kept.replaced else None,
    )

"""A plan that was agreed to, carried out: each act announced, done, and its outcome told."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol, TypeAlias

from watcher.act import disk_reserve, refresh, transaction
from watcher.act.journal import Journal
from watcher.decide import cleaning, events, safety
from watcher.errors import ChangedError, EndedError
from watcher.model import (
    Action,
    ActionKind,
    BlobFault,
    Entry,
    Evidence,
    Outcome,
    Plan,
    Refusal,
    RefusalKind,
    Result,
)
from watcher.observe.host import Host
from watcher.ollama import names, sidecars
from watcher.state import folders

#: One look, with what was planned on it.
Planned: TypeAlias = tuple[Evidence, Plan]


class Looks(Protocol):
    """Looks at the store while it is changed."""

    def again(self) -> Planned:
        """The plan of now."""

    def glance(self, digests: frozenset[str] | None) -> Evidence:
        """Only look: at the downloads of some digests, or, for None, at the whole store."""


#: What goes together; before each batch the plan is made anew. The first is small, since on a full
#: disk its intents have to fit into what is set aside, and each makes room for one ten times
#: larger. Files share an intent; downloads have one each, and share the wait and the looks: not too
#: many of them, since whoever stops us waits until they are put back.
FIRST_BATCH, BATCH = 100, 10_000
FIRST_DOWNLOADS, DOWNLOADS = 10, 100
#: So long a plan counts for further batches of downloads: each is compared under its own guard.
_FRESH_SECONDS = 5.0

_FILES = frozenset(
    {
        ActionKind.REMOVE_ORPHAN,
        ActionKind.REMOVE_TEMPORARY,
        ActionKind.REFRESH,
        ActionKind.QUARANTINE_BLOB,
    }
)
_DOWNLOADS = frozenset(
    {ActionKind.WRITE_SIDECARS, ActionKind.REMOVE_DOWNLOAD, ActionKind.REMOVE_SURPLUS}
)


def apply(host: Host, agreed: Plan, plans: Plans, journal: Journal) -> tuple[Outcome, ...]:
    """Do what was approved, as far as a plan made anew still has it on the very same files.

    The lock is held. What was not begun when `host.stops` has no outcome.
    """
    outcomes: list[Outcome] = []
    for batch in _batches(agreed.actions):
        if host.stops():
            break
        # Times may be set at any moment, whatever else has changed.
        if batch[0].kind is ActionKind.REFRESH:
            outcomes.extend(refresh_all(host, batch, journal))
            continue
        try:
            seen, planned = plans.fresh(anew=batch[0].kind not in _DOWNLOADS)
        except EndedError:
            break
        fresh = {_essence(action): action for action in planned.actions}
        # The fresh one is done: it knows whether the guard has to wait for a server.
        still = [fresh[_essence(action)] for action in batch if _essence(action) in fresh]
        gone = [action for action in batch if _essence(action) not in fresh]
        undone = _no_longer(gone, planned) if gone else []
        journal(*(events.begun(action, host.clock()) for action in still))
        ended = _Batch(host, journal.store, seen, plans.looks).do(still)
        # What somebody else has done meanwhile was not begun here, and is logged by who did it.
        logged = (*(each for each in undone if not _is_overtaken(each)), *ended)
        journal(*(events.ended(outcome, host.clock()) for outcome in logged))
        outcomes.extend((*undone, *ended))
    return tuple(outcomes)


class Plans:
    """Makes plans, and keeps the last one while it is fresh."""

    def __init__(self, looks: Looks, last: Planned, made_at: float) -> None:
        """`last`: a plan that was made at that time of the monotonic clock."""
        self.looks = looks
        self._last: Planned | None = last
        self._until = made_at + _FRESH_SECONDS

    def fresh(self, *, anew: bool) -> Planned:
        """A plan as the store is now; `anew`: made just now."""
        if self._last is None or anew or time.monotonic() > self._until:
            self._last = None  # two looks at a large store need not be kept at once
            self._last = self.looks.again()
            self._until = time.monotonic() + _FRESH_SECONDS
        return self._last


def _batches(actions: Sequence[Action]) -> Iterator[list[Action]]:
    """What is done together: downloads by the hundreds, single files by the thousands."""
    for key, alike in groupby(actions, key=lambda action: (action.kind, _is_transfer(action))):
        rest = list(alike)
        size, most = _sizes(*key)
        while rest:
            yield rest[:size]
            rest = rest[size:]
            size = min(size * 10, most)


def _sizes(kind: ActionKind, is_transfer: bool) -> tuple[int, int]:
    if kind in _FILES:
        return FIRST_BATCH, BATCH
    return (FIRST_DOWNLOADS, DOWNLOADS) if kind in _DOWNLOADS and not is_transfer else (1, 1)


def _is_transfer(action: Action) -> bool:
    return action.expects[0].name == names.transfer(action.subject)


def _essence(action: Action) -> tuple[object, ...]:
    """What two plans must agree in; the reasons' words tell times, which go on."""
    files_of_it = tuple(
        (entry.name, entry.identity, entry.size, entry.mtime_ns) for entry in action.expects
    )
    return action.kind, action.subject, files_of_it, action.parts


class _Batch(NamedTuple):
    """Where a batch is done, and what was seen just before."""

    host: Host
    store: int
    seen: Evidence
    looks: Looks

    def do(self, batch: list[Action]) -> list[Outcome]:
        """Do actions of one kind; the outcome of each."""
        if not batch:
            return []
        kind = batch[0].kind
        if kind in (ActionKind.RESTORE, ActionKind.PURGE):
            blobs = self.seen.place.blobs
            return [_leave_quarantine(self.store, action, blobs) for action in batch]
        together = [batch] if kind in _FILES else [[action] for action in batch]
        changes = [_change(actions, self.seen) for actions in together]

        def confirm(moved: Collection[Entry]) -> Mapping[str, ChangedError]:
            return _must_stay(kind, moved, self.looks)

        def commit_all(some: Sequence[transaction.Change]) -> Sequence[transaction.Answer]:
            return transaction.commit_all(self.host, self.store, some, confirm)

        try:
            answers = disk_reserve.with_room(self.store, changes, commit_all)
        except EndedError:
            answers = [transaction.StoppedError()] * len(changes)
        except OSError as error:
            answers = [error] * len(changes)
        answered = zip(together, answers, strict=True)
        return [outcome for actions, answer in answered for outcome in _outcomes(actions, answer)]


def _outcomes(actions: list[Action], answer: transaction.Answer) -> list[Outcome]:
    if isinstance(answer, ChangedError):
        return [_refused(action, answer) for action in actions]
    if isinstance(answer, OSError):
        return [_failed(action, answer) for action in actions]
    return [_outcome(action, answer, alone=len(actions) == 1) for action in actions]


def _must_stay(kind: ActionKind, moved: Collection[Entry], looks: Looks) -> dict[str, ChangedError]:
    """What has to stay after all: what would forbid the act is looked at once more."""
    if not moved and kind is not ActionKind.WRITE_SIDECARS:
        return {}
    # Whether a download's store forbids it is told by servers and place; its data need not be read.
    alone = kind in (ActionKind.REMOVE_ORPHAN, ActionKind.REMOVE_TEMPORARY)
    seen = looks.glance(None if alone else frozenset())
    if kind is ActionKind.REMOVE_ORPHAN:
        why = cleaning.orphans_forbidden(seen)
    elif kind is ActionKind.REMOVE_TEMPORARY:
        why = safety.idle_forbids(seen)
    else:
        why = safety.store_forbids(seen)
    if why is not None:
        error = ChangedError(why.reason, why.remedy, why.command)
        return {entry.name: error for entry in moved} or {"": error}
    if kind is not ActionKind.REMOVE_ORPHAN:
        return {}
    named = {names.blob(odd.digest) for odd in seen.census.odd if odd.fault is BlobFault.MISSING}
    return {
        entry.name: ChangedError("a manifest names it now", "")
        for entry in moved
        if entry.name in named
    }


def _outcome(action: Action, changed: transaction.Changed, *, alone: bool) -> Outcome:
    for entry in action.expects:
        if entry.name in changed.kept:
            return _refused(action, changed.kept[entry.name])
    # Replaced sidecars give back a block each, which is not what anybody asked for.
    mended = action.kind in (ActionKind.WRITE_SIDECARS, ActionKind.QUARANTINE_BLOB)
    freed = changed.freed if alone else action.frees
    return Outcome(action, Result.DONE, _done_message(action), 0 if mended else freed)


def refresh_all(host: Host, batch: list[Action], journal: Journal) -> list[Outcome]:
    """Set the times of wanted things to now, once their own ones are on the disk elsewhere."""
    try:
        with folders.opened_blobs(journal.store) as blobs:
            touching = refresh.own_times(blobs, batch, host.clock())
            if journal.remember(touching):
                refresh.set_times(blobs, touching)
                ended = [Outcome(action, Result.DONE, _done_message(action)) for action in batch]
            else:
                why = "the own times of its files can't be remembered, so they are left alone"
                ended = [Outcome(action, Result.FAILED, why) for action in batch]
    except OSError as error:
        ended = [_failed(action, error) for action in batch]
    journal(events.refreshed(ended, host.clock()))
    return ended


def _leave_quarantine(store: int, action: Action, blobs: tuple[int, int]) -> Outcome:
    back_into = blobs if action.kind is ActionKind.RESTORE else None
    try:
        transaction.leave_quarantine(store, action.expects[0], back_into)
    except ChangedError as error:
        return _refused(action, error)
    except OSError as error:
        return _failed(action, error)
    return Outcome(action, Result.DONE, _done_message(action), action.frees)


def _change(batch: list[Action], seen: Evidence) -> transaction.Change:
    first = batch[0]
    entries = tuple(entry for action in batch for entry in action.expects)
    in_parts = first.kind in _DOWNLOADS and not _is_transfer(first)
    alone = safety.alone(seen)
    return transaction.Change(
        kind=first.kind,
        expects=entries,
        takes=first.surplus if first.kind is ActionKind.WRITE_SIDECARS else entries,
        writes={
            names.sidecar(first.subject, part.number): sidecars.write(part) for part in first.parts
        },
        digest=first.subject if in_parts else "",
        wait_seconds=first.wait_seconds,
        owner=(first.expects[0].uid, first.expects[0].gid),
        blobs=seen.place.blobs,
        alone=alone,
        loose=alone and safety.is_loose(seen.place),
    )


def _done_message(action: Action) -> str:
    match action.kind:
        case ActionKind.REMOVE_DOWNLOAD | ActionKind.REMOVE_SURPLUS:
            who = names.known_as(action.models, action.subject)
            return f"Cleaned up partial download for: {who}"
        case ActionKind.WRITE_SIDECARS:
            who = names.known_as(action.models, action.subject)
            return f"Repaired the partial download of {who}: {action.saves} bytes saved"
        case ActionKind.QUARANTINE_BLOB:
            return f"{action.subject[:19]} is in quarantine; {action.because.partition(': ')[2]}"
        case ActionKind.RESTORE:
            return f"restored {names.printable(action.subject)}"
        case ActionKind.REFRESH:
            what = names.known_as(action.models, action.subject.removeprefix("sha256-"))
            return f"protected {what} from pruning"
        case _:
            return f"removed {names.printable(action.subject)}"


def _no_longer(gone: list[Action], planned: Plan) -> list[Outcome]:
    """The outcomes of what a fresh plan does not have, with its reason where it gives one."""
    why: dict[tuple[ActionKind, str], Refusal] = {}
    for refusal in planned.refusals:
        for about in (refusal.subject, *refusal.entries):
            why.setdefault((refusal.action, about), refusal)
    error = ChangedError("the store has changed since the plan was made", "plan again")
    undone: list[Outcome] = []
    for action in gone:
        known = why.get((action.kind, action.subject))
        told = _refused(action, error)
        undone.append(told if known is None else told._replace(message=known.why, refusal=known))
    return undone


def _is_overtaken(outcome: Outcome) -> bool:
    return outcome.refusal is not None and outcome.refusal.kind is RefusalKind.CHANGED


def _refused(action: Action, error: ChangedError) -> Outcome:
    kind = getattr(error, "kind", RefusalKind.CHANGED)
    refusal = Refusal(
        kind,
        action.subject,
        action.kind,
        error.message,
        error.next_step,
        models=action.models,
        command=error.command,
    )
    return Outcome(action, Result.REFUSED, error.message, refusal=refusal)


def _failed(action: Action, error: OSError) -> Outcome:
    what = names.printable(os.fsdecode(error.filename)) if error.filename else action.kind.value
    return Outcome(action, Result.FAILED, f"{what}: {error.strerror}")

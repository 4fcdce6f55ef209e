"""A plan that was agreed to, carried out: each act announced, done, and its outcome told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from watcher import files, names, sidecars
from watcher.act import moves
from watcher.decide import learn
from watcher.errors import ChangedError
from watcher.events import Event
from watcher.model import Action, Outcome, Plan, Refusal, RefusalKind, Result, Verb
from watcher.world import World

#: Files of an intent that go together; before each batch the plan is made anew.
BATCH = 1000

_IN_BATCHES = frozenset({Verb.REMOVE_ORPHAN, Verb.REMOVE_TEMPORARY, Verb.REFRESH})


def apply(
    world: World,
    store: int,
    agreed: Plan,
    plan_again: Callable[[], Plan],
    tell: Callable[[Event], None],
) -> tuple[Outcome, ...]:
    """Do what was agreed to, as far as a plan made anew still has it on the very same files.

    The lock is held. `plan_again` looks at the store and plans, `tell` writes an event.
    """
    outcomes: list[Outcome] = []
    for batch in _batches(agreed.actions):
        # Times may be set at any moment, whatever else has changed.
        timeless = batch[0].verb is Verb.REFRESH
        fresh = set() if timeless else {_essence(action) for action in plan_again().actions}
        still = [action for action in batch if timeless or _essence(action) in fresh]
        ended = [_no_longer(action) for action in batch if action not in still]
        if timeless:
            ended.extend(_refresh(store, action) for action in still)
            tell(learn.refreshed(ended, world.clock()))
        else:
            for action in still:
                tell(learn.begun(action, world.clock()))
            ended.extend(_do(world, store, still))
            for outcome in ended:
                tell(learn.ended(outcome, world.clock()))
        outcomes.extend(ended)
    return tuple(outcomes)


def _batches(actions: Sequence[Action]) -> Iterator[list[Action]]:
    """Downloads one by one, since each has its guard; single files by the thousand."""
    for verb, alike in groupby(actions, key=lambda action: action.verb):
        rest = list(alike)
        size = BATCH if verb in _IN_BATCHES else 1
        while rest:
            yield rest[:size]
            rest = rest[size:]


def _essence(action: Action) -> tuple[object, ...]:
    """What two plans must agree in; the reasons' words tell times, which go on."""
    return action.verb, action.subject, action.expects, action.parts


def _do(world: World, store: int, batch: list[Action]) -> list[Outcome]:
    if not batch:
        return []
    if batch[0].verb in (Verb.RESTORE, Verb.PURGE):
        return [_leave_quarantine(store, action) for action in batch]
    try:
        changed = moves.carry_out(world, store, _change(batch))
    except ChangedError as error:
        return [_refused(action, error) for action in batch]
    except OSError as error:
        return [_failed(action, error) for action in batch]
    kept = {entry.name for entry in changed.kept}
    # Replaced sidecars give back a block each, which is not what anybody asked for.
    mended = batch[0].verb in (Verb.WRITE_SIDECARS, Verb.QUARANTINE_BLOB)
    share = 0 if mended else changed.freed if len(batch) == 1 else None
    return [
        _refused(action, ChangedError("it changed or was opened meanwhile", "try again"))
        if action.subject in kept
        else Outcome(
            action,
            Result.DONE,
            _done_message(action),
            action.frees if share is None else share,
        )
        for action in batch
    ]


def _refresh(store: int, action: Action) -> Outcome:
    """Set the times of what is there of a download, or of one blob, all to the same instant."""
    with files.opened_folder("blobs", store, follow=True) as blobs:
        for entry in action.expects:
            try:
                files.touch(entry.name, blobs, action.at_ns)
            except FileNotFoundError:
                continue  # finished, or gone, meanwhile
            except OSError as error:
                return _failed(action, error)
    return Outcome(action, Result.DONE, _done_message(action))


def _leave_quarantine(store: int, action: Action) -> Outcome:
    back = action.verb is Verb.RESTORE
    try:
        moves.leave_quarantine(store, action.expects[0], back=back)
    except ChangedError as error:
        return _refused(action, error)
    except OSError as error:
        return _failed(action, error)
    return Outcome(action, Result.DONE, _done_message(action), action.frees)


def _change(batch: list[Action]) -> moves.Change:
    first = batch[0]
    entries = tuple(entry for action in batch for entry in action.expects)
    keeps = first.verb is Verb.QUARANTINE_BLOB
    alone = keeps or first.expects[0].name == names.transfer(first.subject)
    in_parts = first.verb not in _IN_BATCHES and not alone
    return moves.Change(
        verb=first.verb.value,
        expects=entries,
        takes=first.surplus if first.verb is Verb.WRITE_SIDECARS else entries,
        writes={
            names.sidecar(first.subject, part.number): sidecars.write(part) for part in first.parts
        },
        digest=first.subject if in_parts else "",
        wait_seconds=first.wait_seconds,
        keeps=keeps,
        owner=(first.expects[0].uid, first.expects[0].gid),
    )


def _done_message(action: Action) -> str:
    match action.verb:
        case Verb.REMOVE_DOWNLOAD | Verb.REMOVE_SURPLUS:
            who = names.known_as(action.models, action.subject)
            return f"Cleaned up partial download for: {who}"
        case Verb.WRITE_SIDECARS:
            who = names.known_as(action.models, action.subject)
            return f"Repaired the partial download of {who}: {action.saves} bytes saved"
        case Verb.QUARANTINE_BLOB:
            return f"{action.subject[:19]} is in quarantine; {action.because.partition(': ')[2]}"
        case Verb.RESTORE:
            return f"restored {names.printable(action.subject)}"
        case Verb.REFRESH:
            return f"kept {names.printable(action.subject)} from the server's clean-up"
        case _:
            return f"removed {names.printable(action.subject)}"


def _no_longer(action: Action) -> Outcome:
    error = ChangedError("the store has changed since the plan was made", "plan again")
    return _refused(action, error)


def _refused(action: Action, error: ChangedError) -> Outcome:
    kind = RefusalKind.HELD if isinstance(error, moves.HeldError) else RefusalKind.CHANGED
    refusal = Refusal(
        kind, action.subject, action.verb, error.message, error.next_step, models=action.models
    )
    return Outcome(action, Result.REFUSED, error.message, refusal=refusal)


def _failed(action: Action, error: OSError) -> Outcome:
    what = names.printable(os.fsdecode(error.filename)) if error.filename else action.verb.value
    return Outcome(action, Result.FAILED, f"{what}: {error.strerror}")

"""A plan that was agreed to, carried out: each act announced, done, and its outcome told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from watcher import names
from watcher.act import moves
from watcher.decide import learn
from watcher.errors import ChangedError
from watcher.events import Event
from watcher.model import Action, Outcome, Plan, Refusal, RefusalKind, Result, Verb
from watcher.world import World

#: Files of an intent that go together; before each batch the plan is made anew.
BATCH = 1000

_IN_BATCHES = frozenset({Verb.REMOVE_ORPHAN, Verb.REMOVE_TEMPORARY})


def apply(
    world: World,
    store: int,
    agreed: Plan,
    plan_again: Callable[[], Plan],
    tell: Callable[[Event], None],
) -> tuple[Outcome, ...]:
    """Do what was agreed to, as far as a plan made anew still has it, word for word.

    The lock is held. `plan_again` looks at the store and plans, `tell` writes an event.
    """
    outcomes: list[Outcome] = []
    for batch in _batches(agreed.actions):
        fresh = set(plan_again().actions)
        still = [action for action in batch if action in fresh]
        ended = [_no_longer(action) for action in batch if action not in fresh]
        for action in still:
            tell(learn.begun(action, world.clock()))
        ended.extend(_do(world, store, still))
        for outcome in ended:
            tell(learn.ended(outcome, world.clock()))
        outcomes.extend(ended)
    return tuple(outcomes)


def _batches(actions: Sequence[Action]) -> Iterator[list[Action]]:
    """Downloads one by one, since each has its guard; single files by the thousand."""
    singles = [action for action in actions if action.verb in _IN_BATCHES]
    for action in actions:
        if action.verb not in _IN_BATCHES:
            yield [action]
    for at in range(0, len(singles), BATCH):
        yield singles[at : at + BATCH]


def _do(world: World, store: int, batch: list[Action]) -> list[Outcome]:
    if not batch:
        return []
    try:
        changed = moves.carry_out(world, store, _change(batch))
    except ChangedError as error:
        return [_refused(action, error) for action in batch]
    except OSError as error:
        return [_failed(action, error) for action in batch]
    kept = {entry.name for entry in changed.kept}
    share = changed.freed if len(batch) == 1 else None
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


def _change(batch: list[Action]) -> moves.Change:
    first = batch[0]
    entries = tuple(entry for action in batch for entry in action.expects)
    in_parts = first.verb not in _IN_BATCHES and first.expects[0].name != names.transfer(
        first.subject
    )
    return moves.Change(
        verb=first.verb.value,
        expects=entries,
        takes=entries,
        digest=first.subject if in_parts else "",
        wait_seconds=first.wait_seconds,
    )


def _done_message(action: Action) -> str:
    match action.verb:
        case Verb.REMOVE_DOWNLOAD | Verb.REMOVE_SURPLUS:
            who = names.known_as(action.models, action.subject)
            return f"Cleaned up partial download for: {who}"
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

"""Answering what has to be known before anything is decided: registries asked, files hashed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from watcher import folders, names
from watcher.act import hashing
from watcher.decide import learn
from watcher.journal import Journal, locked
from watcher.model import Action, Outcome, Policy, Result, Verb
from watcher.observe import place
from watcher.world import World

#: Answers are written down this often, so that a kill loses little.
_KEEP_SECONDS = 30.0


def answer(
    world: World,
    policy: Policy,
    questions: Iterable[Action],
    stop: Callable[[], bool],
    lock_seconds: float,
) -> tuple[Outcome, ...]:
    """Ask and hash, with no lock held meanwhile, and keep the answers in the memory."""
    asked = [action for action in questions if action.verb is Verb.ASK_REGISTRY]
    hashed = [action for action in questions if action.verb is Verb.HASH]
    answers: list[Outcome] = []
    kept = 0
    with folders.opened_store(world.store) as store:
        keep_at = time.monotonic() + _KEEP_SECONDS
        found = chain(ask(asked, world), hashing.find_out(store, hashed, stop, world.watch))
        for outcome in found:
            answers.append(outcome)
            if time.monotonic() >= keep_at:
                _keep(world, policy, store, answers[kept:], lock_seconds)
                kept, keep_at = len(answers), time.monotonic() + _KEEP_SECONDS
        _keep(world, policy, store, answers[kept:], lock_seconds)
    return tuple(answers)


def _keep(
    world: World, policy: Policy, store: int, answers: list[Outcome], lock_seconds: float
) -> None:
    # Where nothing can be written the answers still tell what to do; that it can't be done is told
    # by who acts.
    with contextlib.suppress(OSError), locked(store, lock_seconds):
        journal = Journal(store, policy, world)
        start = place.start(world)
        now = world.clock()
        journal.save(learn.proved(journal.recall(), answers, now, start.id, start.at))


def ask(actions: Iterable[Action], world: World) -> Iterator[Outcome]:
    """Ask for each action's digest, by its models in turn until one's registry knows it."""
    for action in actions:
        length = None
        for shown in action.models:
            model = names.parse_model(shown)
            if model is not None:
                length = world.registry_length(model, action.subject)
            if length is not None:
                break
        said = "nothing" if length is None else f"{length} bytes of it"
        yield Outcome(action, Result.DONE, f"the registry has {said}", length=length)

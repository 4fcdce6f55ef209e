"""The one function in the middle: observe, decide, act, learn, show what came of it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace

from watcher import files, memory, names
from watcher.decide import judge, learn, plan
from watcher.errors import NoPermissionError
from watcher.events import Event
from watcher.journal import Journal, locked
from watcher.memory import Memory
from watcher.model import Consent, Evidence, Outcome, Plan, Policy, Verb, Verdict
from watcher.observe import evidence as look
from watcher.observe import place
from watcher.world import World

#: Actions that change nothing but what is known.
QUESTIONS = frozenset({Verb.HASH, Verb.ASK_REGISTRY})


@dataclass(frozen=True, slots=True)
class Report:
    """One cycle: what was seen, judged, planned and done."""

    evidence: Evidence
    verdict: Verdict
    plan: Plan
    outcomes: tuple[Outcome, ...] = ()
    #: What happened since the last look, and what could not be written down.
    events: tuple[Event, ...] = ()
    troubles: tuple[str, ...] = ()


def everything(planned: Plan) -> Plan:
    """The consent of a service that is told to clean, and of ``--yes``."""
    return planned


def nothing(planned: Plan) -> Plan:
    """The consent of ``audit`` and of ``--dry-run``."""
    return replace(planned, actions=())


def cycle(
    world: World,
    policy: Policy,
    scope: frozenset[str] | None = None,
    consent: Consent = everything,
    *,
    first_look: bool = False,
    lock_seconds: float = 10.0,
    until: float | None = None,
) -> Report:
    """Look at a store, decide, do what `consent` leaves of the plan, and remember what was learnt.

    `scope`: the digests to look at; None for the whole store. A world that does not keep anything
    (``world.keeps``) is only looked at. `first_look`: tell every unfinished download, known or not.
    `until`: when to stop hashing, seconds since the epoch; what was hashed is remembered.
    Raises LockedError where somebody else acts for longer than `lock_seconds`, NoPermissionError
    where something was agreed to and can't be done by this user, and what `observe` raises.
    """

    def decide(past: Memory) -> tuple[Evidence, Verdict, Plan]:
        seen = look.observe(world, policy, past, scope)
        verdict = judge.judge(seen, policy)
        return seen, verdict, plan.make(verdict, seen, policy)

    recovered = _recover(world, policy, lock_seconds) if world.keeps else ()
    seen, verdict, planned = decide(_recall(world))
    agreed = consent(planned)
    if not world.keeps:
        return Report(seen, verdict, planned)

    # What is not acted on yet but has to be known first is found out without a lock, and then
    # everything is decided anew: nothing is decided while acting.
    answers = _find_out(world, agreed, until, lock_seconds)
    if answers:
        seen, verdict, planned = decide(_recall(world))
        agreed = consent(planned)
    agreed = _without_questions(agreed)

    with contextlib.ExitStack() as opened:
        try:
            store = opened.enter_context(files.opened_folder(world.store))
            opened.enter_context(locked(store, lock_seconds))
        except OSError as error:
            return _powerless(world, Report(seen, verdict, planned), agreed, error)
        journal = Journal(store, policy, world)
        journal.tell_corrupt(answers)
        past = journal.learn(memory.load(store), seen, verdict, first_look=first_look)
        outcomes: tuple[Outcome, ...] = ()
        if agreed.actions:
            from watcher.act import apply

            past = learn.foresee(past, agreed)
            journal.save(past)
            outcomes = apply.apply(world, store, agreed, lambda: decide(past)[2], journal)
            seen, verdict, _ = decide(past)
            journal.learn(learn.forget(past, outcomes), seen, verdict, first_look=False)
    return Report(
        seen, verdict, planned, answers + outcomes, recovered + journal.events, journal.troubles
    )


def _without_questions(agreed: Plan) -> Plan:
    return replace(
        agreed, actions=tuple(each for each in agreed.actions if each.verb not in QUESTIONS)
    )


def _find_out(
    world: World, agreed: Plan, until: float | None, lock_seconds: float
) -> tuple[Outcome, ...]:
    """Answer the questions of a plan; the answers are in the memory when this returns."""
    questions = [action for action in agreed.actions if action.verb in QUESTIONS]
    if not questions:
        return ()
    from watcher.act import answering

    return answering.answer(world, questions, until, lock_seconds)


def _recover(world: World, policy: Policy, lock_seconds: float) -> tuple[Event, ...]:
    """Finish or undo what a kill has left, before anything is planned."""
    # Here and below: what acts is loaded only where something is to be done.
    from watcher.act import moves

    try:
        with files.opened_folder(world.store) as store:
            if not moves.unfinished(store):
                return ()
            with locked(store, lock_seconds):
                journal = Journal(store, policy, world)
                for done in moves.recover(store):
                    journal(Event(world.clock(), "recovered", done))
                return journal.events
    except OSError:
        return ()  # the look that follows says what is wrong with the folder


def _recall(world: World) -> Memory:
    try:
        with files.opened_folder(world.store) as store:
            return memory.load(store)
    except OSError:
        return Memory()  # observe says what is wrong with the folder


def _powerless(world: World, seen: Report, agreed: Plan, error: OSError) -> Report:
    """The report where our own folder can't be written: nothing is done, nothing remembered."""
    where = names.printable(os.path.join(world.store, memory.FOLDER))
    trouble = f"{where} can't be written: {error.strerror}"
    if agreed.actions:
        raise NoPermissionError(
            f"{trouble}; nothing was done",
            f"run it as the store's owner or as root: {place.sudo_command(world.store)}",
        ) from None
    return replace(seen, troubles=(trouble,))

"""The one function in the middle: observe, decide, act, learn, show what came of it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from watcher.act.journal import Journal, locked
from watcher.decide import diagnose, plan, safety, transitions
from watcher.errors import EndedError, NoPermissionError, WatchError
from watcher.model import (
    Action,
    ActionKind,
    Approve,
    Diagnosed,
    Diagnosis,
    Evidence,
    Outcome,
    Plan,
    Policy,
)
from watcher.observe import evidence as look
from watcher.observe import place
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.state import folders, memory, state_folder
from watcher.state.event_log import Event
from watcher.state.memory import Memory
from watcher.system import advice, stopping

if TYPE_CHECKING:
    from watcher.act import durability

#: Older than this, what was seen is looked at once more before it is learnt from.
_LATE_SECONDS = 0.5
#: How often a plan is made anew because the disk did not take what it relies on.
_MOST_TRIES = 5
#: Actions that change nothing but what is known.
QUESTIONS = frozenset({ActionKind.HASH, ActionKind.ASK_REGISTRY})


@dataclass(frozen=True, slots=True)
class Report:
    """One cycle: what was seen, judged, planned and done."""

    evidence: Evidence
    diagnosis: Diagnosis
    plan: Plan
    outcomes: tuple[Outcome, ...] = ()
    #: What happened since the last look, and what could not be written down.
    events: tuple[Event, ...] = ()
    warnings: tuple[str, ...] = ()
    #: What a kill has left could not be finished, so nothing was done.
    stuck: bool = False
    #: What is remembered after it; for who can't write it down.
    memory: Memory | None = None


class _Decided(NamedTuple):
    """One look, and what follows from it and from what was known."""

    evidence: Evidence
    diagnosed: tuple[Diagnosed, ...]
    plan: Plan
    known: Memory
    #: When, on the monotonic clock; 0.0 where the look is a later one than the plan.
    at: float
    policy: Policy

    def diagnosis(self) -> Diagnosis:
        """What there is to tell of the look: made where somebody reads it, since no plan does."""
        return diagnose.diagnosis(self.diagnosed, self.evidence, self.policy)


def everything(planned: Plan) -> Plan:
    """The consent of a service that is told to clean, and of ``--yes``."""
    return planned


def nothing(planned: Plan) -> Plan:
    """The consent of ``audit`` and of ``--dry-run``."""
    return replace(planned, actions=())


def cycle(
    host: Host,
    policy: Policy,
    scope: frozenset[str] | None = None,
    approve: Approve = everything,
    *,
    first_look: bool = False,
    lock_seconds: float = 10.0,
    stop: Callable[[], bool] = lambda: False,
    past: Memory | None = None,
    ended: frozenset[str] = frozenset(),
) -> Report:
    """Look at a store, decide, do what `consent` leaves of the plan, and remember what was learnt.

    `scope`: the digests to look at; None for the whole store. A world that does not keep anything
    (``world.keeps``) is only looked at. `first_look`: tell every unfinished download, known or not.
    `stop` says when to hash no more and to begin no further act; what was done by then is
    remembered. ctrl-C and SIGTERM wait for the act under way, where nothing else waits for them.
    `past`: what the caller remembers, for a store that nothing can be written down in. `ended`:
    digests whose data somebody has just closed after writing.
    Raises LockedError where somebody else acts for longer than `lock_seconds`, NoPermissionError
    where something was agreed to and can't be done by this user, RefusedError where our folder is
    somebody else's, and what `observe` raises.
    """

    def decide(known: Memory) -> _Decided:
        seen = look.observe(host, policy, known, scope)
        host.go_on()
        diagnosed = diagnose.judge(seen, policy)
        host.go_on()
        made = plan.make(diagnosed, seen, policy)
        host.go_on()
        return _Decided(seen, diagnosed, made, known, time.monotonic(), policy)

    def anew() -> _Decided:
        return decide(_with_answers(host, remembered(host, past), unkept))

    def answer(questions: Sequence[Action]) -> tuple[Outcome, ...]:
        # Here and below: what acts is loaded only where something is to be done.
        from watcher.act import answering

        answers, is_kept = answering.answer(host, policy, questions, stop, lock_seconds)
        unkept.extend(() if is_kept else answers)
        found.extend(answers)
        return answers

    if host.keeps:
        state_folder.check(host.store)
    recovered = _recover(host, policy, lock_seconds) if host.keeps else ()
    now = decide(remembered(host, past))
    agreed = approve(now.plan)
    if not host.keeps:
        return Report(now.evidence, now.diagnosis(), now.plan)
    unkept: list[Outcome] = []
    found: list[Outcome] = []
    try:
        now, agreed, answers = _find_out(now, agreed, approve, answer, anew)
        on_disk = _OnDisk(host, policy, stop, lock_seconds)
        now, agreed, undone = _settle(now, agreed, on_disk, approve, anew)
    except EndedError:
        _tell_found(host, policy, found)
        raise
    looked_at = host.clock()
    with contextlib.ExitStack() as opened:
        try:
            store = opened.enter_context(folders.opened_store(host.store))
            opened.enter_context(locked(store, lock_seconds))
        except OSError as error:
            report = _powerless(host, now, agreed, error, first_look)
            for hashed in filter(
                None, (transitions.hashed(each, host.clock()) for each in answers)
            ):
                host.tell(hashed)
            return replace(report, outcomes=answers + undone)
        from watcher.act import disk_reserve

        disk_reserve.set_aside(store)
        journal = Journal(store, policy, host)
        stuck = _recover_under_lock(host, policy, store, journal)
        known = _with_answers(host, _or_told(journal.recall(), past), unkept)
        late = journal.events or host.clock() - looked_at > _LATE_SECONDS
        journal.tell_hashed(answers)
        if late or known != now.known:
            # Somebody else has learnt or acted meanwhile: what was seen before is an old story.
            now = decide(known)._replace(plan=now.plan, at=0.0)
        journal(*(transitions.ended(each, host.clock()) for each in undone))
        seen, diagnosis = now.evidence, now.diagnosis()
        known = journal.learn(known, seen, diagnosis, first_look=first_look, ended=ended)
        outcomes: tuple[Outcome, ...] = ()
        if agreed.actions and not stuck:
            asked = approve is not everything
            acting = _Acting(host, policy, store, journal, stop, asked)
            outcomes, after = _act(acting, now, known, agreed, decide)
            seen, diagnosis = after or (seen, diagnosis)
        known = journal.recall()
    return Report(
        seen,
        diagnosis,
        now.plan,
        answers + undone + outcomes,
        recovered + journal.events,
        stuck + journal.warnings,
        bool(stuck),
        known,
    )


def keep_fresh(host: Host, policy: Policy, wanted: Plan, lock_seconds: float) -> None:
    """Set the times of what is wanted, by a plan of just now; their own ones are remembered.

    Raises LockedError, and OSError where nothing can be written down.
    """
    from watcher.act import apply

    with folders.opened_store(host.store) as store, locked(store, lock_seconds):
        journal = Journal(store, policy, host)
        refreshes = [each for each in wanted.actions if each.kind is ActionKind.REFRESH]
        apply.refresh_all(host, store, refreshes, journal.remember, journal)


def _tell_found(host: Host, policy: Policy, answers: Sequence[Outcome]) -> None:
    """Tell what was hashed, before an end: no other look does."""
    with (
        contextlib.suppress(OSError, WatchError),
        folders.opened_store(host.store) as store,
        locked(store, stopping.GRACE_SECONDS),
    ):
        Journal(store, policy, host).tell_hashed(answers)


def _with_answers(host: Host, known: Memory, unkept: Sequence[Outcome]) -> Memory:
    """The memory with answers that could not be written down: they count all the same."""
    if not unkept:
        return known
    start = place.start(host)
    return transitions.proved(known, unkept, host.clock(), start.id, start.at)


def _find_out(
    now: _Decided,
    agreed: Plan,
    approve: Approve,
    answer: Callable[[Sequence[Action]], tuple[Outcome, ...]],
    anew: Callable[[], _Decided],
) -> tuple[_Decided, Plan, tuple[Outcome, ...]]:
    """Have the plan's questions answered: the last look, what is agreed to then, and the answers.

    What has to be known first is found out without a lock, and then everything is decided anew,
    until no question is new (some get no answer): nothing is decided while acting.
    """
    answers: tuple[Outcome, ...] = ()
    asked: set[tuple[ActionKind, str]] = set()
    while questions := _new_questions(agreed, asked):
        answers += answer(questions)
        asked.update((each.kind, each.subject) for each in questions)
        now = anew()
        agreed = approve(now.plan)
    return now, agreed.filtered(lambda each: each.kind not in QUESTIONS), answers


class _OnDisk:
    """Brings to the disk what a plan relies on, and remembers what the disk does not take."""

    def __init__(
        self, host: Host, policy: Policy, stop: Callable[[], bool], lock_seconds: float
    ) -> None:
        self._host, self._policy, self._stop = host, policy, stop
        self._lock_seconds = lock_seconds

    def bring(self, now: _Decided, agreed: Plan) -> durability.Settled:
        from watcher.act import durability

        behind = _claims_first(self._policy, now)
        return durability.settle(self._host, agreed, self._stop, behind=behind)

    def keep(self, now: _Decided, done: durability.Settled) -> bool:
        """Whether what the disk did not take is remembered, so that it can be planned anew."""
        from watcher.act import durability

        try:
            with (
                folders.opened_store(self._host.store) as store,
                locked(store, self._lock_seconds),
            ):
                journal = Journal(store, self._policy, self._host)
                journal.learn(journal.recall(), now.evidence, now.diagnosis())
                return durability.keep_refused(journal, self._host.clock(), done.refused)
        except OSError:
            return False


def _claims_first(policy: Policy, now: _Decided) -> bool:
    """Whether claims may come before their data: under a note, which names the machine's start."""
    return policy.sync_behind and bool(now.evidence.boot)


def _settle(
    now: _Decided,
    agreed: Plan,
    on_disk: _OnDisk,
    approve: Approve,
    anew: Callable[[], _Decided],
) -> tuple[_Decided, Plan, tuple[Outcome, ...]]:
    """Have what the plan relies on brought to the disk: the look, the plan, and what has failed.

    What the disk did not take counts as missing from then on, and everything is decided anew.
    """
    for _ in range(_MOST_TRIES):
        done = on_disk.bring(now, agreed)
        if not done.refused or not on_disk.keep(now, done):
            break
        now = anew()
        agreed = approve(now.plan).filtered(lambda each: each.kind not in QUESTIONS)
    return now, done.plan, done.outcomes


class _Acting(NamedTuple):
    """What is acted with."""

    host: Host
    policy: Policy
    store: int
    journal: Journal
    stop: Callable[[], bool]
    #: Somebody was asked, which may have taken long.
    asked: bool


def _act(
    acting: _Acting,
    now: _Decided,
    known: Memory,
    agreed: Plan,
    decide: Callable[[Memory], _Decided],
) -> tuple[tuple[Outcome, ...], tuple[Evidence, Diagnosis] | None]:
    """Do what was agreed to, look at what has come of it, and learn that; under the lock.

    Gives back the outcomes, and what was seen then; None where nobody waits for another look.
    """
    from watcher.act import apply, disk_reserve

    host, policy, store, journal, stop, asked = acting
    note = now.evidence.boot if _claims_first(policy, now) else ""
    foreseen = transitions.stage(known, agreed, host.clock(), note)
    mends = any(each.kind is ActionKind.WRITE_SIDECARS for each in agreed.actions)

    def planned() -> apply.Decided:
        made = decide(now.known)  # plans are compared that were made with the same memory
        return made.evidence, made.plan

    plans = apply.Plans(planned, (now.evidence, now.plan), 0.0 if asked else now.at)
    with _signals_wait(stop) as stopped:
        saved = journal.save(foreseen)
        if mends and not saved and not (disk_reserve.give(store) and journal.save(foreseen)):
            # Without a memory a repair could not be told from the server's own work.
            agreed = agreed.filtered(lambda each: each.kind is not ActionKind.WRITE_SIDECARS)
        outcomes = apply.apply(
            host,
            store,
            agreed,
            lambda within: look.observe(host, policy, now.known, within),
            plans,
            journal,
            journal.remember,
            stopped,
        )
        learnt = transitions.unstage(journal.recall(), known, agreed, outcomes)
        if stopped():
            # Another look at a large store takes time that nobody has; the next run makes it.
            journal.save(transitions.forget(learnt, outcomes))
            return outcomes, None
    try:
        after = decide(learnt)
    except EndedError:
        journal.save(transitions.forget(learnt, outcomes))
        return outcomes, None
    diagnosis = after.diagnosis()
    journal.learn(transitions.forget(learnt, outcomes), after.evidence, diagnosis)
    return outcomes, (after.evidence, diagnosis)


@contextlib.contextmanager
def _signals_wait(stop: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Have ctrl-C and SIGTERM end the block between two acts, and take effect then.

    A handler of somebody else's stays, and so does a second ctrl-C. Only the main thread may.
    """
    came: list[int] = []
    usual: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    ours = threading.current_thread() is threading.main_thread()
    waiting = [each for each in usual if ours and signal.getsignal(each) is usual[each]]

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, usual[signal.Signals(number)])

    for each in waiting:
        signal.signal(each, note)
    try:
        yield lambda: bool(came) or stop()
    finally:
        for each in waiting:
            signal.signal(each, usual[each])
    if came:
        signal.raise_signal(came[0])


def _new_questions(agreed: Plan, asked: Set[tuple[ActionKind, str]]) -> list[Action]:
    questions = (action for action in agreed.actions if action.kind in QUESTIONS)
    return [each for each in questions if (each.kind, each.subject) not in asked]


def _recover(host: Host, policy: Policy, lock_seconds: float) -> tuple[Event, ...]:
    """Finish or undo what a kill has left, before anything is planned."""
    from watcher.act import transaction

    try:
        with folders.opened_store(host.store) as store:
            if not transaction.unfinished(host, store):
                return ()
            with locked(store, lock_seconds):
                journal = Journal(store, policy, host)
                # What is stuck is told by the second try, under the lock that acts.
                _recover_under_lock(host, policy, store, journal, tell_stuck=False)
                return journal.events
    except OSError:
        return ()  # the look that follows says what is wrong with the folder


def _recover_under_lock(
    host: Host, policy: Policy, store: int, journal: Journal, *, tell_stuck: bool = True
) -> tuple[str, ...]:
    """The same where the lock is held: whatever is unfinished now, nobody is at work on any more.

    Gives back what could not be finished: then nothing else may be changed.
    """
    from watcher.act import transaction

    if not transaction.unfinished(host, store):
        return ()
    seen = look.observe(host, policy, journal.recall(), frozenset())
    why = safety.store_forbids(seen)
    if why is not None:
        return (f"what a kill has left waits: {why[1]}",)
    done, stuck = transaction.recover(host, store, journal.recall())
    for each in done:
        journal(Event(host.clock(), "recovered", each))
    for each in stuck if tell_stuck else ():
        journal(Event(host.clock(), "error", each))
    return stuck


def remembered(host: Host, past: Memory | None = None) -> Memory:
    """What is remembered on the disk, or, where there is nothing, by who has called."""
    try:
        with folders.opened_store(host.store) as store:
            found = memory.load(store)
    except OSError:
        return past or Memory()  # observe says what is wrong with the folder
    return _or_told(found, past)


def _or_told(found: Memory, past: Memory | None) -> Memory:
    return past if past is not None and found == Memory() else found


def _powerless(host: Host, now: _Decided, agreed: Plan, error: OSError, first_look: bool) -> Report:
    """The report where our own folder can't be written: told, but not done, nor written down."""
    where = names.printable(os.path.join(host.store, memory.FOLDER))
    if isinstance(error, state_folder.ForeignError):
        raise state_folder.refusal(host.store, error) from None
    warning = f"{where} can't be written: {error.strerror}"
    if any(action.kind is not ActionKind.REFRESH for action in agreed.actions):
        if command := state_folder.cure(host.store):
            raise NoPermissionError(f"{warning}; nothing was done", "give it back:", command)
        raise advice.cant_write(f"{warning}; nothing was done", error, host.store) from None
    if state_folder.cure(host.store):
        warning += "; audit reports the command that helps"
    diagnosis = now.diagnosis()
    known, happened = transitions.learn(
        now.known, now.evidence, diagnosis, {}, first_look=first_look
    )
    for event in happened:
        host.tell(event)
    return Report(
        now.evidence, diagnosis, now.plan, events=happened, warnings=(warning,), memory=known
    )

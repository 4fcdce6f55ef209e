"""The middle of the program: observe, decide, approve, act, learn."""

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any, NamedTuple

from watcher import model
from watcher.act import second_names
from watcher.act.journal import Journal, hold_reserve, locked, release_reserve
from watcher.config import Settings
from watcher.decide import diagnose, events, modes, plan, safety, transitions
from watcher.errors import EndedError, LockedError, NoPermissionError, WatchError
from watcher.model import ALL, ActionKind, Approve, Evidence, Mode, Outcome, Plan, Rules, Scope
from watcher.observe import evidence, place
from watcher.observe.host import Host
from watcher.observe.intents import WRITING
from watcher.ollama import names
from watcher.state import folders, memory, state_folder, sums, transfers
from watcher.state.event_log import Event, EventType
from watcher.state.memory import Memory, Touched
from watcher.system import advice, stopping

_LATE_SECONDS = 0.5  #: when older, the store is scanned again before learning
_FRESH_SECONDS = 5.0  #: so long a plan counts for further batches, each under its own guard
_MOST_TRIES = 5  #: how often a plan is made anew because the disk did not take what it relies on
#: Changes only what is known.
QUESTIONS = frozenset({ActionKind.HASH, ActionKind.ASK_REGISTRY, ActionKind.PROVE})


class Report(NamedTuple):
    """One run: what was seen, diagnosed, planned and done, and what is remembered after it.

    `stuck`: what a kill has left could not be finished, so nothing was done.
    """

    evidence: Evidence
    diagnosis: model.Diagnosis
    plan: Plan
    outcomes: tuple[Outcome, ...] = ()
    events: tuple[Event, ...] = ()
    warnings: tuple[str, ...] = ()
    stuck: bool = False
    memory: Memory | None = None


class Look(NamedTuple):
    """One look, and the plan that follows from it and from what was known."""

    evidence: Evidence
    diagnosed: tuple[model.Diagnosed, ...]
    plan: Plan
    known: Memory
    at: float  #: when, on the monotonic clock; 0.0 where the look is a later one than the plan
    rules: Rules

    def diagnosis(self) -> model.Diagnosis:
        """The findings and the forecast: made where somebody reads them."""
        return diagnose.diagnosis(self.diagnosed, self.evidence, self.rules)


def approve_all(planned: Plan) -> Plan:
    """Approve everything: a service, and ``--yes``."""
    return planned


def approve_none(planned: Plan) -> Plan:
    """Approve nothing: ``--dry-run``."""
    return planned._replace(actions=())


class Reconciler:
    """One store, inspected and brought in order, as often as you like."""

    def __init__(self, host: Host, settings: Settings) -> None:
        self.host, self.settings = host, settings
        self._unsaved: Memory | None = None  #: what was learned, where the store can't be written
        #: Of files whose times were set without the lock, what the memory does not have yet.
        self._touched: Mapping[str, Touched] = {}

    def inspect(self, mode: Mode = modes.INSPECT, scope: Scope = ALL) -> Report:
        """Scan the store and decide; nothing is written, hashed or asked. Raises as `observe`."""
        look = _Looks(self.host, Rules(self.settings, mode), scope).first(self._unsaved)
        return Report(look.evidence, look.diagnosis(), look.plan)

    def reconcile(self, mode: Mode, scope: Scope = ALL, approve: Approve = approve_all) -> Report:
        """Look, decide, do what `approve` leaves of the plan, and remember what was learned.

        ctrl-C, SIGTERM and SIGHUP wait for the act under way, where nothing else waits for them.
        Raises LockedError where another process acts for longer than `mode.lock_seconds`,
        NoPermissionError where this user can't do what was approved, RefusedError where our folder
        is another user's, and what `evidence.observe` raises.
        """
        self._remember_times(mode)
        run = _Run(self.host, Rules(self.settings, mode), scope, approve, self._unsaved)
        report = run.report()
        self._unsaved = report.memory if report.warnings else None
        return report

    def keep_fresh(self, mode: Mode) -> None:
        """Set the times of what is needed, and nothing else. Raises LockedError, and OSError."""
        from watcher.act import apply

        look = _Looks(self.host, Rules(self.settings, mode), ALL).first(None)
        refreshes = [each for each in look.plan.actions if each.kind is ActionKind.REFRESH]
        if not refreshes:
            return
        try:
            with _journal(self.host, self.settings, mode.lock_seconds) as journal:
                apply.refresh_all(self.host, refreshes, journal)
        except LockedError:
            # The other process may act for long. Without the lock the own times can't be
            # remembered before, but times that are too fresh cost less than a download that is
            # gone. The next run remembers them.
            self._touched = apply.set_times_now(self.host, refreshes, look.known)

    def _remember_times(self, mode: Mode) -> None:
        """Remember the own times of files whose times were set without the lock. LockedError."""
        if not self._touched:
            return
        with (
            contextlib.suppress(OSError),  # the run that follows reports it
            _journal(self.host, self.settings, mode.lock_seconds) as journal,
        ):
            journal.remember(self._touched)
        self._touched = {}


class _Looks:
    """Scans of one store, each with the plan that follows from it."""

    def __init__(self, host: Host, rules: Rules, scope: Scope) -> None:
        self._host, self._rules, self._scope = host, rules, scope
        self._known = Memory()
        self.last: Look | None = None  #: what a plan for the next batch may still rest on

    def first(self, unsaved: Memory | None) -> Look:
        return self.look(remembered(self._host, unsaved))

    def look(self, known: Memory) -> Look:
        """Scan and plan. Raises EndedError where nobody waits for it any more."""
        host, rules = self._host, self._rules
        seen = evidence.observe(host, rules, known, self._scope.digests)
        host.go_on()
        diagnosed = diagnose.diagnose(seen, rules)
        host.go_on()
        made = plan.make(diagnosed, seen, rules)
        host.go_on()
        self._known = known
        return Look(seen, diagnosed, made, known, time.monotonic(), rules)

    def fresh(self, *, anew: bool) -> tuple[Evidence, Plan]:
        """A plan as the store is now; with the same memory, so that two plans can be compared."""
        if anew or self.last is None or time.monotonic() > self.last.at + _FRESH_SECONDS:
            self.last = None  # two looks at a large store need not be kept at once
            self.last = self.look(self._known)
        return self.last.evidence, self.last.plan

    def glance(self, digests: frozenset[str] | None) -> Evidence:
        """Only scan: the downloads of some digests, or, for None, the whole store."""
        return evidence.observe(self._host, self._rules, self._known, digests)


class _Run:
    """One run of `Reconciler.reconcile`. What acts is loaded only where something is to be done."""

    def __init__(
        self, host: Host, rules: Rules, scope: Scope, approve: Approve, unsaved: Memory | None
    ) -> None:
        self._host, self._rules, self._scope = host, rules, scope
        self._approve = approve
        self._past = unsaved
        self._looks = _Looks(host, rules, scope)
        #: Everything that hashing and asking has found out, and what of it could not be saved.
        self._answers: tuple[Outcome, ...] = ()
        self._unkept: list[Outcome] = []

    def report(self) -> Report:
        host, mode = self._host, self._rules.mode
        state_folder.check(host.store)
        recovered = self._recover()
        now = self._looks.first(self._past)
        agreed = self._approve(now.plan)
        try:
            now, agreed = self._find_out(now, agreed)
            now, agreed, undone = self._settle(now, agreed)
            agreed, unfetched = self._fetched(now.evidence, agreed)
            undone += unfetched
        except EndedError:
            # What was hashed is logged before the end: no other run does.
            failed = contextlib.suppress(OSError, WatchError)
            with failed, self._journal(stopping.GRACE_SECONDS) as journal:
                journal.log_hashed(self._answers)
            raise
        looked_at = host.clock()
        with contextlib.ExitStack() as opened:
            try:
                journal = opened.enter_context(self._journal(mode.lock_seconds))
            except OSError as error:
                return self._powerless(now, agreed, error)._replace(outcomes=self._answers + undone)
            except LockedError as error:
                if agreed.actions or not (mode.verify and self._answers):
                    raise
                # Nobody hashes a store twice because of what another process is doing.
                warning = f"the results of hashing can't be remembered: {error.message}"
                return self._unwritten(now, warning)._replace(outcomes=self._answers + undone)
            hold_reserve(journal.store)
            stuck = self._finish_leftovers(journal)
            known = self._with_answers(_or_unsaved(journal.recall(), self._past))
            late = journal.events or host.clock() - looked_at > _LATE_SECONDS
            journal.log_hashed(self._answers)
            if late or known != now.known:
                # Somebody else has learned or acted meanwhile: what was seen is an old story.
                now = self._looks.look(known)._replace(plan=now.plan, at=0.0)
            journal(*(events.ended(each, host.clock()) for each in undone))
            seen, diagnosis = now.evidence, now.diagnosis()
            occasion = transitions.Occasion(mode.announce, self._scope.closed)
            known = journal.learn(known, seen, diagnosis, occasion)
            if (mode.clean or mode.patient) and not stuck:
                known = second_names.let_go(journal, known, seen, clean=mode.clean)
            outcomes: tuple[Outcome, ...] = ()
            if agreed.actions and not stuck:
                outcomes, after = self._act(now, known, agreed, journal)
                seen, diagnosis = after or (seen, diagnosis)
            known = journal.recall()
            if mode.clean and not stuck:
                certain = seen.now if seen.clock is None else seen.clock.at_most
                transfers.tidy(journal.store, certain - model.HOUR)
                sums.tidy(journal.store)
        outcomes = self._answers + undone + outcomes
        happened, warnings = recovered + journal.events, stuck + journal.warnings
        return Report(seen, diagnosis, now.plan, outcomes, happened, warnings, bool(stuck), known)

    def _journal(self, seconds: float) -> contextlib.AbstractContextManager[Journal]:
        return _journal(self._host, self._rules.settings, seconds)

    def _find_out(self, now: Look, agreed: Plan) -> tuple[Look, Plan]:
        """Answer the plan's questions until none is new: the last scan, and what is approved."""
        asked: set[tuple[ActionKind, str]] = set()
        while True:
            new = [each for each in agreed.actions if (each.kind, each.subject) not in asked]
            questions = [each for each in new if not _is_act(each)]
            if not questions:
                return now, agreed.filtered(_is_act)
            from watcher.act import answering

            answers, is_kept = answering.answer(self._host, self._rules, questions)
            self._unkept.extend(() if is_kept else answers)
            self._answers += answers
            asked.update((each.kind, each.subject) for each in questions)
            now = self._anew()
            agreed = self._approve(now.plan)

    def _anew(self) -> Look:
        return self._looks.look(self._with_answers(remembered(self._host, self._past)))

    def _with_answers(self, known: Memory) -> Memory:
        """The memory with answers that could not be written down: they count all the same."""
        if not self._unkept:
            return known
        host = self._host
        boot, at = place.boot(host), place.started_at(host)
        return transitions.proved(known, self._unkept, host.clock(), boot, at)

    def _settle(self, now: Look, agreed: Plan) -> tuple[Look, Plan, tuple[Outcome, ...]]:
        """Bring to the disk what the plan relies on; what it refuses is remembered as missing."""
        from watcher.act import durability

        for _ in range(_MOST_TRIES):
            claims_first = self._claims_first(now)
            ready, undone, refused = durability.settle(self._host, agreed, behind=claims_first)
            kept = False
            if refused:
                seconds = self._rules.mode.lock_seconds
                with contextlib.suppress(OSError), self._journal(seconds) as journal:
                    journal.learn(journal.recall(), now.evidence, now.diagnosis())
                    kept = durability.keep_refused(journal, self._host.clock(), refused)
            if not kept:
                break
            now = self._anew()
            agreed = self._approve(now.plan).filtered(_is_act)
        return now, ready, undone

    def _fetched(self, seen: Evidence, agreed: Plan) -> tuple[Plan, tuple[Outcome, ...]]:
        """Fetch what takes the place of damaged blobs; what failed is no longer in the plan."""
        ready: list[model.Action] = []
        failed: list[Outcome] = []
        for action in agreed.actions:
            if action.kind is ActionKind.FETCH_CHUNKS:
                assert self._host.fetch is not None
                try:
                    found, came = self._host.fetch(action)
                    action = action._replace(relies_on=found, fetches=came)
                except (WatchError, OSError) as error:
                    again = advice.watch(seen, "repair", "--fetch", names.short(action.subject))
                    outcome = Outcome(action, model.Result.FAILED, str(error), command=again)
                    failed.append(outcome)
                    continue
                except EndedError:
                    continue  # what has arrived is kept
            ready.append(action)
        return agreed._replace(actions=tuple(ready)), tuple(failed)

    def _claims_first(self, now: Look) -> bool:
        """Whether claims may come before their data: the note names the machine's start."""
        return self._rules.mode.sync_behind and bool(now.evidence.boot)

    def _act(
        self, now: Look, known: Memory, agreed: Plan, journal: Journal
    ) -> tuple[tuple[Outcome, ...], tuple[Evidence, model.Diagnosis] | None]:
        """Do what was approved, under the lock: what came of it, and what was seen then."""
        from watcher.act import apply

        host, store = self._host, journal.store
        note = now.evidence.boot if self._claims_first(now) else ""
        staged = transitions.stage(known, agreed, host.clock(), note)
        repairs = any(each.kind in WRITING for each in agreed.actions)
        # Somebody who was asked may have taken long.
        self._looks.last = now if self._approve is approve_all else None
        with _signals_wait(host) as stoppable:
            saved = journal.save(staged)
            if repairs and not saved and not (release_reserve(store) and journal.save(staged)):
                # Without a memory a repair could not be distinguished from the server's own work.
                agreed = agreed.filtered(lambda each: each.kind not in WRITING)
            outcomes = apply.apply(stoppable, agreed, self._looks, journal)
            learned = transitions.unstage(journal.recall(), known, agreed, outcomes)
            left = transitions.drop(learned, outcomes)
            if stoppable.stops():
                # Another look at a large store takes time that nobody has; the next run makes it.
                journal.save(left)
                return outcomes, None
        try:
            after = self._looks.look(learned)
        except EndedError:
            journal.save(left)
            return outcomes, None
        diagnosis = after.diagnosis()
        journal.learn(left, after.evidence, diagnosis)
        return outcomes, (after.evidence, diagnosis)

    def _recover(self) -> tuple[Event, ...]:
        """Finish or undo what a kill has left, before anything is planned."""
        from watcher.act import transaction

        try:
            with folders.opened_store(self._host.store) as store:
                if not transaction.unfinished(self._host, store):
                    return ()
            with self._journal(self._rules.mode.lock_seconds) as journal:
                # What is stuck is reported by the second try, under the lock that acts.
                self._finish_leftovers(journal, report_stuck=False)
                return journal.events
        except OSError:
            return ()  # the scan that follows reports what is wrong with the folder

    def _finish_leftovers(self, journal: Journal, *, report_stuck: bool = True) -> tuple[str, ...]:
        """The same under the lock; what could not be finished, so that nothing else may change."""
        from watcher.act import transaction

        host, store = self._host, journal.store
        if not transaction.unfinished(host, store):
            return ()
        seen = evidence.observe(host, self._rules, journal.recall(), frozenset())
        why = safety.store_forbids(seen)
        if why is not None:
            return (f"what a kill has left waits: {why[1]}",)
        done, stuck = transaction.recover(host, store, journal.recall())
        for each in done:
            journal(Event(host.clock(), EventType.RECOVERED, each))
        for each in stuck if report_stuck else ():
            journal(Event(host.clock(), EventType.ERROR, each))
        return stuck

    def _powerless(self, now: Look, agreed: Plan, error: OSError) -> Report:
        """The report where our own folder can't be written: nothing is done, nor written down."""
        host = self._host
        if isinstance(error, state_folder.ForeignError):
            raise state_folder.refusal(host.store, error) from None
        where = names.printable(os.path.join(host.store, memory.FOLDER))
        warning = f"{where} can't be written: {error.strerror}"
        command = state_folder.cure(host.store)
        if any(action.kind is not ActionKind.REFRESH for action in agreed.actions):
            message = f"{warning}; nothing was done"
            if command:
                raise NoPermissionError(message, "give it back:", command)
            from watcher.act import apply

            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            if full and (helps := apply.by_hand(agreed.actions, host.store)):
                step = advice.cant_write(message, error, host.store).next_step
                raise WatchError(message, f"{step}, {apply.ROOM_BY_HAND}", helps)
            raise advice.cant_write(message, error, host.store) from None
        if command:
            warning += "; audit reports the command that helps"
        return self._unwritten(now, warning)

    def _unwritten(self, now: Look, warning: str) -> Report:
        """The report where nothing was done, and what was learned can't be written down."""
        host, diagnosis = self._host, now.diagnosis()
        occasion = transitions.Occasion(self._rules.mode.announce)
        known, happened = transitions.learn(now.known, now.evidence, diagnosis, {}, occasion)
        hashed = (events.hashed(each, host.clock()) for each in self._answers)
        for event in (*happened, *filter(None, hashed)):
            host.report(event)
        return Report(now.evidence, diagnosis, now.plan, (), happened, (warning,), memory=known)


def _is_act(action: model.Action) -> bool:
    return action.kind not in QUESTIONS


@contextlib.contextmanager
def _signals_wait(host: Host) -> Iterator[Host]:
    """Have ctrl-C, SIGTERM and SIGHUP, if nobody handles them, end the block between two acts."""
    came: list[int] = []
    ends = (signal.SIGTERM, signal.SIGHUP)
    usual: dict[signal.Signals, Any] = dict.fromkeys(ends, signal.SIG_DFL)
    usual[signal.SIGINT] = signal.default_int_handler
    ours = threading.current_thread() is threading.main_thread()
    waiting = [each for each in usual if ours and signal.getsignal(each) is usual[each]]

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, usual[signal.Signals(number)])

    with stopping.handling(dict.fromkeys(waiting, note)):
        yield replace(host, stops=lambda: bool(came) or host.stops())
    if came:
        signal.raise_signal(came[0])


@contextlib.contextmanager
def _journal(host: Host, settings: Settings, seconds: float) -> Iterator[Journal]:
    """What is written down while the lock for acting is held. Raises OSError, LockedError."""
    with folders.opened_store(host.store) as store, locked(store, seconds):
        yield Journal(store, settings, host)


def remembered(host: Host, unsaved: Memory | None = None) -> Memory:
    """What is remembered on the disk; where there is nothing, what could not be saved there."""
    try:
        with folders.opened_store(host.store) as store:
            found = memory.load(store)
    except OSError:
        return unsaved or Memory()  # observe reports what is wrong with the folder
    return _or_unsaved(found, unsaved)


def _or_unsaved(found: Memory, unsaved: Memory | None) -> Memory:
    return unsaved if unsaved is not None and found == Memory() else found

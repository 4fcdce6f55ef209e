"""The one function in the middle: observe, decide, act, learn, show what came of it."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from watcher import events, files, memory, names
from watcher.act import apply, asking, hashing, moves
from watcher.decide import judge, learn, plan
from watcher.errors import LockedError, NoPermissionError
from watcher.events import Event
from watcher.memory import Memory
from watcher.model import Action, Consent, Evidence, Outcome, Plan, Policy, Verb, Verdict
from watcher.observe import evidence as look
from watcher.observe import place, scan
from watcher.world import World

LOCK = "lock"
#: How often a lock that somebody holds is tried again.
_LOCK_PAUSE = 0.05
#: What was hashed is written down this often.
_KEEP_SECONDS = 30.0
#: Actions that change nothing but what is known.
_QUESTIONS = frozenset({Verb.HASH, Verb.ASK_REGISTRY})


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
    found_out: tuple[Outcome, ...] = ()
    while True:
        seen, verdict, planned = decide(_recall(world))
        agreed = consent(planned)
        if not world.keeps:
            return Report(seen, verdict, planned)
        questions = [action for action in agreed.actions if action.verb in _QUESTIONS]
        if not questions or found_out:
            break
        # Nothing is decided while acting: what has to be known first is found out, and then
        # everything is decided anew.
        found_out = _find_out(world, questions, until, lock_seconds)
        if not found_out:
            break
    agreed = replace(agreed, actions=tuple(a for a in agreed.actions if a.verb not in _QUESTIONS))
    with contextlib.ExitStack() as opened:
        try:
            store = opened.enter_context(files.opened_folder(world.store))
            opened.enter_context(locked(store, lock_seconds))
        except OSError as error:
            return _powerless(world, Report(seen, verdict, planned), agreed, error)
        told = _Telling(store, policy, world)
        for event in (learn.corrupt(outcome, world.clock()) for outcome in found_out):
            if event is not None:
                told(event)
        past = told.learn(memory.load(store), seen, verdict, first_look=first_look)
        outcomes: tuple[Outcome, ...] = ()
        if agreed.actions:
            past = learn.foresee(past, agreed)
            told.save(past)
            outcomes = apply.apply(world, store, agreed, lambda: decide(past)[2], told)
            seen, verdict, _ = decide(past)
            told.learn(learn.forget(past, outcomes), seen, verdict, first_look=False)
    return Report(
        seen, verdict, planned, found_out + outcomes, recovered + told.events, told.troubles
    )


def _find_out(
    world: World, questions: list[Action], until: float | None, lock_seconds: float
) -> tuple[Outcome, ...]:
    """Ask and hash what has to be known, and remember it now and then for the case of a kill."""
    answered: list[Outcome] = []
    kept = 0
    with files.opened_folder(world.store) as store:
        keep_at = time.monotonic() + _KEEP_SECONDS
        for outcome in itertools.chain(
            asking.ask([each for each in questions if each.verb is Verb.ASK_REGISTRY], world),
            hashing.find_out(
                world,
                store,
                [each for each in questions if each.verb is Verb.HASH],
                until,
                world.watch,
            ),
        ):
            answered.append(outcome)
            if time.monotonic() >= keep_at:
                _keep(world, store, answered[kept:], lock_seconds)
                kept, keep_at = len(answered), time.monotonic() + _KEEP_SECONDS
        _keep(world, store, answered[kept:], lock_seconds)
    return tuple(answered)


def _keep(world: World, store: int, answered: list[Outcome], lock_seconds: float) -> None:
    with locked(store, lock_seconds):
        memory.save(store, learn.proved(memory.load(store), answered, world.clock()))


def _recover(world: World, policy: Policy, lock_seconds: float) -> tuple[Event, ...]:
    """Finish or undo what a kill has left, before anything is planned."""
    try:
        with files.opened_folder(world.store) as store:
            if not moves.unfinished(store):
                return ()
            with locked(store, lock_seconds):
                told = _Telling(store, policy, world)
                for done in moves.recover(store):
                    told(Event(world.clock(), "recovered", done))
                return told.events
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


class _Telling:
    """Writes events and the memory; what can't be written is kept as a trouble, not raised."""

    def __init__(self, store: int, policy: Policy, world: World) -> None:
        self._store, self._policy, self._world = store, policy, world
        self.events: tuple[Event, ...] = ()
        self.troubles: tuple[str, ...] = ()

    def __call__(self, event: Event) -> None:
        self.events += (event,)
        self._world.tell(event)
        self._try("the event log", lambda: events.write(self._store, [event], self._policy))

    def learn(self, past: Memory, seen: Evidence, verdict: Verdict, *, first_look: bool) -> Memory:
        """Tell what has happened since `past`, and remember it; the memory as it is now."""
        if past.lost:
            self(Event(self._world.clock(), "error", f"{past.lost}; it is set aside"))
        finished = _finished(self._store, past, seen)
        now, happened = learn.learn(past, seen, verdict, finished, first_look=first_look)
        for event in happened:
            self(event)
        if now != memory.load(self._store) or past.lost:
            self.save(now)
        return replace(now, lost="")

    def save(self, now: Memory) -> None:
        """Keep the memory on the disk."""
        self._try(memory.NAME, lambda: memory.save(self._store, now))

    def _try(self, what: str, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            trouble = f"{what} can't be written: {error.strerror}"
            if trouble not in self.troubles:
                self.troubles += (trouble,)


def announce(world: World, policy: Policy, event: Event) -> None:
    """Tell an event of the service itself, and write it down where that can be done."""
    world.tell(event)
    with contextlib.suppress(OSError), files.opened_folder(world.store) as store:
        events.write(store, [event], policy)


def _finished(store: int, past: Memory, seen: Evidence) -> dict[str, int]:
    """Of remembered downloads that are not there any more: those that have become a blob."""
    gone = set(past.downloads) - {download.key for download in seen.downloads}
    found: dict[str, int] = {}
    with (
        contextlib.suppress(FileNotFoundError),
        files.opened_folder("blobs", store, follow=True) as blobs,
    ):
        for digest in {key.removesuffix(".tmp") for key in gone}:
            blob = scan.look(names.blob(digest), blobs)
            if blob is not None:
                found[digest] = blob.size
    return found


@contextlib.contextmanager
def locked(store: int, seconds: float) -> Iterator[None]:
    """Hold the store's lock for acting; wait so long for who has it. Raises LockedError."""
    files.ensure_folder(memory.FOLDER, store)
    until = time.monotonic() + seconds
    with files.opened_folder(memory.FOLDER, store) as ours, contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(files.locked(LOCK, ours, owner()))
                break
            except files.BusyError as busy:
                if time.monotonic() >= until:
                    raise LockedError(
                        f"another ollama-watch acts on this store: {busy.owner}",
                        "try again when it has ended",
                    ) from None
            time.sleep(_LOCK_PAUSE)
        yield


def owner() -> str:
    """What we write into a lock: who holds it, and since when."""
    return f"pid {os.getpid()} since {events.rfc3339(time.time())}"

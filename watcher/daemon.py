"""The service over one store: for each scope that the wakes name, one cycle."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType

from watcher import __version__, cycle, files, journal, memory
from watcher.errors import LockedError, NoStoreError
from watcher.events import Event
from watcher.memory import Memory
from watcher.model import Plan, Policy, Refusal
from watcher.wakes import Scope, Wakes
from watcher.world import World

DAEMON_LOCK = "daemon.lock"


def run(world: World, policy: Policy) -> None:
    """Watch until SIGTERM or SIGINT. Raises LockedError where another daemon has this store."""
    service = _Service(world, policy)
    with Wakes(world.store) as wakes, _stopped_by_signals(wakes) as signals, service:
        for scope in wakes:
            service.look(scope, wakes)
        service.stop(signals)


class _Service:
    """What a daemon knows between two looks."""

    def __init__(self, world: World, policy: Policy) -> None:
        self._world, self._policy = world, replace(policy, patient=True, refresh=policy.repair)
        self._held = contextlib.ExitStack()
        self._begun = False
        #: Device and inode of the store that is ours; the memory where it can't be written down.
        self._store: tuple[int, int] | None = None
        self._memory: Memory | None = None
        #: What was told already and still holds: told once, not at each look.
        self._refused: set[tuple[str, str]] = set()
        self._troubles: set[str] = set()

    def __enter__(self) -> _Service:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def look(self, scope: Scope, wakes: Wakes) -> None:
        """One cycle. What goes wrong is told, and the service goes on."""
        try:
            first = self._take_store(wakes)
            report = cycle.cycle(
                self._world,
                self._policy,
                scope,
                first_look=first,
                past=self._memory,
                ended=wakes.ended(),
            )
        except LockedError:
            if not self._begun:
                raise
            self._trouble("another ollama-watch has held the lock for long; looked at later")
            wakes.again(scope)
            return
        except (FileNotFoundError, NoStoreError):
            self._trouble(f"there is no store at {self._world.store} yet; waiting for it")
            return
        except Exception as error:
            # The service outlives whatever one look at a strange machine brings up.
            self._trouble(f"{type(error).__name__}: {error}")
            wakes.again(scope)
            return
        self._memory = report.memory
        wakes.deadlines(scope, report.plan.due)
        self._tell_refusals(report.plan, scope)
        if report.troubles:
            for trouble in report.troubles:
                self._trouble(trouble)
        else:
            self._troubles.clear()

    def stop(self, signals: list[int]) -> None:
        """Tell that the service ends."""
        if self._begun:
            name = signal.Signals(signals[0]).name if signals else "its end"
            self._tell("service_stopped", f"ollama-watch stops: {name}")

    def _take_store(self, wakes: Wakes) -> bool:
        """Take the store for this daemon's life; one made anew in its place is another store.

        True where it was not ours yet. Raises FileNotFoundError, LockedError.
        """
        with files.opened_folder(self._world.store) as store:
            status = os.fstat(store)
            if self._store == (status.st_dev, status.st_ino):
                return False
            self._held.close()
            try:
                files.ensure_folder(memory.FOLDER, store)
                ours = self._held.enter_context(files.opened_folder(memory.FOLDER, store))
                self._held.enter_context(files.locked(DAEMON_LOCK, ours, journal.owner()))
            except files.BusyError as busy:
                raise LockedError(
                    f"a daemon watches this store already: {busy.owner}", "one is enough"
                ) from None
            except OSError as error:
                # A store that can't be written can still be watched; the events go to stderr.
                self._trouble(f"{memory.FOLDER} can't be written: {error.strerror}")
            self._store = status.st_dev, status.st_ino
        if not self._begun:
            self._tell_start(wakes)
        self._begun = True
        self._tell("check_started", "Checking for partial model downloads...")
        return True

    def _tell_start(self, wakes: Wakes) -> None:
        repairs = "repairs what broke" if self._policy.repair else "tells what broke"
        cleans = "cleans what is stale" if self._policy.clean else "flags what is stale"
        self._tell(
            "service_started",
            f"ollama-watch {__version__} watches {self._world.store}, {repairs}, {cleans}",
            pid=os.getpid(),
            version=__version__,
            repair=self._policy.repair,
            clean=self._policy.clean,
            stale_after_seconds=self._policy.stale_after,
        )
        if wakes.blind:
            self._trouble(f"{wakes.blind}; looking at intervals instead")

    def _tell_refusals(self, planned: Plan, scope: Scope) -> None:
        # What only has to wait is looked at again when its time has come.
        now = {
            (refusal.subject, refusal.kind.value): refusal
            for refusal in planned.refusals
            if refusal.seconds_left is None
        }
        for key in now.keys() - self._refused:
            self._tell_refusal(now[key])
        kept = {key for key in self._refused if scope is not None and key[0] not in scope}
        self._refused = kept | now.keys()

    def _tell_refusal(self, refusal: Refusal) -> None:
        self._tell(
            "refused",
            f"{refusal.verb.value.replace('_', ' ')}: {refusal.why}",
            kind=refusal.kind.value,
            subject=refusal.subject,
            remedy=refusal.remedy,
            models=list(refusal.models),
        )

    def _trouble(self, text: str) -> None:
        """Tell an error once, until a look has gone well again."""
        if text not in self._troubles:
            self._troubles.add(text)
            self._tell("error", text)

    def _tell(self, event_type: str, message: str, **details: object) -> None:
        journal.announce(
            self._world,
            self._policy,
            Event(self._world.clock(), event_type, message, details=details),
        )


@contextlib.contextmanager
def _stopped_by_signals(wakes: Wakes) -> Iterator[list[int]]:
    """SIGTERM and SIGINT end the wakes; the look under way comes to its end first."""
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        wakes.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The service over one store: for each scope that the wakes name, one cycle."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

from watcher import __version__, reconcile
from watcher.act import journal
from watcher.config import Settings
from watcher.decide import events, modes, questions
from watcher.errors import (
    EndedError,
    LockedError,
    NoStoreError,
    RefusedError,
    SettingsError,
    WatchError,
    named,
)
from watcher.model import Plan, Scope
from watcher.observe.host import Host
from watcher.observe.serving import DAEMON_LOCK
from watcher.reconcile import Reconciler
from watcher.service import notify
from watcher.service.metrics import Metrics
from watcher.service.scrub import Scrub
from watcher.service.triggers import BLIND_SECONDS, Digests, Triggers
from watcher.state import folders, fs, history, memory, registry_cache, state_folder
from watcher.state.event_log import Event, EventType
from watcher.system import stopping

if TYPE_CHECKING:
    from watcher.act.durability import Behind
    from watcher.pull.queue_process import QueueProcess
    from watcher.pull.starter import Starter


def run(
    host: Host, read_settings: Callable[[], Settings], queue_run: Sequence[str] | Starter
) -> None:
    """Watch until SIGTERM or SIGINT; SIGHUP has the settings read again.

    `queue_run`: the command line of who runs the queue, where the settings say so, or what starts
    that process.
    Raises LockedError where another daemon has this store, RefusedError where our folder in it is
    somebody else's, ListenError where its metrics can't be
    served, and what `read_settings` raises at first.
    """
    settings = read_settings()
    metrics = Metrics(host.store, settings)
    service = _Service(
        replace(host, tell=metrics.hearing(host.tell), ends=stopping.asked),
        settings,
        metrics,
        queue_run,
    )
    triggers = Triggers(host.store, host.proc)
    with metrics, triggers, _signals(triggers, service.end) as signals, service:
        for scope in triggers:
            if signals.take_reload():
                service.reload(read_settings)
                scope = None
            service.look(scope, triggers)
            if scope is None:
                _give_back()
            service.ready()
        service.stop(signals.ended_by)


def _give_back() -> None:
    """Give back the memory that a look at the whole store has taken and nobody needs at rest."""
    memory.let_go()
    registry_cache.let_go()
    gc.collect()
    # glibc keeps what was freed below anything that is still in use.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _is_missing(error: Exception, store: str) -> bool:
    """Whether it is the store that is not there, and nothing else."""
    gone = isinstance(error, FileNotFoundError) and not os.path.isdir(store)
    return gone or isinstance(error, NoStoreError)


class _Service:
    """What a daemon knows between two looks."""

    def __init__(
        self, host: Host, settings: Settings, metrics: Metrics, queue_run: Sequence[str] | Starter
    ) -> None:
        self._host, self._metrics = host, metrics
        self._queue_run = queue_run
        self._queue: QueueProcess | None = None
        self._reconciler = Reconciler(host, settings)
        self._proofs = Scrub(host, self._trouble)
        self._behind: Behind | None = None
        self._lock = state_folder.LongLock(DAEMON_LOCK)
        self._begun = self._ready = False
        #: Device and inode of the store that is ours.
        self._store: tuple[int, int] | None = None
        #: What was told already and still holds: told once, not at each look.
        self._refused: set[tuple[str, str]] = set()
        self._troubles: set[str] = set()
        self._blind = ""

    def __enter__(self) -> _Service:
        return self

    def __exit__(self, *_: object) -> None:
        if self._queue is not None:
            self._queue.stop()
        self._proofs.stop()
        if self._behind is not None:
            self._behind.stop()
        self._lock.release()

    @property
    def _settings(self) -> Settings:
        return self._reconciler.settings

    def reload(self, read_settings: Callable[[], Settings]) -> None:
        """Take the settings as they are now; where they are no good, the old ones stay."""
        notify.reloading()
        try:
            self._reconciler.settings = read_settings()
        except SettingsError as error:
            self._tell(EventType.ERROR, f"the settings stay as they were: {error.message}")
        else:
            self._tell(
                EventType.SETTINGS_READ, f"settings read again: {self._ways()}", self._facts()
            )
        notify.notify(notify.READY)

    def look(self, scope: Digests, triggers: Triggers) -> None:
        """One cycle. What goes wrong is told, and the service goes on."""
        begun = time.monotonic()
        try:
            first = self._take_store()
            if scope is None:
                self._see_to_queue(triggers, anew=first)
            mode = replace(modes.watch(self._settings), announce=first)
            self._reconciler.host = replace(self._host, stops=triggers.is_stopped)
            report = self._reconciler.reconcile(mode, Scope(scope, triggers.ended()))
        except EndedError:
            return
        except (LockedError, RefusedError) as error:
            if not self._begun:
                raise
            self._trouble(f"{error.message}; looked at later")
            triggers.again(scope)
            return
        except Exception as error:
            # The service outlives whatever one look at a strange machine brings up.
            if _is_missing(error, self._host.store):
                self._trouble(f"there is no store at {self._host.store} yet; waiting for it")
                notify.status("waiting for the store")
                return
            told = named(error)
            self._trouble(told.message if told else f"{type(error).__name__}: {error}")
            triggers.again(scope)
            return
        self._tell_blind(triggers)
        trouble = self._metrics.look(report, time.monotonic() - begun)
        if trouble:
            self._tell(EventType.ERROR, trouble)
        triggers.deadlines(scope, report.plan.due)
        self._tell_refusals(report.plan, scope)
        self._prove(report)
        self._sync_behind(report, triggers)
        self._tell_systemd(report)
        if report.warnings:
            for trouble in report.warnings:
                self._trouble(trouble)
        else:
            self._troubles.clear()

    def _prove(self, report: reconcile.Report) -> None:
        """Have hashed in the background what is in doubt, and asked again about what is damaged."""
        if report.memory is None or not self._settings.repair:
            return
        wanted = report.memory.unproven | questions.open_questions(report.evidence)
        if report.evidence.scope is None:
            self._proofs.forget(wanted)
        try:
            self._proofs.want(wanted, self._settings)
        except RuntimeError as error:
            self._trouble(f"no thread to prove blobs: {error}")  # the limits of a unit, say

    def _sync_behind(self, report: reconcile.Report, triggers: Triggers) -> None:
        """Have the data brought to the disk that repairs have claimed ahead of it."""
        boot = report.evidence.boot
        known = report.memory.downloads.values() if report.memory is not None else ()
        if not boot or all(record.unsynced != boot for record in known):
            return
        if self._behind is None:
            # Not needed by all, and takes memory.
            from watcher.act.durability import Behind

            self._behind = Behind(self._host, self._trouble, triggers.wake)
        try:
            self._behind.want(self._settings)
        except RuntimeError as error:
            self._trouble(f"no thread to bring data to the disk: {error}")

    def _see_to_queue(self, triggers: Triggers, *, anew: bool) -> None:
        """Have the queue run, or not any more, as the settings say.

        Done at each full look, so that a change which no event told of is found then.
        """
        if self._queue is None and self._settings.queue:
            # Not needed by all, and takes memory.
            from watcher.pull.queue_process import QueueProcess

            self._queue = QueueProcess(
                self._host.store, self._queue_run, self._pass_on, self._trouble
            )
        if self._queue is None:
            return
        if self._settings.queue:
            self._hear_of_queue(triggers, self._queue)
        self._queue.turn(self._settings.queue, anew=anew)

    def _hear_of_queue(self, triggers: Triggers, run: QueueProcess) -> None:
        """Have it look at each change; nothing else comes into that folder, and wakes it."""
        from watcher.pull.queue import FILE

        path = os.path.join(self._host.store, memory.FOLDER, FILE.apart)
        if not os.path.lexists(path):
            with (
                contextlib.suppress(OSError, WatchError),
                folders.opened_store(self._host.store) as store,
            ):
                FILE.change(store, lambda kept: kept)
        triggers.hear(path, run.nudge)

    def _pass_on(self, raw: bytes) -> None:
        """Tell what a process that runs the queue has written down already."""
        line = history.parse(raw)
        if line is not None:
            self._host.tell(line.event)

    def end(self) -> None:
        """Begin nothing more of the queue. Safe in a signal handler."""
        if self._queue is not None:
            self._queue.end()

    def stop(self, ended_by: str) -> None:
        """End what is done beside the looks, and tell that the service ends."""
        notify.notify(notify.STOPPING)
        if self._queue is not None:
            self._queue.stop()
        if self._begun:
            self._tell(EventType.SERVICE_STOPPED, f"ollama-watch stops: {ended_by}")

    def _take_store(self) -> bool:
        """Take the store for this daemon's life; one made anew in its place is another store.

        The lock is taken anew where our folder was removed. True where the store was not ours yet.
        Raises FileNotFoundError, LockedError, RefusedError.
        """
        with folders.opened_store(self._host.store) as store:
            status = os.fstat(store)
            is_new = self._store != (status.st_dev, status.st_ino)
            try:
                if self._lock.hold(store, journal.owner()) and not is_new:
                    self._trouble(f"{memory.FOLDER} was removed, and is made anew")
            except fs.BusyError as busy:
                raise LockedError(
                    f"a daemon watches this store already: {busy.owner}", "one is enough"
                ) from None
            except state_folder.ForeignError as error:
                raise state_folder.refusal(self._host.store, error) from None
            except OSError as error:
                # A store that can't be written can still be watched; the events go to stderr.
                if is_new:
                    self._trouble(f"{memory.FOLDER} can't be written: {error.strerror}")
            if not is_new:
                return False
            self._store = status.st_dev, status.st_ino
        if not self._begun:
            self._tell_start()
        self._begun = True
        self._tell(EventType.CHECK_STARTED, "Checking for partial model downloads...")
        return True

    def _tell_systemd(self, report: reconcile.Report) -> None:
        """Tell that the service is up, or still lives, and what it watches."""
        known = report.memory.downloads.values() if report.memory is not None else ()
        pulled = sum(record.pulling for record in known)
        notify.status(f"{len(known)} unfinished downloads, {pulled} of them being pulled")

    def ready(self) -> None:
        """Tell systemd, once, that the service is up, whatever its first look has come to."""
        if not self._ready:
            notify.notify(notify.READY)
            self._ready = True

    def _ways(self) -> str:
        repairs = "repairs what broke" if self._settings.repair else "tells what broke"
        cleans = "cleans what is stale" if self._settings.clean else "flags what is stale"
        runs = ", runs the queue" if self._settings.queue else ""
        return f"{repairs}, {cleans}{runs}"

    def _facts(self) -> dict[str, object]:
        return {
            "repair": self._settings.repair,
            "clean": self._settings.clean,
            "queue": self._settings.queue,
            "stale_after_seconds": self._settings.stale_after,
        }

    def _tell_start(self) -> None:
        self._tell(
            EventType.SERVICE_STARTED,
            f"ollama-watch {__version__} watches {self._host.store}, {self._ways()}",
            {"pid": os.getpid(), "version": __version__, **self._facts()},
        )

    def _tell_blind(self, triggers: Triggers) -> None:
        if triggers.blind and triggers.blind != self._blind:
            self._tell(
                EventType.ERROR, f"{triggers.blind}; looking every {BLIND_SECONDS:.0f} s instead"
            )
        self._blind = triggers.blind

    def _tell_refusals(self, planned: Plan, scope: Digests) -> None:
        # What only has to wait is looked at again when its time has come.
        now = {
            (refusal.subject, refusal.kind.value): refusal
            for refusal in planned.refusals
            if refusal.seconds_left is None
        }
        for key in now.keys() - self._refused:
            event = events.refused(now[key], self._host.clock())
            journal.announce(self._host, self._settings, event)
        kept = {key for key in self._refused if scope is not None and key[0] not in scope}
        self._refused = kept | now.keys()

    def _trouble(self, text: str) -> None:
        """Tell an error once, until a look has gone well again."""
        if text not in self._troubles:
            self._troubles.add(text)
            self._tell(EventType.ERROR, text)

    def _tell(
        self,
        event_type: EventType,
        message: str,
        details: Mapping[str, object] | None = None,
    ) -> None:
        event = Event(self._host.clock(), event_type, message, None, details or {})
        journal.announce(self._host, self._settings, event)


class _Signals:
    """What signals have asked for."""

    def __init__(self) -> None:
        self.ended_by = "its end"
        self._reload = False

    def end(self, number: int) -> None:
        self.ended_by = signal.Signals(number).name

    def ask_reload(self) -> None:
        self._reload = True

    def take_reload(self) -> bool:
        """Whether the settings are to be read again; asked once."""
        asked, self._reload = self._reload, False
        return asked


@contextlib.contextmanager
def _signals(triggers: Triggers, end: Callable[[], None]) -> Iterator[_Signals]:
    """SIGTERM and SIGINT end the wakes, the look under way comes to its end; SIGHUP wakes."""
    asked = _Signals()

    def stop(number: int, _: FrameType | None) -> None:
        asked.end(number)
        stopping.ask()
        end()
        triggers.stop()

    def reload(_: int, __: FrameType | None) -> None:
        asked.ask_reload()
        triggers.wake(None)

    wanted = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: reload}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stopping.withdraw()

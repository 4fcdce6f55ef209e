"""The service of one store: one reconcile for each scope that the triggers name."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from watcher import __version__, errors, reconcile
from watcher.act import journal
from watcher.act import second_names as keeping
from watcher.config import Settings
from watcher.decide import events, modes, repairing, second_names
from watcher.model import Plan, Scope
from watcher.observe.host import Host
from watcher.service.metrics import Metrics
from watcher.service.scrub import Scrub
from watcher.service.triggers import BLIND_SECONDS, Digests, Triggers
from watcher.state import folders, fs, memory, registry_cache, state_folder
from watcher.state.event_log import Event, EventType
from watcher.system import stopping
from watcher.system.worker import Worker

if TYPE_CHECKING:
    from watcher.pull.queue_process import QueueProcess
    from watcher.service.web_process import WebProcess
    from watcher.system.leash import Starter


class Children(NamedTuple):
    """How the processes are started that run the queue, and serve the page (None: it is not).

    Each is a command line, or what starts it.
    """

    queue: Sequence[str] | Starter
    web: Sequence[str] | Starter | None = None


def run(host: Host, read_settings: Callable[[], Settings], children: Children) -> None:
    """Watch until SIGTERM or SIGINT; SIGHUP rereads the settings.

    Raises LockedError where another daemon has this store, RefusedError where our folder in it is
    somebody else's, ListenError, and what `read_settings` raises at first.
    """
    settings = read_settings()
    metrics = Metrics(host.store, settings)

    def report(event: Event) -> None:
        metrics.event(event)
        host.report(event)

    counted = replace(host, report=report, ends=stopping.asked)
    service = _Service(counted, settings, metrics, children)
    triggers = Triggers(host.store, host.proc, service.keep)
    ending = contextlib.closing(service)
    with metrics, triggers, _signals(triggers, service), ending:
        for number, scope in enumerate(triggers):
            if service.rereads:
                service.reload(read_settings)
                scope = None
            service.look(scope, triggers)
            if scope is None:
                _give_back()
            if number == 0:  # whatever the result of the first scan
                _notify("READY=1")
        service.stop()


def _give_back() -> None:
    memory.let_go()
    registry_cache.FILE.let_go()
    gc.collect()
    # glibc keeps what was freed below anything that is still in use.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _notify(*lines: str) -> None:
    """Send assignments to systemd, if it started us: one datagram (``sd_notify(3)``)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"  # an abstract socket
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)  # a full queue must not stop the service
        sender.sendto("\n".join(lines).encode(errors="replace"), address)


_ALIVE = "WATCHDOG=1"


class _Service:
    """What a daemon knows between two scans."""

    def __init__(
        self, host: Host, settings: Settings, metrics: Metrics, children: Children
    ) -> None:
        self._host, self._metrics = host, metrics
        self._children = children
        self._queue: QueueProcess | None = None
        self._web: WebProcess | None = None
        self._reconciler = reconcile.Reconciler(host, settings)
        self._scrub = Scrub(host, self.warn)
        self._behind = Worker("behind", self._write_behind)
        self._judging = Worker("discarded", self._judge)
        #: What a server has removed; and what of it could not be read.
        self._unjudged: set[str] = set()
        self._unreadable: set[str] = set()
        self._wake: Callable[[Digests], None] = lambda _: None
        self._lock = state_folder.LongLock(state_folder.DAEMON_LOCK)
        self.rereads = False  #: whether to reread the settings
        self._ended_by = "its end"
        self._store: tuple[int, int] | None = None  #: device and inode of the store that is ours
        self._refused: set[tuple[str, str]] = set()  #: reported once while it holds
        self._warnings: set[str] = set()
        self._blind = ""
        self._keeps = True  #: blobs can get a second name here

    def close(self) -> None:
        if self._web is not None:
            self._web.stop()
        if self._queue is not None:
            self._queue.stop()
        self._scrub.stop()
        self._behind.stop()
        self._judging.stop()
        self._lock.release()

    @property
    def _settings(self) -> Settings:
        return self._reconciler.settings

    def reload(self, read_settings: Callable[[], Settings]) -> None:
        """Take the settings as they are now; if they are wrong, the old ones stay."""
        self.rereads = False
        _notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            self._reconciler.settings = read_settings()
        except errors.SettingsError as error:
            helps = f": {error.command}" if error.command else ""
            self._emit(EventType.ERROR, f"kept the previous settings: {error.message}{helps}")
        else:
            words, facts = self._ways()
            self._emit(EventType.SETTINGS_READ, f"reread the settings: {words}", **facts)
        _notify("READY=1")

    def look(self, scope: Digests, triggers: Triggers) -> None:
        """One reconcile. Errors are reported, and the service continues."""
        begun = time.monotonic()
        try:
            first = self._take_store()
            if scope is None:
                self._turn_queue(triggers, anew=first)
                self._serve_page()
            mode = modes.watch(self._settings)._replace(announce=first)
            self._reconciler.host = replace(self._host, stops=triggers.is_stopped)
            report = self._reconciler.reconcile(mode, Scope(scope, triggers.ended()))
        except errors.EndedError:
            return
        except (errors.LockedError, errors.RefusedError) as error:
            if self._store is None:
                raise
            self.warn(f"{error.message}; scanning it later")
            triggers.again(scope)
            return
        except Exception as error:
            # The service survives whatever one scan of a strange machine meets.
            gone = isinstance(error, FileNotFoundError) and not os.path.isdir(self._host.store)
            if gone or isinstance(error, errors.NoStoreError):
                self.warn(f"waiting for a store at {self._host.store}")
                _notify(_ALIVE, "STATUS=waiting for the store")
                return
            ours = errors.named(error)
            self.warn(ours.message if ours else f"{type(error).__name__}: {error}")
            triggers.again(scope)
            return
        self._report_blind(triggers.events.blind)
        if failed := self._metrics.look(report, time.monotonic() - begun):
            self._emit(EventType.ERROR, failed)
        triggers.deadlines(scope, report.plan.due)
        self._report_refusals(report.plan, scope)
        self._work_beside(report, triggers.wake)
        self.keep(second_names.wanted(report.evidence))
        known = report.memory.downloads.values() if report.memory is not None else ()
        pulled = sum(record.pulling for record in known)
        _notify(_ALIVE, f"STATUS={len(known)} unfinished downloads, {pulled} in use")
        for warning in report.warnings:
            self.warn(warning)
        if not report.warnings:
            self._warnings.clear()

    def keep(self, digests: frozenset[str]) -> None:
        """Have the bytes of what a pull has just finished stay where the server discards them.

        Called in a thread of watchdog's, too: a server needs little time to hash a small layer.
        """
        if not (digests and self._keeps and self._settings.repair) or self._store is None:
            return
        why = keeping.keep(self._host, digests)
        if why and self._keeps:
            self._keeps = False
            lost = "what the server discards after a checksum mismatch can't be kept here"
            self._emit(EventType.ERROR, f"{lost}: {why}")

    def _work_beside(self, report: reconcile.Report, wake: Callable[[Digests], None]) -> None:
        """Hash what is in doubt, and write the data back that repairs have recorded ahead of it."""
        known, boot = report.memory, report.evidence.boot
        self._wake = wake
        if known is None:
            return
        try:
            if self._settings.repair:
                removed = {x.digest for x in report.evidence.downloads if x.may_be_right}
                self._unjudged |= removed - self._unreadable
                if self._unjudged:
                    self._judging.wake()
                doubted = known.unproven | repairing.open_questions(
                    report.evidence, missing_too=self._settings.fetch
                )
                if report.evidence.scope is None:
                    self._scrub.forget(doubted)
                self._scrub.want(doubted, self._settings)
            if boot and any(record.unsynced == boot for record in known.downloads.values()):
                self._behind.wake()
        except RuntimeError as error:
            # Such as the limits of a unit.
            self.warn(f"no thread for work in the background: {error}")

    def _write_behind(self) -> None:
        # Not needed by all, and takes memory.
        from watcher.act import durability

        try:
            host = replace(self._host, stops=self._behind.is_stopped)
            refused = durability.sync_noted(host, self._settings)
            if refused:
                self._wake(refused)
        except (errors.WatchError, OSError) as error:
            self.warn(f"what is claimed can't be brought to the disk yet: {error}")

    def _judge(self) -> None:
        host = replace(self._host, stops=self._judging.is_stopped)
        while self._unjudged:
            digest = self._unjudged.pop()
            try:
                if keeping.judge(host, digest):
                    self._wake(frozenset({digest}))
            except OSError as error:
                self._unreadable.add(digest)
                self.warn(f"hashing what the server has removed failed: {error.strerror}")

    def _turn_queue(self, triggers: Triggers, *, anew: bool) -> None:
        if self._queue is None and self._settings.queue:
            # Not needed by all, and takes memory.
            from watcher.pull.queue_process import QueueProcess

            self._queue = QueueProcess(self._host, self._children.queue, self.warn)
        if self._queue is None:
            return
        if self._settings.queue:
            folder = self._queue.watched_folder()
            triggers.events.watch_also(folder, self._queue.nudge)
        self._queue.limit(self._settings.rate)
        self._queue.turn(self._settings.queue, anew=anew)

    def _serve_page(self) -> None:
        """Have the page served, once there is a store."""
        if self._web is None and self._children.web is not None:
            # Not needed by all, and takes memory.
            from watcher.service.web_process import WebProcess

            self._web = WebProcess(self._children.web, self.warn)

    def end(self, by: str) -> None:
        """Start nothing more of the queue; `by`: the signal. Safe in a signal handler."""
        self._ended_by = by
        if self._queue is not None:
            self._queue.end()

    def stop(self) -> None:
        _notify("STOPPING=1")
        if self._queue is not None:
            self._queue.stop()
        if self._store is not None:
            self._emit(EventType.SERVICE_STOPPED, f"ollama-watch stopped: {self._ended_by}")

    def _take_store(self) -> bool:
        """Take the store, or keep it; whether it is new here. Raises LockedError, RefusedError."""
        with folders.opened_store(self._host.store) as store:
            status = os.fstat(store)
            is_new = self._store != (status.st_dev, status.st_ino)
            try:
                if self._lock.hold(store) and not is_new:
                    self.warn(f"{memory.FOLDER} was removed; recreating it")
            except fs.BusyError as busy:
                watched = f"a daemon watches this store already: {busy.owner}"
                raise errors.LockedError(watched, "one is enough") from None
            except state_folder.ForeignError as error:
                raise state_folder.refusal(self._host.store, error) from None
            except OSError as error:
                # A read-only store can still be watched; the events go to stderr.
                if is_new:
                    self.warn(f"{memory.FOLDER} can't be written: {error.strerror}")
            if not is_new:
                return False
            starts, self._store = self._store is None, (status.st_dev, status.st_ino)
        if starts:
            words, facts = self._ways()
            watches = f"ollama-watch {__version__} watches {self._host.store}, {words}"
            facts |= {"pid": os.getpid(), "version": __version__}
            self._emit(EventType.SERVICE_STARTED, watches, **facts)
        self._emit(EventType.CHECK_STARTED, "Checking for partial model downloads...")
        return True

    def _ways(self) -> tuple[str, dict[str, object]]:
        """The settings that an event names, in words and as its details."""
        on = {name: getattr(self._settings, name) for name in ("repair", "clean", "queue")}
        words = ", ".join(f"{name} {'on' if is_on else 'off'}" for name, is_on in on.items())
        return words, {**on, "stale_after_seconds": self._settings.stale_after}

    def _report_blind(self, blind: str) -> None:
        if blind and blind != self._blind:
            self._emit(EventType.ERROR, f"{blind}; scanning every {BLIND_SECONDS:.0f} s instead")
        self._blind = blind

    def _report_refusals(self, planned: Plan, scope: Digests) -> None:
        # What only has to wait is planned again when its time comes.
        final = (each for each in planned.refusals if each.seconds_left is None)
        now = {(each.subject, each.kind.value): each for each in final}
        for key in now.keys() - self._refused:
            event = events.refused(now[key], self._host.clock())
            journal.announce(self._host, self._settings, event)
        kept = {key for key in self._refused if scope is not None and key[0] not in scope}
        self._refused = kept | now.keys()

    def warn(self, text: str) -> None:
        """Report an error once, until a scan succeeds again."""
        if text not in self._warnings:
            self._warnings.add(text)
            self._emit(EventType.ERROR, text)

    def _emit(self, event_type: EventType, message: str, **details: object) -> None:
        event = Event(self._host.clock(), event_type, message, None, details)
        journal.announce(self._host, self._settings, event)


@contextlib.contextmanager
def _signals(triggers: Triggers, service: _Service) -> Iterator[None]:
    """SIGTERM and SIGINT end the triggers after the scan under way; SIGHUP starts a scan."""

    def stop(number: int, _: FrameType | None) -> None:
        service.end(signal.Signals(number).name)
        stopping.ask()
        triggers.stop()

    def reload(_: int, __: FrameType | None) -> None:
        service.rereads = True
        triggers.wake(None)

    handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: reload}
    try:
        with stopping.handling(handlers):
            yield
    finally:
        stopping.withdraw()

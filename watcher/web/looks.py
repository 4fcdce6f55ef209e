"""What the page shows: documents, each as its command prints it, made at most so often.

However many clients ask, one thread looks. They wait for it, but not for long: then they get what
it found before.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from watcher.config import Settings
from watcher.decide import modes, usage
from watcher.errors import WatchError, named
from watcher.observe import place
from watcher.observe.host import Host
from watcher.pull import queue as queues
from watcher.reconcile import Reconciler, Report
from watcher.show import documents, queue, status
from watcher.state import event_log, json_file
from watcher.system.worker import Worker

Document = dict[str, Any]

_PATIENCE_SECONDS = 2.0  #: so long a client waits for what is being made
_REST = 4  #: after a look nothing is looked at for so many times as long as it took
_LOOK_SECONDS, _SURVEY_SECONDS, _LOG_SECONDS = 0.7, 10.0, 0.7  #: and for at least so long
_LATE_SECONDS = 60.0  #: a look that takes longer: what was before says nothing of the store now
_PACE_SECONDS = 15.0  #: an older look says nothing about how fast bytes arrive now
_EVENTS = 1000  #: so many of the last events are shown
_LOG_FILES = 2  #: and they are looked for in so many of the last files


class Made(NamedTuple):
    """What was found at one time: the bytes that ``--json`` prints, by command.

    `tag` is another one for other bytes. `documents` are the same as values.
    """

    tag: str
    printed: Mapping[str, bytes]
    documents: Mapping[str, Any] = MappingProxyType({})


class Lately:
    """What `make` has given lately, for any number of threads. `make` runs in one of its own."""

    def __init__(self, make: Callable[[], Made], seconds: float) -> None:
        self._make, self._seconds = make, seconds
        self._worker = Worker("look", self._work)
        self._changed = threading.Condition()
        self._begun = 0.0  #: when what is being made was begun; 0.0 while nothing is
        self._fresh_until = 0.0
        self._made: Made | None = None
        self._error: WatchError | None = None

    def get(self) -> Made:
        """The last one, if need be after a wait. Raises WatchError where there is none."""
        with self._changed:
            now = time.monotonic()
            if not self._begun and now >= self._fresh_until:
                self._begun = now
                self._worker.wake()
            if self._begun:
                left = self._begun + _PATIENCE_SECONDS - now
                self._changed.wait_for(lambda: not self._begun, max(0.0, left))
            if self._error is not None:
                raise self._error
            is_late = self._begun and time.monotonic() - self._begun > _LATE_SECONDS
            if self._made is None or is_late:
                raise WatchError("inspecting the store takes long", "the page tries it again")
            return self._made

    def _work(self) -> None:
        made: Made | None = None
        error: WatchError | None = None
        begun = time.monotonic()
        try:
            made = self._make()
        except WatchError as failed:
            error = failed
        except Exception as failed:
            # Such as a store that is gone: the page says so, and goes on.
            error = named(failed) or WatchError(f"{type(failed).__name__}: {failed}")
        with self._changed:
            self._made, self._error = made, error
            ended = time.monotonic()
            self._begun = 0.0
            self._fresh_until = ended + max(self._seconds, _REST * (ended - begun))
            self._changed.notify_all()


class Looks:
    """One store, looked at for the page."""

    def __init__(self, host: Host, settings: Settings) -> None:
        self._host, self._settings = host, settings
        self._past: Report | None = None
        self._log = event_log.Log(host.store, last=_LOG_FILES)
        self._events: deque[bytes] = deque(maxlen=_EVENTS)
        self.now = Lately(self._look, _LOOK_SECONDS)  #: status, audit, quarantine
        self.queue = Lately(self._line, _LOOK_SECONDS)  #: queue
        self.space = Lately(self._survey, _SURVEY_SECONDS)  #: df
        self.events = Lately(self._read, _LOG_SECONDS)  #: lines of the log, the last ones

    def _look(self) -> Made:
        past = self._past
        if past is not None and time.time() - past.evidence.now > _PACE_SECONDS:
            past = None
        shown = status.Status(self._host, self._settings, past, apart=0)
        self._past = shown.report
        return _made(
            status=status.document(shown),
            audit=documents.audit(shown.report),
            quarantine=documents.quarantine(shown.report),
        )

    def _line(self) -> Made:
        path = self._host.store
        with place.opened(path) as store:
            shown = queue.look(store, path, queues.FILE.read(store))
        return _made(queue=queue.document(shown, path))

    def _survey(self) -> Made:
        report = Reconciler(self._host, self._settings).inspect(modes.SURVEY)
        space = report.evidence.space
        assert space is not None
        uses = usage.usage(space, report.diagnosis.diagnosed, report.evidence.census)
        return _made(df=documents.df(report, space, *uses))

    def _read(self) -> Made:
        restarts = self._log.restarts
        try:
            lines = [each.line for each in self._log.read()]
        except PermissionError:
            raise place.no_permission(self._host.store) from None
        if self._log.restarts != restarts:
            self._events.clear()
        self._events.extend(lines)
        printed = b"".join(self._events)
        return Made(f'"{hash(printed):x}"', {"log": printed}, {"log": printed})


def _made(**found: Document) -> Made:
    printed = {command: json_file.line(each) for command, each in found.items()}
    return Made(f'"{time.time_ns():x}"', printed, found)

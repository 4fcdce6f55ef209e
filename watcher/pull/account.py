"""What is known of one model's pull: its record, its speed, and what is reported of it."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

from watcher.act import journal
from watcher.config import Settings
from watcher.errors import WatchError
from watcher.observe import place, scan
from watcher.ollama import environment, names
from watcher.pull.failures import Asked, Cause, End
from watcher.pull.layers import ModelProgress
from watcher.pull.speed import STALL_SECONDS, Meter
from watcher.pull.target import Target
from watcher.state import folders, records
from watcher.state.event_log import Event, EventType
from watcher.transfer.rate import Limit

SERVER_SECONDS = 300.0  #: how long a server that is gone is waited for, unless `until_done` is set
TRIES = 8  #: attempts in a row that bring nothing, unless `until_done` is set
MISMATCHES = 3  #: layers that came out wrong, and were fetched anew: then it is no accident
TICK_SECONDS = 0.2  #: how often it is looked whether to stop
_SAVE_SECONDS = 1.0  #: changes besides the state are saved this often

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Options:
    insecure: bool = False
    until_done: bool = False  #: retry temporary failures without limit
    verify: bool = False  #: also hash the layers that were on disk before
    stall_seconds: float = STALL_SECONDS
    server_seconds: float = SERVER_SECONDS
    #: Our own to a registry: how many; or at first, and at most where more bring more.
    connections: int | tuple[int, int] = Settings().connections
    #: Of our own transfers of the store; it may be changed while they run.
    limit: Limit = field(default_factory=Limit)
    wait: bool = True  #: leave a layer that the server pulls just now to it

    def words(self) -> Iterator[str]:
        if self.insecure:
            yield "--insecure"
        if self.until_done:
            yield "--until-done"
        if self.verify:
            yield "--verify"
        if self.stall_seconds != STALL_SECONDS:
            yield f"--stall={self.stall_seconds:g}s"
        if self.limit.per_second:
            yield f"--rate={self.limit.per_second}"
        if not self.wait:
            yield "--no-wait"


class Waiting(NamedTuple):
    """What the next attempt waits for, after which failure, and when it begins."""

    awaited: str
    why: str
    #: The number of that attempt, and of how many; None for no limit.
    attempt: int
    attempts: int | None
    #: Seconds since the epoch: the next attempt, or when the waiting is given up.
    until: float | None

    @property
    def text(self) -> str:
        of = "" if self.attempts is None else f" of {self.attempts}"
        return f"waiting for {self.awaited}: attempt {self.attempt}{of}"


class Update(NamedTuple):
    """How the pull is now, and a note in words, if any."""

    record: records.Record
    seconds_left: float | None = None
    note: str = ""
    waiting: Waiting | None = None  #: None while something is done
    #: Bytes whose hash is computed, where we compute it while they arrive.
    hashed_bytes: int | None = None


class Account:
    """The account of one pull, which its two ways share. A model's name is as people write it."""

    def __init__(self, target: Target, model: str, options: Options) -> None:
        """Raises TargetError for what is not a model's name."""
        self.target, self.model, self.options = target, model, options
        self.name = names.to_model(model)
        self.record = records.Record()
        self.meter = Meter(stall_seconds=options.stall_seconds)
        self.progress = ModelProgress()
        self.why_server = ""  #: why the server moves the bytes; "" where we do
        self.waiting: Waiting | None = None
        #: The layers and the config, by digest; and their bytes by the manifest.
        self.digests: frozenset[str] = frozenset()
        self.promised: Mapping[str, int] = {}
        #: Those of them that were in the store before.
        self.present: frozenset[str] | None = None
        self.is_resuming_noted = self.is_astray_noted = False
        self._driving = records.driving_lock(model)
        self._last_note = ""
        self._saved_at = 0.0
        self._unsaved: dict[str, object] = {}

    @property
    def way(self) -> str:
        """Who moves the bytes."""
        return "server" if self.why_server else "transfer"

    def expect(self, sizes: Mapping[str, int]) -> None:
        present = self.finished(sizes)
        if self.present is None:
            self.present = present
        self.digests, self.promised = frozenset(sizes), sizes
        self.progress.expect(sizes, present)

    def finished(self, sizes: Mapping[str, int]) -> frozenset[str]:
        with self.opened() as store:
            return frozenset() if store is None else scan.present(store, sizes)

    def missing(self) -> frozenset[str]:
        """The layers that were not in the store before."""
        return self.digests - (self.present or frozenset())

    def reported(self, state: records.State | None, now: float) -> Update:
        """An update with how far the download is, in a state where that may follow."""
        changes: dict[str, object] = {
            "downloaded_bytes": self.progress.done,
            "total_bytes": self.progress.total,
            "bytes_per_second": self.meter.rate(now),
            "lost_bytes": self.meter.lost,
            "resets": self.meter.resets,
            "stalls": self.meter.stalls,
        }
        # The server is sometimes too quick to report a state, and a retry goes back in silence.
        if state is not None and records.may_follow(self.record.state, state):
            changes["state"] = state
        missing = self.progress.total - self.progress.done
        update = self.change(**changes)
        return update._replace(seconds_left=self.meter.seconds_left(now, missing))

    def change(self, **changes: object) -> Update:
        """Change the record: here at once, on the disk with each state and now and then."""
        before = self.record.state
        self.record = records.after(self.record, changes, time.time(), self.name.shown)
        self._unsaved.update(changes)
        if self.record.state is not before or time.monotonic() - self._saved_at >= _SAVE_SECONDS:
            self._save()
        return Update(self.record, waiting=self.waiting)

    def fail(self, why: str) -> Update:
        """The record of an end that is none: what could not be saved before is not in its way."""
        self._unsaved = {}
        return self.change(state=records.State.ERROR, error=why)

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        folder = self._records_folder()
        if not folder:
            return
        try:
            with folders.opened_store(folder) as opened:
                records.drive(self._driving, opened)  # anew, where it was removed
                records.change(opened, self.model, self._unsaved)
        except (WatchError, OSError):
            return  # whoever reads it reports that; the pull goes on
        self._unsaved = {}

    def _records_folder(self) -> str:
        """The folder whose records are kept; "" where none are."""
        return self.target.records or (self.target.host.store if self.target.host else "")

    def begin(self) -> None:
        """While this is held, nobody else infers from the store what the record has."""
        path = self._records_folder()
        if path:
            with suppress(OSError), folders.opened_store(path) as folder:
                records.drive(self._driving, folder)

    def end(self) -> None:
        """Give that back."""
        self._driving.release()

    def note(self, text: str) -> Update:
        """An update with a note; the same is noted once in a row."""
        note = "" if text == self._last_note else text
        self._last_note = text
        return Update(self.record, None, note, self.waiting)

    def noted(self, texts: Generator[str, None, T]) -> Generator[Update, None, T]:
        """Each text as an update. Returns what the generator returns."""
        while True:
            try:
                text = next(texts)
            except StopIteration as done:
                result: T = done.value
                return result
            yield self.note(text)

    @contextmanager
    def awaiting(self, waiting: Waiting) -> Iterator[Waiting]:
        """Updates have it as long as this lasts."""
        self.waiting = waiting
        try:
            yield waiting
        finally:
            self.waiting = None

    @staticmethod
    def rest(seconds: float, cancelled: Callable[[], bool]) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not cancelled():
            time.sleep(TICK_SECONDS)

    def log(self, event_type: EventType, message: str, **details: object) -> None:
        if self.target.host is not None:
            shown = self.name.shown
            given = {"models": [shown], "by": self.way, **details, **self.meter.facts}
            event = Event(time.time(), event_type, message, shown, given)
            journal.announce(self.target.host, self.target.settings, event)

    def helps(self, cause: Cause) -> str:
        """What helps against the end of a pull, as a command; "" where none does."""
        url = "" if self.target.url == environment.server_url("") else self.target.url
        asked = Asked(self.name.shown, url, options=tuple(self.options.words()))
        host = self.target.host or self.target.named
        if host is not None:
            is_its = self.target.its is not None
            asked = asked._replace(store=host.store, found_by=host.found_by, is_its=is_its)
        return cause.command(asked)

    @contextmanager
    def opened(self) -> Iterator[int | None]:
        """The descriptor of the store; None where there is none here."""
        with ExitStack() as opened:
            store = None
            if self.target.host is not None:
                with suppress(OSError):
                    store = opened.enter_context(folders.opened_store(self.target.host.store))
            yield store

    @cached_property
    def boot(self) -> str:
        """The id of this start of the machine, where the store is here."""
        return "" if self.target.host is None else place.boot(self.target.host)


CANCELED = End(Cause.INTERRUPTED, "canceled")  #: how a pull ends that somebody has stopped

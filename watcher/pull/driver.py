"""One model's pull, driven through the server to its end over whatever breaks on the way.

The server throws away what an attempt has brought when its connection is reset, and believes
sidecars that it could not write in time. So a loss, a stall or the server's death ends our request,
the cycle makes true sidecars of what is on the disk, and the pull is asked for again.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson
from rich.filesize import decimal

from watcher.act import journal
from watcher.errors import LockedError, WatchError, without_secrets
from watcher.observe import processes, scan
from watcher.ollama import environment, manifests, names, registry, server
from watcher.ollama.pull_stream import PullStream, ServerGoneError, Status
from watcher.pull import astray, disk, repair, verification
from watcher.pull.failures import Asked, Cause, hides_why, of_error, of_status
from watcher.pull.layer_locks import LayerLocks
from watcher.pull.layer_progress import LayerProgress
from watcher.pull.model_progress import ModelProgress
from watcher.pull.repair import Pace
from watcher.pull.speed import STALL_SECONDS, Meter
from watcher.pull.target import Target
from watcher.pull.verification import Proof
from watcher.state import download_states, folders, records, registry_cache, state_folder
from watcher.state.download_states import State
from watcher.state.event_log import Event, EventType
from watcher.state.records import Record
from watcher.system import advice

#: No line at all for so long while the manifest is asked for: the server waits without any limit.
_SILENT_SECONDS = 120.0
#: Who waits for what another pull prepares hears of it many times a second. Who hears nothing of a
#: server far away for so long waits for the registry, and may give up.
_UNHEARD_SECONDS = 30.0
#: Who is connected to the server is looked for this often: it takes a look at all processes.
_LOOK_AROUND_SECONDS = 1.0
#: How long a server that is gone is waited for, where nobody said to wait for ever.
SERVER_SECONDS = 300.0
#: Tries in a row that bring nothing, where nobody said to go on for ever.
_TRIES = 8
#: Layers that were damaged on their way, and fetched again from the start: then it is no accident.
_MISMATCHES = 3
#: Less than this on the disk beyond what the server counts may be a file system's roundings.
_UNHEARD_LOSS = 8 << 20
#: A server tries a part six times, 63 s long, before it says what is in its way. So once after a
#: silence it is let to say so.
_SAYS_WHY_SECONDS = 90.0
_TICK_SECONDS = 0.2
#: Lines come sixteen times a second; what they say is shown this often.
_SHOW_SECONDS = 0.25
#: What changes besides the state is kept this often.
_KEEP_SECONDS = 1.0
_LONGEST_PAUSE = 60.0
#: What the disk has beyond half as much again as is claimed, and this, is no data but a file
#: system's own: copies, parity.
_ROUNDINGS = 64 << 20
_NEVER_WEIGHED = 1 << 62
_HANGS = (
    "waits for a layer that another client has begun, and of which the server tells no length: "
    "if that client is gone, restart the server"
)
#: Of a layer's end no line tells, but these come after the last of them.
_ALL_HERE = frozenset({State.VERIFYING, State.WRITING_MANIFEST})
_WAITS_UNTIL_SAFE = (
    "ends as soon as that is safe: to close the request while a layer is being prepared could end "
    "the server; a second ctrl-C ends at once"
)


@dataclass(frozen=True, slots=True)
class Options:
    """What is wanted of a pull."""

    insecure: bool = False
    #: Go on for ever, over whatever may pass.
    until_done: bool = False
    #: Hash the layers that were there before, too.
    verify: bool = False
    stall_seconds: float = STALL_SECONDS
    server_seconds: float = SERVER_SECONDS

    def words(self) -> Iterator[str]:
        """The options of the command that pulls so."""
        if self.insecure:
            yield "--insecure"
        if self.until_done:
            yield "--until-done"
        if self.verify:
            yield "--verify"
        if self.stall_seconds != STALL_SECONDS:
            yield f"--stall={self.stall_seconds:g}s"


class Waiting(NamedTuple):
    """What the next try waits for, after what, and when it comes."""

    awaited: str
    why: str
    #: The number of that try, and of how many; None where they go on for ever.
    attempt: int
    attempts: int | None
    #: Seconds since the epoch: the next try, or where it is awaited, when it is given up at last.
    until: float | None

    @property
    def told(self) -> str:
        """The same in words."""
        of = "" if self.attempts is None else f" of {self.attempts}"
        return f"waits for {self.awaited}: try {self.attempt}{of}"


class Update(NamedTuple):
    """How the pull is now, and what there is to say in words, if anything."""

    record: Record
    seconds_left: float | None = None
    note: str = ""
    #: None while something is done.
    waiting: Waiting | None = None


class End(NamedTuple):
    """How a request, or the whole pull, has ended; no cause where the model has arrived."""

    cause: Cause | None = None
    text: str = ""


@dataclass(slots=True)
class Pull:
    """A pull of `model` (as people write it). Iterate over `updates`; then `end` tells its end.

    `cancelled` is asked several times a second. Once it says so the request is closed, as soon as
    that is safe, what has come is made resumable, and the updates end.
    """

    target: Target
    model: str
    options: Options = field(default_factory=Options)
    cancelled: Callable[[], bool] = lambda: False
    #: Pulls beside this one, if any.
    layer_locks: LayerLocks = field(default_factory=LayerLocks)
    end: End = field(default_factory=End)
    #: What of ours was wrong, where that has ended it.
    fault: Exception | None = None
    record: Record = field(default_factory=Record)
    meter: Meter = field(init=False)
    name: names.ModelName = field(init=False)
    _driven: state_folder.LongLock = field(init=False)
    _bar: ModelProgress = field(default_factory=ModelProgress)
    _digests: frozenset[str] = frozenset()
    #: Those of them that were in the store before.
    _present: frozenset[str] | None = None
    #: Those that our requests have pulled.
    _pulled: set[str] = field(default_factory=set)
    #: What `Options.verify` asks for was done.
    _proved: bool = False
    #: It was told already what an earlier pull has left.
    _is_resumed: bool = False
    _is_astray_told: bool = False
    _told: set[str] = field(default_factory=set)
    _kept_at: float = 0.0
    _unkept: dict[str, object] = field(default_factory=dict)
    #: Layers that another client pulls, too: closing our request would end nothing.
    _shared: set[str] = field(default_factory=set)
    _pace: Pace = field(default_factory=Pace)
    _looked_around_at: float = -_LOOK_AROUND_SECONDS
    #: Bytes of each layer on the disk that its sidecars did not claim when we looked last.
    _uncounted: dict[str, int] = field(default_factory=dict)
    #: The layer that the server told of last.
    _layer: str = ""
    #: Requests in a row that ended in silence, with nothing gained.
    _silences: int = 0
    _waiting: Waiting | None = None

    def __post_init__(self) -> None:
        """Raises TargetError for what is no model's name."""
        self.name = names.to_model(self.model)
        self.meter = Meter(stall_seconds=self.options.stall_seconds)
        self._driven = records.driving_lock(self.model)

    @property
    def command(self) -> str:
        """What helps against its end, as a command that can be pasted; "" where none does."""
        return "" if self.end.cause is None else self._helps(self.end.cause)

    def _helps(self, cause: Cause) -> str:
        url = "" if self.target.url == environment.server_url("") else self.target.url
        asked = Asked(self.name.shown, url, options=tuple(self.options.words()))
        host = self.target.host or self.target.named
        if host is not None:
            is_its = self.target.is_its or self.target.host is not None
            asked = asked._replace(store=host.store, found_by=host.found_by, is_its=is_its)
        return cause.command(asked)

    def updates(self) -> Iterator[Update]:
        """Drive the pull until the model has arrived, can't arrive, or the pull was cancelled.

        Whatever goes wrong is the end of this pull alone.
        """
        try:
            with self._driving():
                yield from self._updates()
        except WatchError as error:
            yield from self._failed(End(Cause.UNKNOWN, str(error)))
        except Exception as error:
            self.fault = error
            text = names.printable(without_secrets(f"{type(error).__name__}: {error}"))
            yield from self._failed(End(Cause.FAULT, text))
        finally:
            self.layer_locks.release(self.name.shown)

    @contextmanager
    def _driving(self) -> Iterator[None]:
        """While it lasts, nobody else infers from the store what the record says."""
        self._drive()
        try:
            yield
        finally:
            self._driven.release()

    def _drive(self) -> None:
        path = self._records_folder()
        if path:
            with suppress(OSError), folders.opened_store(path) as folder:
                records.drive(self._driven, folder)

    def _records_folder(self) -> str:
        """The folder whose records are kept; "" where none are."""
        return self.target.records or (self.target.host.store if self.target.host else "")

    def _updates(self) -> Iterator[Update]:
        yield from self._tell_what_is_here()
        if self.target.why:
            yield self._say(f"{self.target.why}; so resets and stalls can't be cured")
        tries, best, mismatches = 0, 0, 0
        fetched_again: set[str] = set()
        while True:
            self.end = yield from self._try()
            if self.end.cause is None:
                self.end = self._judge_manifest()
            if self.end.cause is None:
                proved = yield from self._prove()
                if proved.gone - fetched_again:
                    fetched_again |= proved.gone
                    continue
                self.end = _end(proved)
            if self.end.cause is None:
                yield self._change(state=State.COMPLETED)
                self._log(
                    EventType.PULL_COMPLETED, f"{self.name.shown} has arrived", **self.meter.facts
                )
                return
            if self.record.downloaded_bytes > best:
                tries, best, self._silences = 0, self.record.downloaded_bytes, 0
            tries += 1
            mismatches += self.end.cause is Cause.MISMATCH
            self._silences += self.end.cause is Cause.SILENCE
            enough = tries >= _TRIES and not self.options.until_done
            if enough or mismatches >= _MISMATCHES or not self.end.cause.passes:
                break
            if not (yield from self._heal(self.end, tries)):
                break
        # What has come is kept for the next pull, whosever that is.
        yield from self._mend(own=True)
        yield from self._failed(self.end)

    def _failed(self, end: End) -> Iterator[Update]:
        """The pull has ended otherwise than with the model."""
        assert end.cause is not None
        self.end = end
        # What could not be kept must not be in the way of the one thing that has to be.
        self._unkept = {}
        yield self._change(state=State.ERROR, error=end.text)
        told = {"cause": end.cause.value, **self.meter.facts}
        self._log(EventType.PULL_FAILED, f"{self.name.shown}: {end.text}", **told)

    # ------------------------------------------------------------ one try

    def _try(self) -> Generator[Update, None, End]:
        """Everything from the manifest to the end of one request. Returns its `End`."""
        if self.cancelled():
            return End(Cause.INTERRUPTED, "it was cancelled")
        yield self._change(state=State.STARTING)
        answer = self._ask_manifest()
        # Where there is none, the server tells why: it may see what is shown to its user alone.
        if answer.raw is not None and not answer.problem:
            flawed = _of_manifest(answer.raw)
            if flawed.cause is not None:
                return flawed
        if answer.raw is not None:
            self._expect(registry.sizes(answer.raw))
            yield self._change(
                state=State.PULLING_MANIFEST,
                manifest_pulled=True,
                total_bytes=self._bar.total,
                present_bytes=self._bar.present,
                downloaded_bytes=self._bar.done,
                resume_supported=self._bar.total > 0,
            )
            if answer.problem:
                yield self._say(f"{answer.problem}; going by the manifest that was kept")
            if self._is_here(answer.raw):
                yield self._say("up to date")
                return End()
            yield from self._tell_astray()
            yield from self._wait_for_others()
            mended = list(self._mend(own=False))
            if self._bar.done > self._bar.present and not self._is_resumed:
                yield self._resuming()
            self._is_resumed = False  # of each other try it is told again
            yield from mended
            if fault := self._disk_fault():
                return fault
            if short := (yield from self._look_for_room()):
                return End(Cause.DISK_FULL, short)
        if self.cancelled():
            return End(Cause.INTERRUPTED, "it was cancelled")
        try:
            with PullStream(self.target.url, self.model, insecure=self.options.insecure) as stream:
                end = yield from self._follow(stream)
            return self._explained(end)
        except ServerGoneError as error:
            return End(Cause.SERVER_GONE, f"the server at {self.target.url}: {error}")
        finally:
            self.meter.rest(time.monotonic())

    def _tell_what_is_here(self) -> Iterator[Update]:
        """Say first of all what an earlier pull has left, by the manifest that it has kept."""
        with ExitStack() as opened:
            store = self._store(opened)
            known = None if store is None else registry_cache.cached(store).get(self.name.key)
            if store is None or known is None:
                return
            sizes = registry.sizes(known.raw.encode())
            here = scan.present(store, sizes)
            if not scan.begun(store, sizes.keys() - here):
                return
        report = repair.look(self.target, sizes.keys() - here)
        if report is None:
            return
        self._bar.expect(sizes, here)
        self._bar.here(repair.trusted(report), here)
        if self._bar.done > self._bar.present:
            self._is_resumed = True
            yield self._resuming()

    def _resuming(self) -> Update:
        return self._say(f"resuming: {_share(self._bar.done, self._bar.total)} are here")

    def _tell_astray(self) -> Iterator[Update]:
        """Say once, before anything is fetched, what of it lies where no server looks."""
        if self._is_astray_told:
            return
        self._is_astray_told = True
        missing = self._digests - (self._present or frozenset())
        sizes = {digest: self._bar.sizes[digest] for digest in missing & self._bar.sizes.keys()}
        for text in astray.told(self.target, self.name.shown, sizes):
            yield self._say(text)

    def _wait_for_others(self) -> Iterator[Update]:
        """Let a pull beside this one bring the layers that both miss."""
        missing = self._digests - (self._present or frozenset())
        while other := self.layer_locks.claim(self.name.shown, missing):
            if self.cancelled():
                return
            yield self._say(f"waits for {other}, which has a layer of it")
            self._rest(_TICK_SECONDS)

    def _follow(self, stream: PullStream) -> Generator[Update, None, End]:
        """Read the stream to its end, or until our request has to be closed. Returns the `End`."""
        layer_progress, shows_at = LayerProgress(time.monotonic(), self._uncounted), 0.0
        while True:
            now = time.monotonic()
            ends = self._wanted_end(now - layer_progress.changed_at)
            if ends and self._may_close(layer_progress, now):
                return ends
            if ends:
                yield self._say(_HANGS if layer_progress.is_joined else _WAITS_UNTIL_SAFE)
            status = stream.next(_TICK_SECONDS)
            if status is None:
                continue
            now = time.monotonic()
            if status.error:
                return End(of_error(status.error), status.error)
            state = download_states.of_status(status.text)
            if state is State.COMPLETED:
                return End()
            fresh = layer_progress.take(status, now)
            self._layer = layer_progress.digest
            if state not in (None, self.record.state):
                layer_progress.changed_at = now
            before = self._bar.done
            layer_progress.lost += self._count(status)
            if state in _ALL_HERE:
                self._bar.complete()
            came = self._bar.done - before
            self._measure(now, came if came or status.total else None, fresh=fresh)
            if fresh or now >= shows_at or state not in (None, self.record.state):
                shows_at = now + _SHOW_SECONDS
                yield self._progress(state, now)
            lost = layer_progress.lost or self._lost_unheard(layer_progress, now)
            if (
                lost
                and self._may_cure(layer_progress.digest, now)
                and self._may_close(layer_progress, now)
            ):
                return End(Cause.RESETS, f"{decimal(lost)} were lost with a broken connection")

    def _wanted_end(self, quiet: float) -> End | None:
        """Why our request should be closed, if it should: cancelled, or quiet for too long."""
        if self.cancelled():
            return End(Cause.INTERRUPTED, "it was cancelled")
        if self._is_silent(quiet):
            return End(Cause.SILENCE, f"nothing came for {advice.duration(quiet)}")
        return None

    def _is_silent(self, seconds: float) -> bool:
        """Whether that is too long without anything; checking a large layer may take for ever."""
        match self.record.state:
            case State.DOWNLOADING:
                says_why = _SAYS_WHY_SECONDS if self._silences == 1 else 0.0
                return seconds > max(self.options.stall_seconds, says_why)
            case State.STARTING | State.PULLING_MANIFEST:
                return seconds > _SILENT_SECONDS
            case _:
                return False

    def _may_close(self, layer_progress: LayerProgress, now: float) -> bool:
        """Whether no layer is being prepared, or for nobody but us.

        Who closes a request for a layer that another pull is still preparing makes the server
        panic; who closes the one that prepares it leaves those who wait for it for ever, and the
        first of them that is closed makes it panic (docs/store.md).
        """
        if layer_progress.is_prepared(now) or self.record.state in _ALL_HERE:
            return True
        if layer_progress.is_joined:
            return False
        host = self.target.host
        if host is None:
            # Who else is connected there can't be seen. Who waits for another is heard of often.
            return now - layer_progress.at >= _UNHEARD_SECONDS
        if now - self._looked_around_at < _LOOK_AROUND_SECONDS:
            return False
        self._looked_around_at = now
        seen = processes.see(host, (), network=False, writers_visible=False)
        ours = [each for each in seen.servers if each.ours is not False]
        return len(ours) == 1 and ours[0].connections in (0, 1)

    def _may_cure(self, layer: str, now: float) -> bool:
        """Whether closing our request would help, and is not done too often."""
        if self.target.host is None or layer in self._shared:
            return False
        return self._pace.allows(now)

    def _lost_unheard(self, layer_progress: LayerProgress, now: float) -> int:
        """Bytes that are on the disk and that the server counts no more, where that is much."""
        if not layer_progress.wants_weighing(now):
            return 0
        with ExitStack() as opened:
            store = self._store(opened)
            if store is None:
                return 0
            lost = layer_progress.weigh(scan.begun(store, (layer_progress.digest,)), now)
        return lost if lost >= _UNHEARD_LOSS else 0

    # ------------------------------------------------------------ the manifest, and what is here

    def _ask_manifest(self) -> registry_cache.Answer:
        with ExitStack() as opened:
            return registry_cache.manifest(
                self._store(opened), self.name, insecure=self.options.insecure
            )

    def _expect(self, sizes: Mapping[str, int]) -> None:
        """Set the bar on the layers of the manifest as it is now."""
        here = self._finished(sizes)
        if self._present is None:
            self._present = here
        self._digests = frozenset(sizes)
        self._bar.expect(sizes, here)

    def _finished(self, sizes: Mapping[str, int]) -> frozenset[str]:
        with ExitStack() as opened:
            store = self._store(opened)
            return frozenset() if store is None else scan.present(store, sizes)

    def _have_nothing(self, *, own: bool) -> None:
        """There is nothing to mend yet; the room for mending on a full disk is set aside."""
        from watcher.act import disk_reserve

        self._count_anew({}, lost=own)
        with ExitStack() as opened:
            store = self._store(opened)
            if store is None:
                return
            with suppress(LockedError, OSError), journal.locked(store, 0.0):
                disk_reserve.set_aside(store)

    def _is_begun(self) -> bool:
        """Whether there is anything of an unfinished layer, or of an act that was killed."""
        from watcher.act import transaction

        with ExitStack() as opened:
            host, store = self.target.host, self._store(opened)
            if host is None or store is None:
                return False
            begun = not self._digests.isdisjoint(scan.unfinished(store))
            return begun or transaction.unfinished(host, store)

    def _judge_manifest(self) -> End:
        """Whether the manifest that the server has written is a model's at all."""
        with ExitStack() as opened:
            store = self._store(opened)
            if store is None:
                return End()
            try:
                return _of_manifest(verification.read(f"manifests/{self.name.path}", store))
            except OSError:
                return End()  # it is not in the store that is known here

    def _is_here(self, raw: bytes) -> bool:
        """Whether the store has this very manifest, and all that it names."""
        with ExitStack() as opened:
            store = self._store(opened)
            if store is None or self._bar.present < self._bar.total:
                return False
            path = f"manifests/{self.name.path}"
            try:
                same = orjson.loads(verification.read(path, store)) == orjson.loads(raw)
                return bool(same) and not verification.in_doubt(store, self._bar.sizes)
            except (OSError, orjson.JSONDecodeError):
                return False

    def _disk_fault(self) -> End | None:
        """What no retry cures of the disk, for the layers that are missing."""
        missing = self._bar.missing
        if self.target.host is None or not missing:
            return None
        found = disk.fault(self.target.host, max(missing))
        return None if found is None else End(*found)

    def _explained(self, end: End) -> End:
        """The same end, with the reason where the server hides what the registry or disk says."""
        if end.cause is None or not end.cause.passes:
            return end
        if hides_why(end.text) and self._layer:
            return self._answer_of_registry() or end
        if end.cause in (Cause.RESETS, Cause.SILENCE) and (fault := self._disk_fault()):
            return fault
        if end.cause is Cause.SILENCE and self._layer:
            return self._answer_of_registry() or end
        return end

    def _answer_of_registry(self) -> End | None:
        """Why the registry does not give the layer under way, if it says so to us, too."""
        try:
            answer = registry.layer(self.name, self._layer, insecure=self.options.insecure)
        except registry.NoAddressError as error:
            return End(Cause.BAD_ADDRESS, str(error))
        except OSError:
            return None
        what = f"for layer {names.short(self._layer)}"
        if answer.status == 200 and answer.kind == "text/html":
            return End(Cause.PORTAL, f"{self.name.host} answers with a web page {what}")
        # The server may have a token, which we have not.
        if answer.status < 400 or answer.status in (401, 416):
            return None
        cause = of_status(answer.status, of_layer=True)
        return (
            None if cause.passes else End(cause, f"{self.name.host} answers {answer.status} {what}")
        )

    def _look_for_room(self) -> Generator[Update, None, str]:
        """Say where the disk takes this model, but not all that is unfinished beside it, too.

        Returns why it can't take the rest of this one; "" where it can.
        """
        with ExitStack() as opened:
            store = self._store(opened)
            if store is None:
                return ""
            room = os.fstatvfs(store)
            begun = scan.begun(store, self._digests)
            others = scan.unfinished(store) - self._digests
        free = room.f_bavail * room.f_frsize
        missing = self._bar.total - max(self._bar.done, self._bar.present + begun)
        if missing > free:
            return f"{decimal(missing)} are missing, and the disk has {decimal(free)} free"
        more = repair.lacking(self.target, others)
        if missing + more > free:
            yield self._say(
                f"the disk has {decimal(free)} free: enough for the {decimal(missing)} that are "
                f"missing, but other unfinished downloads lack {decimal(more)} more"
            )
        return ""

    # ------------------------------------------------------------ mending

    def _heal(self, end: End, tries: int) -> Generator[Update, None, bool]:
        """What another try takes after such an end. Returns whether there can be one."""
        yield self._say(end.text)
        if end.cause is Cause.SERVER_GONE:
            return (yield from self._await_server(end, tries))
        if end.cause is Cause.BLOCKED:
            self._pulled |= repair.blocked(self.target, self._digests)
        yield from self._mend(own=True)
        self._pace.note(self._bar.done)
        if end.cause not in (Cause.RESETS, Cause.SILENCE) or tries > 1:
            longest = min(_LONGEST_PAUSE, 2.0 ** min(tries, 6))
            pause = longest * random.uniform(0.5, 1.0)  # noqa: S311 - many clients, no secret
            yield from self._wait_for_next(end, tries, pause)
        return True

    def _wait_for_next(self, end: End, tries: int, seconds: float) -> Iterator[Update]:
        """Rest until the next try, and say what for, which one it is, and when it is."""
        assert end.cause is not None
        most = None if self.options.until_done else _TRIES
        waiting = Waiting(end.cause.awaited, end.text, tries + 1, most, time.time() + seconds)
        with self._awaiting(waiting):
            yield self._say(f"{waiting.told} in {advice.duration(seconds)}")
            self._rest(seconds)

    @contextmanager
    def _awaiting(self, waiting: Waiting) -> Iterator[None]:
        """Updates say so as long as this lasts."""
        self._waiting = waiting
        try:
            yield
        finally:
            self._waiting = None

    def _await_server(self, end: End, tries: int) -> Generator[Update, None, bool]:
        """Wait until the server answers; what it left half done is mended meanwhile.

        Returns False where it has not come in time.
        """
        patience = float("inf") if self.options.until_done else self.options.server_seconds
        long = "" if self.options.until_done else f", {patience:.0f} s at most"
        most, ends = (None, None) if self.options.until_done else (_TRIES, time.time() + patience)
        waiting = Waiting(Cause.SERVER_GONE.awaited, end.text, tries + 1, most, ends)
        with self._awaiting(waiting):
            helps = self._helps(Cause.SERVER_GONE) or Cause.SERVER_GONE.step
            yield self._say(f"{waiting.told} as soon as it answers{long}: {helps}")
            return (yield from self._until_it_answers(time.monotonic() + patience))

    def _until_it_answers(self, until: float) -> Generator[Update, None, bool]:
        # At once, before somebody starts it again: a process that was killed closes its files soon.
        yield from self._mend(own=True)
        while time.monotonic() < until and not self.cancelled():
            if server.version(self.target.url) is not None:
                yield from self._mend(own=True)
                return True
            self._rest(1.0)
        return self.cancelled()

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.cancelled():
            time.sleep(_TICK_SECONDS)

    def _mend(self, *, own: bool) -> Iterator[Update]:
        """Make true sidecars of what is on the disk. `own`: our request has just ended."""
        if self.target.host is None or not self._digests:
            return
        if not self._is_begun():
            self._have_nothing(own=own)
            return
        pulled = frozenset(self._pulled) if own else None
        report = yield from repair.mend(
            self.target, self._digests, pulled, self.cancelled, self._say
        )
        if report is None:
            return
        held = repair.held(report)
        if own and not held <= self._shared:
            self._shared |= held
            goes_on = "goes on with it" if self.cancelled() else "pulls it, too: joined"
            yield self._say(f"another client {goes_on}")
        claimed = repair.claimed(report)
        self._count_anew(claimed, lost=own)
        self._uncounted |= {
            digest: rest if rest <= claimed[digest] // 2 + _ROUNDINGS else _NEVER_WEIGHED
            for digest, rest in repair.unclaimed(report).items()
        }
        for each in repair.told(report):
            yield self._say(each)

    def _count_anew(self, claimed: Mapping[str, int], *, lost: bool) -> None:
        """Set the bar on what is here now, with so many bytes of each unfinished layer.

        `lost`: what is less than before was lost by our request; what is more was not, after all.
        """
        before = self._bar.done
        self._bar.here(claimed, self._finished(self._bar.sizes))
        if lost:
            self.meter.correct(self._bar.done - before)
        self._uncounted = dict.fromkeys(self._digests, 0)

    def _prove(self) -> Generator[Update, None, Proof]:
        """Whether the layers are what their names say, as far as that is in doubt or asked for.

        The server has hashed what it has fetched just now, and nothing else.
        """
        wanted = self._in_doubt()
        if wanted is None or (self.options.verify and self.target.host is None):
            asked = self.options.verify
            why = self.target.why or "its manifest is not in the store that is known here"
            return Proof(cause=Cause.UNVERIFIED if asked else None, why=why)
        if self.options.verify and not self._proved:
            wanted |= self._digests if self._present is None else self._present
        if not wanted:
            return Proof()
        if download_states.may_follow(self.record.state, State.VERIFYING):
            yield self._change(state=State.VERIFYING)
        found = yield from verification.prove(self.target, wanted, self.cancelled, self._say)
        self._proved = found.cause is None
        return found

    def _in_doubt(self) -> frozenset[str] | None:
        """The layers that are perhaps not right; None where the model is not in a store here."""
        with ExitStack() as opened:
            store = self._store(opened)
            sizes = None if store is None else verification.layers(store, self.name)
            return None if store is None or sizes is None else verification.in_doubt(store, sizes)

    # ------------------------------------------------------------ telling

    def _count(self, status: Status) -> int:
        """Take up the bytes that a line says are here. Returns how many of its layer were lost."""
        if status.digest:
            lost = self._bar.note(status.digest, status.total, status.completed)
            # The manifest may be known to the server alone.
            if status.digest in self._bar.sizes and status.digest not in self._pulled:
                self._digests |= {status.digest}
                self._pulled.add(status.digest)
            return lost
        self._bar.note_all(status.total, status.completed)
        return 0

    def _measure(self, now: float, came: int | None, *, fresh: bool) -> None:
        """Take up the bytes that have come since the last line; None: none are to come."""
        if came is None:
            self.meter.rest(now)
        elif not fresh:
            self.meter.add(now, came)
        else:
            # Far away nobody knows what a layer had before it was first told of.
            self.meter.add(now, 0 if self.target.host is None else max(0, came))

    def _progress(self, state: State | None, now: float) -> Update:
        """What the server says now."""
        rate = self.meter.rate(now)
        changes: dict[str, object] = {
            "downloaded_bytes": self._bar.done,
            "total_bytes": self._bar.total,
            "bytes_per_second": rate,
            "lost_bytes": self.meter.lost,
            "resets": self.meter.resets,
            "stalls": self.meter.stalls,
        }
        # The server is sometimes too quick to tell of a state, and a retry goes back in silence.
        if state is not None and download_states.may_follow(self.record.state, state):
            changes["state"] = state
        left = self.meter.seconds_left(now, self._bar.total - self._bar.done)
        return self._change(changes, left)

    def _change(
        self, changes: Mapping[str, object] | None = None, left: float | None = None, **more: object
    ) -> Update:
        """Change the record: here at once, on the disk with each state and now and then."""
        given = {**(changes or {}), **more}
        now = time.time()
        before = self.record.state
        self.record = records.after(self.record, given, now, self.name.shown)
        self._unkept.update(given)
        if self.record.state is not before or time.monotonic() - self._kept_at >= _KEEP_SECONDS:
            self._keep()
        return Update(self.record, left, waiting=self._waiting)

    def _keep(self) -> None:
        self._kept_at = time.monotonic()
        folder = self._records_folder()
        if not folder:
            return
        try:
            with folders.opened_store(folder) as opened:
                records.drive(self._driven, opened)  # anew, where it was removed
                records.change(opened, self.model, self._unkept)
        except (WatchError, OSError):
            return  # told by whoever reads it; the pull goes on
        self._unkept = {}

    def _say(self, text: str) -> Update:
        """An update with something to say; the same is said once in a row."""
        note = "" if text in self._told else text
        self._told = {text}
        return Update(self.record, None, note, self._waiting)

    def _log(self, event_type: EventType, message: str, **details: object) -> None:
        if self.target.host is not None:
            shown = self.name.shown
            event = Event(time.time(), event_type, message, shown, {"models": [shown], **details})
            journal.announce(self.target.host, self.target.settings, event)

    def _store(self, opened: ExitStack) -> int | None:
        """The descriptor of the store, while `opened` is; None where there is none here."""
        if self.target.host is None:
            return None
        try:
            return opened.enter_context(folders.opened_store(self.target.host.store))
        except OSError:
            return None


def _share(part: int, whole: int) -> str:
    """A part of some bytes in the unit of the whole: ``41.2 of 46.0 GB``."""
    scale = 1000 ** ((len(str(whole)) - 1) // 3)
    number = f"{part / scale:,.1f}" if scale > 1 else f"{part}"
    return f"{number} of {decimal(whole)}"


def _of_manifest(raw: bytes) -> End:
    """The end of a pull whose manifest names no layer, or what can be none; a server takes it."""
    try:
        flaw = manifests.flaw(raw)
    except ValueError as error:
        flaw = str(error)
    return End(Cause.BAD_MANIFEST, f"its manifest is wrong: {flaw}") if flaw else End()


def _end(proved: Proof) -> End:
    """The end of a pull whose model the server has, as far as its layers are known to be right."""
    if proved.gone:
        missing = names.short(min(proved.gone))
        return End(Cause.DAMAGED, f"{missing} was fetched again, and is not there or not right")
    return End(proved.cause, proved.why if proved.cause is not None else "")

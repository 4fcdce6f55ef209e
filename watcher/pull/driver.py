"""One model's pull, driven through the server to its end over whatever breaks on the way.

The server throws away what an attempt has downloaded when its connection is reset, and believes
progress files that it could not write in time. So a loss, a stall or the server's death ends our
request, a reconcile writes progress files for what is on the disk, and the pull is requested again.

`Pull.updates` is the sequence: note what is on disk, attempt, verify, and after a failure repair,
wait and attempt again.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import orjson
from rich.filesize import decimal

from watcher.act import journal
from watcher.decide import findings
from watcher.errors import LockedError, WatchError, without_secrets
from watcher.observe import place, processes, scan
from watcher.ollama import environment, manifests, names, registry, server
from watcher.ollama.pull_stream import PullStream, ServerGoneError, Status
from watcher.pull import disk, repair, verification
from watcher.pull.failures import Asked, Cause, End, hides_why, of_error, of_status
from watcher.pull.layers import LayerLocks, LayerProgress, ModelProgress
from watcher.pull.repair import Pace
from watcher.pull.speed import STALL_SECONDS, Meter
from watcher.pull.target import Target
from watcher.pull.verification import Proof
from watcher.state import folders, records, registry_cache, state_folder
from watcher.state.event_log import Event, EventType
from watcher.state.records import Record, State
from watcher.system import advice

#: No line at all for so long while the manifest is requested: the server waits without any limit.
_SILENT_SECONDS = 120.0
#: A request that waits for another one's layer gets lines many times a second. One that gets none
#: from a server far away for so long waits for the registry, and may be closed.
_NO_LINE_SECONDS = 30.0
#: The server's connections are counted this often: it takes a scan of all processes.
_CONNECTIONS_SECONDS = 1.0
#: How long a server that is gone is waited for, unless `until_done` is set.
SERVER_SECONDS = 300.0
#: Attempts in a row that bring nothing, unless `until_done` is set.
_TRIES = 8
#: Layers that were damaged on their way, and downloaded again from the start: then it is no
#: accident.
_MISMATCHES = 3
#: Less than this on the disk beyond what the server counts may be a file system's roundings.
_LEAST_LOSS = 8 << 20
#: A server tries a part six times, 63 s long, before it reports what is in its way. So once after a
#: silence it gets that time.
_REASON_SECONDS = 90.0
_TICK_SECONDS = 0.2
#: Lines arrive sixteen times a second; updates are given this often.
_SHOW_SECONDS = 0.25
#: Changes besides the state are saved this often.
_SAVE_SECONDS = 1.0
_LONGEST_PAUSE = 60.0
#: What the disk has beyond half as much again as is recorded, and this, is no data but a file
#: system's own: copies, parity.
_ROUNDINGS = 64 << 20
_NEVER_WEIGHED = 1 << 62
_WAITS_FOR_OTHER = (
    "waiting for a layer that another client began; if that client is gone, restart the server"
)
#: No line reports a layer's end, but these come after the last of them.
_ALL_ON_DISK = frozenset({State.VERIFYING, State.WRITING_MANIFEST})
_WAITS_UNTIL_SAFE = (
    "stopping when it is safe: closing the request now could crash the server; "
    "a second Ctrl-C stops at once"
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is pulled."""

    insecure: bool = False
    #: Retry temporary failures without limit.
    until_done: bool = False
    #: Also hash the layers that were on disk before.
    verify: bool = False
    stall_seconds: float = STALL_SECONDS
    server_seconds: float = SERVER_SECONDS

    def words(self) -> Iterator[str]:
        if self.insecure:
            yield "--insecure"
        if self.until_done:
            yield "--until-done"
        if self.verify:
            yield "--verify"
        if self.stall_seconds != STALL_SECONDS:
            yield f"--stall={self.stall_seconds:g}s"


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

    record: Record
    seconds_left: float | None = None
    note: str = ""
    #: None while something is done.
    waiting: Waiting | None = None


_CANCELED = End(Cause.INTERRUPTED, "canceled")


@dataclass(slots=True)
class Pull:
    """A pull of `model` (as people write it). Iterate over `updates`; then `end` has its end.

    `cancelled` is asked several times a second. When it returns True the request is closed as soon
    as that is safe, what was downloaded is made resumable, and the updates end.
    """

    target: Target
    model: str
    options: Options = field(default_factory=Options)
    cancelled: Callable[[], bool] = lambda: False
    #: Shared with pulls beside this one.
    layer_locks: LayerLocks = field(default_factory=LayerLocks)
    end: End = field(default_factory=End)
    #: A bug of ours, where that ended it.
    fault: Exception | None = None
    record: Record = field(default_factory=Record)
    meter: Meter = field(init=False)
    name: names.ModelName = field(init=False)
    _driving: state_folder.LongLock = field(init=False)
    _progress: ModelProgress = field(default_factory=ModelProgress)
    _digests: frozenset[str] = frozenset()
    #: Those of them that were in the store before.
    _present: frozenset[str] | None = None
    #: Those that our requests have pulled.
    _pulled: set[str] = field(default_factory=set)
    #: Those that were downloaded once more because they were missing or damaged.
    _fetched_again: frozenset[str] = frozenset()
    #: The registry gave us its manifest, and wanted no token for it.
    _is_open: bool = False
    #: What `Options.verify` asks for was done.
    _is_verified: bool = False
    _is_resuming_noted: bool = False
    _is_astray_noted: bool = False
    _last_note: str = ""
    _saved_at: float = 0.0
    _unsaved: dict[str, object] = field(default_factory=dict)
    #: Layers that another client pulls, too: closing our request would end nothing.
    _shared: set[str] = field(default_factory=set)
    _pace: Pace = field(default_factory=Pace)
    _connections_at: float = -_CONNECTIONS_SECONDS
    #: Bytes of each layer on the disk that its progress files did not record at the last scan.
    _uncounted: dict[str, int] = field(default_factory=dict)
    #: The layer of the server's last line.
    _layer: str = ""
    #: Bytes of each layer by the manifest, and by the registry's answer to the server.
    _promised: Mapping[str, int] = field(default_factory=dict)
    _announced: dict[str, int] = field(default_factory=dict)
    #: The layers of which both were compared with what the registry has, in this attempt.
    _compared: set[str] = field(default_factory=set)
    #: Lengths that progress files are to have in place of what the registry has announced.
    _corrected: dict[str, int] = field(default_factory=dict)
    #: Why this attempt can't arrive, once that is known.
    _doomed: End | None = None
    #: Attempts that have failed in a row with nothing gained, and those of them in silence.
    _tries: int = 0
    _silences: int = 0
    _mismatches: int = 0
    #: The most bytes that were on disk after an attempt.
    _best: int = 0
    _waiting: Waiting | None = None

    def __post_init__(self) -> None:
        """Raises TargetError for what is not a model's name."""
        self.name = names.to_model(self.model)
        self.meter = Meter(stall_seconds=self.options.stall_seconds)
        self._driving = records.driving_lock(self.model)

    @property
    def command(self) -> str:
        """What helps against its end, as a command that can be pasted; "" where none does."""
        return "" if self.end.cause is None else self._helps(self.end.cause)

    def _helps(self, cause: Cause) -> str:
        url = "" if self.target.url == environment.server_url("") else self.target.url
        asked = Asked(self.name.shown, url, options=tuple(self.options.words()))
        host = self.target.host or self.target.named
        if host is not None:
            is_its = self.target.its is not None
            asked = asked._replace(store=host.store, found_by=host.found_by, is_its=is_its)
        return cause.command(asked)

    # ------------------------------------------------------------ the sequence

    def updates(self) -> Iterator[Update]:
        """Drive the pull until the model is complete, can't be, or the pull was canceled.

        Whatever goes wrong is the end of this pull alone.
        """
        try:
            # While it is held, nobody else infers from the store what the record has.
            path = self._records_folder()
            if path:
                with suppress(OSError), folders.opened_store(path) as folder:
                    records.drive(self._driving, folder)
            self.end = yield from self._drive()
            if self.end.cause is None:
                yield self._change(state=State.COMPLETED)
                self._log(EventType.PULL_COMPLETED, f"{self.name.shown} is complete")
            else:
                # What was downloaded is kept for the next pull, whoever makes that.
                yield from self._repair(own=True)
                yield from self._failed(self.end)
        except WatchError as error:
            yield from self._failed(End(Cause.UNKNOWN, str(error)))
        except Exception as error:
            self.fault = error
            text = names.printable(without_secrets(f"{type(error).__name__}: {error}"))
            yield from self._failed(End(Cause.FAULT, text))
        finally:
            self._driving.release()
            self.layer_locks.release(self.name.shown)

    def _drive(self) -> Generator[Update, None, End]:
        yield from self._note_on_disk()
        if self.target.why:
            yield self._note(f"{self.target.why}; so resets and stalls can't be repaired")
        while True:
            self.end = end = yield from self._attempt_and_verify()
            if end.cause is None:
                return end
            if end.cause is Cause.WRONG_LENGTH and self._is_correctable():
                yield self._note(f"{end.text}; continuing with that")
                yield from self._repair(own=True)
                continue
            if self.record.downloaded_bytes > self._best:
                self._tries, self._silences, self._best = 0, 0, self.record.downloaded_bytes
            self._tries += 1
            self._mismatches += end.cause is Cause.MISMATCH
            self._silences += end.cause is Cause.SILENCE
            if not self._may_retry(end.cause):
                return end
            final = yield from self._prepare_retry(end, end.cause)
            if final is not None:
                return final

    def _is_correctable(self) -> bool:
        """Whether progress files of the right length, which a server believes, may help now."""
        right = self._promised.get(self._layer)
        if self.target.host is None or right is None or self._layer in self._corrected:
            return False
        self._corrected[self._layer] = right
        return True

    def _may_retry(self, cause: Cause) -> bool:
        enough = self._tries >= _TRIES and not self.options.until_done
        return cause.passes and not enough and self._mismatches < _MISMATCHES

    def _attempt_and_verify(self) -> Generator[Update, None, End]:
        """An attempt, and whether its layers are right; those that are not are pulled again."""
        while True:
            end = yield from self._attempt()
            if end.cause is None:
                end = self._check_stored_manifest()
            if end.cause is not None:
                return end
            proof = yield from self._verify()
            if not proof.gone:
                return proof.end
            if proof.gone <= self._fetched_again:
                missing = names.short(min(proof.gone))
                why = f"{missing} was downloaded again, but is missing or damaged"
                return End(Cause.DAMAGED, why)
            self._fetched_again |= proof.gone

    def _attempt(self) -> Generator[Update, None, End]:
        """Everything from the manifest to the end of one request. Returns its `End`."""
        if self.cancelled():
            return _CANCELED
        self._announced, self._compared, self._doomed = {}, set(), None
        yield self._change(state=State.STARTING)
        ended = yield from self._prepare()
        if ended is not None:
            return ended
        if self.cancelled():
            return _CANCELED
        try:
            with PullStream(self.target.url, self.model, insecure=self.options.insecure) as stream:
                end = yield from self._follow(stream)
            return self._explained(end)
        except ServerGoneError as error:
            return End(Cause.SERVER_GONE, f"the server at {self.target.url}: {error}")
        finally:
            self.meter.rest(time.monotonic())

    def _prepare(self) -> Generator[Update, None, End | None]:
        """Ask for the manifest, and see to what is on disk. Returns the end where there is one.

        Without a manifest the server reports why: it may see what only its user may see.
        """
        with self._opened() as store:
            answer = registry_cache.manifest(store, self.name, insecure=self.options.insecure)
        self._is_open = answer.raw is not None and not answer.problem
        if answer.raw is None:
            return None
        if self._is_open and (flawed := _of_manifest(answer.raw)).cause is not None:
            return flawed
        sizes = registry.sizes(answer.raw)
        right = self._right_sizes(sizes)
        self._expect({**sizes, **right})
        yield self._change(
            state=State.PULLING_MANIFEST,
            manifest_pulled=True,
            total_bytes=self._progress.total,
            present_bytes=self._progress.present,
            downloaded_bytes=self._progress.done,
            resume_supported=self._progress.total > 0,
        )
        if answer.problem:
            yield self._note(f"{answer.problem}; using the stored manifest")
        for digest, size in sorted(right.items()):
            wrong = f"its manifest gives {names.short(digest)} {sizes[digest]:,} bytes"
            yield self._note(f"{wrong}, but {size:,} are right; its publisher must correct that")
        if self._is_complete(answer.raw):
            yield self._note("up to date")
            return End()
        yield from self._note_astray()
        yield from self._wait_for_layers()
        repaired = list(self._repair(own=False))
        if self._progress.done > self._progress.present and not self._is_resuming_noted:
            yield self._note_resuming()
        self._is_resuming_noted = False  # each other attempt notes it again
        yield from repaired
        ends = self._disk_fault() or (yield from self._check_room())
        return None if ends is not None and self._is_oversized() else ends

    # ------------------------------------------------------------ before the request

    def _note_on_disk(self) -> Iterator[Update]:
        """Say first of all what an earlier pull has left, by the manifest that it has kept."""
        with self._opened() as store:
            known = None if store is None else registry_cache.cached(store).get(self.name.key)
            if store is None or known is None:
                return
            sizes = registry.sizes(known.raw.encode())
            present = scan.present(store, sizes)
            if not scan.begun(store, sizes.keys() - present):
                return
        report = repair.look(self.target, sizes.keys() - present)
        if report is None:
            return
        self._progress.expect(sizes, present)
        self._progress.here(repair.trusted(report), present)
        if self._progress.done > self._progress.present:
            self._is_resuming_noted = True
            yield self._note_resuming()

    def _note_resuming(self) -> Update:
        done, total = self._progress.done, self._progress.total
        # In the unit of the whole: ``41.2 of 46.0 GB``.
        scale = 1000 ** ((len(str(total)) - 1) // 3)
        number = f"{done / scale:,.1f}" if scale > 1 else f"{done}"
        return self._note(f"resuming: {number} of {decimal(total)} on disk")

    def _note_astray(self) -> Iterator[Update]:
        """Say once, before anything is downloaded, what of it lies where no server looks."""
        if self._is_astray_noted:
            return
        self._is_astray_noted = True
        missing = self._missing() & self._progress.sizes.keys()
        sizes = {digest: self._progress.sizes[digest] for digest in missing}
        for text in repair.astray(self.target, self.name.shown, sizes):
            yield self._note(text)

    def _wait_for_layers(self) -> Iterator[Update]:
        """Let a pull beside this one download the layers that both miss."""
        while other := self.layer_locks.claim(self.name.shown, self._missing()):
            if self.cancelled():
                return
            yield self._note(f"waiting for {other}, which downloads a layer of it")
            self._rest(_TICK_SECONDS)

    def _missing(self) -> frozenset[str]:
        return self._digests - (self._present or frozenset())

    def _expect(self, sizes: Mapping[str, int]) -> None:
        present = self._finished(sizes)
        if self._present is None:
            self._present = present
        self._digests, self._promised = frozenset(sizes), sizes
        self._progress.expect(sizes, present)

    def _finished(self, sizes: Mapping[str, int]) -> frozenset[str]:
        with self._opened() as store:
            return frozenset() if store is None else scan.present(store, sizes)

    @property
    def _boot(self) -> str:
        """The id of this start of the machine, where the store is here."""
        return "" if self.target.host is None else place.boot(self.target.host)

    def _right_sizes(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        """The sizes of finished layers that the manifest has wrong, as far as they were hashed."""
        with self._opened() as store:
            if store is None or len(scan.present(store, sizes)) == len(sizes):
                return {}
            return verification.right_sizes(store, sizes, self._boot)

    def _is_oversized(self) -> bool:
        """Whether the manifest gives its largest missing layer more bytes than the registry has."""
        missing = {each: self._promised[each] for each in self._missing() & self._promised.keys()}
        largest = max(missing, key=missing.__getitem__, default="")
        return bool(largest) and self._has(largest, missing[largest] - 1) is False

    def _has(self, digest: str, at: int) -> bool | None:
        """Whether the registry has a byte of a layer; None where it does not report that."""
        try:
            answer = registry.layer(self.name, digest, at, insecure=self.options.insecure)
        except OSError:
            return None
        return answer.has(at)

    def _is_complete(self, raw: bytes) -> bool:
        """Whether the store has this very manifest, and all that it names."""
        with self._opened() as store:
            if store is None or self._progress.present < self._progress.total:
                return False
            path = f"manifests/{self.name.path}"
            try:
                same = orjson.loads(verification.read(path, store)) == orjson.loads(raw)
                return bool(same) and not verification.in_doubt(
                    store, self._progress.sizes, self._boot
                )
            except (OSError, orjson.JSONDecodeError):
                return False

    def _disk_fault(self) -> End | None:
        """What of the disk no retry can change, for the layers that are missing."""
        missing = self._progress.missing
        if self.target.host is None or not missing:
            return None
        return disk.fault(self.target.host, max(missing))

    def _check_room(self) -> Generator[Update, None, End | None]:
        """Note where the disk takes this model, but not the other unfinished downloads, too.

        Returns the end where it can't take the rest of this one.
        """
        with self._opened() as store:
            if store is None:
                return None
            room = os.fstatvfs(store)
            begun = scan.begun(store, self._digests)
            others = scan.unfinished(store) - self._digests
        free = room.f_bavail * room.f_frsize
        missing = self._progress.total - max(self._progress.done, self._progress.present + begun)
        if missing > free:
            why = f"{decimal(missing)} to download, but the disk has only {decimal(free)} free"
            return End(Cause.DISK_FULL, why)
        report = repair.look(self.target, others)
        more = 0 if report is None else findings.lacking(report.diagnosis.diagnosed)
        if missing + more > free:
            yield self._note(
                f"the disk has {decimal(free)} free: enough for this model ({decimal(missing)}), "
                f"but not also for other unfinished downloads ({decimal(more)})"
            )
        return None

    # ------------------------------------------------------------ the request

    def _follow(self, stream: PullStream) -> Generator[Update, None, End]:
        """Read the stream to its end, or until our request has to be closed. Returns the `End`."""
        layer, shows_at = LayerProgress(time.monotonic(), self._uncounted), 0.0
        while True:
            now = time.monotonic()
            ends = self._wanted_end(now - layer.changed_at)
            if ends and self._may_close(layer, now):
                return ends
            if ends:
                yield self._note(_WAITS_FOR_OTHER if layer.is_joined else _WAITS_UNTIL_SAFE)
            status = stream.next(_TICK_SECONDS)
            if status is None:
                continue
            now = time.monotonic()
            if status.error:
                return End(of_error(status.error), status.error)
            state = records.of_status(status.text)
            if state is State.COMPLETED:
                return End()
            changes = state not in (None, self.record.state)
            fresh = self._take(status, layer, changes=changes)
            self._doomed = self._doomed or self._wrong_length(status)
            if fresh or changes or now >= shows_at:
                shows_at = now + _SHOW_SECONDS
                yield self._reported(state, now)
            lost = layer.lost or self._lost_unreported(layer, now)
            if lost and self._may_repair(layer.digest, now) and self._may_close(layer, now):
                return End(Cause.RESETS, f"a broken connection lost {decimal(lost)}")

    def _take(self, status: Status, layer: LayerProgress, *, changes: bool) -> bool:
        """Take up a line. Returns whether its layer is another one than before."""
        now = time.monotonic()
        fresh = layer.take(status, now)
        self._layer = layer.digest
        if changes:
            layer.changed_at = now
        before = self._progress.done
        layer.lost += self._count(status)
        if records.of_status(status.text) in _ALL_ON_DISK:
            self._progress.complete()
        came = self._progress.done - before
        if not came and not status.total:
            self.meter.rest(now)  # none are to come
        elif fresh:
            # Far away nobody knows what a layer had before its first line.
            self.meter.add(now, 0 if self.target.host is None else max(0, came))
        else:
            self.meter.add(now, came)
        return fresh

    def _count(self, status: Status) -> int:
        """Take up the bytes that a line counts. Returns how many of its layer were lost."""
        if not status.digest:
            self._progress.note_all(status.total, status.completed)
            return 0
        lost = self._progress.note(status.digest, status.total, status.completed)
        # The manifest may be known to the server alone.
        if status.digest in self._progress.sizes and status.digest not in self._pulled:
            self._digests |= {status.digest}
            self._pulled.add(status.digest)
        return lost

    def _wanted_end(self, quiet: float) -> End | None:
        if self.cancelled():
            return _CANCELED
        if self._doomed is not None:
            return self._doomed
        longest = math.inf  # checking a large layer may take for ever
        if self.record.state is State.DOWNLOADING:
            until_reason = _REASON_SECONDS if self._silences == 1 else 0.0
            longest = max(self.options.stall_seconds, until_reason)
        elif self.record.state in (State.STARTING, State.PULLING_MANIFEST):
            longest = _SILENT_SECONDS
        if quiet > longest:
            return End(Cause.SILENCE, f"no bytes for {advice.duration(quiet)}")
        return None

    def _wrong_length(self, status: Status) -> End | None:
        """The end of a layer of which the registry announces another length than it has.

        Where the manifest's length is the wrong one the server arrives all the same.
        """
        digest, promised = status.digest, self._promised.get(status.digest, 0)
        if not status.completed < status.total:
            return None  # finished before, or still being prepared
        self._announced[digest] = status.total
        if promised in (0, status.total) or digest in self._compared:
            return None
        self._compared.add(digest)
        longer = max(promised, status.total)
        has_it = self._has(digest, longer - 1)
        if has_it is None or has_it == (status.total > promised):
            return None
        return self._misannounced(digest)

    def _misannounced(self, digest: str) -> End:
        announced, promised = self._announced[digest], self._promised[digest]
        what = f"{announced:,} bytes of layer {names.short(digest)}"
        text = f"{self.name.host} announces {what}, but has {promised:,}, as its manifest says"
        return End(Cause.WRONG_LENGTH, text)

    def _may_close(self, layer: LayerProgress, now: float) -> bool:
        """Whether no layer is being prepared, or for nobody but us.

        Closing a request for a layer that another pull is still preparing makes the server panic;
        closing the one that prepares it leaves the others waiting for it for ever, and the first of
        them that is closed makes it panic (docs/store.md).
        """
        if layer.is_prepared(now) or self.record.state in _ALL_ON_DISK:
            return True
        if layer.is_joined:
            return False
        host = self.target.host
        if host is None:
            # Other clients there are not visible. A request that waits for one gets lines often.
            return now - layer.at >= _NO_LINE_SECONDS
        if now - self._connections_at < _CONNECTIONS_SECONDS:
            return False
        self._connections_at = now
        seen = processes.see(host, (), network=False, writers_visible=False)
        ours = [each for each in seen.servers if each.ours is not False]
        return len(ours) == 1 and ours[0].connections in (0, 1)

    def _may_repair(self, layer: str, now: float) -> bool:
        if self.target.host is None or layer in self._shared:
            return False
        return self._pace.allows(now)

    def _lost_unreported(self, layer: LayerProgress, now: float) -> int:
        """Bytes that are on the disk and that the server counts no more, where that is much."""
        if not layer.wants_weighing(now):
            return 0
        with self._opened() as store:
            if store is None:
                return 0
            lost = layer.weigh(scan.begun(store, (layer.digest,)), now)
        return lost if lost >= _LEAST_LOSS else 0

    # ------------------------------------------------------------ after the request

    def _explained(self, end: End) -> End:
        """The same end, with the reason where the server hides that of registry or disk."""
        if end.cause is None or not end.cause.passes:
            return end
        if hides_why(end.text) and self._layer:
            if self._announced.get(self._layer, 0) > self._promised.get(self._layer, 1 << 62):
                return self._misannounced(self._layer)
            return self._answer_of_registry() or end
        if end.cause in (Cause.RESETS, Cause.SILENCE) and (fault := self._disk_fault()):
            return fault
        if end.cause is Cause.SILENCE and self._layer:
            return self._answer_of_registry() or end
        return end

    def _answer_of_registry(self) -> End | None:
        """Why the registry does not give the layer under way, if it refuses us, too."""
        known = self._announced.get(self._layer) or self._promised.get(self._layer, 1)
        last = max(known, 1) - 1
        try:
            answer = registry.layer(self.name, self._layer, last, insecure=self.options.insecure)
        except registry.NoAddressError as error:
            return End(Cause.BAD_ADDRESS, str(error))
        except OSError:
            return None
        what = f"for layer {names.short(self._layer)}"
        if answer.status == 200 and answer.kind == "text/html":
            return End(Cause.PORTAL, f"{self.name.host} answered with a web page {what}")
        # Where even the manifest takes a token, the server may have one, and we have none.
        if answer.status < 400 or (answer.status == 401 and not self._is_open):
            return None
        cause = of_status(answer.status, of_layer=True)
        if cause.passes:
            return None
        return End(cause, f"{self.name.host} answered {answer.status} {what}")

    def _check_stored_manifest(self) -> End:
        with self._opened() as store:
            if store is None:
                return End()
            try:
                return _of_manifest(verification.read(f"manifests/{self.name.path}", store))
            except OSError:
                return End()  # it is not in the store that is known here

    def _verify(self) -> Generator[Update, None, Proof]:
        """Whether the layers match their names, as far as that is in doubt or asked for.

        The server has hashed what it has downloaded just now, and nothing else.
        """
        doubted = self._in_doubt()
        if doubted is None or (self.options.verify and self.target.host is None):
            if not self.options.verify:
                return Proof()
            why = self.target.why or "its manifest is not in this store"
            return Proof(end=End(Cause.UNVERIFIED, why))
        if self.options.verify and not self._is_verified:
            doubted |= self._digests if self._present is None else self._present
        if not doubted:
            return Proof()
        if records.may_follow(self.record.state, State.VERIFYING):
            yield self._change(state=State.VERIFYING)
        found = yield from self._noted(verification.prove(self.target, doubted, self.cancelled))
        self._is_verified = found.end.cause is None
        return found

    def _in_doubt(self) -> frozenset[str] | None:
        """The layers that are perhaps not right; None where the model is not in a store here."""
        with self._opened() as store:
            sizes = None if store is None else verification.layers(store, self.name)
            if store is None or sizes is None:
                return None
            return verification.in_doubt(store, sizes, self._boot)

    # ------------------------------------------------------------ after a failure

    def _prepare_retry(self, end: End, cause: Cause) -> Generator[Update, None, End | None]:
        """What another attempt takes. Returns the end where there can't be one."""
        yield self._note(end.text)
        if cause is Cause.SERVER_GONE:
            return (yield from self._await_server(end))
        if cause is Cause.BLOCKED:
            self._pulled |= repair.blocked(self.target, self._digests)
        yield from self._repair(own=True)
        self._pace.note(self._progress.done)
        tries = self._tries
        if cause not in (Cause.RESETS, Cause.SILENCE) or tries > 1:
            longest = min(_LONGEST_PAUSE, 2.0 ** min(tries, 6))
            pause = longest * random.uniform(0.5, 1.0)  # noqa: S311 - many clients, no secret
            with self._awaiting(end, pause) as waiting:
                yield self._note(f"{waiting.text} in {advice.duration(pause)}")
                self._rest(pause)
        return None

    def _await_server(self, end: End) -> Generator[Update, None, End | None]:
        """Wait until the server answers; what it left half done is repaired meanwhile.

        Returns the end where it did not answer in time, or can't serve this store.
        """
        until_done = self.options.until_done
        patience = None if until_done else self.options.server_seconds
        limit = "" if patience is None else f", {patience:.0f} s at most"
        with self._awaiting(end, patience) as waiting:
            helps = self._helps(Cause.SERVER_GONE) or Cause.SERVER_GONE.step
            yield self._note(f"{waiting.text} when it answers{limit}: {helps}")
            # At once, before somebody starts it again: a killed process closes its files soon.
            yield from self._repair(own=True)
            gives_up = math.inf if patience is None else time.monotonic() + patience
            while time.monotonic() < gives_up and not self.cancelled():
                if server.version(self.target.url) is not None:
                    yield from self._repair(own=True)
                    return None
                if self.target.its and (why := disk.read_only(self.target.its.store)):
                    return End(Cause.READ_ONLY, why)
                self._rest(1.0)
            return None if self.cancelled() else end

    @contextmanager
    def _awaiting(self, end: End, seconds: float | None) -> Iterator[Waiting]:
        """Updates have it as long as this lasts; `seconds`: None for no limit."""
        assert end.cause is not None
        most = None if self.options.until_done else _TRIES
        until = None if seconds is None else time.time() + seconds
        self._waiting = Waiting(end.cause.awaited, end.text, self._tries + 1, most, until)
        try:
            yield self._waiting
        finally:
            self._waiting = None

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.cancelled():
            time.sleep(_TICK_SECONDS)

    def _failed(self, end: End) -> Iterator[Update]:
        assert end.cause is not None
        self.end = end
        # What could not be saved must not be in the way of the one thing that has to be.
        self._unsaved = {}
        yield self._change(state=State.ERROR, error=end.text)
        self._log(EventType.PULL_FAILED, f"{self.name.shown}: {end.text}", cause=end.cause.code)

    # ------------------------------------------------------------ repairing

    def _repair(self, *, own: bool) -> Iterator[Update]:
        """Write progress files for what is on the disk. `own`: our request has just ended."""
        if self.target.host is None or not self._digests:
            return
        if not self._is_begun():
            self._have_nothing(own=own)
            return
        pulled = frozenset(self._pulled) if own else None
        report = yield from self._noted(
            repair.run(self.target, self._digests, pulled, self._corrected, self.cancelled)
        )
        if report is None:
            return
        held = repair.held(report)
        if own and not held <= self._shared:
            self._shared |= held
            does = "continues it" if self.cancelled() else "also pulls it: joined"
            yield self._note(f"another client {does}")
        claimed = repair.claimed(report)
        self._count_anew(claimed, lost=own)
        for each in report.evidence.downloads:
            if each.data is not None:
                rest = each.data.allocated - claimed[each.digest]
                known = rest <= claimed[each.digest] // 2 + _ROUNDINGS
                self._uncounted[each.digest] = rest if known else _NEVER_WEIGHED
        for text in repair.notes(report):
            yield self._note(text)

    def _is_begun(self) -> bool:
        """Whether there is anything of an unfinished layer, or of a change that was killed."""
        from watcher.act import transaction

        with self._opened() as store:
            host = self.target.host
            if host is None or store is None:
                return False
            begun = not self._digests.isdisjoint(scan.unfinished(store))
            return begun or transaction.unfinished(host, store)

    def _have_nothing(self, *, own: bool) -> None:
        """There is nothing to repair yet; the room for a repair on a full disk is reserved."""
        self._count_anew({}, lost=own)
        with self._opened() as store:
            if store is None:
                return
            with suppress(LockedError, OSError), journal.locked(store, 0.0):
                journal.hold_reserve(store)

    def _count_anew(self, claimed: Mapping[str, int], *, lost: bool) -> None:
        """Count what is on disk now, with so many bytes of each unfinished layer.

        `lost`: what is less than before was lost by our request; what is more was not, after all.
        """
        before = self._progress.done
        self._progress.here(claimed, self._finished(self._progress.sizes))
        if lost:
            self.meter.correct(self._progress.done - before)
        self._uncounted = dict.fromkeys(self._digests, 0)

    # ------------------------------------------------------------ updates, records and events

    def _reported(self, state: State | None, now: float) -> Update:
        changes: dict[str, object] = {
            "downloaded_bytes": self._progress.done,
            "total_bytes": self._progress.total,
            "bytes_per_second": self.meter.rate(now),
            "lost_bytes": self.meter.lost,
            "resets": self.meter.resets,
            "stalls": self.meter.stalls,
        }
        # The server is sometimes too quick to report a state, and a retry goes back in silence.
        if state is not None and records.may_follow(self.record.state, state):
            changes["state"] = state
        missing = self._progress.total - self._progress.done
        update = self._change(**changes)
        return update._replace(seconds_left=self.meter.seconds_left(now, missing))

    def _change(self, **changes: object) -> Update:
        """Change the record: here at once, on the disk with each state and now and then."""
        before = self.record.state
        self.record = records.after(self.record, changes, time.time(), self.name.shown)
        self._unsaved.update(changes)
        if self.record.state is not before or time.monotonic() - self._saved_at >= _SAVE_SECONDS:
            self._save()
        return Update(self.record, waiting=self._waiting)

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

    def _note(self, text: str) -> Update:
        """An update with a note; the same is noted once in a row."""
        note = "" if text == self._last_note else text
        self._last_note = text
        return Update(self.record, None, note, self._waiting)

    def _noted(self, texts: Generator[str, None, T]) -> Generator[Update, None, T]:
        """Each text as an update. Returns what the generator returns."""
        while True:
            try:
                text = next(texts)
            except StopIteration as done:
                result: T = done.value
                return result
            yield self._note(text)

    def _log(self, event_type: EventType, message: str, **details: object) -> None:
        if self.target.host is not None:
            shown = self.name.shown
            given = {"models": [shown], **details, **self.meter.facts}
            event = Event(time.time(), event_type, message, shown, given)
            journal.announce(self.target.host, self.target.settings, event)

    @contextmanager
    def _opened(self) -> Iterator[int | None]:
        """The descriptor of the store; None where there is none here."""
        with ExitStack() as opened:
            store = None
            if self.target.host is not None:
                with suppress(OSError):
                    store = opened.enter_context(folders.opened_store(self.target.host.store))
            yield store


def _of_manifest(raw: bytes) -> End:
    """The end of a pull whose manifest names no layer, or an impossible one; a server takes it."""
    try:
        if not (flaw := manifests.flaw(raw)):
            registry.sizes(raw)
    except ValueError as error:
        flaw = str(error)
    return End(Cause.BAD_MANIFEST, f"its manifest is invalid: {flaw}") if flaw else End()

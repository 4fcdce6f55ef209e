"""A pull whose bytes the server moves.

The server throws away what an attempt has downloaded when its connection is reset, and believes
progress files that it could not write in time. So a loss, a stall or the server's death ends our
request, a reconcile writes progress files for what is on the disk, and the pull is requested again.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress

from rich.filesize import decimal

from watcher.act import journal
from watcher.errors import LockedError
from watcher.observe import processes, scan
from watcher.ollama import names, registry, server
from watcher.ollama.pull_stream import PullStream, ServerGoneError, Status
from watcher.pull import before, disk, repair
from watcher.pull.account import CANCELED, TICK_SECONDS, TRIES, Account, Update, Waiting
from watcher.pull.failures import Cause, End, hides_why, of_error, of_status
from watcher.pull.layers import LayerLocks, LayerProgress
from watcher.pull.repair import Pace
from watcher.state import records, registry_cache
from watcher.state.records import State
from watcher.system import advice

#: No line at all for so long while the manifest is requested: the server waits without any limit.
_SILENT_SECONDS = 120.0
#: A request that waits for another one's layer gets lines many times a second. One that gets none
#: from a server far away for so long waits for the registry, and may be closed.
_NO_LINE_SECONDS = 30.0
#: The server's connections are counted this often: it takes a scan of all processes.
_CONNECTIONS_SECONDS = 1.0
#: Layers that were damaged on their way, and downloaded again from the start: then it is no
#: accident.
_MISMATCHES = 3
#: Less than this on the disk beyond what the server counts may be a file system's roundings.
_LEAST_LOSS = 8 << 20
#: A server tries a part six times, 63 s long, before it reports what is in its way. So once after a
#: silence it gets that time.
_REASON_SECONDS = 90.0
#: Lines arrive sixteen times a second; updates are given this often.
_SHOW_SECONDS = 0.25
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


class ByServer:
    """Attempts through the server."""

    def __init__(
        self, account: Account, cancelled: Callable[[], bool], layer_locks: LayerLocks
    ) -> None:
        self._account, self._cancelled, self._layer_locks = account, cancelled, layer_locks
        #: Those that our requests have pulled.
        self._pulled: set[str] = set()
        #: The registry gave us its manifest, and wanted no token for it.
        self._is_open = False
        #: Layers that another client pulls, too: closing our request would end nothing.
        self._shared: set[str] = set()
        self._pace = Pace()
        self._connections_at = -_CONNECTIONS_SECONDS
        #: Bytes of each layer on the disk that its progress files did not record at the last scan.
        self._uncounted: dict[str, int] = {}
        #: The layer of the server's last line.
        self._layer = ""
        #: Bytes of each layer by the registry's answer to the server.
        self._announced: dict[str, int] = {}
        #: The layers of which both lengths were compared with what the registry has, in this
        #: attempt.
        self._compared: set[str] = set()
        #: Lengths that progress files are to have in place of what the registry has announced.
        self._corrected: dict[str, int] = {}
        #: Why this attempt can't arrive, once that is known.
        self._doomed: End | None = None
        #: Attempts that have failed in a row with nothing gained, and those of them in silence.
        self._tries = self._silences = self._mismatches = 0
        #: The most bytes that were on disk after an attempt.
        self._best = 0

    def begin(self) -> Iterator[Update]:
        """What there is to say before the first attempt."""
        yield from before.note_on_disk(self._account)
        yield self._account.note(f"the server downloads it: {self._account.by.reason}")

    def after(self, end: End) -> Generator[Update, None, End | None]:
        """What another attempt takes after one that has failed; the end where there is none."""
        assert end.cause is not None
        if end.cause is Cause.WRONG_LENGTH and self._is_correctable():
            yield self._account.note(f"{end.text}; continuing with that")
            yield from self._repair(own=True)
            return None
        downloaded = self._account.record.downloaded_bytes
        if downloaded > self._best:
            self._tries, self._silences, self._best = 0, 0, downloaded
        self._tries += 1
        self._mismatches += end.cause is Cause.MISMATCH
        self._silences += end.cause is Cause.SILENCE
        if not self._may_retry(end.cause):
            return end
        return (yield from self._prepare_retry(end, end.cause))

    def keep(self) -> Iterator[Update]:
        """What was downloaded is kept for the next pull, whoever makes that."""
        yield from self._repair(own=True)

    def release(self) -> None:
        """Let others have the layers."""
        self._layer_locks.release(self._account.name.shown)

    def _may_retry(self, cause: Cause) -> bool:
        enough = self._tries >= TRIES and not self._account.options.until_done
        return cause.passes and not enough and self._mismatches < _MISMATCHES

    def _is_correctable(self) -> bool:
        """Whether progress files of the right length, which a server believes, may help now."""
        right = self._account.promised.get(self._layer)
        if self._account.target.host is None or right is None or self._layer in self._corrected:
            return False
        self._corrected[self._layer] = right
        return True

    def attempt(self) -> Generator[Update, None, End]:
        """Everything from the manifest to the end of one request. Returns its `End`."""
        if self._cancelled():
            return CANCELED
        self._announced, self._compared, self._doomed = {}, set(), None
        yield self._account.change(state=State.STARTING)
        ended = yield from self._prepare()
        if ended is not None:
            return ended
        if self._cancelled():
            return CANCELED
        try:
            with PullStream(
                self._account.target.url,
                self._account.model,
                insecure=self._account.options.insecure,
            ) as stream:
                end = yield from self._follow(stream)
            return self._explained(end)
        except ServerGoneError as error:
            return End(Cause.SERVER_GONE, f"the server at {self._account.target.url}: {error}")
        finally:
            self._account.meter.rest(time.monotonic())

    def _prepare(self) -> Generator[Update, None, End | None]:
        """Ask for the manifest, and see to what is on disk. Returns the end where there is one.

        Without a manifest the server reports why: it may see what only its user may see.
        """
        with self._account.opened() as store:
            answer = registry_cache.manifest(
                store, self._account.name, insecure=self._account.options.insecure
            )
        self._is_open = answer.raw is not None and not answer.problem
        if answer.raw is None:
            return None
        if self._is_open and (flawed := before.flaw(answer.raw)).cause is not None:
            return flawed
        if answer.problem:
            yield self._account.note(f"{answer.problem}; using the stored manifest")
        if (yield from before.take_up(self._account, answer.raw)):
            return End()
        yield from self._wait_for_layers()
        repaired = list(self._repair(own=False))
        if (
            self._account.progress.done > self._account.progress.present
            and not self._account.is_resuming_noted
        ):
            yield before.note_resuming(self._account)
        self._account.is_resuming_noted = False  # each other attempt notes it again
        yield from repaired
        ends = before.disk_fault(self._account) or (
            yield from before.check_room(self._account, self._have())
        )
        return None if ends is not None and self._is_oversized() else ends

    # ------------------------------------------------------------ before the request

    def _wait_for_layers(self) -> Iterator[Update]:
        """Let a pull beside this one download the layers that both miss."""
        while other := self._layer_locks.claim(self._account.name.shown, self._account.missing()):
            if self._cancelled():
                return
            yield self._account.note(f"waiting for {other}, which downloads a layer of it")
            self._rest(TICK_SECONDS)

    def _have(self) -> int:
        with self._account.opened() as store:
            begun = 0 if store is None else scan.begun(store, self._account.digests)
        return max(self._account.progress.done, self._account.progress.present + begun)

    def _is_oversized(self) -> bool:
        """Whether the manifest gives its largest missing layer more bytes than the registry has."""
        missing = {
            each: self._account.promised[each]
            for each in self._account.missing() & self._account.promised.keys()
        }
        largest = max(missing, key=missing.__getitem__, default="")
        return bool(largest) and self._has(largest, missing[largest] - 1) is False

    def _has(self, digest: str, at: int) -> bool | None:
        """Whether the registry has a byte of a layer; None where it does not report that."""
        try:
            answer = registry.layer(
                self._account.name, digest, at, insecure=self._account.options.insecure
            )
        except OSError:
            return None
        return answer.has(at)

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
                yield self._account.note(_WAITS_FOR_OTHER if layer.is_joined else _WAITS_UNTIL_SAFE)
            status = stream.next(TICK_SECONDS)
            if status is None:
                continue
            now = time.monotonic()
            if status.error:
                return End(of_error(status.error), status.error)
            state = records.of_status(status.text)
            if state is State.COMPLETED:
                return End()
            changes = state not in (None, self._account.record.state)
            fresh = self._take(status, layer, changes=changes)
            self._doomed = self._doomed or self._wrong_length(status)
            if fresh or changes or now >= shows_at:
                shows_at = now + _SHOW_SECONDS
                yield self._account.reported(state, now)
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
        before = self._account.progress.done
        layer.lost += self._count(status)
        if records.of_status(status.text) in _ALL_ON_DISK:
            self._account.progress.complete()
        came = self._account.progress.done - before
        if not came and not status.total:
            self._account.meter.rest(now)  # none are to come
        elif fresh:
            # Far away nobody knows what a layer had before its first line.
            self._account.meter.add(now, 0 if self._account.target.host is None else max(0, came))
        else:
            self._account.meter.add(now, came)
        return fresh

    def _count(self, status: Status) -> int:
        """Take up the bytes that a line counts. Returns how many of its layer were lost."""
        if not status.digest:
            self._account.progress.note_all(status.total, status.completed)
            return 0
        lost = self._account.progress.note(status.digest, status.total, status.completed)
        # The manifest may be known to the server alone.
        if status.digest in self._account.progress.sizes and status.digest not in self._pulled:
            self._account.digests |= {status.digest}
            self._pulled.add(status.digest)
        return lost

    def _wanted_end(self, quiet: float) -> End | None:
        if self._cancelled():
            return CANCELED
        if self._doomed is not None:
            return self._doomed
        longest = math.inf  # checking a large layer may take for ever
        if self._account.record.state is State.DOWNLOADING:
            until_reason = _REASON_SECONDS if self._silences == 1 else 0.0
            longest = max(self._account.options.stall_seconds, until_reason)
        elif self._account.record.state in (State.STARTING, State.PULLING_MANIFEST):
            longest = _SILENT_SECONDS
        if quiet > longest:
            return End(Cause.SILENCE, f"no bytes for {advice.duration(quiet)}")
        return None

    def _wrong_length(self, status: Status) -> End | None:
        """The end of a layer of which the registry announces another length than it has.

        Where the manifest's length is the wrong one the server arrives all the same.
        """
        digest, promised = status.digest, self._account.promised.get(status.digest, 0)
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
        announced, promised = self._announced[digest], self._account.promised[digest]
        what = f"{announced:,} bytes of layer {names.short(digest)}"
        host = self._account.name.host
        text = f"{host} announces {what}, but has {promised:,}, as its manifest says"
        return End(Cause.WRONG_LENGTH, text)

    def _may_close(self, layer: LayerProgress, now: float) -> bool:
        """Whether no layer is being prepared, or for nobody but us.

        Closing a request for a layer that another pull is still preparing makes the server panic;
        closing the one that prepares it leaves the others waiting for it for ever, and the first of
        them that is closed makes it panic (docs/store.md).
        """
        if layer.is_prepared(now) or self._account.record.state in _ALL_ON_DISK:
            return True
        if layer.is_joined:
            return False
        host = self._account.target.host
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
        if self._account.target.host is None or layer in self._shared:
            return False
        return self._pace.allows(now)

    def _lost_unreported(self, layer: LayerProgress, now: float) -> int:
        """Bytes that are on the disk and that the server counts no more, where that is much."""
        if not layer.wants_weighing(now):
            return 0
        with self._account.opened() as store:
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
            if self._announced.get(self._layer, 0) > self._account.promised.get(
                self._layer, 1 << 62
            ):
                return self._misannounced(self._layer)
            return self._answer_of_registry() or end
        if end.cause in (Cause.RESETS, Cause.SILENCE) and (
            fault := before.disk_fault(self._account)
        ):
            return fault
        if end.cause is Cause.SILENCE and self._layer:
            return self._answer_of_registry() or end
        return end

    def _answer_of_registry(self) -> End | None:
        """Why the registry does not give the layer under way, if it refuses us, too."""
        known = self._announced.get(self._layer) or self._account.promised.get(self._layer, 1)
        last = max(known, 1) - 1
        try:
            answer = registry.layer(
                self._account.name, self._layer, last, insecure=self._account.options.insecure
            )
        except registry.NoAddressError as error:
            return End(Cause.BAD_ADDRESS, str(error))
        except OSError:
            return None
        what = f"for layer {names.short(self._layer)}"
        if answer.status == 200 and answer.kind == "text/html":
            return End(Cause.PORTAL, f"{self._account.name.host} answered with a web page {what}")
        # Where even the manifest takes a token, the server may have one, and we have none.
        if answer.status < 400 or (answer.status == 401 and not self._is_open):
            return None
        cause = of_status(answer.status, of_layer=True)
        if cause.passes:
            return None
        return End(cause, f"{self._account.name.host} answered {answer.status} {what}")

    # ------------------------------------------------------------ after a failure

    def _prepare_retry(self, end: End, cause: Cause) -> Generator[Update, None, End | None]:
        """What another attempt takes. Returns the end where there can't be one."""
        yield self._account.note(end.text)
        if cause is Cause.SERVER_GONE:
            return (yield from self._await_server(end))
        if cause is Cause.BLOCKED:
            self._pulled |= repair.blocked(self._account.target, self._account.digests)
        yield from self._repair(own=True)
        self._pace.note(self._account.progress.done)
        tries = self._tries
        if cause not in (Cause.RESETS, Cause.SILENCE) or tries > 1:
            longest = min(_LONGEST_PAUSE, 2.0 ** min(tries, 6))
            pause = longest * random.uniform(0.5, 1.0)  # noqa: S311 - many clients, no secret
            with self._awaiting(end, pause) as waiting:
                yield self._account.note(f"{waiting.text} in {advice.duration(pause)}")
                self._rest(pause)
        return None

    def _await_server(self, end: End) -> Generator[Update, None, End | None]:
        """Wait until the server answers; what it left half done is repaired meanwhile.

        Returns the end where it did not answer in time, or can't serve this store.
        """
        until_done = self._account.options.until_done
        patience = None if until_done else self._account.options.server_seconds
        limit = "" if patience is None else f", {patience:.0f} s at most"
        with self._awaiting(end, patience) as waiting:
            helps = self._account.helps(Cause.SERVER_GONE) or Cause.SERVER_GONE.step
            yield self._account.note(f"{waiting.text} when it answers{limit}: {helps}")
            # At once, before somebody starts it again: a killed process closes its files soon.
            yield from self._repair(own=True)
            gives_up = math.inf if patience is None else time.monotonic() + patience
            while time.monotonic() < gives_up and not self._cancelled():
                if server.version(self._account.target.url) is not None:
                    yield from self._repair(own=True)
                    return None
                if self._account.target.its and (
                    why := disk.read_only(self._account.target.its.store)
                ):
                    return End(Cause.READ_ONLY, why)
                self._rest(1.0)
            return None if self._cancelled() else end

    @contextmanager
    def _awaiting(self, end: End, seconds: float | None) -> Iterator[Waiting]:
        """Updates have it as long as this lasts; `seconds`: None for no limit."""
        assert end.cause is not None
        most = None if self._account.options.until_done else TRIES
        until = None if seconds is None else time.time() + seconds
        waiting = Waiting(end.cause.awaited, end.text, self._tries + 1, most, until)
        with self._account.awaiting(waiting):
            yield waiting

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._cancelled():
            time.sleep(TICK_SECONDS)

    # ------------------------------------------------------------ repairing

    def _repair(self, *, own: bool) -> Iterator[Update]:
        """Write progress files for what is on the disk. `own`: our request has just ended."""
        if self._account.target.host is None or not self._account.digests:
            return
        if not self._is_begun():
            self._have_nothing(own=own)
            return
        pulled = frozenset(self._pulled) if own else None
        report = yield from self._account.noted(
            repair.run(
                self._account.target,
                self._account.digests,
                pulled,
                self._corrected,
                self._cancelled,
            )
        )
        if report is None:
            return
        held = repair.held(report)
        if own and not held <= self._shared:
            self._shared |= held
            does = "continues it" if self._cancelled() else "also pulls it: joined"
            yield self._account.note(f"another client {does}")
        claimed = repair.claimed(report)
        self._count_anew(claimed, lost=own)
        for each in report.evidence.downloads:
            if each.data is not None:
                rest = each.data.allocated - claimed[each.digest]
                known = rest <= claimed[each.digest] // 2 + _ROUNDINGS
                self._uncounted[each.digest] = rest if known else _NEVER_WEIGHED
        for text in repair.notes(report):
            yield self._account.note(text)

    def _is_begun(self) -> bool:
        """Whether there is anything of an unfinished layer, or of a change that was killed."""
        from watcher.act import transaction

        with self._account.opened() as store:
            host = self._account.target.host
            if host is None or store is None:
                return False
            begun = not self._account.digests.isdisjoint(scan.unfinished(store))
            return begun or transaction.unfinished(host, store)

    def _have_nothing(self, *, own: bool) -> None:
        """There is nothing to repair yet; the room for a repair on a full disk is reserved."""
        self._count_anew({}, lost=own)
        with self._account.opened() as store:
            if store is None:
                return
            with suppress(LockedError, OSError), journal.locked(store, 0.0):
                journal.hold_reserve(store)

    def _count_anew(self, claimed: Mapping[str, int], *, lost: bool) -> None:
        """Count what is on disk now, with so many bytes of each unfinished layer.

        `lost`: what is less than before was lost by our request; what is more was not, after all.
        """
        before = self._account.progress.done
        self._account.progress.here(claimed, self._account.finished(self._account.progress.sizes))
        if lost:
            self._account.meter.correct(self._account.progress.done - before)
        self._uncounted = dict.fromkeys(self._account.digests, 0)

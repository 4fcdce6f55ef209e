"""A pull whose bytes the server moves, where we can't: its stream is followed and reported.

What the server throws away on the way is lost, and nothing is repaired in between: the daemon does
that. A failure that passes is followed by another attempt.
"""

import math
import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

from watcher.ollama import server
from watcher.ollama.pull_stream import PullStream, ServerGoneError, Status
from watcher.pull import before, disk
from watcher.pull.account import CANCELED, MISMATCHES, TICK_SECONDS, TRIES, Account, Update, Waiting
from watcher.pull.failures import Cause, End, of_error
from watcher.state import records
from watcher.state.records import State
from watcher.system import advice
from watcher.transfer import questions

#: No line at all for so long while the manifest is requested: the server waits without any limit.
_SILENT_SECONDS = 120.0
#: A server tries a part six times, 63 s long, before it reports what is in its way.
_REASON_SECONDS = 90.0
_SHOW_SECONDS = 0.25  #: lines arrive sixteen times a second; updates are given this often
_LONGEST_PAUSE = 60.0
#: No line reports a layer's end, but these come after the last of them.
_ALL_ON_DISK = frozenset({State.VERIFYING, State.WRITING_MANIFEST})


class ByServer:
    def __init__(self, account: Account, cancelled: Callable[[], bool]) -> None:
        self._account, self._cancelled = account, cancelled
        #: The layer of the last line, and when the last news came, on the monotonic clock.
        self._layer, self._news_at = "", 0.0
        #: Attempts that have failed in a row with nothing gained.
        self._tries = self._mismatches = 0
        self._best = 0  #: the most bytes that were on disk after an attempt

    def begin(self) -> Iterator[Update]:
        """Why it is not us."""
        free = ", and its rate is not limited" * bool(self._account.options.limit.per_second)
        yield self._account.note(f"the server downloads it{free}: {self._account.why_server}")

    def attempt(self) -> Generator[Update, None, End]:
        """Everything from the manifest to the end of one request. Returns its `End`."""
        account = self._account
        if self._cancelled():
            return CANCELED
        yield account.change(state=State.STARTING)
        ended = yield from self._prepare()
        if ended is not None:
            return ended
        url, insecure = account.target.url, account.options.insecure
        try:
            with PullStream(url, account.model, insecure=insecure) as stream:
                return (yield from self._follow(stream))
        except ServerGoneError as error:
            return End(Cause.SERVER_GONE, f"the server at {url}: {error}")
        finally:
            account.meter.rest(time.monotonic())

    def after(self, end: End) -> Generator[Update, None, End | None]:
        """What another attempt takes after one that has failed; the end where there is none."""
        assert end.cause is not None
        downloaded = self._account.record.downloaded_bytes
        if downloaded > self._best:
            self._tries, self._best = 0, downloaded
        self._tries += 1
        self._mismatches += end.cause is Cause.MISMATCH
        enough = self._tries >= TRIES and not self._account.options.until_done
        if enough or not end.cause.passes or self._mismatches >= MISMATCHES:
            return end
        yield self._account.note(end.text)
        if end.cause is Cause.SERVER_GONE:
            return (yield from self._await_server(end))
        longest = min(_LONGEST_PAUSE, 2.0 ** min(self._tries, 6))
        pause = longest * random.uniform(0.5, 1.0)  # noqa: S311 - many clients, no secret
        with self._awaiting(end, pause) as waiting:
            yield self._account.note(f"{waiting.text} in {advice.duration(pause)}")
            self._account.rest(pause, self._cancelled)
        return None

    def _prepare(self) -> Generator[Update, None, End | None]:
        """Ask for the manifest, without which the server reports why; the end, if it is one."""
        account, insecure = self._account, self._account.options.insecure
        with account.opened() as store:
            answer = questions.manifest(store, account.name, insecure=insecure)
        if answer.raw is None:
            return None
        if not answer.problem and (flawed := before.flaw(answer.raw)).cause is not None:
            return flawed
        if answer.problem:
            yield account.note(f"{answer.problem}; using the stored manifest")
        return End() if (yield from before.take_up(account, answer.raw, {})) else None

    def _follow(self, stream: PullStream) -> Generator[Update, None, End]:
        """Read the stream to its end, or until nobody wants it any more. Returns the `End`."""
        account, shows_at = self._account, 0.0
        self._news_at = time.monotonic()
        while True:
            if ends := self._wanted_end():
                return ends
            status = stream.next(TICK_SECONDS)
            if status is None:
                continue
            now = time.monotonic()
            if status.error:
                return End(of_error(status.error), status.error)
            state = records.of_status(status.text)
            if state is State.COMPLETED:
                return End()
            changes = state not in (None, account.record.state)
            fresh = self._take(status, changes=changes)
            if fresh or changes or now >= shows_at:
                shows_at = now + _SHOW_SECONDS
                yield account.reported(state, now)

    def _take(self, status: Status, *, changes: bool) -> bool:
        """Take up a line. Returns whether its layer is another one than before."""
        account, now = self._account, time.monotonic()
        fresh, self._layer = status.digest != self._layer, status.digest
        had = account.progress.done
        if status.digest:
            account.progress.note(status.digest, status.total, status.completed)
        else:
            account.progress.note_all(status.total, status.completed)
        if records.of_status(status.text) in _ALL_ON_DISK:
            account.progress.complete()
        came = account.progress.done - had
        if came or fresh or changes:
            self._news_at = now
        if not came and not status.total:
            account.meter.rest(now)  # none are to come
        else:
            # What a layer had before its first line was not downloaded now.
            account.meter.add(now, 0 if fresh else came)
        return fresh

    def _wanted_end(self) -> End | None:
        if self._cancelled():
            return CANCELED
        longest = math.inf  # checking a large layer may take for ever
        if self._account.record.state is State.DOWNLOADING:
            longest = max(self._account.options.stall_seconds, _REASON_SECONDS)
        elif self._account.record.state in (State.STARTING, State.PULLING_MANIFEST):
            longest = _SILENT_SECONDS
        quiet = time.monotonic() - self._news_at
        if quiet > longest:
            return End(Cause.SILENCE, f"no bytes for {advice.duration(quiet)}")
        return None

    def _await_server(self, end: End) -> Generator[Update, None, End | None]:
        """Wait until the server answers; the end where it can't serve this store, or is late."""
        account = self._account
        patience = None if account.options.until_done else account.options.server_seconds
        limit = "" if patience is None else f", {patience:.0f} s at most"
        with self._awaiting(end, patience) as waiting:
            helps = account.helps(Cause.SERVER_GONE) or Cause.SERVER_GONE.step
            yield account.note(f"{waiting.text} when it answers{limit}: {helps}")
            gives_up = math.inf if patience is None else time.monotonic() + patience
            while time.monotonic() < gives_up and not self._cancelled():
                if server.version(account.target.url) is not None:
                    return None
                if account.target.its and (why := disk.read_only(account.target.its.store)):
                    return End(Cause.READ_ONLY, why)
                account.rest(1.0, self._cancelled)
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

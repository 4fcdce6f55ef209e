"""A pull whose bytes we move: fetched from the registry, then named, and the manifest last.

It needs no server. Where one runs, that writes the manifest: all layers are there, so it downloads
nothing.
"""

import contextlib
import errno
import os
import queue
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from rich.filesize import decimal

from watcher.model import QUIET_SECONDS, Download, RefusalKind
from watcher.observe import scan
from watcher.ollama import manifests, names, ranges
from watcher.pull import before
from watcher.pull.account import CANCELED, MISMATCHES, TICK_SECONDS, TRIES, Account, Update, Waiting
from watcher.pull.failures import Cause, End, of_error
from watcher.reconcile import Report
from watcher.state import folders, registry_cache, transfers
from watcher.state.event_log import EventType, clock
from watcher.state.records import State
from watcher.system import advice
from watcher.transfer import auth, questions, store, taking_over, values
from watcher.transfer.model import Fetched, Transfer
from watcher.transfer.publication import Publication
from watcher.transfer.values import Layer, Noticed, Order, Partial, Progress, TransferError

_SHOW_SECONDS = 0.25
#: The store is looked at this often while somebody else is waited for.
_LOOK_SECONDS = 1.0
_LOG_SECONDS = 60.0

#: Where the words say no more.
_CAUSES = {
    values.Cause.NETWORK: Cause.NO_NETWORK,
    values.Cause.WRONG_ANSWER: Cause.PORTAL,
    values.Cause.CERTIFICATE: Cause.CERTIFICATE,
    values.Cause.NOT_ALLOWED: Cause.NO_PERMISSION,
    values.Cause.DAMAGED_BLOB: Cause.DAMAGED,
    values.Cause.DISK: Cause.DISK_FAILS,
}
#: What helps against these is another step where we are the ones who ask.
_OURS = frozenset({Cause.NO_NETWORK, Cause.CERTIFICATE, Cause.NO_PERMISSION, Cause.DISK_FAILS})
#: What lies in the place of a file or folder of ours is something else.
_STRANGE = frozenset({errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.EMLINK, errno.ENOTDIR})

#: What another user's file or folder is refused with.
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EINVAL})

_NO_COPY = "there is no room for a copy of the server's download, which can't be taken over yet"
_MAKE_ROOM = "free space for a copy of it, or let the server continue it"

T = TypeVar("T")


class ByTransfer:
    """Attempts of our own."""

    def __init__(self, account: Account, cancelled: Callable[[], bool]) -> None:
        assert account.target.host is not None
        self._account, self._cancelled = account, cancelled
        self._host = account.target.host
        #: Of each layer on its way: bytes that have arrived, and of them those that are hashed.
        self._arrived: dict[str, int] = {}
        self._hashed: dict[str, int] = {}
        #: The bytes of layers that the registry has, where its manifest has others.
        self._sizes: dict[str, int] = {}
        self._shown_at = self._logged_at = 0.0
        self._mismatches = 0
        #: A layer that was fetched anew is wrong again.
        self._came_twice = False

    def begin(self) -> Iterator[Update]:
        """Say first of all what is here, by the manifest that an earlier pull has kept."""
        account = self._account
        with account.opened() as opened:
            cached = {} if opened is None else registry_cache.cached(opened)
        known = cached.get(account.name.key)
        if known is None:
            return
        sizes = manifests.sizes(known.raw.encode())
        account.progress.expect(sizes, account.finished(sizes))
        with contextlib.suppress(OSError, TransferError):
            self._count(sizes, taking_over.partials(self._look(sizes.keys())))
            if account.progress.done > account.progress.present:
                yield before.note_resuming(account)

    def after(self, end: End) -> Generator[Update, None, End | None]:
        """None where another attempt may help; a transfer has tried again by itself."""
        # Of a layer of no bytes, as the manifest says, nobody asks for any.
        is_of_length = end.cause in (Cause.WRONG_LENGTH, Cause.OTHER_BYTES)
        if is_of_length and any(map(self._has_other, self._account.missing())):
            return None
        self._mismatches += end.cause is Cause.MISMATCH
        if end.cause is not Cause.MISMATCH or self._mismatches >= MISMATCHES or self._came_twice:
            return end
        yield self._account.note(end.text)
        return None

    def attempt(self) -> Generator[Update, None, End]:
        """Everything from the manifest to its place. Returns how it ended."""
        if self._cancelled():
            return CANCELED
        yield self._account.change(state=State.STARTING)
        try:
            raw = yield from self._driven(Transfer.manifest)
            return (yield from self._fetched(raw))
        except values.StoppedError:
            return CANCELED
        except TransferError as error:
            self._came_twice = error.cause is values.Cause.MISMATCH
            return _end(error)
        except OSError as error:
            return _refused(self._host.store, error)
        finally:
            self._account.meter.rest(time.monotonic())

    def _fetched(self, raw: bytes) -> Generator[Update, None, End]:
        account = self._account
        if (flawed := before.flaw(raw)).cause is not None:
            return flawed
        with account.opened() as opened:
            if opened is not None:
                registry_cache.keep(opened, account.name, raw, "", time.time())
        if (yield from before.take_up(account, raw, self._sizes)):
            with account.opened() as opened:
                if opened is not None:
                    transfers.tidy(opened, 0.0)  # a kill may have left folders without bytes
            return End()
        partials, ended = yield from self._taken_over()
        if self._cancelled():
            return CANCELED
        if ended is not None and self._has_other(self._largest()):
            return (yield from self._fetched(raw))
        if ended is not None:
            return ended
        self._log_begin()
        left = account.missing() - {each.digest for each in partials}
        sizes = {digest: account.promised.get(digest, 0) for digest in left}
        partials = (*partials, *taking_over.damaged(self._host.store, sizes))
        fetched = yield from self._driven(Transfer.run, partials, raw)
        return (yield from self._published(fetched))

    def _largest(self) -> str:
        promised = self._account.promised
        return max(self._account.missing(), key=lambda each: promised.get(each, 0), default="")

    def _has_other(self, digest: str) -> bool:
        """Whether the registry has another number of bytes of a layer; what it has is taken."""
        account = self._account
        if digest in self._sizes:
            return False  # it has said so before
        found = None
        with contextlib.suppress(OSError):
            found = questions.length(account.name, digest, insecure=account.options.insecure)
        if found in (None, account.promised.get(digest)):
            return False
        self._sizes[digest] = found or 0
        return True

    def _count(self, sizes: Mapping[str, int], partials: Sequence[Partial]) -> int:
        """Take up what is here of unfinished layers; how many bytes have arrived with us."""
        account = self._account
        missing = sizes.keys() - account.finished(sizes)
        with store.opened(self._host.store) as opened:
            ours = {
                digest: opened.peek(Layer(digest, sizes[digest]), account.boot)
                for digest in missing
            }
        theirs = {each.digest: ranges.size(each.trusted) for each in partials}
        here = {each: max(ours[each], theirs.get(each, 0)) for each in ours}
        account.progress.here(here, account.finished(account.progress.sizes))
        self._arrived, self._hashed = {}, {}
        return sum(ours.values())

    # ------------------------------------------------------------ others at work

    def _wait_for_server(self) -> Generator[Update, None, Report | None]:
        """Leave layers that a server pulls to it, if that is wanted; how it was seen last."""
        account, since = self._account, time.time()
        while True:
            seen = self._look(account.missing())
            pulled = taking_over.live(seen)
            if not pulled or not account.options.wait or self._cancelled():
                account.progress.here({}, account.finished(account.progress.sizes))
                return seen
            first = pulled[0].download
            why = _why_waiting(first)
            waiting = Waiting("the server's pull", why, 1, None, None)
            with account.awaiting(waiting):
                at = clock(since, time.time())
                yield account.note(f"{why}: waiting for it since {at}; --no-wait downloads it, too")
                theirs = {x.digest: ranges.size(x.download.trust.trusted) for x in pulled}
                account.progress.here(theirs, account.finished(account.progress.sizes))
                yield account.reported(None, time.monotonic())
                account.rest(_LOOK_SECONDS, self._cancelled)

    def _look(self, digests: Set[str]) -> Report | None:
        return taking_over.look(self._host, self._account.target.settings, digests)

    def _taken_over(self) -> Generator[Update, None, tuple[Sequence[Partial], End | None]]:
        """Take over what a server has left, or wait until that may be done.

        Returns what is to be copied, since there is room for it, and why the pull ends, if so.
        """
        account, tries, noted = self._account, 0, 0.0
        settings = account.target.settings
        while True:
            taking_over.recover(self._host, settings)
            partials = [*taking_over.partials((yield from self._wait_for_server()))]
            host, sizes = replace(self._host, stops=self._cancelled), account.promised
            taking = taking_over.take(host, settings, partials, sizes, account.boot)
            left = yield from account.noted(taking)
            if self._cancelled():
                return (), CANCELED
            partials = [each for each in partials if each.digest in left]
            arrived = self._count(account.promised, partials)
            if account.progress.done > account.progress.present and not account.is_resuming_noted:
                yield before.note_resuming(account)
            ended = yield from before.check_disk(account, arrived)
            if ended is None or not partials:
                return partials, ended
            # What time does not help against comes first.
            why = min(left.values(), key=lambda each: (each.left is not None, each.left or 0.0))
            tries += why.kind is RefusalKind.CHANGED
            if why.left is None or tries >= TRIES:
                text = f"{ended.text}; the server's download can't be taken over: {why.reason}"
                helps = f"{why.remedy}: {why.command}" if why.command else why.remedy
                step = f"{helps}; or {_MAKE_ROOM}" if helps else _MAKE_ROOM
                return partials, ended._replace(text=text, step=step)
            until = time.time() + why.left
            waiting = Waiting("the server's download", why.reason, tries + 1, TRIES, until)
            with account.awaiting(waiting):
                if until > noted + _LOOK_SECONDS:
                    helps = f": {why.remedy}" if why.kind is RefusalKind.SIGHT else ""
                    then = f"{waiting.text} in {advice.duration(why.left)}"
                    yield account.note(f"{_NO_COPY}: {why.reason}{helps}; {then}")
                    noted = until
                yield account.reported(None, time.monotonic())
                account.rest(min(_LOOK_SECONDS, why.left), self._cancelled)

    # ------------------------------------------------------------ the transfer

    def _driven(
        self, work: Callable[[Transfer], T], partials: Sequence[Partial] = (), raw: bytes = b""
    ) -> Generator[Update, None, T]:
        """Run a transfer in a thread, with updates from what it reports; what it gives back."""
        events: queue.SimpleQueue[values.Event | None] = queue.SimpleQueue()
        transfer = Transfer(
            self._order(partials)._replace(manifest=raw), self._options(), events.put
        )
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(work, transfer)
            job.add_done_callback(lambda _: events.put(None))
            try:
                while True:
                    try:
                        event = events.get(timeout=TICK_SECONDS)
                    except queue.Empty:
                        yield from self._in_silence()
                    else:
                        if event is None:
                            break
                        yield from self._took(event)
                    if self._cancelled():
                        transfer.stop()
            finally:
                transfer.stop()
        return job.result()

    def _order(self, partials: Sequence[Partial]) -> Order:
        account = self._account
        insecure = account.options.insecure
        return Order(
            self._host.store,
            account.name,
            account.boot,
            insecure=insecure,
            plain=insecure and account.model.lower().startswith("http://"),
            key=auth.usual_key(),
            given=self._given(),
            sizes=dict(self._sizes),
            partials=tuple(partials),
            mirrors=account.target.settings.mirrors,
        )

    def _given(self) -> frozenset[str]:
        """The layers that have their names; whether they are right is seen later."""
        with (
            contextlib.suppress(OSError),
            folders.opened_store(self._host.store) as opened,
            folders.opened_blobs(opened) as blobs,
        ):
            there = {x for x in self._account.digests if scan.content(names.blob(x), blobs)}
            return frozenset(there)
        return frozenset()

    def _options(self) -> values.Options:
        options = self._account.options
        return values.Options(
            connections=options.connections,
            limit=options.limit,
            stall=options.stall_seconds,
            tries=None if options.until_done else TRIES,
            reserve=transfers.reserve(os.statvfs(self._host.store)),
        )

    def _took(self, event: values.Event) -> Iterator[Update]:
        """Take up what a transfer reports."""
        match event:
            case Progress():
                yield from self._came(event)
            case Noticed(digest, text):
                yield self._account.note(f"{names.short(digest)}: {text}" if digest else text)
            case values.Waiting(_, reason, attempt, seconds):
                is_room, until = reason.startswith("the disk"), time.time() + seconds
                awaited = "room on the disk" if is_room else "the registry"
                most = None if is_room else self._options().tries
                waiting = Waiting(awaited, reason, attempt + 1, most, until)
                self._account.waiting = waiting
                wait = advice.duration(seconds)
                yield self._account.note(f"{reason}; {waiting.text} in {wait}")

    def _came(self, event: Progress) -> Iterator[Update]:
        account, now = self._account, time.monotonic()
        last = self._arrived.get(event.digest)
        self._arrived[event.digest], self._hashed[event.digest] = event.arrived, event.hashed
        account.progress.note(event.digest, event.total, event.arrived)
        is_news = last is not None and not event.copied
        if is_news and event.arrived > (last or 0):
            account.waiting = None
        account.meter.add(now, event.arrived - (last or 0) if is_news else 0)
        has_all = account.progress.done >= account.progress.total
        state = State.VERIFYING if has_all else State.DOWNLOADING
        if now - self._shown_at >= _SHOW_SECONDS or state is not account.record.state:
            self._shown_at = now
            hashed = account.progress.present + sum(self._hashed.values())
            yield account.reported(state, now)._replace(hashed_bytes=hashed)
        if now - self._logged_at >= _LOG_SECONDS:
            self._logged_at = now
            done, total = account.progress.done, account.progress.total
            message = f"{account.name.shown}: {decimal(done)} of {decimal(total)} on disk"
            rate = account.meter.rate(now)
            account.log(
                EventType.DOWNLOAD_PROGRESS,
                message,
                **self._facts(),
                per_second_bytes=None if rate is None else round(rate),
                left_seconds=account.meter.seconds_left(now, total - done),
            )

    def _in_silence(self) -> Iterator[Update]:
        """Nothing has come: that counts as well."""
        now = time.monotonic()
        if self._account.record.state is State.DOWNLOADING and now - self._shown_at >= 1.0:
            self._shown_at = now
            self._account.meter.add(now, 0)
            yield self._account.reported(None, now)

    def _log_begin(self) -> None:
        account, self._logged_at = self._account, time.monotonic()
        is_new = account.progress.done <= account.progress.present
        kind = EventType.DOWNLOAD_STARTED if is_new else EventType.DOWNLOAD_RESUMED
        does = "downloads" if is_new else "continues to download"
        account.log(kind, f"ollama-watch {does} {account.name.shown}", **self._facts())

    def _facts(self) -> dict[str, int]:
        progress = self._account.progress
        return {"total_bytes": progress.total, "downloaded_bytes": progress.done}

    # ------------------------------------------------------------ names

    def _published(self, fetched: Fetched) -> Generator[Update, None, End]:
        """Give layers their names, and see that the manifest gets into its place."""
        account = self._account
        # The tag may have moved since the pull began.
        account.expect(manifests.sizes(fetched.manifest, self._sizes))
        account.progress.complete()
        names_of = Publication(self._host, account.target.settings, self._cancelled)
        if (why := (yield from account.noted(names_of.until_allowed()))) is not None:
            return End(Cause.STORE, why.reason, why.remedy)
        yield account.reported(State.WRITING_MANIFEST, time.monotonic())
        with store.opened(self._host.store) as target:
            published = yield from account.noted(names_of.named(target, fetched.verified))
            if published.changed:
                digest = names.short(published.changed[0].layer.digest)
                return End(Cause.MISMATCH, f"{digest}: its file changed after it was hashed")
            asked = (account.target.url, account.model, account.options.insecure)
            yield from account.noted(names_of.with_manifest(target, fetched, *asked))
            quiet = yield from account.noted(names_of.until_settled(target, published.named))
        names_of.remember(published.named, account.boot)
        before.remove_surplus(account.target, quiet)
        account.log(
            EventType.DOWNLOAD_COMPLETED,
            f"{account.name.shown}: {len(published.named)} layers are complete",
            **self._facts(),
        )
        return End()


def _why_waiting(download: Download) -> str:
    """Who pulls it, or may."""
    short = names.short(download.digest)
    for each in download.writers:
        return f"{each.process} ({each.pid}) is downloading {short}"
    return f"{short} changed less than {QUIET_SECONDS:.0f} s ago, and an unseen server may use it"


def _refused(folder: str, error: OSError) -> End:
    """The end of a pull for what the system refuses in the store."""
    at = os.path.join(folder, str(error.filename)) if error.filename else folder
    if error.errno in _FORBIDDEN and (other := _of_another(at)):
        text = f"{names.printable(other)} belongs to user id {os.lstat(other).st_uid}"
        command = advice.as_root("chown", "-R", f"{os.geteuid()}:{os.getegid()}", other)
        return End(Cause.UNKNOWN, text, f"run `{command}`, then this again")
    text = f"{names.printable(at)}: {error.strerror or error}"
    is_strange = bool(error.filename) and error.errno in _STRANGE
    return End(of_error(text), text, "move it out of the way, and run it again" * is_strange)


def _of_another(path: str) -> str:
    """The file or folder there, or the nearest above, if another user owns it; else ""."""
    while not os.path.lexists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return "" if os.lstat(path).st_uid == os.geteuid() else path


def _end(error: TransferError) -> End:
    """The end of a pull for that of a transfer."""
    cause = of_error(error.message)  # as whoever reads the record later does
    if cause is Cause.UNKNOWN:
        cause = _CAUSES.get(error.cause, cause)
    return End(cause, error.message, error.next_step if cause in _OURS else "")

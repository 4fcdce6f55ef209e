"""The connections of a transfer: each fetches piece after piece of whichever layer comes first.

Each tries again by itself. While bytes arrive over any of them, no try is in vain; a registry that
asks for less gets less; a slow connection gives its rest to a fresh one; a full disk is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.filesize import decimal

from watcher.errors import refused
from watcher.model import MIB
from watcher.ollama import names
from watcher.transfer import flows
from watcher.transfer.client import Answer, Client
from watcher.transfer.fetch import Fetch
from watcher.transfer.flows import Flow
from watcher.transfer.growth import Growth, bounds
from watcher.transfer.pieces import Piece
from watcher.transfer.rate import Bucket
from watcher.transfer.registry import Registry, wrong_answer
from watcher.transfer.store import Store
from watcher.transfer.tasks import Wakeup, all_of, in_thread
from watcher.transfer.values import (
    Address,
    BusyError,
    Cause,
    Emit,
    Noticed,
    Options,
    TransferError,
    TryError,
    Waiting,
)

T = TypeVar("T")
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
#: A try that brings so much was not in vain.
_FRUIT = 64 * 1024
#: Pieces without a complaint after which one connection more is allowed again.
_GOOD_PIECES = 16
_LONGEST_LOOK = 5.0
#: What came is written at least so often.
_LOOK_SECONDS = 0.5
#: How often it is seen which other transfers run.
_SHARE_SECONDS = 0.5
#: What may mean that an address, or a token, has expired.
_EXPIRED = frozenset({301, 302, 303, 307, 308, 400, 401, 403, 404, 410})
_STEPS = {
    Cause.NO_SUCH_MODEL: "check the name",
    Cause.NEWER_OLLAMA: "install a newer Ollama",
    Cause.NOT_ALLOWED: "add your key (~/.ollama/id_ed25519.pub) to your account there",
    Cause.CERTIFICATE: "name the bundle with its authority: SSL_CERT_FILE=/path/to/bundle.pem",
    Cause.NETWORK: "run it again when the network works: it continues where it stopped",
    Cause.BAD_MANIFEST: "choose another tag of the model, or report it to its publisher",
    Cause.WRONG_SIZE: "report it to its publisher",
    Cause.WRONG_ANSWER: "find out what answers in the registry's place: a proxy, a login page",
}


class _AgainError(Exception):
    """Try again at once, with another address or over another connection; the text says why."""


@dataclass(eq=False, slots=True)
class _Connection:
    """One of the connections."""

    #: Tries in vain, one after the other, and what was good everywhere at the last one.
    tries: int = 0
    good_then: int = 0
    is_fresh: bool = False
    #: The last try brought something.
    has_brought: bool = False
    #: What it fetches, and its request.
    flow: Flow | None = None
    asked: asyncio.Future[Any] | None = None
    #: Why that request is given up.
    given_up: TryError | _AgainError | OSError | None = None
    #: Bytes per second, when last measured.
    rate: float | None = None


class Connections:
    """Fetches the pieces of the layers that are `open`, in their order."""

    def __init__(
        self, client: Client, registry: Registry, store: Store, options: Options, emit: Emit
    ) -> None:
        self._client, self._registry = client, registry
        self._store, self._options = store, options
        self.emit = emit
        self.open: list[Fetch] = []
        #: Bytes of the layers that are to be opened later.
        self.later = 0
        self.wakeup = Wakeup()
        first, most = bounds(options.connections)
        self._all = [_Connection() for _ in range(most)]
        self._first = self._begun = self._allowed = first
        self._used = 0
        self._growth = Growth(first, most)
        #: Sent when more connections are to begin.
        self._more = Wakeup()
        #: Bytes that answers brought which have ended.
        self._came = 0
        #: Before that nobody asks anything.
        self._not_before = 0.0
        #: Tries that brought something; those in a row that nobody complained about.
        self._good = self._good_in_row = 0
        self._room = asyncio.Lock()
        self._bucket = Bucket(options.limit, _now)

    @property
    def came(self) -> int:
        """Bytes that answers have brought."""
        return self._came + sum(each.flow.received for each in self._all if each.flow is not None)

    async def run(self) -> None:
        """Fetch until canceled. Raises TransferError where no further try can help."""
        works = [self._work(number, each) for number, each in enumerate(self._all)]
        await all_of([*works, self._watch_speeds(), self._share_rate()])

    @contextlib.contextmanager
    def fetching(self, fetch: Fetch) -> Iterator[None]:
        """Fetch the pieces of one layer more."""
        self.open.append(fetch)
        self.wakeup.send()
        try:
            yield
        finally:
            self.open.remove(fetch)

    async def patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What a question to the registry brings; it is asked again as often as a piece."""
        asker = _Connection()
        while True:
            await self._pause(self._not_before - _now())
            try:
                return await ask()
            except TryError as error:
                await self._wait_after(asker, error, "")

    async def _work(self, number: int, connection: _Connection) -> None:
        while number >= self._begun:
            await self._more.wait()
        while True:
            fetch, piece = await self._next()
            failed: TryError | OSError | None = None
            self._used += 1
            try:
                await self._have_room(fetch)
                await self._fetch(connection, fetch, piece)
            except _AgainError as error:
                self.emit(Noticed(fetch.layer.digest, str(error)))
            except (TryError, OSError) as error:
                failed = error
            finally:
                self._used -= 1
                fetch.pieces.give_back(piece)
                self.wakeup.send()
            if failed is not None:
                await self._wait_after(connection, failed, fetch.layer.digest)

    async def _next(self) -> tuple[Fetch, Piece]:
        """The first piece that may be fetched, once one may."""
        while True:
            await self._pause(self._not_before - _now())
            for fetch in self.open if self._used < self._allowed else ():
                piece = fetch.take()
                if piece is not None:
                    return fetch, piece
            await self.wakeup.wait()

    # ------------------------------------------------------------ one piece

    async def _fetch(self, connection: _Connection, fetch: Fetch, piece: Piece) -> None:
        """Fetch as much of a piece as one answer brings; a mirror that fails brings no more."""
        connection.has_brought = False
        address = await self._registry.address(fetch.layer)
        piece.is_mirrored = bool(address.mirror)
        if piece.is_mirrored:
            await fetch.expect_mirror()
        try:
            await self._answered(connection, fetch, piece, address)
        except TryError as error:
            if not address.mirror:
                raise
            self._registry.leave(address.mirror, str(error))

    async def _answered(
        self, connection: _Connection, fetch: Fetch, piece: Piece, address: Address
    ) -> None:
        fresh, connection.is_fresh = connection.is_fresh, False
        request = self._registry.request(address, piece.at, piece.end, fresh=fresh)
        flow = connection.flow = Flow(fetch.ledger, piece, self.wakeup, self._bucket, _now())
        connection.asked = asyncio.ensure_future(self._client.ask(request, flow))
        try:
            answer = await connection.asked
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if connection.given_up is None or (task is not None and task.cancelling()):
                raise
            connection.is_fresh = True
            raise connection.given_up from None
        finally:
            connection.flow = connection.asked = connection.given_up = None
            flow.end(_now())
            self._came += flow.received
            connection.rate = flow.rate() if flow.received >= MIB else connection.rate
            connection.has_brought = flow.received >= _FRUIT or piece.at == piece.end
            if connection.has_brought:
                self._was_good(fetch, address)
        if flow.fault != "":
            raise self._refusal(fetch, address, answer, flow)
        if piece.at < piece.end:
            raise TryError("the connection was closed early")

    def _was_good(self, fetch: Fetch, address: Address) -> None:
        fetch.worked = address
        self._good += 1
        self._good_in_row += 1
        if self._good_in_row >= _GOOD_PIECES and self._allowed < self._first:
            self._allowed, self._good_in_row = self._allowed + 1, 0

    def _refusal(
        self, fetch: Fetch, address: Address, answer: Answer, flow: Flow
    ) -> TryError | _AgainError:
        """What an answer without the range means."""
        status = answer.head.status
        if status in _EXPIRED:
            is_first = self._registry.expire(fetch.layer, address)
            if fetch.worked == address or not is_first:
                # Only once: a registry may give the same address again.
                fetch.worked = None if is_first else fetch.worked
                return _AgainError(f"the address has expired ({status}): asking for a new one")
            if status == 401 and address.is_own:
                return TryError("the registry's token has expired", Cause.NOT_ALLOWED)
        if status in (200, 206) and flow.fault:
            return wrong_answer(address.url, flow.fault, answer)
        return self._registry.failure(answer, address)

    # ------------------------------------------------------------ waits

    async def _wait_after(
        self, connection: _Connection, error: TryError | OSError, digest: str
    ) -> None:
        """Wait as long as a failed try says; raise TransferError where none can succeed."""
        if isinstance(error, OSError) and error.errno not in FULL:
            raise disk_error(error)
        if isinstance(error, TryError) and error.final:
            raise _ended(error)
        if connection.has_brought and type(error) is TryError:
            self.emit(Noticed(digest, str(error)))
            return
        if connection.good_then != self._good:
            connection.tries, connection.good_then = 0, self._good
        connection.tries += 1
        most = self._options.tries
        if isinstance(error, TryError) and most is not None and connection.tries >= most:
            raise _ended(error)
        seconds = min(
            self._options.first_pause * 2.0 ** min(connection.tries - 1, 20),
            self._options.longest_pause,
        )
        if isinstance(error, BusyError):
            seconds = self._ask_less(seconds if error.seconds is None else error.seconds)
        self._growth.stop()
        reason = str(error) if isinstance(error, TryError) else f"the disk: {error.strerror}"
        self.emit(Waiting(digest, reason, connection.tries, seconds))
        await self._pause(seconds)

    def _ask_less(self, seconds: float) -> float:
        """Half the connections from now on, and none for so long."""
        if _now() >= self._not_before:
            self._allowed = max(1, self._allowed // 2)
        self._good_in_row = 0
        self._not_before = max(self._not_before, _now() + seconds)
        return self._not_before - _now()

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            await asyncio.sleep(seconds)
            self.wakeup.send()

    async def _have_room(self, fetch: Fetch) -> None:
        """Wait until what is under way fits on the disk beside the reserve."""
        async with self._room:
            looks = 0
            while (missing := self._missing()) > 0:
                looks += 1
                seconds = min(self._options.first_pause * 2.0 ** min(looks - 1, 20), _LONGEST_LOOK)
                reason = f"the disk is full: {decimal(missing)} more are needed"
                self.emit(Waiting(fetch.layer.digest, reason, looks, seconds))
                await asyncio.sleep(seconds)

    def _missing(self) -> int:
        """Bytes that have to be freed for all that is left; 0 while there is room to go on."""
        room = self._store.free() - self._options.reserve
        if sum(each.pieces.under_way for each in self.open) <= room:
            return 0
        return sum(each.pieces.rest for each in self.open) + self.later - room

    # ------------------------------------------------------------ slow ones

    async def _watch_speeds(self) -> None:
        seconds, stall = self._options.slow_seconds, self._options.stall
        while True:
            await asyncio.sleep(min(seconds / 10, stall / 10, _LOOK_SECONDS))
            for each in self._all:
                self._look(each, seconds)
            self._grow()
            rates = [each.rate for each in self._all if each.rate is not None]
            for each in self._all:
                if each.flow is None:
                    continue
                if each.flow.silence() >= stall:
                    _give_up(each, TryError(f"the connection was silent for {stall:g} s"))
                elif self._bucket.binds():
                    continue  # a connection that brings more would wait
                elif each.flow.covers(seconds) and flows.is_slow(each.flow.rate(), rates):
                    _give_up(each, _AgainError("a slow connection is replaced"))

    def _grow(self) -> None:
        """Use more connections where they bring more, and fewer again where they did not."""
        all_used = self._used >= self._allowed and not self._bucket.is_limited
        before = self._growth.number
        number = self._growth.look(_now(), self.came, all_used=all_used)
        if number != before:
            self._allowed, self._begun = number, max(self._begun, number)
            self._more.send()

    async def _share_rate(self) -> None:
        """Take of the rate what falls to the layers that are fetched here, of all of the store."""
        while True:
            if self._options.limit.per_second:
                with contextlib.suppress(OSError):  # it stays as it was, then
                    running, ours = await in_thread(self._store.running), max(1, len(self.open))
                    self._bucket.share = ours / max(running, ours)
            await asyncio.sleep(_SHARE_SECONDS)

    @staticmethod
    def _look(connection: _Connection, seconds: float) -> None:
        try:
            if connection.flow is not None and connection.flow.look(_now(), seconds):
                connection.rate = connection.flow.rate()
        except OSError as error:
            _give_up(connection, error)


def _give_up(connection: _Connection, why: TryError | _AgainError | OSError) -> None:
    if connection.asked is not None:
        connection.given_up = why
        connection.asked.cancel()


def disk_error(error: OSError) -> TransferError:
    """What this machine has refused, as the end of a transfer."""
    text = error.strerror or "the disk fails"
    text = f"{names.printable(str(error.filename))}: {text}" if error.filename else text
    found = refused(text, error.errno or errno.EIO)
    return TransferError(found.message, found.next_step, Cause.DISK)


def _ended(error: TryError) -> TransferError:
    return TransferError(str(error), _STEPS.get(error.cause, ""), error.cause)


def _now() -> float:
    return asyncio.get_running_loop().time()

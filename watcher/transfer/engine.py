"""Layers from a registry to files with their right hash, several at a time.

Everything runs in one asyncio loop. Layers are opened in their order, a few at a time: a model of
many small ones keeps all connections busy. Each that is open is hashed behind its front, and synced
now and then, both in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence

from rich.filesize import decimal

from watcher.model import Ranges
from watcher.observe import parts
from watcher.ollama import names, ranges
from watcher.state import fs, sums
from watcher.state.sums import Chunk, Chunks
from watcher.transfer.connections import FULL, Connections, disk_error
from watcher.transfer.fetch import Fetch
from watcher.transfer.ledger import COPY, Ledger, LostError
from watcher.transfer.proof import has
from watcher.transfer.registry import Registry
from watcher.transfer.store import Store, Verified
from watcher.transfer.tasks import all_of, beside, in_thread
from watcher.transfer.values import (
    Cause,
    Layer,
    Noticed,
    Options,
    Order,
    OverBudgetError,
    Partial,
    Progress,
    TransferError,
    Waiting,
)

#: Layers that are open at once.
_AT_ONCE = 8
_REPORT_SECONDS = 0.25
#: How often it is seen to what another process does with a layer.
_JOIN_SECONDS = 0.5
#: How often it is tried whether there is room for a ledger.
_ROOM_SECONDS = 1.0


class Engine:
    """Fetches layers into a store. Made and used in one loop."""

    def __init__(
        self,
        connections: Connections,
        registry: Registry,
        store: Store,
        order: Order,
        options: Options,
    ) -> None:
        self._connections, self._registry, self._store = connections, registry, store
        self._boot, self._options = order.boot, options
        self._partials = {partial.digest: partial for partial in order.partials}
        self._emit = connections.emit

    async def fetch(self, layers: Sequence[Layer]) -> list[Verified]:
        """Fetch and verify layers.

        One that another process gives its name meanwhile is not in the result. Raises
        TransferError, and OSError. Canceled or failed, it keeps what has arrived.
        """
        found: dict[Layer, Verified] = {}
        waiting = iter(layers)
        self._connections.later = sum(layer.size for layer in layers)
        openers = [self._each(waiting, found) for _ in range(_AT_ONCE)]
        try:
            await beside(all_of(openers), self._connections.run())
        finally:
            self._options.budget.came += self._connections.came
        return [found[layer] for layer in layers if layer in found]

    async def _each(self, waiting: Iterator[Layer], found: dict[Layer, Verified]) -> None:
        for layer in waiting:
            self._connections.later -= layer.size
            with contextlib.ExitStack() as held:
                ledger = await self._opened(layer, held)
                if ledger is not None:
                    await self._one(ledger)
                    found[layer] = Verified(layer, ledger.identity)

    async def _opened(self, layer: Layer, held: contextlib.ExitStack) -> Ledger | None:
        """The ledger of a layer once no other process has it; None: it has got its name."""
        told = False
        while not self._store.has(layer):
            try:
                found = held.enter_context(self._store.ledger(layer, self._boot))
                if not self._store.has(layer):
                    return found
                # It has got its name, and its folder went, just before this one was made.
                self._store.tidy(layer)
                return None
            except FileNotFoundError:
                # Its folder went when the other one was done, or all folders did.
                self._store.check()
            except fs.BusyError as error:
                if not told:
                    text = f"another process is downloading this layer: {error.owner}".rstrip(": ")
                    self._emit(Noticed(layer.digest, text))
                told = True
            except OSError as error:
                if error.errno not in FULL:
                    raise
                await self._wait_for_room(layer)
                continue
            arrived = self._store.peek(layer, self._boot)
            self._emit(Progress(layer.digest, layer.size, arrived, 0, shared=True))
            await asyncio.sleep(_JOIN_SECONDS)
        return None

    async def _wait_for_room(self, layer: Layer) -> None:
        self._emit(Waiting(layer.digest, self._store.why_full(), 1, _ROOM_SECONDS))
        await asyncio.sleep(_ROOM_SECONDS)

    async def _one(self, ledger: Ledger) -> None:
        """Fetch one layer; return once it is right, and on the disk where others are under way."""
        if ledger.lost:
            text = f"earlier bytes must be downloaded again: {ledger.lost}"
            self._emit(Noticed(ledger.layer.digest, text))
        is_next_named = False
        try:
            chunks = await self._sums(ledger.layer)
            if partial := self._partials.get(ledger.layer.digest):
                # Where it is known what of a blob is wrong, no more is compared, and fetched.
                is_measured = partial.is_blob and bool(partial.trusted)
                await self._take(ledger, partial, all_of_it=bool(chunks) and not is_measured)
            if chunks and ledger.taken:
                await self._compare(ledger, chunks)
            fetch = Fetch(ledger, self._options, self._connections.wakeup, chunks)
            self._must_fit(fetch.pieces.rest)
            with self._connections.fetching(fetch):
                helpers = (self._prove(fetch), self._sync_often(fetch), self._report(fetch))
                await beside(self._verify(fetch), *helpers)
                is_next_named = self._is_last()
            self._emit(fetch.progress())
        finally:
            if not is_next_named:
                _keep(ledger)

    def _must_fit(self, missing: int) -> None:
        """Raise OverBudgetError where so many bytes more are more than was agreed to."""
        budget = self._options.budget
        came = budget.came + self._connections.came
        if budget.most is not None and came + missing > budget.most:
            raise OverBudgetError(
                f"it would fetch {decimal(missing)} more, beside {decimal(came)} that came: more "
                "than was agreed to, since bytes are wrong that were not known to be",
                "it goes on from there once that is agreed to:",
                Cause.MISMATCH,
            )

    def _is_last(self) -> bool:
        """Whether the one layer that is open is the last one: it is synced when it gets its name.

        Where no start of the machine is known, nothing but what is durable is found until then.
        """
        return (
            self._connections.later == 0 and len(self._connections.open) == 1 and self._boot != ""
        )

    async def _take(self, ledger: Ledger, partial: Partial, *, all_of_it: bool) -> None:
        """Copy what a server has left of a layer, as far as there is room beside the reserve."""
        layer, copied = ledger.layer, 0
        pieces = self._store.take(ledger, partial, all_of_it=all_of_it)
        while True:
            while self._store.free() - self._options.reserve < COPY:
                await self._wait_for_room(layer)
            try:
                size = await in_thread(next, pieces, 0)
            except OSError as error:
                if error.errno not in FULL:
                    text = f"the rest of the server's download can't be copied: {error.strerror}"
                    self._emit(Noticed(layer.digest, text))
                    return
                await self._wait_for_room(layer)
                pieces = self._store.take(ledger, partial, all_of_it=all_of_it)
                continue
            if not size:
                break
            copied += size
            arrived = ranges.size(ledger.arrived)
            self._emit(Progress(layer.digest, layer.size, arrived, 0, copied=True))
        if copied:
            whose = "damaged blob" if partial.is_blob or partial.label else "server's download"
            text = f"copied {decimal(copied)} from the {whose}"
            self._emit(Noticed(layer.digest, text))

    async def _verify(self, fetch: Fetch) -> None:
        digest, before = fetch.layer.digest, ""
        while (found := await fetch.hash()).hexdigest() != digest.lower():
            await self._sync(fetch)  # what is said of it from here on is not overtaken by another
            if fetch.proof.look_again():
                text = "checksum mismatch: comparing its chunks with their sums"
                self._emit(Noticed(digest, text))
                self._connections.wakeup.send()
                continue
            if fetch.proof.chunks:
                self._drop_sums(fetch)  # all chunks are right by them
            doubted = _doubted(fetch.ledger)
            if not doubted and before:
                fetch.ledger.note_wrong()
                raise _mismatch(digest, is_same=found.hexdigest() == before)
            if not doubted:
                rest = fetch.rest or ((0, fetch.layer.size),)
                before, doubted = found.hexdigest(), [("the registry", rest)]
            if fetch.ledger.mirrored:
                self._registry.distrust(fetch.layer)
            try:
                self._must_fit(ranges.size(ranges.normal(x for _, each in doubted for x in each)))
            except OverBudgetError:
                fetch.ledger.note_wrong()
                raise
            whose = " and ".join(f"{decimal(ranges.size(x))} from {who}" for who, x in doubted)
            self._emit(Noticed(digest, f"checksum mismatch: {whose} must be downloaded again"))
            self._emit(fetch.progress())  # before and after, so that all of it counts as lost
            for _, each in doubted:
                await self._forget(fetch, each)
            self._emit(fetch.progress())
        if not fetch.proof.chunks and (made := found.sums()):
            self._store.keep_sums(fetch.layer, made)
        while fetch.ledger.taken and not await self._written(fetch.believe):
            await self._wait_for_room(fetch.layer)
        while not self._is_last() and not await self._sync(fetch):
            await self._wait_for_room(fetch.layer)

    # ------------------------------------------------------------ chunks

    async def _sums(self, layer: Layer) -> Chunks:
        if layer.size < self._options.sums_from:
            return ()
        known = self._store.sums(layer)
        is_said = bool(known) and known[0].kind == sums.REGISTRY
        if not is_said and (raw := await self._registry.sums(layer)):
            self._store.keep_sums(layer, raw)
            known = sums.parsed(raw, layer.size)
        return known

    async def _compare(self, ledger: Ledger, chunks: Chunks) -> None:
        """Keep of what a server has left each chunk that is right, whatever was said of it."""
        layer, right, wrong = ledger.layer, Ranges(), Ranges()
        written = parts.segments(ledger.data, layer.size)
        for chunk in chunks:
            piece, is_claimed = ((chunk.start, chunk.end),), has(ledger.arrived, chunk)
            is_ours = is_claimed and not ranges.within(ledger.taken, chunk.start, chunk.end)
            if is_ours or not has(written, chunk):
                continue
            if not await in_thread(sums.wrong, ledger.data, chunk):
                right = ranges.union(right, piece)
            elif is_claimed:
                wrong = ranges.union(wrong, piece)
            arrived = ranges.size(ledger.arrived)
            self._emit(Progress(layer.digest, layer.size, arrived, chunk.end, copied=True))
        if right:  # else the sums may be of something else
            ledger.compared(right, wrong)
            found = f"{decimal(ranges.size(right))} match their sums"
            found += f", {decimal(ranges.size(wrong))} don't" if wrong else ""
            self._emit(Noticed(layer.digest, f"of the server's download {found}"))

    async def _prove(self, fetch: Fetch) -> None:
        """Look at each chunk once it is there; one that is wrong is fetched again."""
        while True:
            chunk = fetch.proof.ready(fetch.ledger.arrived)
            if chunk is None:
                await self._connections.wakeup.wait()
                continue
            wrong = fetch.proof.judge(
                chunk, await in_thread(sums.hash_of, fetch.ledger.data, chunk)
            )
            if wrong is None:
                self._drop_sums(fetch)
            elif wrong:
                await self._fetch_again(fetch, chunk, wrong)
            else:
                fetch.ledger.prove(chunk.start, chunk.end)
            self._connections.wakeup.send()

    async def _fetch_again(self, fetch: Fetch, chunk: Chunk, wrong: int) -> None:
        digest, most = fetch.layer.digest, self._options.tries
        where = f"checksum mismatch in bytes {chunk.start:,} to {chunk.end:,}"
        if most is not None and wrong >= most:
            raise TransferError(
                f"{names.short(digest)}: {where}, {wrong} times in a row, on its way",
                "run it again over another network: it continues where it stopped",
                Cause.MISMATCH,
            )
        self._emit(Noticed(digest, f"{where}: downloading them again"))
        if ranges.within(fetch.ledger.mirrored, chunk.start, chunk.end):
            self._registry.distrust(fetch.layer)
        piece = ((chunk.start, chunk.end),)
        try:
            self._must_fit(fetch.pieces.rest + chunk.end - chunk.start)
        except OverBudgetError:
            await fetch.doubt(piece)  # and no connection begins to fetch it
            raise
        await self._forget(fetch, piece)

    async def _forget(self, fetch: Fetch, doubted: Ranges) -> None:
        """Fetch bytes anew, once there is room to write that down."""
        while True:
            try:
                return await fetch.forget(doubted)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                await self._wait_for_room(fetch.layer)

    def _drop_sums(self, fetch: Fetch) -> None:
        text = "the sums of its chunks belong to other data, and are ignored"
        self._emit(Noticed(fetch.layer.digest, text))
        self._store.keep_sums(fetch.layer, b"")
        fetch.proof.drop()
        fetch.ledger.proven = ()

    async def _sync_often(self, fetch: Fetch) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._options.sync_seconds):
                    while fetch.unsynced < self._options.sync_bytes:
                        await self._connections.wakeup.wait()
            if not await self._sync(fetch):
                await asyncio.sleep(_ROOM_SECONDS)

    async def _sync(self, fetch: Fetch) -> bool:
        """Make durable what has arrived. False where there is no room for the ledger.

        Raises TransferError.
        """
        try:
            return await self._written(fetch.sync)
        except LostError as error:
            fetch.ledger.lose()
            raise disk_error(error) from None

    @staticmethod
    async def _written(write: Callable[[], Awaitable[None]]) -> bool:
        """The same of whatever else is written. Raises LostError, too."""
        try:
            await write()
        except LostError:
            raise
        except OSError as error:
            if error.errno not in FULL:
                raise disk_error(error) from None
            return False
        return True

    async def _report(self, fetch: Fetch) -> None:
        before = None
        while True:
            now = fetch.progress()
            if now != before:
                self._emit(now)
            before = now
            await asyncio.sleep(_REPORT_SECONDS)


def _mismatch(digest: str, *, is_same: bool) -> TransferError:
    what = "it was damaged on its way, twice"
    step = "run it again over another network: it downloads the whole layer again"
    if is_same:
        what = "the registry serves other bytes than its manifest names"
        step = "choose another tag of the model, or report it to its publisher"
    text = f"{names.short(digest)}: checksum mismatch: {what}"
    return TransferError(text, step, Cause.MISMATCH)


def _doubted(ledger: Ledger) -> list[tuple[str, Ranges]]:
    """What may be wrong of a layer though its registry is right, and whose that is."""
    found = {"the server's download": ledger.taken, "mirrors": ledger.mirrored}
    return [each for each in found.items() if each[1]]


def _keep(ledger: Ledger) -> None:
    """Make durable what has arrived, however it ends. A disk that fails has been reported."""
    if ledger.arrived == ledger.durable:
        return
    with contextlib.suppress(OSError):
        try:
            ledger.make_durable(ledger.arrived)
        except LostError:
            ledger.lose()

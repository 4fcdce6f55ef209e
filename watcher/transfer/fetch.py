"""One layer that is open: its ledger, its missing pieces, and how far its hash is."""

from __future__ import annotations

import asyncio

from watcher.model import MIB, Ranges
from watcher.ollama import ranges
from watcher.state import sums
from watcher.state.sums import Chunks
from watcher.transfer.ledger import Ledger
from watcher.transfer.pieces import Piece, Pieces
from watcher.transfer.proof import Proof
from watcher.transfer.tasks import Wakeup, in_thread
from watcher.transfer.values import Address, Options, Progress

#: Hashed in one go. Whether to stop is asked in between.
_STEP = 16 * MIB


class Fetch:
    """A layer on its way."""

    def __init__(
        self, ledger: Ledger, options: Options, wakeup: Wakeup, chunks: Chunks = ()
    ) -> None:
        self.ledger, self.layer = ledger, ledger.layer
        self.proof = Proof(chunks, ledger.arrived)
        self._sums_from = options.sums_from
        self.pieces = Pieces(self.layer.size, ledger.arrived, options.piece, options.ahead)
        #: The address that bytes came from; once it stops to work it has expired.
        self.worked: Address | None = None
        #: What was not fetched anew: if all else is right, the mistake is there.
        self.rest: Ranges = ((0, self.layer.size),)
        self._wakeup = wakeup
        self._hashed = 0
        #: The hash has reached the front: from then on nothing runs too far ahead of it. Before,
        #: as after a resume, connections don't wait for it.
        self._is_caught_up = False
        self._sync_turn = asyncio.Lock()
        self._expects_mirror = False

    def take(self) -> Piece | None:
        """The next piece that may be fetched now."""
        return self.pieces.take(self._hashed if self._is_caught_up else self.pieces.front)

    def progress(self) -> Progress:
        """How far it is."""
        arrived = self.layer.size - self.pieces.rest
        return Progress(self.layer.digest, self.layer.size, arrived, self._hashed)

    # ------------------------------------------------------------ hashing

    async def hash(self) -> sums.Whole:
        """Hash all bytes, in order, behind the front."""
        found = sums.Whole(with_sums=self.layer.size >= self._sums_from)
        self._hashed, self._is_caught_up = 0, False
        while self._hashed < self.layer.size:
            start, front = self._hashed, min(self.pieces.front, self.proof.front(self.layer.size))
            end = min(front, start + _STEP)
            if start == end:
                self._is_caught_up = True
                await self._wakeup.wait()
                continue
            await in_thread(sums.add, found, self.ledger.data, start, end)
            self._hashed = end
            self._wakeup.send()
        return found

    async def forget(self, doubted: Ranges) -> None:
        """Fetch bytes anew that are all there."""
        await self.doubt(doubted)
        self.pieces.forget(doubted)
        self.rest = ranges.difference(self.rest, doubted)
        self._wakeup.send()

    async def doubt(self, doubted: Ranges) -> None:
        """Leave bytes to the next run. Raises OSError where that can't be kept."""
        async with self._sync_turn:
            self.ledger.forget(doubted)

    async def believe(self) -> None:
        """The whole is right. Raises OSError where that can't be kept."""
        async with self._sync_turn:
            self.ledger.believe()

    # ------------------------------------------------------------ syncing

    @property
    def unsynced(self) -> int:
        """Bytes that have arrived and are not durable."""
        return ranges.size(self.ledger.arrived) - ranges.size(self.ledger.durable)

    async def expect_mirror(self) -> None:
        """A mirror is asked for what is missing. Raises OSError where that can't be kept."""
        if not self._expects_mirror:
            async with self._sync_turn:
                await in_thread(self.ledger.expect_mirror)
            self._expects_mirror = True

    async def sync(self) -> None:
        """Make durable what has arrived by now. Raises LostError, and OSError."""
        async with self._sync_turn:
            snapshot = self.ledger.arrived
            if snapshot != self.ledger.durable:
                await in_thread(self.ledger.make_durable, snapshot)
                self.ledger.shorten()

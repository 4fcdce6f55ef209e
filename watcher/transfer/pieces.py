"""Which bytes of a layer are asked for next: the first missing ones, and none too far ahead. Pure.

The hash follows the first missing byte, so that one is always given away first: whatever a
connection leaves undone comes before all that nobody has begun.
"""

from __future__ import annotations

from dataclasses import dataclass

from watcher.model import Ranges
from watcher.ollama import ranges


@dataclass(eq=False, slots=True)
class Piece:
    """What one connection fetches: the bytes ``[at, end)``; `at` moves as they arrive."""

    at: int
    end: int
    #: What is written comes from a mirror.
    is_mirrored: bool = False


class Pieces:
    """The missing bytes of one layer."""

    def __init__(self, total: int, arrived: Ranges, size: int, ahead: int) -> None:
        """`size`: of the largest piece; `ahead`: how far behind the front bytes are given."""
        self._total, self._size, self._ahead = total, size, ahead
        #: What was missing at first: only that counts as distance.
        self._gaps = ranges.complement(arrived, total)
        self._missing = self._gaps
        self._given: list[Piece] = []

    @property
    def front(self) -> int:
        """The first byte that has not arrived; the layer's size where none is missing."""
        starts = [piece.at for piece in self._given if piece.at < piece.end]
        starts += [start for start, _ in self._missing[:1]]
        return min(starts, default=self._total)

    @property
    def rest(self) -> int:
        """Bytes that have not arrived."""
        return ranges.size(self._missing) + self.under_way

    @property
    def under_way(self) -> int:
        """Bytes that connections are fetching."""
        return sum(piece.end - piece.at for piece in self._given)

    def take(self, hashed: int) -> Piece | None:
        """The next piece; None where none is left, or the next is too far ahead of `hashed`."""
        if not self._missing:
            return None
        start, stop = self._missing[0]
        base = min(hashed, self.front)
        if ranges.size(ranges.within(self._gaps, base, start)) >= self._ahead:
            return None
        piece = Piece(start, min(stop, (start // self._size + 1) * self._size))
        self._missing = ranges.difference(self._missing, ((piece.at, piece.end),))
        self._given.append(piece)
        return piece

    def give_back(self, piece: Piece) -> None:
        """A connection is done with a piece; what it leaves is missing again."""
        self._given.remove(piece)
        self._missing = ranges.union(self._missing, ((piece.at, piece.end),))

    def forget(self, lost: Ranges) -> None:
        """Bytes that had arrived are missing again. Nothing is under way meanwhile."""
        self._missing = ranges.union(self._missing, lost)
        self._gaps = ranges.union(self._gaps, lost)

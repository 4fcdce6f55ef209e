"""Which chunks of a layer are still to be proven by sums. Pure."""

from __future__ import annotations

from watcher.model import Ranges
from watcher.ollama import ranges
from watcher.state.sums import Chunk, Chunks


class Proof:
    """The chunks that have to be right before the whole is hashed; without sums there are none."""

    def __init__(self, chunks: Chunks, arrived: Ranges) -> None:
        self.chunks = chunks
        #: Those whose bytes came earlier. The hash of the whole proves them; if that is wrong,
        #: each is looked at.
        self._earlier = [each for each in chunks if has(arrived, each)]
        self._open = [each for each in chunks if not has(arrived, each)]
        #: How a chunk was wrong, by its first byte.
        self._wrong: dict[int, list[str]] = {}
        #: A chunk was right: the sums are about this layer.
        self._is_credible = False

    def front(self, total: int) -> int:
        """The first byte that may still turn out wrong."""
        return self._open[0].start if self._open else total

    def ready(self, arrived: Ranges) -> Chunk | None:
        """The first chunk that is all there, and not proven.

        If the first one is wrong, the others are left in peace until it was fetched again.
        """
        last = arrived[-1][1] if arrived else 0
        is_doubted = bool(self._wrong) and not self._is_credible
        for each in self._open:
            if each.start >= last:
                break
            if has(arrived, each) and (each.start in self._wrong or not is_doubted):
                return each
        return None

    def judge(self, chunk: Chunk, found: str) -> int | None:
        """Take up what a chunk hashes to: 0 where it is right, else how often it was wrong.

        None where it is wrong in the same way again. Then its bytes are the registry's own, and the
        sums are of something else.
        """
        if found == chunk.digest:
            self._open.remove(chunk)
            self._is_credible = True
            return 0
        before = self._wrong.setdefault(chunk.start, [])
        if found in before:
            return None
        before.append(found)
        return len(before)

    def look_again(self) -> bool:
        """The whole is wrong: look at the chunks that came earlier; whether there are any."""
        self._open, self._earlier = self._earlier, []
        return bool(self._open)

    def drop(self) -> None:
        """Believe the sums no longer."""
        self.chunks, self._open, self._earlier = (), [], []


def has(arrived: Ranges, chunk: Chunk) -> bool:
    """Whether all bytes of a chunk are in `arrived`."""
    return ranges.size(ranges.within(arrived, chunk.start, chunk.end)) == chunk.end - chunk.start

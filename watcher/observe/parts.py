"""Claimed, present and trusted bytes of one download, by the rules of ``docs/store.md``.

Holes (``lseek`` with SEEK_DATA and SEEK_HOLE) show what was never written; the data itself is read
only for the zeros at a range's end, and, after a reboot, for blocks that were never written.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from watcher.model import MIB, Part, Ranges, Reads, Trust
from watcher.ollama import ranges, sidecars

#: No allocation unit is larger: this many zeros at an end are enough to stop looking further back.
ZEROS_ENOUGH = 16 * MIB
#: So many zeros before the start of a part of old are no content, in a file without holes.
NOTHING = 64 * 1024
BLOCK = 4096  #: the unit in which zeros after a reboot are looked for
MOST_SEGMENTS = 100_000  #: a file in more pieces is hostile
_PIECE, _CHUNK = 4096, MIB  #: of a way through zeros: the first, and each further one
#: What lies behind less than a piece, at a part's end, is the next part's beginning: read along.
_WINDOW = 16 * 1024
_MOST_ANSWERS = 1000  #: a file with more answers than this is odd: they are found anew each time


class Doubts(NamedTuple):
    """What is known of a data file from before that makes its bytes doubtful."""

    rebooted: bool = False  #: some of it may have been written before the machine started
    refused: Ranges = ()  #: what the disk did not take, which is as good as a hole
    doubted: Ranges = ()  #: what an earlier scan knew to be doubtful; a claim settles it
    starts: Sequence[int] = ()  #: where parts that were there once began


class Limits(NamedTuple):
    read_bytes: int | None = None  #: where the file system has no holes; None for no limit
    stop: Callable[[], bool] = lambda: False  #: says when to read no more for zeros


def segments(fd: int, size: int) -> Ranges:
    """The parts of a file that are no holes, up to `size` bytes."""
    found: list[tuple[int, int]] = []
    at = 0
    while at < size and len(found) < MOST_SEGMENTS:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole behind `at`
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, min(at, size)))
    return ranges.normal(found)


def zero_blocks(fd: int, within: Ranges, stop: Callable[[], bool] = lambda: False) -> Ranges | None:
    """Blocks of zeros in `within`, on the file's grid; None where `stop` ended the reading."""
    found: list[tuple[int, int]] = []
    zeros = bytes(BLOCK)
    for start, end in within:
        for low, high in _cut(start, end, _CHUNK):
            if stop():
                return None
            chunk = os.pread(fd, high - low, low)
            # Only a chunk that begins or ends within a block can hide less than a block of zeros.
            if zeros not in chunk and low % BLOCK == 0 and high % BLOCK == 0:
                continue
            for block, block_end in _cut(low, high, BLOCK):
                if not chunk[block - low : block_end - low].strip(b"\0"):
                    found.append((block, block_end))
    return ranges.normal(found)


def _cut(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """``[start, end)`` in pieces that end on multiples of `step`."""
    while start < end:
        stop = min(end, (start // step + 1) * step)
        yield start, stop
        start = stop


def trust(content: Content | None, parts: Sequence[Part], doubts: Doubts, limits: Limits) -> Trust:
    """What can be believed of a data file; None where it is missing.

    `parts`: all parts by offset; those with a lost sidecar have the number -1 and claim nothing.
    Raises OSError where the data can't be read.
    """
    recorded = claimed = sidecars.claims(parts)
    lost = ranges.normal((part.offset, part.end) for part in parts if part.number < 0)
    if lost:
        claimed = sidecars.claims([part for part in parts if part.number >= 0])
    if content is None:
        return Trust(claimed=claimed)
    held = segments(content.fd, content.size)
    has_holes = ranges.size(held) < content.size
    held = ranges.difference(held, doubts.refused)
    # What the parts don't record, each on its own: parts that touch are not joined.
    rests = tuple((part.starts_at, part.end) for part in parts if part.completed < part.size)
    most = limits.read_bytes
    if not has_holes and most is not None and ranges.size(ranges.normal(rests)) > most:
        present = ranges.intersection(held, claimed)
        return Trust(claimed, present, present, has_holes, doubts.rebooted, zeros_read=False)
    # Where something else was written before, by parts that are no more.
    edges = {*doubts.starts, *(start for start, _ in doubts.doubted)}
    if parts and not has_holes:
        # A part that a repair has made may hold a beginning of the server's own cut, far behind its
        # own: it shows behind nothing but zeros.
        rule = sidecars.part_rule(parts[-1].end)
        edges.update(part.offset for part in rule[1:] if content.is_zeros_before(part.offset))
    enough = ZEROS_ENOUGH if has_holes else content.size
    present = _present(content, held, recorded, _cut_at(sorted(edges), rests, held), enough)
    # Behind its claim a part has written the run that begins where the claim ends.
    begins = {start for start, _ in rests}
    behind = ranges.intersection(present, rests)
    beyond = [(start + sidecars.DOUBTED_HEAD, end) for start, end in behind if start in begins]
    believed = ranges.normal((*ranges.intersection(recorded, present), *beyond))
    doubted = doubts.doubted
    if lost:
        # Without its sidecar a server may have begun a part again by the part rule, unseen.
        heads = sidecars.heads(sidecars.part_rule(parts[-1].end))
        doubted = ranges.union(doubted, ranges.intersection(heads, lost))
    believed = ranges.difference(believed, ranges.difference(doubted, claimed))
    zeros_read = not doubts.rebooted or most is None or ranges.size(believed) <= most
    if doubts.rebooted and zeros_read:
        zeros = zero_blocks(content.fd, believed, limits.stop)
        zeros_read = zeros is not None
        believed = ranges.difference(believed, zeros or ())
    return Trust(claimed, present, believed, has_holes, doubts.rebooted, zeros_read)


def _cut_at(edges: list[int], rests: Ranges, held: Ranges) -> Iterator[tuple[int, int]]:
    """What of `rests` is held, in pieces that end at `edges`."""
    for low, high in ranges.intersection(held, rests):
        inside = edges[bisect_right(edges, low) : bisect_left(edges, high)]
        yield from pairwise((low, *inside, high))


def _present(
    content: Content, held: Ranges, recorded: Ranges, rests: Iterable[tuple[int, int]], enough: int
) -> Ranges:
    """`held` without the zeros at the end of what each part has written.

    An allocation ends on a block, not on the last byte; and the block at a part's end belongs to
    the next part's beginning as well, so that no hole shows there. The same holds for each piece
    of the `rests`, at whose end `enough` zeros end the look.
    """
    kept: list[tuple[int, int]] = []
    # A claim holds no hole, but in data that was cut and made longer again: such a hole has the
    # rest of a block before it, and what was then written behind it may begin within a block, too.
    for low, high in recorded:
        for start, end in ranges.within(held, low, high):
            if start > low:
                start = content.written_start(start, end)
            if end < high:
                end = content.written_end(start, end)
            kept.append((start, end))
    kept.extend((start, content.written_end(start, end, enough)) for start, end in rests)
    return ranges.normal(kept)


class Content:
    """A data file up to `size` bytes; `known`: what a scan of the very same bytes read."""

    def __init__(self, fd: int, size: int, known: Reads | None = None) -> None:
        self.fd, self.size = fd, size
        self._known = _parsed(known.answers) if known is not None else {}
        self._asked: list[int] = []  #: where a look ends, where it starts, and the bytes
        self._window_at, self._window = 0, b""
        self._before: dict[int, bytes] = {}

    @property
    def answers(self) -> str:
        """What was asked, with the answers: to be known at the next scan."""
        return " ".join(map(str, self._asked)) if len(self._asked) <= 3 * _MOST_ANSWERS else ""

    def written_end(self, start: int, end: int, enough: int = ZEROS_ENOUGH) -> int:
        """Where the last non-zero byte of ``[start, end)`` ends, looking back over `enough`."""
        stop = max(start, end - enough)
        found = self._known.get((stop, end), -1)
        if not stop <= found <= end:
            found = self._last(stop, end)
        self._asked += (stop, end, found)
        return found

    def written_start(self, start: int, end: int) -> int:
        """Where the first non-zero byte of ``[start, end)`` is, looking at `ZEROS_ENOUGH`."""
        stop = min(end, start + ZEROS_ENOUGH)
        found = self._known.get((stop, start), -1)
        if not start <= found <= stop:
            found = self._first(start, stop)
        self._asked += (stop, start, found)
        return found

    def is_zeros_before(self, offset: int) -> bool:
        """Whether there are `NOTHING` zeros before an offset."""
        low, high = offset - NOTHING, min(offset, self.size)
        if low >= high:
            return False
        if (low, high) not in self._known:
            self._before[high] = os.pread(self.fd, high - low, low)
        return self.written_end(low, high) == low

    def _last(self, stop: int, end: int) -> int:
        chunk = len(self._before.get(end, b"")) or _PIECE
        while end > stop:
            low = max(stop, end - chunk)
            read = self._read(low, end)
            if read != bytes(len(read)):
                return low + len(read.rstrip(b"\0"))
            end, chunk = low, _CHUNK
        return end

    def _first(self, start: int, stop: int) -> int:
        chunk = _PIECE
        while start < stop:
            read = self._read(start, min(start + chunk, stop))
            if not read:
                break
            if read != bytes(len(read)):
                return start + len(read) - len(read.lstrip(b"\0"))
            start, chunk = start + len(read), _CHUNK
        return start

    def _read(self, low: int, high: int) -> bytes:
        length, at = high - low, low - self._window_at
        if 0 <= at <= len(self._window) - length:
            return self._window[at : at + length]
        before = self._before.get(high, b"")
        if length <= len(before):
            return before[-length:]
        if length >= _PIECE:
            return os.pread(self.fd, length, low)
        self._window_at, self._window = low, os.pread(self.fd, _WINDOW, low)
        return self._window[:length]


def _parsed(answers: str) -> dict[tuple[int, int], int]:
    """Answers as they were written down; none of a text that is none of ours."""
    try:
        numbers = list(map(int, answers.split()))
        return {(a, b): found for a, b, found in zip(*[iter(numbers)] * 3, strict=True)}
    except ValueError:
        return {}


def data_behind(fd: int, start: int) -> int | None:
    """Where the first bytes other than zeros lie from `start` on; None where there are none."""
    read, at = 0, start
    while read < ZEROS_ENOUGH:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return None  # a hole up to the end
        piece = os.pread(fd, _CHUNK, at)
        if not piece:
            return None
        if left := len(piece.lstrip(b"\0")):
            return at + len(piece) - left
        read, at = read + len(piece), at + len(piece)
    return None

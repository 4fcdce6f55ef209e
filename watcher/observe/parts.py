"""Claimed, present and trusted bytes of one download, by the rules of ``docs/store.md``.

Holes (``lseek`` with SEEK_DATA and SEEK_HOLE) tell what was never written; the data itself is read
only for the zeros at a range's end, and, after a reboot, for blocks that were never written.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from watcher.model import MIB, Part, Ranges, Trust
from watcher.observe.content import ZEROS_ENOUGH, Content
from watcher.ollama import ranges, sidecars

#: The unit in which zeros after a reboot are looked for.
BLOCK = 4096
#: A file in more pieces than this is hostile; what lies behind them is not believed.
MOST_SEGMENTS = 100_000
_CHUNK = MIB


class Doubts(NamedTuple):
    """What is known of a data file from before that makes its bytes doubtful."""

    #: Some of it may have been written before the machine started.
    rebooted: bool = False
    #: What the disk did not take, which is as good as a hole.
    refused: Ranges = ()
    #: What an earlier scan knew to be doubtful; a claim settles it.
    doubted: Ranges = ()
    #: Where parts that were there once began.
    starts: Sequence[int] = ()


class Limits(NamedTuple):
    """How much may be read."""

    #: Bytes that may be read where holes don't tell; None for no limit.
    read_bytes: int | None = None
    #: Says when to read no more for zeros.
    stop: Callable[[], bool] = lambda: False


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
    """Blocks of nothing but zeros in `within`, on the file's grid of blocks. Reads all of it.

    None where `stop`, which is asked for each piece, said to read no more.
    """
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
    claimed = sidecars.claims([part for part in parts if part.number >= 0])
    if content is None:
        return Trust(claimed=claimed)
    held = segments(content.fd, content.size)
    holes_tell = ranges.size(held) < content.size
    held = ranges.difference(held, doubts.refused)
    open_ends = ranges.normal((part.starts_at, part.end) for part in parts)
    most = limits.read_bytes
    if not holes_tell and most is not None and ranges.size(open_ends) > most:
        present = ranges.intersection(held, claimed)
        return Trust(claimed, present, present, holes_tell, doubts.rebooted, zeros_read=False)
    present = _present(content, held, parts, _edges(content, parts, doubts, holes_tell=holes_tell))
    started = sidecars.claims(parts)
    believed = ranges.union(ranges.intersection(started, present), _beyond(present, parts))
    doubted = ranges.union(doubts.doubted, _begun_unseen(parts))
    believed = ranges.difference(believed, ranges.difference(doubted, claimed))
    zeros_read = not doubts.rebooted or most is None or ranges.size(believed) <= most
    if doubts.rebooted and zeros_read:
        zeros = zero_blocks(content.fd, believed, limits.stop)
        zeros_read = zeros is not None
        believed = ranges.difference(believed, zeros or ())
    return Trust(claimed, present, believed, holes_tell, doubts.rebooted, zeros_read)


def _edges(content: Content, parts: Sequence[Part], doubts: Doubts, *, holes_tell: bool) -> _Edges:
    """Where something else was written before, by parts that are no more."""
    edges = {*doubts.starts, *(start for start, _ in doubts.doubted)}
    if parts and not holes_tell:
        # A part that a repair has made may hold a beginning of the server's own cut, far behind its
        # own: it shows behind nothing but zeros.
        rule = sidecars.part_rule(parts[-1].end)
        edges.update(part.offset for part in rule[1:] if content.is_zeros_before(part.offset))
    return _Edges(sorted(edges), ZEROS_ENOUGH if holes_tell else content.size)


class _Edges(NamedTuple):
    """Offsets at which zeros are trimmed, and how far back each look for them goes."""

    at: Sequence[int]
    enough: int


def _begun_unseen(parts: Sequence[Part]) -> Ranges:
    """Without its sidecar a server may have begun a part again by the part rule, unseen."""
    lost = [part for part in parts if part.number < 0]
    if not lost:
        return ()
    heads = sidecars.heads(sidecars.part_rule(parts[-1].end))
    return ranges.intersection(heads, ranges.normal((part.offset, part.end) for part in lost))


def _present(content: Content, held: Ranges, parts: Sequence[Part], edges: _Edges) -> Ranges:
    """`held` without the zeros at the end of what each part has written.

    An allocation ends on a block, not on the last byte; and the block at a part's end belongs to
    the next part's beginning as well, so that no hole shows there. The same holds at `edges`.
    """
    kept = list(_claimed(content, held, sidecars.claims(parts)))
    for low, high in ranges.intersection(held, _unclaimed(parts)):
        inside = edges.at[bisect_right(edges.at, low) : bisect_left(edges.at, high)]
        for start, end in pairwise((low, *inside, high)):
            kept.append((start, content.written_end(start, end, edges.enough)))
    return ranges.normal(kept)


def _claimed(content: Content, held: Ranges, claimed: Ranges) -> Iterator[tuple[int, int]]:
    """What of the claims is in no hole, without the zeros beside one within a claim.

    Data that was cut and made longer again has such a hole, and the rest of a block before it; what
    was then written behind the hole may begin within a block, too.
    """
    for low, high in claimed:
        for start, end in ranges.within(held, low, high):
            if start > low:
                start = content.written_start(start, end)
            if end < high:
                end = content.written_end(start, end)
            yield start, end


def _beyond(present: Ranges, parts: Sequence[Part]) -> Ranges:
    """What parts have written behind their claims: the run that begins where the claim ends."""
    begins = {part.starts_at for part in parts}
    return ranges.normal(
        (start + sidecars.DOUBTED_HEAD, end)
        for start, end in ranges.intersection(present, _unclaimed(parts))
        if start in begins
    )


def _unclaimed(parts: Sequence[Part]) -> Ranges:
    """What the parts don't claim, each on its own: parts that touch are not joined."""
    return tuple((part.starts_at, part.end) for part in parts if part.completed < part.size)

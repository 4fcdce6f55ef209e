"""Claimed, present and trusted bytes of one download, by the rules of ``docs/store.md``.

Holes (``lseek`` with SEEK_DATA and SEEK_HOLE) tell what was never written; the data itself is read
only for the zeros at a range's end, and, after a reboot, for blocks that were never written.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from watcher.model import MIB, Part, Ranges, Trust
from watcher.ollama import ranges, sidecars

#: No allocation unit is larger: this many zeros at an end are enough to stop looking further back.
ZEROS_ENOUGH = 16 * MIB
#: The unit in which zeros after a reboot are looked for.
BLOCK = 4096
#: So many zeros before the start of a part of old are no content, in a file without holes.
_TAIL_ENOUGH = 16 << 20
_NOTHING = 64 * 1024
#: A file in more pieces than this is hostile; what lies behind them is not believed.
MOST_SEGMENTS = 100_000

_CHUNK = MIB
#: So many zeros are stripped as fast as they are told otherwise.
_FEW = 64


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


def without_trailing_zeros(fd: int, start: int, end: int, enough: int = ZEROS_ENOUGH) -> int:
    """Where the last non-zero byte of ``[start, end)`` ends, looking back over `enough` bytes."""
    stop = max(start, end - enough)
    chunk = BLOCK
    while end > stop:
        low = max(stop, end - chunk)
        read = os.pread(fd, end - low, low)
        if read != bytes(len(read)):
            return low + _last_written(read)
        end, chunk = low, _CHUNK
    return end


def _last_written(read: bytes) -> int:
    """Where the last non-zero byte of `read` ends."""
    end = run = len(read)
    # Many zeros at once are told far sooner than stripped one by one.
    while run > _FEW and not read[end - 1]:
        run //= 2
        if read.endswith(bytes(run), 0, end):
            end -= run
    return len(read[:end].rstrip(b"\0"))


def without_leading_zeros(fd: int, start: int, end: int, enough: int = ZEROS_ENOUGH) -> int:
    """Where the first non-zero byte of ``[start, end)`` is, looking at `enough` bytes."""
    stop = min(end, start + enough)
    chunk = BLOCK
    while start < stop:
        read = os.pread(fd, min(chunk, stop - start), start)
        if not read:
            break
        if read != bytes(len(read)):
            return start + len(read) - len(read.lstrip(b"\0"))
        start, chunk = start + len(read), _CHUNK
    return start


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


def trust(
    fd: int | None,
    size: int,
    parts: Sequence[Part],
    *,
    rebooted: bool,
    read_limit: int | None,
    refused: Ranges = (),
    doubted: Ranges = (),
    starts: Sequence[int] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Trust:
    """What can be believed of a data file.

    `fd` and `size` are the data file's (None and 0 where it is missing), `parts` all parts by
    offset; those with a lost sidecar have the number -1 and claim nothing. `rebooted`: some of it
    may have been written before the machine started. `read_limit`: bytes that may be read where
    holes don't tell; None for no limit. `refused`: what the disk did not take, which is as good as
    a hole. `doubted`: what an earlier look knew to be doubtful; a claim settles it. `starts`: where
    parts that were there once began. `stop` says when to read no more for zeros.
    Raises OSError where the data can't be read.
    """
    claimed = sidecars.claims([part for part in parts if part.number >= 0])
    if fd is None:
        return Trust(claimed=claimed)
    held = segments(fd, size)
    holes_tell = ranges.size(held) < size
    held = ranges.difference(held, refused)
    open_ends = ranges.normal((part.starts_at, part.end) for part in parts)
    if not holes_tell and read_limit is not None and ranges.size(open_ends) > read_limit:
        present = ranges.intersection(held, claimed)
        return Trust(claimed, present, present, holes_tell, rebooted, zeros_read=False)
    edges = {*starts, *(start for start, _ in doubted)}
    if parts and not holes_tell:
        edges.update(_begun(fd, sidecars.part_rule(parts[-1].end)))
    present = _present(fd, held, parts, sorted(edges), ZEROS_ENOUGH if holes_tell else size)
    started = sidecars.claims(parts)
    believed = ranges.union(ranges.intersection(started, present), _beyond(present, parts))
    lost = [part for part in parts if part.number < 0]
    if lost:
        # Without the sidecars a server may have begun again by the part rule, unseen.
        heads = sidecars.heads(sidecars.part_rule(parts[-1].end))
        gaps = ranges.normal((part.offset, part.end) for part in lost)
        doubted = ranges.union(doubted, ranges.intersection(heads, gaps))
    believed = ranges.difference(believed, ranges.difference(doubted, claimed))
    zeros_read = not rebooted or read_limit is None or ranges.size(believed) <= read_limit
    if rebooted and zeros_read:
        zeros = zero_blocks(fd, believed, stop)
        zeros_read = zeros is not None
        believed = ranges.difference(believed, zeros or ())
    return Trust(claimed, present, believed, holes_tell, rebooted, zeros_read)


def data_behind(fd: int, start: int) -> int | None:
    """Where the first bytes other than zeros lie from `start` on; None where there are none.

    Blocks that a file system has reserved hold zeros; of such no more than 16 MiB are read.
    """
    read, at = 0, start
    while read < _TAIL_ENOUGH:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return None  # a hole up to the end
        piece = os.pread(fd, 1 << 20, at)
        if not piece:
            return None
        if left := len(piece.lstrip(b"\0")):
            return at + len(piece) - left
        read, at = read + len(piece), at + len(piece)
    return None


def _present(
    fd: int, held: Ranges, parts: Sequence[Part], edges: Sequence[int], enough: int
) -> Ranges:
    """`held` without the zeros at the end of what each part has written.

    An allocation ends on a block, not on the last byte; and the block at a part's end belongs to
    the next part's beginning as well, so that no hole shows there. The same holds at `edges`,
    where something else was written before, by parts that are no more.
    """
    kept = list(_claimed(fd, held, sidecars.claims(parts)))
    for low, high in ranges.intersection(held, _unclaimed(parts)):
        inside = edges[bisect_right(edges, low) : bisect_left(edges, high)]
        for start, end in pairwise((low, *inside, high)):
            kept.append((start, without_trailing_zeros(fd, start, end, enough)))
    return ranges.normal(kept)


def _begun(fd: int, rule: Sequence[Part]) -> Iterator[int]:
    """Where parts of the server's own cut begin behind nothing but zeros.

    A part that a repair has made may hold such a beginning far behind its own.
    """
    for part in rule[1:]:
        before = os.pread(fd, _NOTHING, part.offset - _NOTHING)
        if before and not before.strip(b"\0"):
            yield part.offset


def _claimed(fd: int, held: Ranges, claimed: Ranges) -> Iterator[tuple[int, int]]:
    """What of the claims is in no hole, without the zeros beside one within a claim.

    Data that was cut and made longer again has such a hole, and the rest of a block before it; what
    was then written behind the hole may begin within a block, too.
    """
    for low, high in claimed:
        for start, end in ranges.within(held, low, high):
            if start > low:
                start = without_leading_zeros(fd, start, end)
            if end < high:
                end = without_trailing_zeros(fd, start, end)
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

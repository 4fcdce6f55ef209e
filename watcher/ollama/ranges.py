"""Sets of byte ranges: sorted, disjoint, half-open ``[start, end)``, neighbours joined."""

from bisect import bisect_right
from collections.abc import Iterable
from operator import itemgetter

from rich.filesize import decimal

from watcher.model import Ranges


def normal(pieces: Iterable[tuple[int, int]]) -> Ranges:
    """Sort, drop what is empty and join what touches or overlaps."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(pieces):
        if start >= end:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return tuple(joined)


def size(ranges: Ranges) -> int:
    return sum(end - start for start, end in ranges)


def union(first: Ranges, second: Ranges) -> Ranges:
    return normal(first + second)


def intersection(first: Ranges, second: Ranges) -> Ranges:
    """What lies in both, cut where neighbours in one of them touch. Linear in their number."""
    common: list[tuple[int, int]] = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = first[i]
        low, high = second[j]
        if start < high and low < end:
            common.append((max(low, start), min(high, end)))
        if end < high:
            i += 1
        else:
            j += 1
    return tuple(common)


def within(ranges: Ranges, start: int, end: int) -> Ranges:
    """What of `ranges` lies in ``[start, end)``. Logarithmic, so that it can be asked often."""
    at = bisect_right(ranges, start, key=itemgetter(1))
    clipped: list[tuple[int, int]] = []
    while at < len(ranges) and ranges[at][0] < end:
        clipped.append((max(ranges[at][0], start), min(ranges[at][1], end)))
        at += 1
    return tuple(clipped)


def complement(ranges: Ranges, end: int) -> Ranges:
    """What of ``[0, end)`` does not lie in `ranges`."""
    gaps: list[tuple[int, int]] = []
    at = 0
    for start, stop in ranges:
        if start >= end:
            break
        if at < start:
            gaps.append((at, start))
        at = stop
    if at < end:
        gaps.append((at, end))
    return tuple(gaps)


def difference(first: Ranges, second: Ranges) -> Ranges:
    if not first or not second:
        return first
    return intersection(first, complement(second, first[-1][1]))


def in_words(*sizes: int) -> list[str]:
    """Numbers of bytes for people, who compare them: exact where two would look alike."""
    found = list(map(decimal, sizes))
    if len(set(found)) < len(set(sizes)):
        return [f"{each:,} bytes" for each in sizes]
    return found

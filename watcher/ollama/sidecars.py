"""A sidecar's bytes, the part rule, and the faults of a set."""

import heapq
from collections.abc import Iterable, Sequence
from itertools import pairwise, zip_longest

from watcher.model import MIB, Part, Ranges, Sidecar
from watcher.ollama import gojson, ranges

#: A sidecar of the server has at most about 100 bytes; what is larger is read no further.
READ_LIMIT = 4096

_SIDECAR = dict.fromkeys(("n", "offset", "size", "completed"), int)

# Part sizes of the server, in bytes: a sixteenth of the layer, within these (decimal) bounds.
_PARTS = 16
_SMALLEST_PART = 100_000_000
_LARGEST_PART = 1_000_000_000
#: Each retry begins at Offset + Completed, and a failed one may have written an error page there.
DOUBTED_HEAD = MIB
LARGEST_LAYER = 64 << 40  #: no layer is larger; a larger one is wrong, and must not cost memory
#: A missing piece is cut no smaller, so that the parts of a resumed pull stay few.
_SMALLEST_CUT = 32 * MIB
#: More missing pieces than this (they come from many rounds of kill and repair) are joined.
_MOST_GAPS = 128


def parse(raw: bytes) -> Part:
    """Read a sidecar as the server does. Raises ValueError with the reason where it would fail.

    ``{}`` is no error to the server (a part of no bytes), so it is none here; `faults` reports it.
    """
    value = gojson.fields(gojson.first_value(raw), "the sidecar", _SIDECAR)
    return Part(*(value.get(key, 0) for key in _SIDECAR))


def write(part: Part) -> bytes:
    """The bytes of a sidecar, to the letter as the server writes them."""
    text = '{"N":%d,"Offset":%d,"Size":%d,"Completed":%d}\n'
    return (text % part).encode()


def part_rule(total: int) -> tuple[Part, ...]:
    """The parts into which the server cuts a layer of `total` bytes, nothing of them completed."""
    step = min(max(total // _PARTS, _SMALLEST_PART), _LARGEST_PART)
    starts = enumerate(range(0, total, step))
    return tuple(Part(number, at, min(step, total - at), 0) for number, at in starts)


def part_fault(number: int | None, part: Part) -> str | None:
    """What is wrong with one parsed part, whatever the others have."""
    if number is None:
        return "no plain number in its name"
    if part.number != number:
        return f"says it is part {part.number}"
    if min(part.offset, part.completed) < 0:
        return "a negative number"
    if part.size <= 0:
        return "a part of no bytes"
    if part.completed > part.size:
        return "more completed than it has bytes"
    return None


def faults(sidecars: Sequence[Sidecar], total: int | None) -> tuple[str, ...]:
    """Why the server can't go on with this set, if so; `total`: the length by something else."""
    faulty = [each for each in sidecars if each.fault]
    found = [f"part {'?' if each.number is None else each.number}: {each.fault}" for each in faulty]
    numbers = {each.number for each in sidecars if each.number is not None}
    missing = sorted(set(range(len(sidecars))) - numbers)
    if missing and numbers:
        shown = ", ".join(map(str, missing[:5])) + (" …" if len(missing) > 5 else "")
        found.append(f"of {len(sidecars)} sidecars, number {shown} is missing")
    flawless = (each.part for each in sidecars if each.part and not each.fault)
    parts = sorted(flawless, key=lambda part: part.offset)
    at = 0
    for part in parts:
        if part.offset < at:
            found.append(f"part {part.number} overlaps the one before it")
        elif part.offset > at and len(parts) == len(sidecars):
            found.append(f"a gap before part {part.number}")
        at = max(at, part.end)
    if not found and total is not None and parts and at != total:
        found.append("the parts add up to {}, not to {}".format(*ranges.in_words(at, total)))
    return tuple(found)


def believable(sidecars: Sequence[Sidecar], total: int) -> tuple[Part, ...]:
    """The parts of a faulty set that fit into `total` bytes and overlap no other, by offset."""
    flawless = (each.part for each in sidecars if each.part and not each.fault)
    parts = sorted((p for p in flawless if p.end <= total), key=lambda part: part.offset)
    alone: list[Part] = []
    reached = 0
    for part, after in zip_longest(parts, parts[1:]):
        if reached <= part.offset and (after is None or part.end <= after.offset):
            alone.append(part)
        reached = max(reached, part.end)
    return tuple(alone)


def fill_gaps(parts: Sequence[Part], total: int, remembered: Sequence[Part]) -> tuple[Part, ...]:
    """`parts`, and for what lies between them the parts that were most likely there.

    Those `remembered` first, where they fit into a gap; for the rest the ones that the part rule
    would have made, with nothing completed. The added parts have number -1.
    """
    known = list(parts)

    def gaps() -> Ranges:
        taken = ranges.normal((part.offset, part.end) for part in known)
        return ranges.complement(taken, total)

    for part in remembered:
        free = gaps()
        if any(start <= part.offset and part.end <= end for start, end in free):
            known.append(part._replace(number=-1))
    rule = tuple((part.offset, part.end) for part in part_rule(total))
    lost = [Part(-1, low, high - low, 0) for low, high in ranges.intersection(gaps(), rule)]
    return tuple(sorted((*known, *lost), key=lambda part: part.offset))


def heads(parts: Sequence[Part]) -> Ranges:
    """What is in doubt behind each unfinished part's claim."""
    rests = ((part.starts_at, part.end) for part in parts if part.completed < part.size)
    return ranges.normal((start, min(end, start + DOUBTED_HEAD)) for start, end in rests)


def from_trusted(trusted: Ranges, total: int, at_least: int = 1) -> tuple[Part, ...]:
    """The parts that claim just `trusted` of a layer of `total` bytes, numbered from 0.

    A part is a trusted run and the missing rest behind it; a trusted tail is a part of its own.
    What is missing is spread over several parts, so that a resumed pull is as fast as a fresh one.
    `at_least` so many parts are made where there are bytes enough: then no sidecar is left over.
    The same ranges give the same parts. Trusted bytes beside a very small missing piece are given
    up, and so are the smallest runs where there would be too many pieces.
    """
    made: list[tuple[int, int, int]] = []
    at = 0
    for start, end in _spread(_gaps(trusted, total)):
        made.append((at, end - at, start - at))
        at = end
    if at < total:
        made.append((at, total - at, total - at))
    return tuple(Part(number, *each) for number, each in enumerate(_split(made, at_least)))


def _gaps(trusted: Ranges, total: int) -> Ranges:
    """The missing pieces: of at least 1 MiB, and not too many; what lies between is given up."""
    wide: list[tuple[int, int]] = []
    for start, end in ranges.complement(trusted, total):
        # Trusted bytes before them are given up, or else behind.
        start = max(wide[-1][1] if wide else 0, min(start, end - MIB))
        wide.append((start, min(total, max(end, start + MIB))))
    gaps = ranges.normal(wide)
    too_many = len(gaps) - _MOST_GAPS
    if too_many <= 0:
        return gaps
    runs = ranges.intersection(ranges.complement(gaps, total), ((gaps[0][1], gaps[-1][0]),))
    smallest = sorted(runs, key=lambda run: (run[1] - run[0], run[0]))[:too_many]
    return ranges.normal((*gaps, *smallest))


def _spread(gaps: Ranges) -> list[tuple[int, int]]:
    """The missing pieces cut so that up to 16 can be fetched at once, each of 32 MiB or more."""
    cuts = [1] * len(gaps)
    while sum(cuts) < _PARTS and gaps:
        sizes = [(end - start) // cut for (start, end), cut in zip(gaps, cuts, strict=True)]
        largest = max(range(len(gaps)), key=lambda index: (sizes[index], -index))
        start, end = gaps[largest]
        if (end - start) // (cuts[largest] + 1) < _SMALLEST_CUT:
            break
        cuts[largest] += 1
    pieces: list[tuple[int, int]] = []
    for (start, end), cut in zip(gaps, cuts, strict=True):
        # On the grid of MiB, so that a cut's block is not shared by two parts.
        step = (end - start) // cut
        marks = [start, *((start + step * n) // MIB * MIB for n in range(1, cut)), end]
        pieces.extend(pairwise(marks))
    return pieces


def _split(made: Iterable[tuple[int, int, int]], at_least: int) -> list[tuple[int, int, int]]:
    """Parts (offset, size, completed), the largest cut in two until there are enough of them."""
    largest = [(-size, offset, completed) for offset, size, completed in made]
    heapq.heapify(largest)
    while len(largest) < at_least and largest and largest[0][0] < -1:
        size, offset, completed = largest[0]
        half = -size // 2
        heapq.heapreplace(largest, (-half, offset, min(completed, half)))
        heapq.heappush(largest, (size + half, offset + half, max(0, completed - half)))
    return sorted((offset, -size, completed) for size, offset, completed in largest)


def claims(parts: Sequence[Part]) -> Ranges:
    return ranges.normal((part.offset, part.starts_at) for part in parts)

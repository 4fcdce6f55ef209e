"""A download's bytes drawn in a line, readable without color."""

from __future__ import annotations

from watcher.model import Ranges, Trust
from watcher.ollama import ranges
from watcher.show.text import size

CLAIMED = "#"
PRESENT = "+"
MISSING = "."
LEGEND = f"{CLAIMED} recorded   {PRESENT} on disk, not recorded by the server   {MISSING} missing"


def drawing(trust: Trust, total: int, cells: int) -> str:
    """`cells` characters for `total` bytes, each for what most of its bytes are."""
    drawn: list[str] = []
    real = ranges.intersection(trust.claimed, trust.present)
    for cell in range(cells):
        start = total * cell // cells
        piece: Ranges = ((start, max(start + 1, total * (cell + 1) // cells)),)
        half = ranges.size(piece) / 2
        if ranges.size(ranges.intersection(piece, real)) > half:
            drawn.append(CLAIMED)
        elif ranges.size(ranges.intersection(piece, trust.present)) > half:
            drawn.append(PRESENT)
        else:
            drawn.append(MISSING)
    return "".join(drawn)


def scale(total: int, cells: int) -> str:
    """What stands below a drawing: where it begins, its middle, and its end."""
    middle, end = size(total // 2), size(total)
    left = f"{0:<{max(2, (cells - len(middle)) // 2)}}{middle}"
    return f"{left}{end:>{max(len(end) + 1, cells - len(left))}}"

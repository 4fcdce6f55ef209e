"""A download's bytes drawn in a line, readable without colour."""

from __future__ import annotations

from watcher.model import Ranges, Trust
from watcher.ollama import ranges

CLAIMED = "#"
PRESENT = "+"
MISSING = "."
LEGEND = f"{CLAIMED} claimed   {PRESENT} on disk, not claimed   {MISSING} missing"


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

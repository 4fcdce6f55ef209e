"""What fits into one line of plain text, without rich's tables, which take long to load."""

from __future__ import annotations

from rich.filesize import decimal

from watcher import names
from watcher.cycle import Report


def count(number: int, what: str) -> str:
    """A number of things, in words: ``1 model``, ``2,000 models``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def healthy_line(report: Report) -> str:
    """The one line for a store with nothing to tell."""
    census = report.evidence.census
    return (
        f"healthy: {names.printable(report.evidence.place.path)}: "
        f"{count(census.manifests, 'model')}, {count(census.healthy, 'blob')}, "
        f"{decimal(census.healthy_bytes)}\n"
    )

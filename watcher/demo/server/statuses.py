"""What a client is told while it waits: one JSON object a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Line = dict[str, Any]
Emit = Callable[[Line], None]


def short_digest(digest: str) -> str:
    """Twelve digits of a digest, as statuses and log name it."""
    return digest[7:19]


def progress(digest: str, total: int, completed: int) -> Line:
    """A status line of a layer; numbers that are 0 are left out."""
    line: Line = {"status": f"pulling {short_digest(digest)}", "digest": digest}
    if total:
        line["total"] = total
    if completed:
        line["completed"] = completed
    return line

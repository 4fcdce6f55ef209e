"""How wide text is. Loads next to nothing, so that help is quick."""

from __future__ import annotations

import os
import sys

NARROWEST, USUAL, WIDEST = 60, 80, 160


def width() -> int:
    """The columns of the terminal, within what can be read; 80 in a pipe."""
    columns = os.environ.get("COLUMNS", "")
    given = int(columns) if columns.isascii() and columns.isdecimal() and len(columns) < 10 else 0
    return min(max(given or _columns_of_terminal() or USUAL, NARROWEST), WIDEST)


def _columns_of_terminal() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (AttributeError, ValueError, OSError):  # no file, or no terminal
        return 0

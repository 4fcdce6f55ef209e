"""How wide text is. Loads next to nothing, so that help is quick."""

import contextlib
import os
import sys

NARROWEST, USUAL, WIDEST = 60, 80, 160


def width() -> int:
    """The columns of the terminal, within what can be read; 80 in a pipe."""
    columns = os.environ.get("COLUMNS", "")
    found = int(columns) if columns.isascii() and columns.isdecimal() and len(columns) < 10 else 0
    if not found:
        # Stdout may be no file, or no terminal.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            found = os.get_terminal_size(sys.stdout.fileno()).columns
    return min(max(found or USUAL, NARROWEST), WIDEST)

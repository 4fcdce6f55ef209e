"""How many made-up cases a test tries: half of them in the usual run, with `--slow` all."""

from __future__ import annotations

import os

#: Set where `--slow` is given, before any test is imported.
ALL = "TESTS_ALL_EXAMPLES"


def some(of: int) -> int:
    """So many of the cases that a test has."""
    return of if ALL in os.environ else of // 2

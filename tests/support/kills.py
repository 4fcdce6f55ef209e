"""A process that is given orders, and dies at the changing call that an order names.

`tests/support/breaking.py` is the other side: for each order it forks, and the child breaks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Self

from .driving import environment


class Ended(NamedTuple):
    """How an order ended: its exit code (-9 after a kill, 70 for an error that escaped)."""

    code: int
    #: The changing calls that were made.
    calls: list[str]


class Breaker:
    """Runs a module that takes orders; leaving the context ends it."""

    def __init__(self, module: str, folder: Path) -> None:
        self._errors = folder / f"{module}.err"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                env=environment(folder / module),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.communicate(timeout=120)

    @property
    def errors(self) -> str:
        """What it has written to stderr."""
        return self._errors.read_text()

    def kill(self) -> None:
        """Kill it, and the children that carry out its orders."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def begin(self, **order: Any) -> None:
        """Give an order, and return at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def end(self) -> Ended:
        """Wait until it was carried out, or has broken."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.errors
        answer = json.loads(line)
        return Ended(answer["exit"], answer["calls"])

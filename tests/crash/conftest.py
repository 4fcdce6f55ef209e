"""A process that runs cycles and breaks them on order."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.driving import Store, environment, private_proc


class Ended(NamedTuple):
    """How a cycle ended: its exit code (-9 after a kill, 70 for an error that escaped)."""

    code: int
    calls: list[str]


class Driver:
    """Orders cycles over stores; see `driver`."""

    def __init__(self, folder: Path) -> None:
        self._proc = private_proc(folder / "proc")
        self.errors = folder / "driver.err"
        with self.errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("driver.py"))],
                env=environment(folder / "driver"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def cycle(self, store: Store, **order: Any) -> Ended:
        """Run one cycle over a store, to its end or to the call where it breaks."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order |= {"store": str(store.path), "proc": self._proc}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self.errors.read_text()
        answer = json.loads(line)
        return Ended(answer["exit"], answer["calls"])

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=30)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    made = Driver(tmp_path_factory.mktemp("driver"))
    yield made
    made.close()

"""A process that runs cycles and breaks them on order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.breaking import POLICY, carried_out, ends_here
from tests.support.driving import HealthyStore, private_proc
from tests.support.kills import Breaker, Ended
from tests.support.runs import changed, one_run
from watcher.observe.host import Host
from watcher.reconcile import Report


class Driver:
    """Orders cycles over stores; see `driver`."""

    def __init__(self, folder: Path, breaker: Breaker, *, kills: bool) -> None:
        """`kills`: each kill is that of a process, not only where the order says so."""
        self.proc = Path(private_proc(folder / "proc"))
        self._breaker, self._kills = breaker, kills

    @property
    def errors(self) -> str:
        """What the process has written to stderr."""
        return self._breaker.errors

    def cycle(self, store: HealthyStore, **order: Any) -> Ended:
        """Run one cycle over a store, to its end or to the call where it breaks."""
        order = {"process": self._kills, **order, "store": str(store.path), "proc": str(self.proc)}
        if ends_here(order):
            return Ended(*carried_out(order))
        self._breaker.begin(**order)
        return self._breaker.end()

    def unhindered(self, store: HealthyStore, **policy: Any) -> Report:
        """Run one cycle here, which shows the same where nothing is to break."""
        host = Host(str(store.path), proc=str(self.proc), registry_length=lambda *_: None)
        return one_run(host, changed(POLICY, **policy))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory, slow: bool) -> Iterator[Driver]:
    folder = tmp_path_factory.mktemp("driver")
    with (
        pytest.MonkeyPatch.context() as patch,
        Breaker("tests.support.breaking", folder) as breaker,
    ):
        # As in what breaks: what has reached the disk plays no part.
        patch.setattr(os, "fsync", lambda _: None)
        yield Driver(folder, breaker, kills=slow)

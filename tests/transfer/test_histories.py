"""Random histories of one transfer: whatever happens, the model arrives, and within its budget."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

from tests.support.servers import EngineServer
from watcher.demo.registry import Fault, Manners, Registry
from watcher.model import MIB
from watcher.ollama import ranges

from .driven import Here, Process, wait_for, with_options

SIZE = 24_000_000
CONNECTIONS = 4
SYNC = 4 * MIB
OPTIONS = with_options(connections=CONNECTIONS, sync_bytes=SYNC, tries=None, sync_seconds=0.5)
MANY = pytest.mark.slow("each history takes ten seconds, and two are enough to see a mistake")


class History:
    """One store, through whatever happens to it."""

    def __init__(self, here: Here, seed: int, folder: Path) -> None:
        self.here, self.chance = here, random.Random(seed)
        self.counter = folder / "received"
        self.starts = self.kills = self.cuts = 0

    @property
    def received(self) -> int:
        """Bytes of all bodies that our clients have received."""
        raw = self.counter.read_bytes() if self.counter.exists() else b""
        return int(struct.unpack("q", raw)[0]) if len(raw) == 8 else 0

    @property
    def boot(self) -> str:
        return f"start {self.starts}"

    def pulling(self) -> Process:
        return Process(self.here, OPTIONS, self.boot, self.counter)

    def line(self) -> None:
        """The line is another one from now on."""
        registry, chance = self.here.registry, self.chance
        registry.clear_faults()
        registry.manners = Manners(
            lifetime=chance.choice([None, 3, 10]), plain=chance.random() < 0.2
        )
        for fault in (
            Fault("reset", begin=1, after=chance.randint(1, 3_000_000), every=chance.randint(2, 5)),
            Fault("page", begin=1, every=chance.randint(3, 7), body="sorry"),
            Fault("truncate", begin=1, after=chance.randint(1, 2_000_000), every=3),
            Fault("wrong_total", begin=1, every=9),
        ):
            if chance.random() < 0.5:
                registry.add_fault(fault)

    def kill(self) -> None:
        until = self.received + self.chance.randint(0, 8_000_000)
        with self.pulling() as pulling:
            wait_for(lambda: self.received >= until or pulling.has_ended)
            self.kills += not pulling.has_ended
            pulling.kill()

    def two(self) -> None:
        """A second process, and the first one dies."""
        until = self.received + self.chance.randint(0, 5_000_000)
        with self.pulling() as first, self.pulling() as second:
            wait_for(lambda: self.received >= until or first.has_ended)
            self.kills += 2 - first.has_ended - second.has_ended
            first.kill()

    def cut_power(self) -> None:
        """What was not synced is gone, and the machine starts again."""
        self.kill()
        self.starts += 1
        self.cuts += 1
        data = self.here.folder / "data"
        if not data.exists():
            return
        size = data.stat().st_size
        with self.here.ledger(self.boot) as found:
            lost = ranges.complement(found.durable, size)
        with data.open("r+b") as file:
            for start, end in lost:
                file.seek(start)
                file.write(bytes(end - start))

    def start_server(self) -> None:
        """All files are older than a day when a server starts."""
        for path in self.here.path.rglob("*"):
            if path.is_file():
                os.utime(path, (1, 1))
        with EngineServer(self.here.path) as server:
            server.start().wait_ready()

    def run(self) -> None:
        self.here.registry.throttle(30_000_000)
        for _ in range(5):
            self.line()
            # A blob whose manifest is not written yet is a server's to remove.
            acts = [self.kill, self.kill, self.cut_power, self.two]
            if not self.here.blob.exists():
                acts.append(self.start_server)
            self.chance.choice(acts)()
        self.here.registry.throttle(None)
        with self.pulling() as pulling:
            pulling.end()


@pytest.mark.parametrize("seed", [1, 2, *(pytest.param(each, marks=MANY) for each in range(3, 30))])
def test_whatever_happens_the_model_arrives_within_its_budget(
    tmp_path: Path, registry: Registry, seed: int
) -> None:
    history = History(Here(tmp_path / "models", registry, SIZE), seed, tmp_path)
    history.run()
    history.here.check()
    lost = history.kills * CONNECTIONS * MIB + history.cuts * (2 * SYNC + CONNECTIONS * MIB)
    assert history.received <= 1.02 * SIZE + lost

"""Random histories of one transfer whose bytes are damaged: each damage costs its chunk."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from watcher.demo.registry import Fault, Manners, Registry
from watcher.demo.registry import Layer as Made
from watcher.model import MIB

from .driven import BOOT, Here, Process, wait_for, with_options

SIZE = 24_000_000
CONNECTIONS = 4
CHUNK = 2 * MIB
OPTIONS = with_options(connections=CONNECTIONS, sync_seconds=0.5, tries=None, sums_from=MIB)
MANY = pytest.mark.slow("each history takes ten seconds, and two are enough to see a mistake")


class History:
    """Kills, and bytes that are flipped on their way, by a mirror, and on the disk."""

    def __init__(self, here: Here, mirror: Registry, seed: int) -> None:
        self.here, self.mirror, self.chance = here, mirror, random.Random(seed)
        self.counter = here.path / "received"
        self.kills = self.flips = 0

    @property
    def received(self) -> int:
        """Bytes of all bodies that our clients have received."""
        raw = self.counter.read_bytes() if self.counter.exists() else b""
        return int(struct.unpack("q", raw)[0]) if len(raw) == 8 else 0

    def pulling(self) -> Process:
        return Process(self.here, OPTIONS, BOOT, self.counter, mirrors=(self.mirror.url,))

    def line(self) -> None:
        """Both lines are other ones from now on."""
        manners = Manners(lifetime=self.chance.choice([None, 10]), sums="complete", chunk=CHUNK)
        self.here.registry.manners = manners
        for registry in (self.here.registry, self.mirror):
            registry.clear_faults()
            times, after = self.chance.randint(0, 2), self.chance.randint(0, 100_000)
            registry.add_fault(Fault("flip", begin=1, after=after, times=times))
            self.flips += times
            if self.chance.random() < 0.4:
                registry.add_fault(Fault("reset", begin=1, after=500_000, every=4))

    def kill(self) -> None:
        until = self.received + self.chance.randint(0, 8_000_000)
        with self.pulling() as pulling:
            wait_for(lambda: self.received >= until or pulling.has_ended)
            self.kills += not pulling.has_ended
            pulling.kill()

    def rot(self) -> None:
        """The disk changes a byte of what has arrived."""
        data = self.here.folder / "data"
        if not data.exists() or not data.stat().st_size:
            return
        with data.open("r+b") as file:
            at = self.chance.randrange(data.stat().st_size)
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))
        self.flips += 1

    def run(self) -> None:
        self.here.registry.throttle(30_000_000)
        self.mirror.throttle(30_000_000)
        for _ in range(4):
            self.line()
            self.kill()
            self.rot()
        with self.pulling() as pulling:
            pulling.end()


@pytest.fixture
def mirror() -> Iterator[Registry]:
    with Registry() as made:
        made.manners = Manners(plain=True)
        made.add_model("demo", "1b", [Made(SIZE)], extras=False)
        yield made


@pytest.mark.parametrize("seed", [1, 2, *(pytest.param(each, marks=MANY) for each in range(3, 30))])
def test_whatever_is_damaged_costs_its_chunk(
    tmp_path: Path, registry: Registry, mirror: Registry, seed: int
) -> None:
    history = History(Here(tmp_path / "models", registry, SIZE), mirror, seed)
    history.run()
    history.here.check()
    lost = history.kills * CONNECTIONS * MIB + history.flips * CHUNK
    assert history.received <= 1.02 * SIZE + lost

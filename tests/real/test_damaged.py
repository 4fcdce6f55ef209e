"""A damaged layer of a complete model: what a real server does, and what a repair fetches."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.driving import is_right, run
from tests.support.notation import age
from tests.support.servers import RealServer, collapsed, wait_until
from tests.transfer.driven import Here
from watcher.demo.registry import Manners, Registry
from watcher.model import HOUR, Ranges
from watcher.ollama import ranges, sidecars
from watcher.state import sums

pytestmark = pytest.mark.skipif("OLLAMA_BIN" not in os.environ, reason="OLLAMA_BIN is not set")

SIZE, CHUNK = 262_144_000, sums.CHUNK


def _flipped(blob: Path) -> None:
    with blob.open("r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, SIZE // 2)
        os.pwrite(file.fileno(), bytes([byte ^ 1]), SIZE // 2)


def _cut(blob: Path) -> None:
    os.truncate(blob, SIZE - 40_000_000)


@pytest.mark.parametrize(
    ("damage", "server_fetches", "fetched"),
    [
        (_flipped, 0, sums.CHUNK),
        (_cut, 0, 40_000_000),
        (Path.unlink, SIZE, SIZE),
    ],
)
def test_a_repair_fetches_what_is_wrong(
    damage: Callable[[Path], None],
    server_fetches: int,
    fetched: int,
    tmp_path: Path,
    registry: Registry,
) -> None:
    here = Here(tmp_path / "models", registry, SIZE)
    digest = here.model.digests[0]
    with RealServer(here.path) as server:
        server.start().wait_ready()
        assert collapsed(server.pull(here.model.name))[-1] == "success"
        assert run(here.path, "verify").returncode == 0  # makes the sums
        damage(here.blob)
        registry.reset_stats()
        assert collapsed(server.pull(here.model.name))[-1] == "success"
        assert registry.bytes_served(digest) == server_fetches
        assert is_right(here.path, digest) == (server_fetches > 0)
        if server_fetches:
            here.blob.unlink()
        assert run(here.path, "verify").returncode == 1
        registry.reset_stats()
        done = run(here.path, "repair", "--yes", "--fetch")
        assert done.returncode == 0, done.stdout + done.stderr
        assert registry.bytes_served(digest) in (fetched, fetched + 1)
        assert is_right(here.path, digest)
        assert collapsed(server.pull(here.model.name))[-1] == "success"


@pytest.mark.parametrize("proves", [True, False])
def test_damage_that_repair_finds_before_the_pull_costs_its_chunk(
    tmp_path: Path, registry: Registry, proves: bool
) -> None:
    """Alone, the server fetches the rest, and then discards the whole layer."""
    here = Here(tmp_path / "models", registry, SIZE)
    registry.manners = Manners(sums="complete", chunk=CHUNK)
    registry.throttle(60_000_000)
    data = here.path / "blobs" / f"sha256-{here.digest}-partial"
    with RealServer(here.path) as server:
        server.start().wait_ready()
        pull = server.start_pull(here.model.name)
        wait_until(lambda: data.exists() and data.stat().st_blocks * 512 > SIZE // 2, "half")
        server.kill()
        pull.close()
        registry.throttle(None)
        assert run(here.path, "repair", "--yes", here.model.name).returncode == 0
        before = recorded(here)
        chunks = ((start, start + CHUNK) for start in range(0, SIZE - CHUNK, CHUNK))
        wrong = next(each for each in chunks if not ranges.difference((each,), before))
        with data.open("r+b") as file:
            (byte,) = os.pread(file.fileno(), 1, wrong[0])
            os.pwrite(file.fileno(), bytes([byte ^ 1]), wrong[0])
        age(data, HOUR)
        words = ["--prove"] if proves else []
        assert run(here.path, "repair", "--yes", *words, here.model.name).returncode == 0
        after = recorded(here)
        assert ranges.difference(before, after) == ((wrong,) if proves else ())
        registry.reset_stats()
        server.start().wait_ready()
        if not proves:
            assert "digest mismatch" in collapsed(server.pull(here.model.name))[-1]
        assert collapsed(server.pull(here.model.name))[-1] == "success"
    assert is_right(here.path, f"sha256:{here.digest}")
    assert here.served == SIZE - ranges.size(after) + (0 if proves else SIZE)


def recorded(here: Here) -> Ranges:
    """What the progress files record."""
    found = (here.path / "blobs").glob(f"sha256-{here.digest}-partial-*")
    return sidecars.claims([sidecars.parse(path.read_bytes()) for path in found])

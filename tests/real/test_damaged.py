"""A damaged layer of a complete model: what a real server does, and what a repair fetches."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.driving import is_right, run
from tests.support.servers import RealServer, collapsed
from tests.transfer.driven import Here
from watcher.demo.registry import Registry
from watcher.state import sums

pytestmark = pytest.mark.skipif("OLLAMA_BIN" not in os.environ, reason="OLLAMA_BIN is not set")

SIZE = 262_144_000


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

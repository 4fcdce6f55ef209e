"""A real pull is killed three times, and nobody does anything but start the server again."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.driving import Daemon, HealthyStore, audit, is_right, whole_lines
from tests.support.servers import RealServer, blob, wait_until
from watcher.demo.registry import Layer, Registry
from watcher.model import MIB

pytestmark = pytest.mark.skipif("OLLAMA_BIN" not in os.environ, reason="OLLAMA_BIN is not set")

SIZE = 400_000_000
RATE = 80_000_000
BUDGET = 1.1 * MIB
#: A pull is killed when so many of its bytes lie on the disk.
KILLED_AT = (80_000_000, 180_000_000, 290_000_000)
RESTART_SECONDS = 1.0


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as served:
        served.throttle(RATE)
        yield served


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.exists() else 0


def test_three_kills_cost_the_budget_and_the_log_describes_each(
    tmp_path: Path, registry: Registry
) -> None:
    store = HealthyStore(tmp_path / "models")
    seed = int(store.digest("layer")[:7], 16)
    model = registry.add_model("demo", "1b", [Layer(SIZE, seed=seed)], extras=False)
    digest = model.digests[0]
    data = blob(store.path, digest, "-partial")
    host = {"OLLAMA_HOST": f"127.0.0.1:{free_port()}"}
    with (
        RealServer(store.path, host) as server,
        Daemon(store.path, {"OLLAMA_WATCH_REPAIR": "true"}) as daemon,
    ):
        for kills, size in enumerate(KILLED_AT, 1):
            server.start().wait_ready()
            pull = server.start_pull(model.name)
            wait_until(lambda size=size: on_disk(data) > size, f"{size} bytes", 60)  # type: ignore[misc]
            server.kill()
            killed = time.monotonic()
            pull.close()
            present = int(
                daemon.wait_event("download_interrupted", kills)["details"]["present_bytes"]
            )
            daemon.wait_event("download_repaired", kills)
            (told,) = (each for each in audit(store.path)["downloads"] if each["digest"] == digest)
            parts = len(list(data.parent.glob(f"{data.name}-*")))
            assert present - told["bytes"]["claimed"] <= BUDGET * parts
            wait_until(lambda k=killed: time.monotonic() > k + RESTART_SECONDS, "a second")  # type: ignore[misc]
            registry.reset_stats()
        server.start().wait_ready()
        lines = server.pull(model.name, timeout=120)
        assert lines[-1] == {"status": "success"}
        assert registry.bytes_served(digest) <= SIZE - told["bytes"]["claimed"]
        assert is_right(store.path, digest)
        daemon.wait_event("manifest_written")
        daemon.wait_idle()
        daemon.kill(15)
    hexes = re.compile(digest.removeprefix("sha256:"))
    of_it = [
        line["event_type"]
        for line in whole_lines(store.ours / "logs/events.jsonl")
        if hexes.search(str(line["details"])) and line["event_type"] != "refreshed"
    ]
    story = [each for each in of_it if each != "download_progress"]
    once = ["download_interrupted", "act_started", "download_repaired", "download_resumed"]
    whole = ["download_started", *once * len(KILLED_AT), "download_completed"]
    # What goes on and ends between two looks is told by its end alone.
    assert story in (whole, [*whole[:-2], whole[-1]])

"""Hundreds of pulls begun and cancelled, and one of sixteen writers: told, and nothing leaks."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.driving import Daemon, HealthyStore, whole_lines
from tests.support.notation import age
from tests.support.servers import EngineServer, least, wait_until
from watcher.demo.registry import Layer, Model, Registry

from .replayed import on_disk, replay

REPAIRS = {"OLLAMA_WATCH_REPAIR": "true"}
#: `MANY_PULLS` and `--slow` make them more.
PULLS, SLOW = int(os.environ.get("MANY_PULLS", "500")), 1000
FIRST = 200
MODELS = 20
#: Generous: what is asked is that nothing of the looks at hundreds of pulls is kept.
MOST_GROWTH = 6_000_000
#: Of threads and descriptors that are made when they are first needed, or that a look just uses.
FEW = 4


def footprint(daemon: Daemon) -> tuple[int, int, int]:
    """Resident bytes, threads, and open descriptors."""
    proc = Path(f"/proc/{daemon.pid}")
    status = dict(
        line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line
    )
    resident = int(status["VmRSS"].split()[0]) * 1024
    return resident, int(status["Threads"]), len(os.listdir(proc / "fd"))


def test_hundreds_of_cancelled_pulls_leave_nothing_behind_in_the_service(
    store: HealthyStore, registry: Registry, slow: bool
) -> None:
    chance = random.Random(1)
    first = int(store.digest("layers")[:7], 16)
    models = [
        registry.add_model(f"m{n}", "1b", [Layer(150_000, seed=first + n)], extras=False)
        for n in range(MODELS)
    ]
    with EngineServer(store.path) as server, Daemon(store.path, REPAIRS) as daemon:
        server.start().wait_ready()

        def some(count: int) -> None:
            drawn = [(chance.choice(models), chance.choice([0, 1, 2, 3, 9])) for _ in range(count)]
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda each: cancelled(server, *each), drawn))
            daemon.wait_idle()

        def growth() -> float:
            """Of its memory by as many pulls; of threads and descriptors, none is left of them."""
            resident, threads, descriptors = footprint(daemon)
            some((SLOW if slow else PULLS) - FIRST)
            wait_until(lambda: footprint(daemon)[1] <= threads + FEW, "the threads to end")
            wait_until(lambda: footprint(daemon)[2] <= descriptors + FEW, "the files to be closed")
            return footprint(daemon)[0] - resident

        some(FIRST)
        # What is kept of each pull is so in each round; many events at once take room only once.
        assert least(growth, MOST_GROWTH) < MOST_GROWTH
        assert daemon.of("error") == []
        server.kill()
        for path in store.blobs.iterdir():
            age(path, 100)
        before = len(daemon.of("settings_read"))
        os.kill(daemon.pid, signal.SIGHUP)
        daemon.wait_event("settings_read", before + 1)
        daemon.wait_idle()
        daemon.kill(signal.SIGTERM)
    told = replay(whole_lines(store.ours / "logs/events.jsonl"))
    there = on_disk(store)
    assert told.downloads == there.downloads
    assert told.models == there.models - {"healthy:latest"}


def cancelled(server: EngineServer, model: Model, lines: int) -> None:
    """A pull whose client goes after so many lines, or at its end; what is whole is removed."""
    pull = server.start_pull(model.name)
    with contextlib.closing(pull):
        wait_until(lambda: pull.ended or len(pull.lines) >= lines, "its lines")
    if pull.lines and pull.lines[-1].get("status") == "success":
        name = model.name.removeprefix("http://")
        server.request("DELETE", "/api/delete", {"model": name})


def test_a_pull_of_sixteen_writers_is_reported_once(
    store: HealthyStore, registry: Registry
) -> None:
    size = 16_000_000
    seed = int(store.digest("layer")[:7], 16)
    model = registry.add_model("large", "1b", [Layer(size, seed=seed)], extras=False)
    digest = model.digests[0]
    with (
        EngineServer(store.path, {"DEMO_PART_BYTES": str(size // 16)}) as server,
        Daemon(store.path, REPAIRS) as daemon,
    ):
        server.start().wait_ready()
        registry.hold(digest, after=size // 32)
        with contextlib.closing(server.start_pull(model.name)):
            registry.wait_held(digest, 16)
            daemon.wait_event("download_started")
            daemon.wait_idle()
            registry.release()
            daemon.wait_event("manifest_written")
            daemon.wait_idle()
        told = [e["event_type"] for e in daemon.events if e["details"].get("digest") == digest]
        assert told == ["download_started", "download_completed"]

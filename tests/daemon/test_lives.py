"""Several lives of the service on one store: what is told, over all of them, once and in order."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime

import pytest

from tests.support.driving import POLICY, Daemon, HealthyStore, host, private_proc, whole_lines
from tests.support.runs import one_run
from tests.support.servers import EngineServer, Line, collapsed, wait_until
from watcher import reconcile
from watcher.act import journal
from watcher.demo.registry import Layer, Registry
from watcher.model import DAY
from watcher.state import event_log, fs

from .replayed import on_disk, replay

REPAIRS = {"OLLAMA_WATCH_REPAIR": "true"}
SIZE = 4_000_000
LIVES = 3
PARTS = {"DEMO_PART_BYTES": "1_000_000", "DEMO_RETRY_SECONDS": "0.01"}


def in_order(lines: list[Line]) -> None:
    """Each event of a download may follow what was told of it before."""
    live: dict[str, bool] = {}
    for line in lines:
        kind, digest = line["event_type"], str(line["details"].get("digest"))
        if kind == "download_started":
            assert digest not in live, f"{digest} has begun twice"
        elif kind == "download_resumed":
            assert live.get(digest) is False, f"{digest} goes on, and was not interrupted"
        elif kind in ("download_completed", "partial_removed"):
            assert digest in live, f"{digest} ended twice, or has never begun"
            del live[digest]
        if "condition" in line["details"]:
            live[digest] = kind in ("download_started", "download_resumed") or (
                live.get(digest, False) and line["details"]["condition"] == "live"
            )
    assert not live, f"not told to its end: {live}"


@pytest.mark.parametrize("seed", range(2))
def test_three_lives_log_one_history(store: HealthyStore, registry: Registry, seed: int) -> None:
    """The server is killed with each of them, before or after it."""
    chance = random.Random(seed)
    digest_seed = int(store.digest("layers")[:7], 16)
    layers = [Layer(SIZE, seed=digest_seed), Layer(SIZE, seed=digest_seed + 1)]
    model = registry.add_model("demo", "1b", layers, extras=False)
    daemon = Daemon(store.path, REPAIRS)
    with EngineServer(store.path, PARTS) as server, contextlib.closing(daemon):
        for life in range(LIVES):
            server.start().wait_ready()
            daemon.start()
            if chance.random() < 0.5:
                daemon.wait_event("check_started")
            for digest in model.digests:
                registry.hold(digest, after=chance.randrange(200_000, 900_000))
            pull = server.start_pull(model.name)
            wait_until(lambda: any(map(registry.held, model.digests)), "the pull to be held")
            moment = chance.uniform(0, 0.3)
            wait_until(until(moment), "the moment of the kill")
            ends: list[Callable[[], int]] = [daemon.kill, server.kill]
            for end in chance.sample(ends, 2):
                end()
            registry.release()
            pull.close()
            assert "Traceback" not in daemon.errors, f"life {life}: {daemon.errors}"
        daemon.start().wait_idle()
        server.start().wait_ready()
        assert collapsed(server.pull(model.name))[-1] == "success"
        shown = model.name.removeprefix("http://")
        wait_until(
            lambda: any(shown in str(e["model_name"]) for e in daemon.of("manifest_written")),
            "the end to be told",
        )
        daemon.wait_idle()
        server.kill()
        daemon.kill(15)
    told = whole_lines(store.ours / "logs/events.jsonl")
    at = [datetime.fromisoformat(line["timestamp"]).timestamp() for line in told]
    # What a scan has found bears the time of its beginning, which lies in the same life.
    starts = [n for n, line in enumerate(told) if line["event_type"] == "service_started"]
    assert starts[0] == 0
    nexts = [*starts[1:], len(at)]
    for first, after in zip(starts, nexts, strict=True):
        latest = at[after] if after < len(at) else time.time()
        assert all(at[first] - 1 <= each <= latest + 1 for each in at[first:after])
    in_order([line for line in told if line["event_type"] != "act_started"])
    once = Counter((line["event_type"], str(line["details"].get("digest"))) for line in told)
    for digest in model.digests:
        assert once["download_started", digest] + once["partial_found", digest] >= 1 or (
            once["download_completed", digest] == 0
        )
        assert once["download_started", digest] <= 1
        assert once["download_completed", digest] <= 1
    assert len(told) == len({str(line) for line in told})
    there = on_disk(store)
    assert replay(told).downloads == there.downloads == {}


def until(seconds: float) -> Callable[[], bool]:
    """Whether so much time has passed."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


class KilledError(BaseException):
    """In place of a kill."""


@pytest.mark.parametrize("where", ["before the log", "after the log", "in the log of the model"])
def test_a_kill_around_the_log_loses_nothing_and_doubles_nothing(
    store: HealthyStore, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store.blobs / f"sha256-{store.digests[0]}").unlink()
    store.download("healthy weights", aged=DAY)
    here = host(store, private_proc(store.path.with_name("proc")))

    def killed(*_: object) -> None:
        raise KilledError

    append = fs.append

    def append_to_common(name: str, parent: int, lines: bytes) -> int:
        if name != "events.jsonl":
            killed()
        return append(name, parent, lines)

    with monkeypatch.context() as broken:
        if where == "before the log":
            broken.setattr(event_log, "write", killed)
        elif where == "after the log":
            broken.setattr(journal.Journal, "_all_logged", killed)
        else:
            broken.setattr(fs, "append", append_to_common)
        with pytest.raises(KilledError):
            one_run(here, POLICY, approve=reconcile.approve_none)
    for _ in range(3):
        one_run(here, POLICY, approve=reconcile.approve_none)
    for log in ("events", "healthy%3Alatest"):
        told = [e["event_type"] for e in whole_lines(store.ours / f"logs/{log}.jsonl")]
        assert told.count("partial_found") == 1, (log, told)
    told = [e["event_type"] for e in whole_lines(store.ours / "logs/events.jsonl")]
    assert told.count("store_problem") == 1, told

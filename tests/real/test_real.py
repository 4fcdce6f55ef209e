"""The service, the audit and cleaning beside a real Ollama server."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.support.driving import OLD, Daemon, audit, is_right, lay_out, run
from tests.support.notation import age
from tests.support.servers import Pull, RealServer, blob, collapsed, wait_until, wait_written
from watcher.demo.registry import Layer, Model, Registry

pytestmark = pytest.mark.skipif("OLLAMA_BIN" not in os.environ, reason="OLLAMA_BIN is not set")

#: Two parts by the server's own rule; `HELD` bytes of each arrive before they are held back.
SIZE, HELD = 120_000_000, 5_000_000
FIRST = 100_000_000

Begin = Callable[[], tuple[Model, Pull]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RealServer]:
    with RealServer(tmp_path / "models") as made:
        yield made.start().wait_ready()


@pytest.fixture
def begin(registry: Registry, server: RealServer) -> Iterator[Begin]:
    """Begins a pull that is held back in the middle of both of its parts."""
    pulls: list[Pull] = []

    def start() -> tuple[Model, Pull]:
        model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
        digest = model.digests[0]
        registry.hold(digest, after=HELD)
        pulls.append(server.start_pull(model.name))
        registry.wait_held(digest, 2)
        wait_written(blob(server.store, digest, "-partial"), [HELD, FIRST + HELD])
        return model, pulls[-1]

    yield start
    registry.release()
    server.stop()
    for pull in pulls:
        pull.close()


def test_a_killed_pull_is_reported_within_a_second(server: RealServer, begin: Begin) -> None:
    with Daemon(server.store) as daemon:
        model, _ = begin()
        daemon.wait_event("download_started")
        killed = time.time()
        server.kill()
        told = daemon.wait_event("download_interrupted")
        assert datetime.fromisoformat(told["timestamp"]).timestamp() - killed < 1
        details = told["details"]
        assert (details["digest"], details["total_bytes"]) == (model.digests[0], SIZE)
        assert (details["condition"], details["claimed_bytes"]) == ("behind", 0)
        assert details["present_bytes"] == 2 * HELD


def test_an_audit_of_a_pull_under_way_says_live_and_who(server: RealServer, begin: Begin) -> None:
    model, _ = begin()
    seen = audit(server.store)
    (download,) = seen["downloads"]
    assert (download["digest"], download["condition"]) == (model.digests[0], "live")
    holders = [(each["pid"], each["writes"]) for each in download["holders"]]
    assert holders == [(server.pid, True)]
    (told,) = [each for each in seen["servers"] if each["pid"] == server.pid]
    assert (told["state"], told["serves_this_store"]) == ("answering", True)
    assert seen["plan"]["actions"] == []


#: How the pull ends, to what the audit may say of it. A SIGTERM may cut the server's own writing.
ENDS = {
    "killed": {"behind"},
    "terminated": {"paused", "behind", "blocked"},
    "cancelled": {"paused"},
}


@pytest.mark.parametrize("how", ENDS)
def test_a_download_that_a_pull_left_has_its_right_condition_and_is_cleaned_when_stale(
    how: str, server: RealServer, begin: Begin
) -> None:
    model, pull = begin()
    if how == "cancelled":
        pull.close()
        wait_until(lambda: not server.open_files(), "the server to close its files")
    server.kill(signal.SIGTERM if how == "terminated" else signal.SIGKILL)
    (download,) = audit(server.store)["downloads"]
    assert download["condition"] in ENDS[how], download["because"]
    assert download["bytes"]["total"] == SIZE
    assert download["bytes"]["present"] == 2 * HELD
    assert run(server.store, "clean", "--yes").returncode == 0
    files = list(server.store.glob("blobs/*-partial*"))
    assert len(files) == 3
    for path in files:
        age(path, OLD)
    assert run(server.store, "clean", "--yes").returncode == 0
    assert all(path.exists() for path in files), "the memory knows better than set times"
    (server.store / ".ollama-watch/state.json").unlink()
    done = run(server.store, "clean", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(server.store.glob("blobs/*-partial*")) == []
    server.start().wait_ready()
    digest = model.digests[0]
    assert not blob(server.store, digest).exists()


def test_a_stale_download_is_cleaned_beside_the_server_which_then_pulls_it(
    server: RealServer, registry: Registry
) -> None:
    model = registry.add_model("demo", "1b", [Layer(3_000_000)], extras=False)
    lay_out(registry, server.store, model.digests[0])
    done = run(server.store, "clean", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(server.store.glob("blobs/*-partial*")) == []
    assert collapsed(server.pull(model.name))[-1] == "success"
    assert is_right(server.store, model.digests[0])
    assert registry.bytes_served(model.digests[0]) == 3_000_000


def test_orphans_are_refused_while_the_server_runs(server: RealServer, registry: Registry) -> None:
    model = registry.add_model("demo", "1b", [Layer(1_000_000)], extras=False)
    server.pull(model.name)
    orphan = blob(server.store, "sha256:" + "ab" * 32)
    orphan.write_text("orphan")
    age(orphan, OLD)
    done = run(server.store, "clean", "--yes")
    assert done.returncode == 3
    assert "stop the server" in done.stdout
    assert orphan.exists()
    server.kill()
    assert run(server.store, "clean", "--yes").returncode == 0
    assert not orphan.exists()
    server.start().wait_ready()
    assert collapsed(server.pull(model.name))[-1] == "success"

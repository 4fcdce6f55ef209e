"""What the service tells of other people's pulls."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.support.driving import POLICY, Daemon, HealthyStore, private_proc
from tests.support.runs import one_run
from tests.support.servers import EngineServer, least, wait_until
from watcher import reconcile
from watcher.demo.registry import Layer, Model, Registry
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.reconcile import Report
from watcher.state.event_log import Event

from .conftest import HELD, SIZE, Begin


def test_a_killed_pull_is_reported_within_a_second_with_condition_and_sizes(
    tmp_path: Path, begin: Begin
) -> None:
    tries = itertools.count()

    def reported() -> float:
        store = HealthyStore(tmp_path / str(next(tries)) / "models")
        with EngineServer(store.path).start().wait_ready() as server, Daemon(store.path) as daemon:
            model, _ = begin(server)
            started = daemon.wait_event("download_started")
            killed = time.time()
            server.kill()
            told = daemon.wait_event("download_interrupted")
            assert told["model_name"] == started["model_name"] == names.short(model.digests[0][7:])
            details = told["details"]
            assert details["digest"] == model.digests[0]
            assert (details["condition"], details["can_resume"]) == ("behind", True)
            assert (details["total_bytes"], details["claimed_bytes"]) == (SIZE, 0)
            assert details["present_bytes"] == HELD
            assert len(daemon.of("download_started")) == len(daemon.of("download_interrupted")) == 1
            assert daemon.of("partial_found") == []
            return datetime.fromisoformat(told["timestamp"]).timestamp() - killed

    assert least(reported, 1) < 1


@pytest.fixture
def watched(
    store: HealthyStore, server: EngineServer, begin: Begin
) -> Iterator[tuple[Daemon, Model]]:
    """A daemon that has told of a pull, which is held back."""
    server.start().wait_ready()
    with Daemon(store.path) as daemon:
        model, _ = begin(server)
        daemon.wait_event("download_started")
        yield daemon, model


@pytest.mark.parametrize("again", [False, True], ids=["to its end", "killed again"])
def test_a_pull_that_goes_on_after_a_kill_is_reported(
    watched: tuple[Daemon, Model], registry: Registry, server: EngineServer, again: bool
) -> None:
    daemon, model = watched
    server.kill()
    daemon.wait_event("download_interrupted")
    server.start().wait_ready()
    with contextlib.closing(server.start_pull(model.name)):
        # The registry may still count the connection of the first pull as held.
        wait_until(lambda: "w" in server.open_files().values(), "the second pull to open its data")
        if again:
            server.kill()
            daemon.wait_event("download_interrupted", 2)
        else:
            registry.release()
            daemon.wait_event("download_completed")


def test_a_pull_that_ends_well_is_reported_as_completed(
    watched: tuple[Daemon, Model], registry: Registry
) -> None:
    daemon, model = watched
    registry.release()
    told = daemon.wait_event("download_completed")
    assert told["details"]["digest"] == model.digests[0]
    assert told["details"]["total_bytes"] == SIZE
    assert daemon.of("download_interrupted") == []


def test_a_pull_that_its_client_ended_is_reported_once_it_was_quiet(
    store: HealthyStore, server: EngineServer, begin: Begin, tmp_path: Path
) -> None:
    server.start().wait_ready()
    began = time.time()
    model, pull = begin(server)
    digest = model.digests[0]
    told: list[Event] = []
    later = [0.0]

    def look() -> Report:
        here = Host(
            str(store.path),
            proc=private_proc(tmp_path / "proc", server.pid),
            clock=lambda: time.time() + later[0],
            report=told.append,
        )
        return one_run(here, POLICY, frozenset({digest[7:]}), reconcile.approve_none)

    look()
    assert [event.event_type for event in told] == ["download_started"]
    pull.close()
    wait_until(lambda: not server.open_files(), "the server to close its files")
    due = look().plan.due
    assert [event.event_type for event in told] == ["download_started"]
    (at,) = [each.at for each in due if each.digest == digest[7:]]
    assert began + 90 < at <= time.time() + 90
    later[0] = 91
    look()
    assert [event.event_type for event in told] == ["download_started", "download_interrupted"]
    assert told[-1].details["condition"] == "paused"
    assert told[-1].details["claimed_bytes"] == HELD
    look()
    assert len(told) == 2


def test_the_writes_of_a_pull_do_not_wake_the_service(
    tmp_path: Path, store: HealthyStore, registry: Registry
) -> None:
    layer = 64_000_000
    model = registry.add_model("large", "1b", [Layer(layer)], extras=False)
    digest = model.digests[0]
    parts = {"DEMO_PART_BYTES": str(layer // 16)}
    with (
        contextlib.ExitStack() as pulling,
        EngineServer(store.path, parts) as server,
        Daemon(store.path) as daemon,
    ):
        server.start().wait_ready()
        registry.hold(digest, after=100_000)
        pulling.enter_context(contextlib.closing(server.start_pull(model.name)))
        registry.wait_held(digest, 16)
        daemon.wait_event("download_started")
        daemon.wait_idle()
        before, written = daemon.work(), registry.bytes_served(digest)
        registry.hold(digest, after=layer // 16 - 100_000)
        registry.wait_held(digest, 16)
        wait_until(lambda: registry.bytes_served(digest) > written + layer // 2, "the writes")
        assert daemon.work() - before <= 2

"""``status``: what is going on just now, with a daemon and without one."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import time
from typing import Any

import pytest

from tests.support.driving import Daemon, HealthyStore, command, environment, run
from tests.support.servers import EngineServer, wait_until
from watcher.demo.registry import Layer, Registry
from watcher.observe.host import Host
from watcher.show import status as shown

from .conftest import HELD, SIZE, Begin


def status(store: HealthyStore) -> dict[str, Any]:
    done = run(store.path, "--json", "status")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_pull_is_shown_with_who_pulls_it(
    store: HealthyStore, server: EngineServer, begin: Begin
) -> None:
    server.start().wait_ready()
    model, _ = begin(server)
    told = status(store)
    assert (told["daemon"], told["looked_at"]) == (None, None)
    (one,) = told["downloads"]
    assert one["digest"] == model.digests[0]
    assert (one["condition"], one["total_bytes"], one["present_bytes"]) == ("live", SIZE, HELD)
    assert [each["pid"] for each in one["writers"]] == [server.pid]
    assert one["per_second_bytes"] == 0, "it is held back"
    assert one["left_seconds"] is None
    shown = run(store.path, "status").stdout
    assert f"({server.pid})" in shown
    assert max(len(line) for line in shown.splitlines() if str(store.path) not in line) <= 80
    assert "daemon     not running on this store" in shown


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("restarted", [False, True])
def test_right_after_a_break_it_shows_one_state(
    store: HealthyStore, server: EngineServer, begin: Begin, watched: bool, restarted: bool
) -> None:
    """Not live, nothing a second, and interrupted all at once."""
    server.start().wait_ready()
    with Daemon(store.path) if watched else contextlib.nullcontext() as daemon:
        model, _ = begin(server)
        if daemon is not None:
            daemon.wait_event("download_started")
        server.kill()
        if daemon is not None:
            daemon.wait_event("download_interrupted")
        if restarted:
            server.start().wait_ready()
        (one,) = status(store)["downloads"]
        assert (one["digest"], one["writers"]) == (model.digests[0], [])
        assert one["condition"] in ("behind", "paused"), "repaired by then, or not yet"
        assert (one["per_second_bytes"], one["left_seconds"]) == (None, None)
        shown = run(store.path, "status").stdout
        assert not [line for line in shown.splitlines() if line.startswith("in use")]
        assert "bytes/s" not in shown


def test_the_rate_is_that_of_what_arrives(
    store: HealthyStore, registry: Registry, server: EngineServer, begin: Begin
) -> None:
    server.start().wait_ready()
    begin(server)
    words = command(store.path, "--json", "status", "--watch")
    with subprocess.Popen(words, env=environment(store.path), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        (one,) = json.loads(process.stdout.readline())["downloads"]
        assert one["per_second_bytes"] == 0
        registry.hold(one["digest"], after=HELD + 500_000)
        wait_until(lambda: registry.bytes_served(one["digest"]) > HELD, "more bytes")
        rates: list[int] = []
        while not any(rates):
            (one,) = json.loads(process.stdout.readline())["downloads"]
            rates.append(one["per_second_bytes"])
        assert 0 < rates[-1] <= 500_000
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130


def test_the_pulls_of_others_are_reported_together(
    store: HealthyStore, registry: Registry, server: EngineServer
) -> None:
    server.start().wait_ready()
    registry.throttle(1_000_000)
    seed = int(store.digest("two")[:7], 16)
    made = [
        registry.add_model(f"m{number}", "1b", [Layer(SIZE * 20, seed=seed + number)])
        for number in range(2)
    ]
    with contextlib.ExitStack() as pulling:
        for model in made:
            pulling.enter_context(contextlib.closing(server.start_pull(model.name)))
        told: dict[str, Any] = {}

        def both() -> bool:
            nonlocal told
            told = status(store)
            return bool(told["advice"])

        wait_until(both, "bytes of both")
    paces = [each["per_second_bytes"] for each in told["downloads"]]
    assert len(paces) == 2
    assert told["per_second_bytes"] == pytest.approx(sum(paces), abs=2)
    assert told["advice"][0].startswith("2 pulls share the connection: ")


def test_how_fast_it_was_lately_is_what_the_daemon_has_seen(
    store: HealthyStore, server: EngineServer, begin: Begin
) -> None:
    server.start().wait_ready()
    with Daemon(store.path) as daemon:
        begin(server)
        daemon.wait_event("download_started")
        daemon.kill(signal.SIGTERM)
    assert status(store)["downloads"][0]["lately_per_second_bytes"] is None
    memory = json.loads((store.ours / "state.json").read_bytes())
    (known,) = memory["downloads"].values()
    known["samples"] = [[0, 0], [10, 10_000_000], [20, 40_000_000], [30, 60_000_000]]
    (store.ours / "state.json").write_text(json.dumps(memory))
    (one,) = status(store)["downloads"]
    assert one["lately_per_second_bytes"] == {
        "min": 1_000_000, "median": 2_000_000, "max": 3_000_000,
    }  # fmt: skip
    shown = " ".join(run(store.path, "status").stdout.split())
    assert "(1.0 MB/s to 3.0 MB/s in the last minutes)" in shown


def test_the_daemon_is_notified_while_it_lives(store: HealthyStore) -> None:
    store.download("broken", aged=3600)
    with Daemon(store.path) as daemon:
        told = status(store)
        assert told["daemon"]["pid"] == daemon.pid
        assert told["daemon"]["since"].endswith("Z")
        assert told["looked_at"] is not None
        assert f"pid {daemon.pid}" in run(store.path, "status").stdout
        daemon.kill()
        assert status(store)["daemon"] is None


def test_on_a_terminal_it_is_drawn_again_and_ends_quietly(store: HealthyStore) -> None:
    store.download("broken", aged=3600)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command(store.path, "status", "--watch"),
        env={**environment(store.path), "TERM": "xterm"},
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how the end of a pty is told
            while shown.count(b"\033[H") < 2:
                shown += os.read(ours, 4096)
            process.send_signal(signal.SIGINT)
            while piece := os.read(ours, 4096):
                shown += piece
        os.close(ours)
        assert process.wait(120) == 130
    assert shown.count(b"needs repair: ") + shown.count(b"resumable: ") >= 2
    assert b"Traceback" not in shown


def test_health_is_whether_a_daemon_watches_and_scans(store: HealthyStore) -> None:
    assert run(store.path, "status", "--health").returncode == 1
    with Daemon(store.path) as daemon:
        wait_until(
            lambda: run(store.path, "status", "--health", "-q").returncode == 0, "the daemon's lock"
        )
        made = json.loads(run(store.path, "--json", "status", "--health").stdout)
        assert (made["schema"], made["healthy"], made["why"]) == (
            "ollama-watch/health/1", True, None,
        )  # fmt: skip
        hour_later = Host(str(store.path), clock=lambda: time.time() + 3600)
        assert "no full scan for 1 h" in shown.unhealthy(hour_later)
        daemon.kill()
        done = run(store.path, "status", "--health", "-q")
        assert (done.returncode, "no daemon is seen to watch it" in done.stdout) == (1, True)

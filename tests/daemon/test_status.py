"""``status``: what is going on just now, with a daemon and without one."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
from typing import Any

from tests.driving import Daemon, Store, command, environment, run
from tests.fidelity.harness import EngineServer, wait_until
from watcher.demo.registry import Registry

from .conftest import HELD, SIZE, Begin


def status(store: Store) -> dict[str, Any]:
    done = run(store.path, "--json", "status")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_pull_is_shown_with_who_pulls_it(
    store: Store, server: EngineServer, begin: Begin
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
    assert max(map(len, shown.splitlines())) <= 80
    assert "none watches this store" in shown


def test_the_rate_is_that_of_what_arrives(
    store: Store, registry: Registry, server: EngineServer, begin: Begin
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
        assert process.wait(20) == 130


def test_the_daemon_is_told_while_it_lives(store: Store) -> None:
    store.download("broken", aged=3600)
    with Daemon(store.path) as daemon:
        told = status(store)
        assert told["daemon"]["pid"] == daemon.pid
        assert told["daemon"]["since"].endswith("Z")
        assert told["looked_at"] is not None
        assert f"pid {daemon.pid}" in run(store.path, "status").stdout
        daemon.kill()
        assert status(store)["daemon"] is None


def test_on_a_terminal_it_is_drawn_again_and_ends_quietly(store: Store) -> None:
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
        assert process.wait(20) == 130
    assert shown.count(b"unclaimed") + shown.count(b"paused") + shown.count(b"behind") >= 2
    assert b"Traceback" not in shown

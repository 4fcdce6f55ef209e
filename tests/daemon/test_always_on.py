"""What makes the daemon a service: systemd's protocol, settings read again, proofs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repair.scenes import SIZE, finished
from tests.support.driving import Daemon, HealthyStore, command, environment
from tests.support.servers import EngineServer, collapsed, wait_until
from watcher.demo.registry import Registry
from watcher.model import DAY

REPAIRS = {"OLLAMA_WATCH_REPAIR": "true"}


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as opened:
        opened.bind(str(tmp_path / "notify"))
        opened.settimeout(120)
        yield opened


def until(listener: socket.socket, wanted: str) -> list[str]:
    """What systemd is told, up to a line."""
    lines: list[str] = []
    while wanted not in lines:
        lines += listener.recv(4096).decode().splitlines()
    return lines


@pytest.mark.parametrize("there", [True, False])
def test_systemd_is_notified_of_a_whole_life(
    tmp_path: Path, listener: socket.socket, there: bool
) -> None:
    store = HealthyStore(tmp_path / "models").path if there else tmp_path / "none"
    daemon = Daemon(store, {"NOTIFY_SOCKET": str(tmp_path / "notify")})
    try:
        daemon.start()
        assert "WATCHDOG=1" in until(listener, "READY=1")
        if not there:
            HealthyStore(store)
        daemon.wait_event("service_started")
        os.kill(daemon.pid, signal.SIGHUP)
        told = until(listener, "RELOADING=1")
        assert any(line.startswith("MONOTONIC_USEC=") for line in until(listener, "READY=1") + told)
        os.kill(daemon.pid, signal.SIGTERM)
        until(listener, "STOPPING=1")
        wait_until(lambda: not daemon.alive, "its end")
    finally:
        daemon.close()


def test_settings_are_read_again_and_bad_ones_refused(store: HealthyStore, tmp_path: Path) -> None:
    stale = store.download("stale")
    settings = tmp_path / "settings.toml"
    settings.write_text("clean = false\n")
    with Daemon(store.path, settings=settings) as daemon:
        settings.write_text("clean = perhaps\n")
        os.kill(daemon.pid, signal.SIGHUP)
        told = daemon.wait_event("error")
        assert "kept the previous settings" in str(told["message"])
        assert store.partials(stale)
        settings.write_text("clean = true\n")
        os.kill(daemon.pid, signal.SIGHUP)
        assert daemon.wait_event("settings_read")["details"]["clean"] is True
        daemon.wait_event("partial_cleaned")
        assert store.partials(stale) == []


@pytest.mark.parametrize("right", [True, False])
def test_daemon_hashes_a_blob_finished_from_repaired_progress_files_in_the_background(
    registry: Registry, tmp_path: Path, right: bool
) -> None:
    with EngineServer(tmp_path / "pulled") as server:
        it = finished(server, registry, right=right)
        state = it.store / ".ollama-watch/state.json"
        with Daemon(it.store, REPAIRS) as daemon:
            if right:
                digest = it.blob.name.removeprefix("sha256-")
                hashes = it.store / f".ollama-watch/hashes/{digest[:2]}.json"
                wait_until(hashes.exists, "the hash")
                assert digest in hashes.read_text()
                wait_until(lambda: b'"unproven": []' in state.read_bytes(), "the proof")
                assert daemon.of("blob_corrupt") == []
                return
            daemon.wait_event("blob_corrupt")
            told = daemon.wait_event("quarantined")
            name = it.model.name.removeprefix("http://")
            assert f"ollama pull --insecure {name}" in str(told["message"])
            assert not it.blob.exists()
            server.start().wait_ready()
            assert collapsed(server.pull(it.model.name))[-1] == "success"
            assert it.blob.stat().st_size == SIZE


def test_an_end_does_not_wait_for_a_long_hash(store: HealthyStore) -> None:
    """The hash of a large blob is broken off; nothing is said of it, and it stays unproven."""
    digest = store.digest("large")
    with (store.blobs / f"sha256-{digest}").open("wb") as file:
        file.truncate(40 << 30)
    store.manifest_of("large", digest)
    state = store.path / ".ollama-watch/state.json"
    with Daemon(store.path) as daemon:
        daemon.kill(signal.SIGTERM)
    state.write_text(state.read_text().replace('"unproven": []', f'"unproven": ["{digest}"]'))
    with Daemon(store.path, REPAIRS) as daemon:
        daemon.kill(signal.SIGTERM)
    assert f'"{digest}"' in state.read_text()


def test_the_check_at_the_start_is_readable_on_a_terminal(store: HealthyStore) -> None:
    """What was found, and what was done about it, in 80 columns."""
    weights = store.digest("llama2 weights")
    (store.blobs / f"sha256-{weights}").write_bytes(bytes(48 * 1024))
    store.manifest_of("llama2", store.digests[0], weights)
    (store.blobs / f"sha256-{weights}").unlink()
    store.download("llama2 weights", aged=DAY)
    (store.blobs / f"sha256-{weights}-partial-1").unlink()
    stale = store.download("stale")
    process = subprocess.Popen(
        command(store.path, "daemon"),
        env=environment(store.path, {**REPAIRS, "OLLAMA_WATCH_CLEAN": "true"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        log = store.ours / "logs/events.jsonl"
        wait_until(lambda: log.exists() and "partial_cleaned" in log.read_text(), "the clean-up")
        process.terminate()
        out, told = process.communicate(timeout=120)
    finally:
        process.kill()
    assert out == ""
    # A path is never broken, however long it is.
    assert all(len(line) <= 80 or str(store.path) in line for line in told.splitlines())
    said = " ".join(told.split())
    for text in (
        "Checking for partial model downloads...",
        "Found partial download for model: llama2:latest. Partial size: 24576 bytes. Can resume: ",
        "Repaired the partial download of llama2:latest",
        f"Cleaned up partial download for: sha256-{stale[:12]}",
    ):
        assert text in said, told

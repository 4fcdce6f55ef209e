"""Metrics of a daemon: right after each event, by file and by listener, as promtool wants them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.daemon.conftest import HELD, SIZE, Begin
from tests.support.driving import Daemon, HealthyStore, run
from tests.support.servers import EngineServer, wait_until
from watcher.model import DAY

ROOT = Path(__file__).parents[2]
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)"
)

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=120) as answer:
        return str(answer.read().decode())


def values(text: str, store: HealthyStore) -> Values:
    """Each sample by its name and its labels; that of the store must be the right one."""
    found: Values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("store") == str(store.path)
            found[sample.name, frozenset(labels.items())] = sample.value
    return found


def value(text: str, store: HealthyStore, name: str, **labels: str) -> float | None:
    return values(text, store).get((f"ollama_watch_{name}", frozenset(labels.items())))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "node_exporter"
    folder.mkdir()
    return folder / "ollama-watch.prom"


def to(file: Path, **more: str) -> dict[str, str]:
    return {"OLLAMA_WATCH_METRICS_FILE": str(file), **more}


def by_condition(text: str, store: HealthyStore) -> dict[str, float]:
    """The conditions that any download has."""
    return {
        dict(labels)["condition"]: number
        for (name, labels), number in values(text, store).items()
        if name == "ollama_watch_downloads" and number
    }


# ---------------------------------------------------------------- a file


def test_a_textfile_describes_the_store(store: HealthyStore, file: Path) -> None:
    store.download("stale")
    store.download("young", aged=DAY)
    orphan = store.blobs / f"sha256-{store.text_blob('orphan' * 1000)}"
    with Daemon(store.path, to(file)) as daemon:
        text = file.read_text()
        assert by_condition(text, store) == {"paused": 2}
        assert value(text, store, "stale_downloads") == 1
        assert value(text, store, "orphan_bytes") == orphan.stat().st_blocks * 512
        assert value(text, store, "findings", severity="warning", kind="download_stale") == 1
        assert value(text, store, "blobs") == 2
        healthy = [store.blobs / f"sha256-{digest}" for digest in store.digests]
        assert value(text, store, "blob_bytes") == sum(path.stat().st_size for path in healthy)
        present = value(text, store, "download_bytes", condition="paused", part="present")
        missing = value(text, store, "download_bytes", condition="paused", part="missing")
        length = store.partial(store.digest("stale")).stat().st_size
        assert present is not None
        assert missing is not None
        assert present > 0
        assert present + missing == 2 * length
        oldest = value(text, store, "oldest_progress_timestamp_seconds")
        stale = store.partial(store.digest("stale")).stat().st_mtime
        assert oldest == pytest.approx(stale, abs=5)
        at = value(text, store, "last_full_look_timestamp_seconds")
        assert at == pytest.approx(file.stat().st_mtime, abs=60)
        assert value(text, store, "events_total", type="partial_found") == 2
        assert value(text, store, "events_total", type="error") == 0
        daemon.kill(signal.SIGTERM)
    assert os.listdir(file.parent) == [file.name]
    assert file.stat().st_mode & 0o777 == 0o644, "node_exporter has to read it"


def test_a_pull_that_dies_is_reported_at_once_and_its_repair_counted(
    store: HealthyStore, file: Path, server: EngineServer, begin: Begin
) -> None:
    """By narrow looks: no look at the whole store comes for ten minutes."""
    repairs = to(file, OLLAMA_WATCH_REPAIR="true")
    server.start().wait_ready()
    with Daemon(store.path, repairs) as daemon:
        begin(server)
        daemon.wait_event("download_started")
        wait_until(lambda: by_condition(file.read_text(), store) == {"live": 1}, "it is live")
        at = value(file.read_text(), store, "last_full_look_timestamp_seconds")
        server.kill()
        daemon.wait_event("download_repaired")
        wait_until(lambda: by_condition(file.read_text(), store) == {"paused": 1}, "its repair")
        text = file.read_text()
        assert value(text, store, "repairs_total") == 1
        saved = value(text, store, "saved_bytes_total")
        assert saved is not None
        assert 0 < saved <= HELD
        # What the look at the whole store has told stays as it was.
        assert value(text, store, "last_full_look_timestamp_seconds") == at
        assert value(text, store, "blobs") == 2
        missing = value(text, store, "download_bytes", condition="paused", part="missing")
        present = value(text, store, "download_bytes", condition="paused", part="present")
        assert missing is not None
        assert present is not None
        assert missing + present == SIZE


def test_a_removed_download_is_gone_and_the_freed_bytes_counted(
    store: HealthyStore, file: Path
) -> None:
    store.download("young", aged=DAY)
    with Daemon(store.path, to(file, OLLAMA_WATCH_CLEAN="true")) as daemon:
        stale = store.download("stale")
        size = sum(path.stat().st_blocks * 512 for path in store.blobs.glob(f"*{stale}*"))
        daemon.wait_event("partial_cleaned")
        wait_until(lambda: value(file.read_text(), store, "freed_bytes_total") == size, "freed")
        assert by_condition(file.read_text(), store) == {"paused": 1}


def test_refusals_are_counted_by_kind(store: HealthyStore, file: Path) -> None:
    digest = store.download("stale")
    with store.partial(digest).open("rb"), Daemon(
        store.path, to(file, OLLAMA_WATCH_CLEAN="true")
    ) as daemon:  # fmt: skip
        told = daemon.wait_event("refused")
        store.download("more", aged=DAY)
        daemon.wait_event("partial_found", 2)
        kind = told["details"]["kind"]
        wait_until(
            lambda: value(file.read_text(), store, "refusals_total", kind=kind) == 1, "a refusal"
        )
        assert value(file.read_text(), store, "refusals_total", kind="length") == 0


@pytest.mark.parametrize("how", ["missing", "no folder"])
def test_a_folder_that_cannot_be_written_is_reported_once(
    store: HealthyStore, file: Path, how: str
) -> None:
    file.parent.rmdir()
    if how == "no folder":
        file.parent.write_text("a file")
    with Daemon(store.path, to(file)) as daemon:
        (told,) = daemon.of("error")
        assert told["message"].startswith(f"metrics_file: writing {file} failed: ")
        store.download("young", aged=DAY)
        daemon.wait_event("partial_found")
        daemon.wait_idle()
        assert len(daemon.of("error")) == 1
        with contextlib.suppress(FileNotFoundError):
            file.parent.unlink()
        file.parent.mkdir()
        store.download("another", aged=DAY)
        daemon.wait_event("partial_found", 2)
        wait_until(file.exists, "the file")
        shutil.rmtree(file.parent)
        store.download("a third", aged=DAY)
        daemon.wait_event("error", 2)


def test_a_reader_never_sees_half_of_it(store: HealthyStore, file: Path) -> None:
    with Daemon(store.path, to(file)) as daemon:
        whole = len(file.read_text().splitlines())
        for number in range(20):
            digest = store.download(f"number {number}", aged=DAY)

            def is_told(digest: str = digest) -> bool:
                assert len(file.read_text().splitlines()) >= whole
                return any(digest in str(each["details"]) for each in daemon.events)

            wait_until(is_told, "the download")


# ---------------------------------------------------------------- a listener


@pytest.fixture
def listening(store: HealthyStore) -> Iterator[tuple[Daemon, int]]:
    port = free_port()
    with Daemon(store.path, {"OLLAMA_WATCH_METRICS_LISTEN": f"127.0.0.1:{port}"}) as daemon:
        yield daemon, port


def test_a_listener_answers_with_the_same(
    store: HealthyStore, listening: tuple[Daemon, int]
) -> None:
    daemon, port = listening
    assert by_condition(scrape(port), store) == {}
    assert value(scrape(port), store, "oldest_progress_timestamp_seconds") is None
    store.download("young", aged=DAY)
    daemon.wait_event("partial_found")
    wait_until(lambda: by_condition(scrape(port), store) == {"paused": 1}, "the download")
    assert daemon.kill(signal.SIGTERM) == 0
    assert daemon.errors == ""
    with pytest.raises(OSError):
        scrape(port)


def test_clients_that_send_nothing_or_go_away_keep_nobody_waiting(
    store: HealthyStore, listening: tuple[Daemon, int]
) -> None:
    daemon, port = listening
    with contextlib.ExitStack() as silent:
        for said in (b"", b"GET /met", b"\xff" * 100_000, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
            client = silent.enter_context(socket.create_connection(("127.0.0.1", port)))
            with contextlib.suppress(OSError):
                client.sendall(said)
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"GET ")
                # Closing it resets the connection.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert value(scrape(port), store, "blobs") == 2
        assert daemon.kill(signal.SIGTERM) == 0
    assert daemon.errors == ""


def test_the_listener_sleeps_until_a_scrape(listening: tuple[Daemon, int]) -> None:
    daemon, port = listening
    daemon.wait_idle()
    before = daemon.work()
    scrape(port)
    wait_until(lambda: daemon.work() > before, "the scrape")
    daemon.wait_idle()
    before = daemon.work()
    time.sleep(1.2)  # twice as long as socketserver would sleep by itself
    assert daemon.work() == before


def test_a_port_that_is_taken_is_an_error_that_names_it(store: HealthyStore) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run(store.path, "daemon", env={"OLLAMA_WATCH_METRICS_LISTEN": address})
    assert done.returncode == 4
    assert f"listening on {address} failed: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr
    assert not store.ours.exists()


# ---------------------------------------------------------------- nothing of it without a wish


def test_nothing_is_loaded_that_was_not_asked_for(store: HealthyStore) -> None:
    with Daemon(store.path, {"PYTHONPROFILEIMPORTTIME": "1"}) as daemon:
        assert "watcher.service.daemon" in daemon.errors
        assert "prometheus_client" not in daemon.errors
        assert "http.server" not in daemon.errors


# ---------------------------------------------------------------- promtool


@needs_promtool
def test_promtool_has_no_complaint(store: HealthyStore, file: Path) -> None:
    store.download("stale")
    port = free_port()
    both = to(file, OLLAMA_WATCH_METRICS_LISTEN=f"127.0.0.1:{port}")
    with Daemon(store.path, both):
        for text in (file.read_text(), scrape(port)):
            done = subprocess.run(
                ["promtool", "check", "metrics"], input=text, capture_output=True, text=True
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_promtool
def test_the_rules_are_valid_and_fire_when_they_should() -> None:
    folder = ROOT / "deploy/prometheus"
    for words in (["check", "rules"], ["test", "rules"]):
        name = "rules" if words[0] == "check" else "test"
        command = ["promtool", *words, str(folder / f"ollama-watch.{name}.yml")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_ask_for_metrics_that_there_are(store: HealthyStore, file: Path) -> None:
    rules = (ROOT / "deploy/prometheus" / "ollama-watch.rules.yml").read_text()
    asked = set(re.findall(r"ollama_watch_\w+", rules))
    store.download("stale")
    with Daemon(store.path, to(file)):
        there = {name for name, _ in values(file.read_text(), store)}
    assert asked
    assert asked <= there

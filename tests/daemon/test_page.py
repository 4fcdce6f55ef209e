"""The page that a daemon has served: it comes with the daemon, and goes with it."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
from pathlib import Path

import psutil
import pytest

from tests.conftest import NOBODY, needs_root
from tests.support.driving import Daemon, HealthyStore
from tests.support.servers import wait_until


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection), contextlib.suppress(OSError):
        connection.request("GET", "/status.json")
        with connection.getresponse() as answer:
            return answer.status == 200
    return False


def runs(pid: int) -> bool:
    """Whether a process has not ended; nobody may have asked for its exit code yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.mark.parametrize("end", ["SIGTERM", "SIGKILL"])
def test_the_page_comes_and_goes_with_the_daemon(store: HealthyStore, port: int, end: str) -> None:
    with Daemon(store.path, {"OLLAMA_WATCH_WEB_LISTEN": f"127.0.0.1:{port}"}) as daemon:
        wait_until(lambda: answers(port), "the page")
        pages = [each.pid for each in psutil.Process(daemon.pid).children(recursive=True)]
        assert pages
        assert daemon.pid not in pages
        assert daemon.kill({"SIGTERM": 15, "SIGKILL": 9}[end]) == {"SIGTERM": 0, "SIGKILL": -9}[end]
        wait_until(lambda: not answers(port), "its end")
        wait_until(lambda: not any(map(runs, pages)), "the end of the process")


def test_a_page_that_died_is_reported(store: HealthyStore, port: int) -> None:
    with Daemon(store.path, {"OLLAMA_WATCH_WEB_LISTEN": f"127.0.0.1:{port}"}) as daemon:
        wait_until(lambda: answers(port), "the page")
        for child in psutil.Process(daemon.pid).children():
            os.kill(child.pid, 9)
        told = daemon.wait_event("error")["message"]
        assert told == "the process that serves the page ended with -9; restarting in 5 s"
        assert daemon.alive


def test_a_daemon_goes_on_where_the_port_is_taken(store: HealthyStore, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with Daemon(store.path, {"OLLAMA_WATCH_WEB_LISTEN": address}) as daemon:
            told = daemon.wait_event("error")["message"]
            assert told == "the process that serves the page ended with 4; restarting in 5 s"
            assert f"listening on {address} failed" in daemon.errors
            assert daemon.kill(15) == 0


@needs_root
def test_roots_settings_serve_it_as_the_owner(
    store: HealthyStore, port: int, tmp_path: Path
) -> None:
    """The owner can't read them: the page comes from a fork, and ends with the daemon as well."""
    settings = tmp_path / "settings.toml"
    settings.write_text(f'web_listen = "127.0.0.1:{port}"\n')
    settings.chmod(0o600)
    for path in (store.path, *store.path.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    with Daemon(store.path, settings=settings) as daemon:
        wait_until(lambda: answers(port), "the page")
        pages = psutil.Process(daemon.pid).children(recursive=True)
        assert {each.uids().effective for each in pages} == {NOBODY}
        assert daemon.kill(9) == -9
        wait_until(lambda: not answers(port), "its end")
        wait_until(lambda: not any(runs(each.pid) for each in pages), "the end of the processes")

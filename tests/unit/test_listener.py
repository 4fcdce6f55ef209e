"""The metrics' listener: bounded, whatever clients do, and for this machine alone."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import psutil
import pytest
from prometheus_client import CollectorRegistry, Gauge

from tests.support.servers import wait_until
from watcher.service import listener


@pytest.fixture
def port() -> Iterator[int]:
    registry = CollectorRegistry()
    Gauge("answer", "A number.", registry=registry).set(42)
    Gauge("other", "Another one.", registry=registry).set(7)
    with listener.listening("127.0.0.1", 0, registry, print) as port:
        yield port


def ask(
    port: int, *lines: str, target: str = "/metrics", host: str = "127.0.0.1"
) -> tuple[int, str]:
    """The status and the body of a request with these headers."""
    with socket.create_connection((host, port), timeout=120) as client:
        text = "\r\n".join((f"GET {target} HTTP/1.1", *lines, "", ""))
        client.sendall(text.encode())
        answer = http.client.HTTPResponse(client)
        answer.begin()
        return answer.status, answer.read().decode()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_metrics_are_answered(port: int) -> None:
    status, body = ask(port, f"Host: localhost:{port}")
    assert status == 200
    assert "answer 42.0" in body
    assert ask(port, "Host: localhost", target="/?name[]=other")[1].count("42.0") == 0


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:9464", "localhost.", "127.0.0.1", "127.8.9.1:1", "[::1]", "[::1]:80"],
)
def test_hosts_of_this_machine_are_served(port: int, host: str) -> None:
    assert ask(port, f"Host: {host}")[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:9464",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost:80@evil.example",
        "10.0.0.1",
        "0.0.0.0",
        "[::2]",
        "::1x",
        "",
        "2130706433",
    ],
)
def test_other_hosts_are_refused(port: int, host: str) -> None:
    """A page that is led here by its own name server would read a store's path."""
    status, body = ask(port, f"Host: {host}")
    assert status == 403
    assert "42" not in body


def test_who_comes_by_another_address_than_loopback_may_use_any_name() -> None:
    every = [each for those in psutil.net_if_addrs().values() for each in those]
    others = [each.address for each in every if each.family == socket.AF_INET]
    own = next((each for each in others if not each.startswith("127.")), None)
    with listener.listening("0.0.0.0", 0, CollectorRegistry(), print) as port:
        assert ask(port, "Host: evil.example")[0] == 403, "a browser on this machine"
        if own is None:
            pytest.skip("no address here besides loopback")
        assert ask(port, "Host: ollama-0.example", host=own)[0] == 200


def test_a_request_with_two_hosts_or_none_is_refused(port: int) -> None:
    assert ask(port)[0] == 400
    assert ask(port, "Host: localhost", "Host: evil.example")[0] == 400
    assert ask(port, "Host: localhost", target="http://evil.example/metrics")[0] == 403
    assert ask(port, "Host: localhost", target="http://localhost/metrics")[0] == 200


def test_many_slow_clients_take_no_threads_and_few_descriptors(port: int) -> None:
    with contextlib.ExitStack() as slow:
        threads, before = threading.active_count(), descriptors()
        for _ in range(640):
            client = slow.enter_context(socket.create_connection(("127.0.0.1", port), timeout=120))
            client.sendall(b"GET /")
        assert ask(port, "Host: localhost")[0] == 200
        assert threading.active_count() <= threads
        theirs = descriptors() - before - 640
        assert theirs <= listener._MOST_CONNECTIONS
    wait_until(lambda: descriptors() <= before, "the connections to be closed")


def test_the_time_limit_is_that_of_the_whole_request(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then does not make it longer."""
    monkeypatch.setattr(listener, "_REQUEST_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", port), timeout=120) as client:
        client.settimeout(0.1)

        def ended() -> bool:
            try:
                client.send(b"G")
                return client.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        wait_until(ended, "its end")


def test_a_request_without_end_is_dropped(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=120) as client:
        with contextlib.suppress(OSError):
            client.sendall(b"x" * 1_000_000)
        with contextlib.suppress(OSError):
            assert client.recv(1) == b""


@pytest.mark.parametrize(
    ("target", "accept", "status"),
    [
        ("http://[/metrics", "", 400),
        ("/metrics", "text/plain; version=1.0.0x", 200),
        ("/metrics", "application/openmetrics-text; version=1.0.0q=0.5,x0", 200),
    ],
)
def test_invalid_requests_are_answered(
    port: int, target: str, accept: str, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ask(port, "Host: localhost", f"Accept: {accept}", target=target)[0] == status
    assert ask(port, "Host: localhost")[0] == 200
    assert capfd.readouterr().err == ""


def test_the_listener_ends_even_if_no_client_can_be_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some errors of accept(2) are the client's; a kernel may give one again and again."""
    tried = threading.Event()

    def refused(_: socket.socket) -> None:
        tried.set()
        raise PermissionError(errno.EPERM, "refused by a firewall")

    def lives() -> None:
        with listener.listening("127.0.0.1", 0, CollectorRegistry(), print):
            tried.wait(120)

    monkeypatch.setattr(socket.socket, "accept", refused)
    life = threading.Thread(target=lives, daemon=True)
    life.start()
    life.join(120)
    assert tried.is_set()
    assert not life.is_alive()


def test_an_error_of_accept_is_reported_once_and_does_not_spin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried, told = list[float](), list[str]()

    def refused(_: socket.socket) -> None:
        tried.append(time.monotonic())
        raise PermissionError(errno.EPERM, "refused by a firewall")

    monkeypatch.setattr(socket.socket, "accept", refused)
    monkeypatch.setattr(listener, "_PAUSE_SECONDS", 0.2)
    with listener.listening("127.0.0.1", 0, CollectorRegistry(), told.append):
        wait_until(lambda: len(tried) > 2, "a third try")
    assert min(later - before for before, later in pairwise(tried)) >= 0.2
    (reason,) = told
    assert reason.startswith("metrics_listen: no client can connect: refused by a firewall")


def test_an_answer_that_nobody_reads_keeps_nobody_waiting(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=120) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ask(port, "Host: localhost")[0] == 200


def test_without_a_descriptor_left_it_waits_and_goes_on(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_PAUSE_SECONDS", 0.05)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as client:
        client.settimeout(120)
        free = os.dup(client.fileno())
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.recv(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        client.settimeout(120)
        assert client.recv(8) == b"HTTP/1.1"

"""Asking a server for its version, whatever answers there."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from watcher.ollama import server
from watcher.ollama.names import ModelName
from watcher.transfer import questions

OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"


@pytest.fixture
def port() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def asked(port: socket.socket, answer: bytes | None) -> str | None:
    """What we make of an answer; None: the connection is taken and nothing is said."""
    ended = threading.Event()

    def serve() -> None:
        connection, _ = port.accept()
        with connection:
            connection.recv(1000)
            if answer is not None:
                connection.sendall(answer)
            else:
                ended.wait(120)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        return server.version(f"http://127.0.0.1:{port.getsockname()[1]}")
    finally:
        ended.set()
        thread.join()


def body(text: bytes) -> bytes:
    return OK % (len(text), text)


def test_a_server_that_answers(port: socket.socket) -> None:
    assert asked(port, body(b'{"version":"0.33.0"}')) == "0.33.0"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0\xff" * 50,
        b"SSH-2.0-OpenSSH_9.9\r\n",
        body(b"<html>"),
        body(b"[]"),
        body(b"null"),
        body(b'{"version":5}'),
        body(b"[" * 5000),
        body(b"x" * 200_000),
        OK % (1000, b"{"),
    ],
)
def test_another_program_is_not_taken_for_ollama(port: socket.socket, answer: bytes) -> None:
    assert asked(port, answer) is None


def test_one_that_starts_has_its_port_open_and_is_silent(port: socket.socket) -> None:
    before = time.monotonic()
    assert asked(port, None) is None
    assert time.monotonic() - before < 60


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "http://[::1]:1", "http://nowhere.invalid:11434"]
)
def test_an_address_where_nobody_listens_has_no_version(url: str) -> None:
    assert server.version(url) is None


@pytest.mark.parametrize("url", ["http://x:99999", "http://x:port", "http://[::1", "http://a b:1"])
def test_an_address_that_is_none(url: str) -> None:
    assert server.version(url) is None


#: Bytes of a slow answer: those of half a minute.
DRIBBLED = 600


def dribbling(
    port: socket.socket, head: bytes, ended: threading.Event, waited_for: threading.Event
) -> None:
    """Answer a byte now and then: each is in time, and the answer never whole.

    `waited_for`: somebody has waited for all of it.
    """
    connection, _ = port.accept()
    with connection, contextlib.suppress(OSError):
        connection.recv(1000)
        connection.sendall(head)
        for _ in range(DRIBBLED):
            if ended.wait(0.05):
                return
            connection.sendall(b" ")
        waited_for.set()


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n", b"HTTP/1.1 "]
)
@pytest.mark.parametrize("asks", ["version", "length", "manifest"])
def test_a_slow_answer_keeps_nobody_waiting_for_ever(
    port: socket.socket, monkeypatch: pytest.MonkeyPatch, head: bytes, asks: str
) -> None:
    monkeypatch.setattr(server, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(questions, "ANSWER_SECONDS", 0.3)
    ended, waited_for = threading.Event(), threading.Event()
    thread = threading.Thread(target=dribbling, args=(port, head, ended, waited_for))
    thread.start()
    host = f"127.0.0.1:{port.getsockname()[1]}"
    model = ModelName(host, "library", "slow", "1b")
    try:
        match asks:
            case "version":
                assert server.version(f"http://{host}") is None
            case "length":
                with contextlib.suppress(OSError):
                    assert questions.length(model, "0" * 64) in (None, 60000)
            case _:
                assert questions.manifest(None, model).silent
    finally:
        ended.set()
        thread.join()
    assert not waited_for.is_set()

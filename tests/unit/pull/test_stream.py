"""One request to pull, whatever the other side makes of it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator

import pytest

from tests.support.servers import wait_until
from watcher.ollama.pull_stream import PullStream, ServerGoneError, Status
from watcher.pull.failures import Cause, of_error
from watcher.pull.layers import ModelProgress

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
DIGEST = "ab" * 32


class Peer:
    """Takes one connection, sends what it is told to, and keeps it open until it is let go."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._ended = threading.Event()
        self.asked = b""
        self.sent = 0
        self.closed_by_us = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def answer(self, raw: bytes, *, stays: bool = False) -> PullStream:
        """A stream over what is sent; `stays`: then nothing more, with the connection open."""

        def serve() -> None:
            connection, _ = self._listening.accept()
            with connection:
                while b"}" not in self.asked:
                    self.asked += connection.recv(4096)
                connection.sendall(raw)
                if stays:
                    connection.settimeout(120)
                    if not connection.recv(1):
                        self.closed_by_us.set()

        self._thread = threading.Thread(target=serve)
        self._thread.start()
        return PullStream(self.url, "llama3", insecure=True)

    def flood(self, piece: bytes) -> PullStream:
        """A stream over one piece again and again, until it is closed; `sent` counts the bytes."""

        def serve() -> None:
            connection, _ = self._listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
                while b"}" not in self.asked:
                    self.asked += connection.recv(4096)
                connection.sendall(HEAD + b"\r\n")
                while True:
                    self.sent += connection.send(piece)

        self._thread = threading.Thread(target=serve)
        self._thread.start()
        return PullStream(self.url, "llama3", insecure=True)

    def close(self) -> None:
        self._listening.close()
        if hasattr(self, "_thread"):
            self._thread.join(120)


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


def chunked(*pieces: bytes, whole: bool = True) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + (b"0\r\n\r\n" if whole else b"")


def plain(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def read(stream: PullStream) -> tuple[list[Status], str]:
    """All lines, and why there are no more."""
    lines: list[Status] = []
    with stream:
        while True:
            try:
                line = stream.next(120)
            except ServerGoneError as error:
                return lines, str(error)
            assert line is not None, "nothing came in ten seconds"
            lines.append(line)


def test_lines_as_they_come(peer: Peer) -> None:
    lines, why = read(
        peer.answer(
            chunked(
                b'{"status":"pulling manifest"}\n',
                b'{"status":"pulling abab","digest":"sha256:' + DIGEST.encode() + b'",',
                b'"total":100,"completed":7}\n\n{"status":"success"}\n',
            )
        )
    )
    assert lines == [
        Status("pulling manifest"),
        Status("pulling abab", DIGEST, 100, 7),
        Status("success"),
    ]
    assert why
    assert b"POST /api/pull HTTP/1.1" in peer.asked
    assert b'"insecure":true' in peer.asked


@pytest.mark.parametrize(
    "line",
    [
        b'{"status":5,"digest":7,"total":"many","completed":-3}\n',
        b'{"status":"x","digest":"sha256:model","total":1e400,"completed":99999999999999999999}\n',
        b'{"status":"x","total":18446744073709551615,"completed":true}\n',
        b"{}\n",
    ],
)
def test_values_that_make_no_sense_are_none(peer: Peer, line: bytes) -> None:
    lines, _ = read(peer.answer(chunked(line)))
    for each in lines:
        assert each.error or (each.digest, each.total) == ("", 0)
        assert each.completed == 0


@pytest.mark.parametrize(
    "line", [b"[1]\n", b"null\n", b"<html>\n", b"\0\xff\x1b[31m\n", b"x" * (3 << 20) + b"\n"]
)
def test_garbage_is_reported_as_an_error_in_printable_words(peer: Peer, line: bytes) -> None:
    lines, _ = read(peer.answer(chunked(line)))
    assert lines
    assert lines[0].error.startswith("the server answers 200: ")
    assert lines[0].error.isprintable()
    assert len(lines[0].error) < 2000


def test_an_error_is_printable_and_one_that_is_empty_is_one_all_the_same(peer: Peer) -> None:
    lines, _ = read(peer.answer(chunked(b'{"error":"no \\u001b[31m space"}\n{"error":""}\n')))
    assert [each.error.isprintable() and bool(each.error) for each in lines] == [True, True]


def test_an_http_error_with_json(peer: Peer) -> None:
    body = b'{"error":"model \'nothing\' not found"}'
    lines, _ = read(peer.answer(plain(body, b"404 Not Found")))
    assert lines == [Status("", error="model 'nothing' not found")]


def test_an_http_error_of_a_proxy(peer: Peer) -> None:
    lines, _ = read(peer.answer(plain(b"<html>Bad Gateway</html>", b"502 Bad Gateway")))
    assert of_error(lines[0].error) is Cause.OVERLOADED


@pytest.mark.parametrize("whole", [True, False])
def test_half_a_line_is_the_servers_death(peer: Peer, whole: bool) -> None:
    answer = chunked(b'{"status":"pulling manifest"}\n', b'{"status":"pull', whole=whole)
    lines, why = read(peer.answer(answer))
    assert lines == [Status("pulling manifest")]
    assert why


@pytest.mark.parametrize(
    "raw", [b"", b"HTTP/1.1 200", b"SSH-2.0-OpenSSH\r\n", b"\0\xff" * 5000, HEAD + b"\r\n"]
)
def test_an_answer_that_makes_no_sense_gives_no_lines_and_a_reason(peer: Peer, raw: bytes) -> None:
    lines, why = read(peer.answer(raw))
    assert lines == []
    assert why


def test_no_server_at_the_address_is_reported_as_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerGoneError), PullStream(url, "m", insecure=False):
        pass


@pytest.mark.parametrize("head", [b"", HEAD + b"Connection: close\r\n\r\n", chunked(whole=False)])
def test_a_silent_one_can_be_left_at_any_time(peer: Peer, head: bytes) -> None:
    """Also one that is to close the connection after its answer, as some proxies are."""
    with peer.answer(head, stays=True) as stream:
        assert stream.next(0.3) is None
    assert peer.closed_by_us.wait(120)


def test_the_end_is_reported_again(peer: Peer) -> None:
    with peer.answer(b"") as stream:
        for _ in range(3):
            with pytest.raises(ServerGoneError):
                stream.next(120)


def test_a_flood_of_lines_waits_until_they_are_taken_up(peer: Peer) -> None:
    line = b'{"status":"pulling %s","digest":"sha256:%s"}\n' % (b"a" * 900, DIGEST.encode())
    with peer.flood(line) as stream:
        before = -1

        def waits() -> bool:
            nonlocal before
            same, before = peer.sent == before, peer.sent
            time.sleep(0.3)
            return same

        wait_until(waits, "the server to wait")
        assert peer.sent < 16 << 20
        first = stream.next(120)
        assert first is not None
        assert len(first.text) == 200
    assert not stream._thread.is_alive()


def test_a_line_without_end_is_not_kept_in_memory(peer: Peer) -> None:
    tracemalloc.start()
    try:
        with peer.flood(b"x" * (1 << 16)) as stream:
            wait_until(lambda: peer.sent > 64 << 20, "a long line")
            assert stream.next(0.1) is None
            assert tracemalloc.get_traced_memory()[0] < 8 << 20
    finally:
        tracemalloc.stop()


def test_an_error_with_a_whole_page_in_it_is_understood(peer: Peer) -> None:
    page = b"<html>" * 400_000
    lines, _ = read(peer.answer(HEAD + b'\r\n{"error":"412: ' + page + b'"}\n'))
    (line,) = lines
    assert of_error(line.error) is Cause.OLD_SERVER
    assert len(line.error) <= 2000


def test_layers_that_no_manifest_names_are_not_taken_on_without_end() -> None:
    bar = ModelProgress()
    for number in range(20_000):
        bar.note(f"{number:064x}", 1 << 40, 0)
    bar.note("f" * 64, 1 << 60, 0)
    assert len(bar.sizes) == 10_000
    assert bar.total < 1 << 63


def test_no_password_of_an_address_is_in_an_error(peer: Peer) -> None:
    error = b'Get \\"https://x/\\": invalid proxy address \\"http://me:s3cr3t/x@proxy:1\\"'
    lines, _ = read(peer.answer(HEAD + b'\r\n{"error":"' + error + b'"}\n'))
    assert "invalid proxy address" in lines[0].error
    assert "s3cr3t" not in lines[0].error

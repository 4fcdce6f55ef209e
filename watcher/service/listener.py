"""An HTTP listener on loopback that serves the metrics, in one thread of its own.

Clients can't keep the daemon from its work: the number of connections, the length of a request and
its time are limited, and the oldest connection gives way to a new one.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from watcher.errors import ListenError
from watcher.system import advice

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

#: For a whole request and its answer.
_REQUEST_SECONDS = 10.0
_MOST_CONNECTIONS = 32
_LONGEST_REQUEST = 16 * 1024
#: Where no descriptor is left, new clients wait for so long.
_PAUSE_SECONDS = 1.0
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_REQUEST_LINE = re.compile(r"([A-Z]+) (\S+) HTTP/(1\.[01])")
_STATUS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 405: "Method Not Allowed"}


@contextlib.contextmanager
def listening(host: str, port: int, registry: CollectorRegistry) -> Iterator[int]:
    """Answer scrapes until the context ends; the port (`port` 0: any that is free).

    It sleeps until a client connects. Raises ListenError, which names the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_MOST_CONNECTIONS)
    except OSError as error:
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        # create_server adds the address to the reason.
        why = (error.strerror or str(error)).partition(" (while")[0]
        taken = error.errno == errno.EADDRINUSE
        raise ListenError(
            f"metrics_listen: listening on {shown} failed: {why}",
            "choose another port, or stop the process that uses it"
            if taken
            else "choose another address",
            advice.as_root("ss", "-ltnp", f"sport = :{port}") if taken else "",
        ) from None
    ours, theirs = socket.socketpair()
    with listener, ours, theirs:
        server = _Server(listener, theirs, registry)
        thread = threading.Thread(target=server.serve, name="metrics", daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            ours.close()  # wakes it, and ends it
            thread.join()


@dataclass(slots=True)
class _Client:
    """A connection: its request so far, and the rest of its answer."""

    socket: socket.socket
    until: float
    request: bytearray = field(default_factory=bytearray)
    answer: memoryview | None = None


class _Server:
    def __init__(
        self, listener: socket.socket, end: socket.socket, registry: CollectorRegistry
    ) -> None:
        self._listener, self._end, self._registry = listener, end, registry
        #: In the order in which they connected, which is that of their deadlines.
        self._clients: dict[int, _Client] = {}
        self._selector = selectors.DefaultSelector()
        #: When clients are accepted again; None: now.
        self._paused_until: float | None = None

    def serve(self) -> None:
        """Serve until the other end of `end` is closed."""
        self._listener.setblocking(False)
        with self._selector:
            self._selector.register(self._end, selectors.EVENT_READ)
            self._selector.register(self._listener, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in self._selector.select(self._wait())]
                if self._end in ready:
                    break
                self._drop_late()
                for each in ready:
                    if each is self._listener:
                        self._accept()
                    elif isinstance(each, socket.socket) and each.fileno() in self._clients:
                        self._continue(self._clients[each.fileno()])
            for client in tuple(self._clients.values()):
                self._drop(client)

    def _wait(self) -> float | None:
        """Seconds until something is due; None where no client is connected."""
        due = [client.until for client in self._clients.values()]
        if self._paused_until is not None:
            due.append(self._paused_until)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _drop_late(self) -> None:
        now = time.monotonic()
        for client in [each for each in self._clients.values() if each.until <= now]:
            self._drop(client)
        if self._paused_until is not None and self._paused_until <= now:
            self._paused_until = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _accept(self) -> None:
        try:
            connected, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:
                # It stays ready: this would never sleep.
                self._selector.unregister(self._listener)
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
            return
        connected.setblocking(False)
        if len(self._clients) >= _MOST_CONNECTIONS:
            self._drop(next(iter(self._clients.values())))
        client = _Client(connected, time.monotonic() + _REQUEST_SECONDS)
        self._clients[connected.fileno()] = client
        self._selector.register(connected, selectors.EVENT_READ)

    def _drop(self, client: _Client) -> None:
        del self._clients[client.socket.fileno()]
        self._selector.unregister(client.socket)
        client.socket.close()

    def _continue(self, client: _Client) -> None:
        try:
            if client.answer is None:
                self._read(client)
            else:
                self._write(client, client.answer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._drop(client)  # it disconnected

    def _read(self, client: _Client) -> None:
        piece = client.socket.recv(4096)
        client.request += piece
        head, end, _ = bytes(client.request).partition(b"\r\n\r\n")
        if not piece or (not end and len(client.request) > _LONGEST_REQUEST):
            self._drop(client)
        elif end:
            client.answer = memoryview(_answer(head.decode("latin-1"), self._registry))
            self._selector.modify(client.socket, selectors.EVENT_WRITE)
            self._write(client, client.answer)

    def _write(self, client: _Client, left: memoryview) -> None:
        client.answer = left[client.socket.send(left) :]
        if not client.answer:
            with contextlib.suppress(OSError):
                client.socket.shutdown(socket.SHUT_WR)
            self._drop(client)


# ---------------------------------------------------------------- one request


def _answer(head: str, registry: CollectorRegistry) -> bytes:
    """The answer to a request, by its first line and its headers."""
    first, *lines = head.split("\r\n")
    request = _REQUEST_LINE.fullmatch(first)
    headers: dict[str, list[str]] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers.setdefault(name.strip().lower(), []).append(value.strip())
    if request is None:
        return _response(400, "no request of HTTP/1")
    method, target, version = request.groups()
    hosts = headers.get("host", [])
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        return _response(400, "expected one Host")
    named = [*hosts, urlsplit(target).netloc] if "://" in target else hosts
    if not all(map(is_here, named)):
        # A web page that is sent here by DNS rebinding has the name of its own host.
        return _response(403, "served to this machine alone: ask for localhost")
    if method not in ("GET", "HEAD"):
        return _response(405, "only GET")
    kind, body = _metrics(target, headers.get("accept", [""])[0], registry)
    return _response(200, body, kind, only_head=method == "HEAD")


def is_here(host: str) -> bool:
    """Whether a ``Host`` is a name or an address of loopback; the port does not matter."""
    name = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(:[0-9]*)?", host)
    if name is None:
        return False
    plain = name[1].lower().removesuffix(".")
    if plain in ("localhost", "ip6-localhost", "localhost.localdomain"):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(plain.strip("[]")).is_loopback
    return False


def _metrics(target: str, accept: str, registry: CollectorRegistry) -> tuple[str, bytes]:
    from prometheus_client.exposition import choose_encoder

    names = parse_qs(urlsplit(target).query).get("name[]")
    wanted = registry.restricted_registry(names) if names else registry
    encode, kind = choose_encoder(accept)
    return kind, encode(wanted)


def _response(
    status: int, body: bytes | str, kind: str = "text/plain", *, only_head: bool = False
) -> bytes:
    raw = f"{body}\n".encode() if isinstance(body, str) else body
    head = (
        f"HTTP/1.1 {status} {_STATUS[status]}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if only_head else raw)

"""What is asked of a server by HTTP, and which hosts are this machine."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    import http.client

#: A server that starts has its port open and does not answer: the wait must be short.
ANSWER_SECONDS = 1.0
_LONGEST_ANSWER = 64 * 1024
_LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})


def version(url: str) -> str | None:
    """The version of the server at `url`, or None where no Ollama answers there in time."""
    # Only where there is a server to ask: the imports alone cost 5 MB and 25 ms.
    import http.client
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(
            parts.hostname or "127.0.0.1", parts.port or 11434, timeout=ANSWER_SECONDS
        )
        with _deadline(connection, ANSWER_SECONDS):
            connection.request("GET", "/api/version")
            answer = orjson.loads(connection.getresponse().read(_LONGEST_ANSWER))
    except (OSError, ValueError, http.client.HTTPException):
        return None  # nobody there, no Ollama, or no address at all
    found = answer.get("version") if isinstance(answer, dict) else None
    return found if isinstance(found, str) else None


@contextlib.contextmanager
def _deadline(connection: http.client.HTTPConnection, seconds: float) -> Iterator[None]:
    """Connect, and end all talk over this connection after so long.

    A socket's own time-out begins anew with each byte, so a slow answer could take for ever.
    """
    with contextlib.closing(connection):
        connection.connect()
        talk: socket.socket = connection.sock

        def end() -> None:
            with contextlib.suppress(OSError):
                talk.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def is_loopback(host: str) -> bool:
    """Whether a host, with or without a port, is this machine by its loopback."""
    if host in _LOOPBACK_HOSTS:
        return True
    return host.rsplit(":", 1)[0] in _LOOPBACK_HOSTS

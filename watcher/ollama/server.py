"""What is asked of a server by HTTP, and which hosts are this machine."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import orjson

if TYPE_CHECKING:
    import socket

_T = TypeVar("_T")

_LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
#: A server that starts has its port open and does not answer: the wait must be short.
ANSWER_SECONDS = 1.0
_LONGEST_ANSWER = 64 * 1024


def version(url: str) -> str | None:
    """The version of the server at `url`, or None where no Ollama answers there in time."""
    # Only where there is a server to ask: the imports alone cost 5 MB and 25 ms.
    import http.client
    from urllib.parse import urlsplit

    def ask(opened: list[socket.socket]) -> object:
        parts = urlsplit(url)
        host, port = parts.hostname or "127.0.0.1", parts.port or 11434
        made = http.client.HTTPConnection(host, port, timeout=ANSWER_SECONDS)
        with contextlib.closing(made):
            made.connect()
            opened.append(made.sock)
            made.request("GET", "/api/version")
            return orjson.loads(made.getresponse().read(_LONGEST_ANSWER))

    try:
        answer = within(ANSWER_SECONDS, ask)
    except (OSError, ValueError, http.client.HTTPException):
        return None  # nobody there, no Ollama, or no address at all
    found = answer.get("version") if isinstance(answer, dict) else None
    return found if isinstance(found, str) else None


def within(seconds: float, ask: Callable[[list[socket.socket]], _T]) -> _T:
    """What `ask` gives, or raises; TimeoutError after so long. It lists the sockets it opens.

    A socket's own time-out begins anew with each byte, and looking up a name has none.
    """
    answers: queue.SimpleQueue[tuple[_T] | Exception] = queue.SimpleQueue()
    opened: list[socket.socket] = []

    def run() -> None:
        try:
            answers.put((ask(opened),))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=run, name="asking", daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        import socket

        for each in opened:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        raise TimeoutError("no complete response in time") from None
    if isinstance(answer, Exception):
        raise answer
    return answer[0]


def is_loopback(host: str) -> bool:
    """Whether a host, with or without a port, is this machine by its loopback."""
    return host in _LOOPBACK_HOSTS or host.rsplit(":", 1)[0] in _LOOPBACK_HOSTS

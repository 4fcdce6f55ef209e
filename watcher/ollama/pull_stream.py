"""One request ``POST /api/pull`` and what the server streams back, line by line."""

import contextlib
import http.client
import queue
import re
import socket
import threading
from typing import NamedTuple, Self
from urllib.parse import urlsplit

import orjson

from watcher.errors import without_secrets
from watcher.ollama import names

CONNECT_SECONDS = 10.0
_LONGEST_LINE = 1 << 20
#: Of an error, which may have a registry's whole page in it, so many characters; of a status less.
_LONGEST_ERROR, _LONGEST_STATUS = 2000, 200
#: Lines that nobody has taken up yet. A server that sends more waits.
_MOST_LINES = 256
_TICK_SECONDS = 0.2
_MOST_BYTES = 1 << 55  #: sums of what a server reports must stay numbers that can be kept
#: A machine that is gone without a word is noticed after a minute, even while a layer is checked.
_ALIVE = (
    ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 30),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), 10),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 3),
)

#: The beginning of an error that is longer than a line may be.
_TOO_LONG = re.compile(rb'\s*\{\s*"error"\s*:\s*"([^"]{1,2000})')


class Status(NamedTuple):
    """One line of the stream. `digest` has its 64 digits only; bytes are 0 where none are given.

    Bytes without a digest are those of all layers together.
    """

    text: str
    digest: str = ""
    total: int = 0
    completed: int = 0
    error: str = ""  #: why the pull has failed: the last line then


class ServerGoneError(Exception):
    """Nobody answers, or the stream has broken off."""


class PullStream:
    """A pull, until this is closed, which may cancel it. A thread reads, so a wait may end."""

    def __init__(self, url: str, model: str, *, insecure: bool) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_SECONDS)
        self._path = f"{parts.path.rstrip('/')}/api/pull"
        self._body = orjson.dumps({"model": model, "insecure": insecure, "stream": True})
        self._lines: queue.Queue[Status | ServerGoneError] = queue.Queue(_MOST_LINES)
        self._gone: ServerGoneError | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="pull", daemon=True)
        #: The connection forgets it where the server is to close it after its answer.
        self._socket: socket.socket | None = None

    def __enter__(self) -> Self:
        """Raises ServerGoneError where nobody takes the request."""
        try:
            self._connection.connect()
            # The answer may take as long as the registry lets the server wait.
            self._socket = self._connection.sock
            self._socket.settimeout(None)
            for option, value in _ALIVE:
                self._socket.setsockopt(*option, value)
            self._connection.request("POST", self._path, self._body)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            self._connection.close()
            raise ServerGoneError(_why(error)) from None
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread; a close does not
        self._thread.join()
        self._connection.close()

    def next(self, seconds: float) -> Status | None:
        """The next line; None where none has come in that time. Raises ServerGoneError."""
        if self._gone is None:
            try:
                line = self._lines.get(timeout=seconds)
            except queue.Empty:
                return None
            if not isinstance(line, ServerGoneError):
                return line
            self._gone = line
        raise self._gone

    def _read(self) -> None:
        try:
            with self._connection.getresponse() as answer:
                while not self._closed.is_set() and (raw := answer.readline(_LONGEST_LINE)):
                    rest = raw
                    while len(rest) == _LONGEST_LINE and not rest.endswith(b"\n"):
                        rest = answer.readline(_LONGEST_LINE)  # of a longer one that is enough
                    if not raw.strip():
                        continue
                    status = _status(raw, answer.status)
                    if status is None:
                        break  # the server has died while it wrote it
                    self._put(status)
            why = "the server has ended the answer"
        except (OSError, ValueError, http.client.HTTPException, AttributeError) as error:
            why = _why(error)
        self._put(ServerGoneError(why))

    def _put(self, line: Status | ServerGoneError) -> None:
        """Hand a line on; the server waits where nobody takes it, until this is closed."""
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._lines.put(line, timeout=_TICK_SECONDS)
                return


def _why(error: Exception) -> str:
    """What is wrong, without the number that Python puts before it."""
    return getattr(error, "strerror", None) or without_secrets(str(error)) or type(error).__name__


def _status(raw: bytes, code: int) -> Status | None:
    """What a line reports; None where it is the beginning of a line that has no end."""
    try:
        line = orjson.loads(raw)
    except orjson.JSONDecodeError:
        is_cut = not raw.endswith(b"\n") and len(raw) < _LONGEST_LINE
        if code == 200 and is_cut:
            return None
        line = None
    if not isinstance(line, dict):
        if long := _TOO_LONG.match(raw):
            line = {"error": long[1].decode("utf-8", "replace")}
        else:
            shown = names.printable(without_secrets(raw[:200].decode("utf-8", "replace").strip()))
            return Status("", error=f"the server answers {code}: {shown}")
    if "error" in line or code >= 400:
        reason = names.printable(without_secrets(str(line.get("error") or ""))[:_LONGEST_ERROR])
        return Status("", error=reason or f"the server answers {code}")
    digest = names.SPELLED_DIGEST.fullmatch(str(line.get("digest", ""))[:_LONGEST_STATUS])
    return Status(
        str(line.get("status", ""))[:_LONGEST_STATUS],
        digest[2] if digest else "",
        _count(line.get("total")),
        _count(line.get("completed")),
    )


def _count(value: object) -> int:
    return value if type(value) is int and 0 < value < _MOST_BYTES else 0

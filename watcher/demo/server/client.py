"""Asking the registry: requests that can be given up at any moment."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from watcher.demo.server.context import Context
from watcher.demo.server.errors import EngineError, NotExistError, UnexpectedEndError, reason
from watcher.demo.server.files import CHUNK
from watcher.demo.server.settings import VERSION

REDIRECTS = 10


@dataclass
class Answer:
    """A response whose body is still to be read."""

    url: str
    _connection: http.client.HTTPConnection
    _response: http.client.HTTPResponse
    _context: Context
    _take_back: Callable[[], None]
    _ends: str

    @property
    def status(self) -> int:
        """Its status."""
        return self._response.status

    @property
    def length(self) -> int:
        """The length it promises, 0 where it promises none."""
        text = self._response.headers.get("Content-Length") or ""
        return int(text) if text.isdigit() else 0

    @property
    def redirect(self) -> str | None:
        """The address it refers to."""
        location = self._response.headers.get("Location")
        return urllib.parse.urljoin(self.url, location) if location else None

    @property
    def realm_host(self) -> str:
        """The host of the address at which the registry says that it hands out tokens."""
        challenge = self._response.headers.get("WWW-Authenticate") or ""
        found = re.search('realm="([^"]*)"', challenge)
        return urllib.parse.urlsplit(found[1]).netloc if found else ""

    def read_some(self, most: int) -> bytes:
        """Some of the body, at most `most` bytes, b"" at its end.

        Raises CanceledError, UnexpectedEndError where less than promised came, EngineError where
        the connection broke.
        """
        promised = self._response.length
        try:
            data = self._response.read1(most)
        except http.client.IncompleteRead as error:
            self._context.check()
            raise UnexpectedEndError from error
        except (OSError, ValueError) as error:
            self._context.check()
            raise EngineError(f"read tcp {self._ends}: read: {reason(error)}") from error
        if data:
            return data
        self._context.check()
        if promised:
            raise UnexpectedEndError
        return data

    def read_all(self) -> bytes:
        """The whole body. Raises as `read_some`."""
        return b"".join(iter(lambda: self.read_some(CHUNK), b""))

    def read_exactly(self, size: int) -> Iterator[bytes]:
        """So many bytes, piece by piece. Raises as `read_some`, and where they are fewer."""
        while size > 0:
            data = self.read_some(min(CHUNK, size))
            if not data:
                raise EngineError("EOF")
            yield data
            size -= len(data)

    def close(self) -> None:
        """Close the connection."""
        self._take_back()
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def ask_registry(
    context: Context,
    method: str,
    url: str,
    headers: Mapping[str, str] | None = None,
    *,
    same_host: bool = False,
) -> Answer:
    """As `ask`; a status of 400 and more is an error, 404 a NotExistError.

    A token is asked for only at the registry's own host, and none is given out here.
    """
    answer = ask(context, method, url, headers, same_host=same_host)
    if answer.status < 400:
        return answer
    with answer:
        if answer.status == 404:
            raise NotExistError
        if answer.status == 401:
            realm, own = answer.realm_host, urllib.parse.urlsplit(url).netloc
            if realm != own:
                raise EngineError(f'realm host "{realm}" does not match original host "{own}"')
            raise EngineError("unauthorized: access denied")
        body = answer.read_all() if method != "HEAD" else b""
        raise EngineError(f"{answer.status}: {body.decode('utf-8', 'replace')}")


def ask(
    context: Context,
    method: str,
    url: str,
    headers: Mapping[str, str] | None = None,
    *,
    same_host: bool = False,
) -> Answer:
    """A request that follows redirects, with `same_host` only those within the host's name."""
    hostname = urllib.parse.urlsplit(url).hostname
    for _ in range(REDIRECTS + 1):
        answer = _ask_once(context, method, url, headers or {})
        if answer.status not in (301, 302, 303, 307, 308) or not answer.redirect:
            return answer
        url = answer.redirect
        if same_host and urllib.parse.urlsplit(url).hostname != hostname:
            return answer
        answer.close()
    raise EngineError(f"stopped after {REDIRECTS} redirects")


def _ask_once(context: Context, method: str, url: str, headers: Mapping[str, str]) -> Answer:
    """One request without following redirects. Raises CanceledError or EngineError."""
    context.check()
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        scheme = f'unsupported protocol scheme "{parts.scheme}"'
        raise EngineError(f'{method.title()} "{url}": {scheme}')
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=30)
    what = f'{method.title()} "{url}": '
    try:
        connection.connect()
        plain = connection.sock
        plain.settimeout(None)
        take_back = context.on_cancel(lambda: _shut(plain))
        ends = f"{_address(plain.getsockname())}->{_address(plain.getpeername())}"
        target = parts.path + ("?" + parts.query if parts.query else "")
        connection.request(method, target, headers={"User-Agent": f"ollama/{VERSION}", **headers})
        response = connection.getresponse()
    except http.client.RemoteDisconnected as error:
        connection.close()
        context.check()
        raise EngineError(what + "EOF") from error
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        context.check()
        raise EngineError(f"{what}dial tcp {parts.netloc}: {reason(error)}") from error
    return Answer(url, connection, response, context, take_back, ends)


def _address(end: tuple[Any, ...]) -> str:
    return f"{end[0]}:{end[1]}"


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)

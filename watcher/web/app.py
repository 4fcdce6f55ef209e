"""The WSGI application: the page, its script and its style, and the documents. It is read-only."""

import contextlib
import hmac
from base64 import b64decode
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from watcher.errors import WatchError
from watcher.service.listener import is_here
from watcher.state import json_file
from watcher.web import files, summary
from watcher.web.looks import Looks, Made

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

#: Where a document is, and what it is: that of which command, and in which of the looks.
_DOCUMENTS = {
    f"/{command}.json": (which, command, "application/json")
    for which, commands in (
        ("now", ("status", "audit", "quarantine")),
        ("queue", ("queue",)),
        ("space", ("df",)),
    )
    for command in commands
} | {"/log.jsonl": ("events", "log", "application/x-ndjson")}
#: Of every answer. The page runs its own script and style only, and nothing embeds or caches it.
_POLICY = (
    *("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"),
    *("img-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    *("require-trusted-types-for 'script'", "trusted-types 'none'"),
)
_HEADERS = [
    ("Content-Security-Policy", "; ".join(_POLICY)),
    ("Cache-Control", "no-store"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
]


class Answer(NamedTuple):
    """What a client gets."""

    status: str
    body: bytes = b""
    kind: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


class App:
    """The page of one store. `token`: who has it may read; "": whoever is on this machine may."""

    def __init__(self, looks: Looks, token: str = "") -> None:
        self._looks, self._token = looks, token

    def __call__(self, environ: "WSGIEnvironment", start: "StartResponse") -> Iterable[bytes]:
        answer = self._refused(environ) or self._found(environ)
        length = ("Content-Length", str(len(answer.body)))
        start(answer.status, [*_HEADERS, ("Content-Type", answer.kind), length, *answer.headers])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else answer.body]

    def _refused(self, environ: "WSGIEnvironment") -> Answer | None:
        if self._token:
            given = _token_of(environ.get("HTTP_AUTHORIZATION", ""))
            if not hmac.compare_digest(given.encode(), self._token.encode()):
                asks = ("WWW-Authenticate", 'Basic realm="ollama-watch", charset="UTF-8"')
                return Answer("401 Unauthorized", b"the token is the password\n", headers=(asks,))
        elif not is_here(environ.get("HTTP_HOST", "")):
            # A web page that is sent here by DNS rebinding has the name of its own host.
            return Answer("403 Forbidden", b"served to this machine alone: ask for localhost\n")
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            allows = ("Allow", "GET, HEAD")
            return Answer("405 Method Not Allowed", b"read-only\n", headers=(allows,))
        if not environ["REQUEST_URI"].startswith("/"):
            # Such as a whole address, whose host is another one than the one looked at above.
            return Answer("400 Bad Request", b"ask for a path\n")
        return None

    def _found(self, environ: "WSGIEnvironment") -> Answer:
        path = environ["PATH_INFO"]
        if path in files.SERVED:
            return Answer("200 OK", *files.SERVED[path])
        if path == "/":
            page = files.PAGE.substitute(summary.of(self._looks))
            return Answer("200 OK", page.encode(), "text/html; charset=utf-8")
        if path not in _DOCUMENTS:
            return Answer("404 Not Found", b"no such page\n")
        which, command, kind = _DOCUMENTS[path]
        try:
            made: Made = getattr(self._looks, which).get()
        except WatchError as error:
            failed = json_file.line({"error": error.message, "command": error.command})
            return Answer("503 Service Unavailable", failed, "application/json")
        headers = (("ETag", made.tag),)
        if environ.get("HTTP_IF_NONE_MATCH") == made.tag:
            return Answer("304 Not Modified", headers=headers)
        return Answer("200 OK", made.printed[command], kind, headers)


def _token_of(header: str) -> str:
    """The token of an ``Authorization``: a bearer's, or the password that a browser asks for."""
    scheme, _, given = header.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            return b64decode(given).decode().partition(":")[2]
    return ""

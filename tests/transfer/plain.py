"""A plain registry that takes what is pushed, and misbehaves on demand."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

_PIECE = 64 * 1024


class Plain:
    """Takes blobs and manifests on loopback; a context manager."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        #: Method, path and headers of each request.
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        #: Bytes that each upload has brought so far.
        self.received: list[int] = []
        #: Called with each request first; it answers by itself and gives back True, or False.
        self.fault: Callable[[Handler], bool] = lambda _: False
        #: The host of upload addresses; "": relative ones.
        self.uploads = ""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self._server.plain = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def count(self, method: str, part: str) -> int:
        return sum(each == method and part in path for each, path, _ in self.asked)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def plain(self) -> Plain:
        found: Plain = self.server.plain  # type: ignore[attr-defined]
        return found

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Length": str(len(body)), **named}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        data, left = b"", int(self.headers.get("Content-Length", 0))
        self.plain.received.append(0)
        while left and (piece := self.rfile.read1(min(left, _PIECE))):
            data, left = data + piece, left - len(piece)
            self.plain.received[-1] += len(piece)
        return data

    def handle_expect_100(self) -> bool:
        return True  # the answer may be another one

    def _serve(self) -> None:
        plain, path = self.plain, self.path
        plain.asked.append((self.command, path, dict(self.headers)))
        if plain.fault(self):
            return
        if self.headers.get("Expect"):
            self.send_response_only(100)
            self.end_headers()
        digest = re.search(r"sha256(?::|%3A)([0-9a-f]{64})", path)
        if self.command == "POST":
            host = f"http://{plain.uploads}:{plain.port}" if plain.uploads else ""
            self.answer(202, Location=f"{host}/v2/upload?state=1")
        elif self.command == "PUT" and digest is not None:
            data = self.body()
            if hashlib.sha256(data).hexdigest() != digest[1]:
                self.answer(400, b'{"errors":[{"message":"digest invalid"}]}')
                return
            plain.blobs[digest[1]] = data
            self.answer(201)
        elif self.command == "PUT":
            plain.manifests[path] = self.body()
            self.answer(201)
        else:
            found = plain.manifests.get(path) if digest is None else plain.blobs.get(digest[1])
            self.answer(404) if found is None else self.answer(200, found)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

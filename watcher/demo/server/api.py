"""The paths of the HTTP API."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from watcher.demo.server.context import Context
from watcher.demo.server.download import Downloads
from watcher.demo.server.errors import BadRequestError, EngineError, NotExistError
from watcher.demo.server.files import CHUNK
from watcher.demo.server.gojson import first_json, go_json
from watcher.demo.server.listing import ModelList
from watcher.demo.server.models import copy, create, delete, new_layer
from watcher.demo.server.names import Name
from watcher.demo.server.pull import pull
from watcher.demo.server.settings import VERSION
from watcher.demo.server.statuses import Emit, Line
from watcher.demo.server.store import blob_path, existing_name, manifest_path
from watcher.demo.server.streams import Stream, Watched, Work, run


class Server(ThreadingHTTPServer):
    """The API's server. It listens at once and answers only once `serve_forever` runs."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, Handler)
        self.models = ModelList()
        self.downloads = Downloads()
        self.requests: set[Context] = set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away; only other errors are worth a trace."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """The API's paths."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Requests are not logged."""

    def do_GET(self) -> None:
        self._read_only()

    def do_HEAD(self) -> None:
        if self.path.startswith("/api/blobs/"):
            self._guard(self._head_blob)
        else:
            self._read_only()

    def do_POST(self) -> None:
        routes = {"/api/pull": self._pull, "/api/copy": self._copy, "/api/create": self._create}
        if self.path.startswith("/api/blobs/"):
            self._guard(self._post_blob)
        elif self.path in routes:
            self._guard(routes[self.path])
        else:
            self._not_found()

    def do_DELETE(self) -> None:
        if self.path == "/api/delete":
            self._guard(self._delete)
        else:
            self._not_found()

    # Answers

    def _read_only(self) -> None:
        match self.path:
            case "/":
                self._send(200, b"Ollama is running", "text/plain; charset=utf-8")
            case "/api/version":
                self._json(200, {"version": VERSION})
            case "/api/ps":
                self._json(200, {"models": []})
            case "/api/tags":
                self._guard(lambda: self._json(200, {"models": self.server.models.models()}))
            case _:
                self._not_found()

    def _not_found(self) -> None:
        self.close_connection = True
        self._send(404, b"404 page not found", "text/plain")

    def _guard(self, handler: Callable[[], None]) -> None:
        try:
            handler()
        except BadRequestError as error:
            # Its body may be unread still.
            self.close_connection = True
            self._json(400, {"error": str(error)})
        except EngineError as error:
            self._json(500, {"error": str(error)})

    def _json(self, status: int, value: Any) -> None:
        self._send(status, go_json(value), "application/json; charset=utf-8")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _request(self) -> dict[str, Any]:
        body = b"".join(self._body())
        if not body:
            raise BadRequestError("missing request body")
        with _bad_request():
            value = first_json(body)
        if not isinstance(value, dict):
            raise BadRequestError("json: cannot unmarshal into Go value")
        return value

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left and (data := self.rfile.read(min(CHUNK, left))):
            left -= len(data)
            yield data

    # Handlers

    def _pull(self) -> None:
        request = self._request()
        name = _new_name(request)
        scheme = "http" if request.get("insecure") else "https"

        def work(context: Context, emit: Emit) -> None:
            pull(context, self.server.downloads, name, scheme, emit)
            self.server.models.refresh(name)

        self._work(request, work)

    def _create(self) -> None:
        request = self._request()
        name = _new_name(request)

        def work(_: Context, emit: Emit) -> None:
            create(request, name, emit)
            self.server.models.refresh(name)

        self._work(request, work)

    def _copy(self) -> None:
        request = self._request()
        names = []
        for key in ("source", "destination"):
            text = str(request.get(key) or "")
            name = Name.parse(text)
            if not name.valid:
                raise BadRequestError(f'{key} "{text}" is invalid')
            names.append(_spelled(name))
        try:
            copy(*names)
        except NotExistError:
            self._json(404, {"error": f'model "{request.get("source")}" not found'})
            return
        self.server.models.refresh(names[1])
        self._send(200, b"", "text/plain")

    def _delete(self) -> None:
        request = self._request()
        text, name = _text(request), _name(request)
        if not name.valid:
            raise BadRequestError(f'name "{text}" is invalid')
        try:
            name = existing_name(name)
            missing = not os.path.exists(manifest_path(name))
        except EngineError:
            missing = True
        if missing:
            self._json(404, {"error": f"model '{text}' not found"})
            return
        delete(name)
        self._send(200, b"", "text/plain")

    def _head_blob(self) -> None:
        _, path = self._blob()
        self._send(200 if os.path.exists(path) else 404, b"", "text/plain")

    def _post_blob(self) -> None:
        digest, path = self._blob()
        if os.path.exists(path):
            self.close_connection = True
            self._send(200, b"", "text/plain")
            return
        layer, _ = new_layer(self._body())
        if layer.digest != digest:
            raise BadRequestError(f'digest mismatch, expected "{digest}", got "{layer.digest}"')
        self._send(201, b"", "text/plain")

    def _blob(self) -> tuple[str, str]:
        digest = self.path.removeprefix("/api/blobs/")
        with _bad_request():
            return digest, blob_path(digest)

    # Streams

    def _work(self, request: Mapping[str, Any], work: Work) -> None:
        """Run `work` in a thread of its own, which goes on where its client goes away."""
        watched, stream = Watched(self.connection), Stream()
        self.server.requests.add(watched.context)
        args = (work, watched.context, stream)
        threading.Thread(target=run, args=args, daemon=True).start()
        try:
            if request.get("stream") is False:
                self._answer_last(stream)
            else:
                self._answer_lines(watched.context, stream)
        finally:
            stream.abandon()
            watched.end()
            self.server.requests.discard(watched.context)

    def _answer_last(self, stream: Stream) -> None:
        last: Line = {}
        while line := stream.take():
            last = line
            if "error" in line:
                self._json(line.pop("code", 500), line)
                return
        self._json(200, last)

    def _answer_lines(self, context: Context, stream: Stream) -> None:
        line = stream.take()
        if line and "error" in line:
            self._json(line.pop("code", 500), line)
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while line:
            line.pop("code", None)
            data = go_json(line) + b"\n"
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            if context.canceled:
                return
            line = stream.take()
        self.wfile.write(b"0\r\n\r\n")


@contextlib.contextmanager
def _bad_request() -> Iterator[None]:
    """What goes wrong in here is the request's fault."""
    try:
        yield
    except EngineError as error:
        raise BadRequestError(str(error)) from error


def _text(request: Mapping[str, Any]) -> Any:
    return request.get("model") or request.get("name") or ""


def _name(request: Mapping[str, Any]) -> Name:
    text = _text(request)
    return Name.parse(text.strip() if isinstance(text, str) else "")


def _new_name(request: Mapping[str, Any]) -> Name:
    name = _name(request)
    if not name.valid:
        raise BadRequestError("invalid model name")
    return _spelled(name)


def _spelled(name: Name) -> Name:
    with _bad_request():
        return existing_name(name)

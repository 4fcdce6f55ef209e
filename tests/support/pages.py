"""The page of ``web``, served by a process, and a client that says exactly what it wants to say."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import commands
from tests.support.driving import environment
from tests.support.servers import wait_until


class Answer(NamedTuple):
    """What came back; the names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Page(NamedTuple):
    """A page that is served at a port of loopback."""

    port: int
    process: commands.Process
    log: Path

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"http://127.0.0.1:{self.port}/"

    def ask(self, path: str = "/", method: str = "GET", **headers: str) -> Answer:
        """One request; ``if_none_match`` is ``If-None-Match``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, headers=given)
            answer = connection.getresponse()
            fields = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, fields, answer.read())

    def document(self, command: str) -> dict[str, Any]:
        """A JSON document, which must be there."""
        answer = self.ask(f"/{command}.json")
        assert answer.status == 200, answer.body
        return dict(json.loads(answer.body))


@contextlib.contextmanager
def served(store: Path, *words: str, env: Mapping[str, str] | None = None) -> Iterator[Page]:
    """Serve the page of a store; SIGTERM must end it with 0 and without a word on stderr."""
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as errors:
        listen = [] if "--listen" in words else ["--listen", "127.0.0.1:0"]
        given = ["--store", str(store), "web", *listen, *words]
        process = commands.start(
            given,
            environment(store, env),
            stdout=out,
            stderr=errors,
        )
        log, found = Path(out.name), Path(errors.name)
        try:
            wait_until(lambda: b"/ (" in log.read_bytes() or process.poll() is not None, "the page")
            address = re.search(r"^http://\S+:([0-9]+)/", log.read_text())
            assert address, found.read_text()
            yield Page(int(address[1]), process, found)
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0, found.read_text()
            assert found.read_text() == ""
        finally:
            process.kill()

"""The demo's registry and server as processes, so that the measuring process itself stays small."""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .measure import PYTHON, ROOT, environment


@contextmanager
def process(
    *words: str, until: str, more: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of the demo, from the line that says it is ready."""
    process = subprocess.Popen(
        [PYTHON, "-m", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**environment(), **(more or {})},
    )
    try:
        assert process.stdout is not None
        yield process, next(line for line in process.stdout if until in line)
    finally:
        process.kill()
        process.communicate()


def connection(url: str) -> http.client.HTTPConnection:
    """A connection to the server at `url`."""
    return http.client.HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=60)


def post(url: str, path: str, body: object) -> Any:
    """Post JSON; the answer's JSON."""
    asked = connection(url)
    asked.request("POST", path, json.dumps(body))
    answer = asked.getresponse().read()
    asked.close()
    return json.loads(answer)

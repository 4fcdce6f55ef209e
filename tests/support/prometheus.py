"""A real Prometheus on a free port, with a folder of its own."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.servers import wait_until

_TIMEOUT = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Prometheus(NamedTuple):
    """One that runs; `get` asks its API and returns the data of the answer."""

    port: int
    pid: int

    def get(self, path: str, **given: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(given)}"
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each series now, in the order of the answer."""
        found = self.get("query", query=expression)
        if found["resultType"] == "scalar":
            return [({}, float(found["result"][1]))]
        return [(each["metric"], float(each["value"][1])) for each in found["result"]]


@contextlib.contextmanager
def prometheus(folder: Path, settings: Mapping[str, object]) -> Iterator[Prometheus]:
    """Run one with these settings (JSON is YAML) until the context ends."""
    file, port = folder / "prometheus.yml", free_port()
    file.write_text(json.dumps(settings))
    words = [f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    words += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    with (folder / "prometheus.err").open("w+") as errors:
        process = subprocess.Popen(["prometheus", *words], stderr=errors, cwd=folder)
        try:
            wait_until(lambda: _is_ready(process, port), "Prometheus to be ready", _TIMEOUT)
            yield Prometheus(port, process.pid)
        finally:
            process.kill()
            process.wait()


def _is_ready(process: subprocess.Popen[bytes], port: int) -> bool:
    assert process.poll() is None, "Prometheus has ended: see prometheus.err in its folder"
    with contextlib.suppress(OSError):
        url = f"http://127.0.0.1:{port}/-/ready"
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            return bool(answer.status == 200)
    return False

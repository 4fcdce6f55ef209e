"""A registry of one model whose bytes cost the machine little: a file, sent by the kernel.

`python -m tests.bench.files FILE [IN_ALL [EACH]]` makes FILE (2 GiB of noise, unless it is there),
prints the URL, the model and the file's digest, and serves until it is killed: at most IN_ALL bytes
per second, and EACH per connection (0: no limit).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

SIZE = 2 << 30
#: Of the kernel; Python has no name for it.
SO_MAX_PACING_RATE = 47
CONFIG = b"{}"
_STEP = 256 << 10


class Served:
    """What is served, and how a request is answered."""

    def __init__(self, path: Path, digest: str, port: int, rates: tuple[int, int]) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.in_all, self.each = rates
        #: When the next bytes may go out, and the last have, by the machine's clock.
        self._next = self.last = 0.0
        self._turn = threading.Lock()
        self.size, self.port = os.fstat(self.fd).st_size, port
        self.config = hashlib.sha256(CONFIG).hexdigest()
        parts = [{"digest": f"sha256:{digest}", "size": self.size, "mediaType": "m"}]
        config = {"digest": f"sha256:{self.config}", "size": len(CONFIG), "mediaType": "c"}
        self.manifest = json.dumps(
            {"schemaVersion": 2, "mediaType": "x", "config": config, "layers": parts}
        ).encode()

    def connection(self, connected: socket.socket) -> None:
        """Answer requests until the client goes away."""
        with connected, connected.makefile("rb") as lines:
            try:
                while request := lines.readline().decode():
                    headers = {}
                    while (line := lines.readline().decode().strip()) != "":
                        name, _, value = line.partition(":")
                        headers[name.lower()] = value.strip()
                    method, path, _ = request.split(" ", 2)
                    self.answer(connected, method, path, headers)
            except OSError:
                pass

    def answer(self, to: socket.socket, method: str, path: str, headers: dict[str, str]) -> None:
        small = self.config in path
        size = len(CONFIG) if small else self.size
        if path == "/last":
            last = str(self.last).encode()
            to.sendall(head(200, len(last)) + last)
        elif "/manifests/" in path:
            to.sendall(head(200, len(self.manifest)) + self.manifest)
        elif method == "HEAD":
            to.sendall(head(200, size))
        elif path.startswith("/v2/"):
            other = "127.0.0.1" if headers["host"].startswith("localhost") else "localhost"
            to.sendall(head(307, 0, f"Location: http://{other}:{self.port}/data{path}"))
        else:
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
            at = int(asked[1]) if asked else 0
            end = int(asked[2]) + 1 if asked and asked[2] else size
            place = f"Content-Range: bytes {at}-{end - 1}/{size}\r\nAccept-Ranges: bytes"
            to.sendall(head(206 if asked else 200, end - at, place if asked else ""))
            if small:
                to.sendall(CONFIG[at:end])
                return
            if self.each:
                to.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, self.each)
                # What the kernel holds back would be counted as sent.
                to.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _STEP // 2)
            while at < end:
                sent = os.sendfile(to.fileno(), self.fd, at, min(end - at, self._allowed()))
                at, self.last = at + sent, time.monotonic()

    def _allowed(self) -> int:
        """How many bytes may be sent now, waiting for it."""
        if not self.in_all:
            return SIZE
        with self._turn:
            now = time.monotonic()
            self._next = max(now - 0.05, self._next) + _STEP / self.in_all
            wait = self._next - now
        time.sleep(max(0.0, wait))
        return _STEP


def head(status: int, length: int, more: str = "") -> bytes:
    lines = [f"HTTP/1.1 {status} x", f"Content-Length: {length}", *([more] if more else [])]
    return "\r\n".join([*lines, "", ""]).encode()


def main() -> None:
    path = Path(sys.argv[1])
    in_all, each = [*map(int, sys.argv[2:]), 0, 0][:2]
    digest = hashlib.sha256()
    if not path.exists():
        with path.open("wb") as file:
            for _ in range(SIZE >> 20):
                file.write(os.urandom(1 << 20))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: digest).hexdigest()
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        port = listening.getsockname()[1]
        served = Served(path, found, port, (in_all, each))
        model = f"http://localhost:{port}/library/file:1b"
        sys.stdout.write(f"http://127.0.0.1:{port}/data/v2/file {model} {found}\n")
        sys.stdout.flush()
        while True:
            connected, _ = listening.accept()
            threading.Thread(target=served.connection, args=(connected,), daemon=True).start()


if __name__ == "__main__":
    main()

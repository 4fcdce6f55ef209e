"""A small Ollama server: it treats a model store as the real one does, and runs no models.

It exists to show and to test what happens to a store, so it copies behaviour, weaknesses included:
how the start removes files, how a pull writes, resumes, verifies and discards. All of that was read
in Ollama's sources (v0.33 era) or seen on a real server; the recordings beside the tests hold it to
account. It imports nothing of the rest of this project, so that a misreading can't cancel itself
out, and only the standard library.

    python -m watcher.demo.engine serve

This module is the process; `server/__init__.py` says what stands where, `server/settings.py` what
the environment can change.

Not imitated: loading models, pushing, signing in, models with tensor layers (refused with the
message of a server without MLX), and a panic: the real server is gone when the last but one request
for a layer is closed while that layer is still being prepared.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from watcher.demo.server.api import Server
from watcher.demo.server.errors import EngineError, told
from watcher.demo.server.log import log
from watcher.demo.server.settings import VERSION, exit_kind, listen_address
from watcher.demo.server.start import start_store


def end_downloads(server: Server) -> None:
    """What SIGTERM does to downloads: their requests end, and with them they do."""
    how = exit_kind()
    if how == "lost":
        return
    downloads = server.downloads.all()
    writing = [part for download in downloads for part in download.writing]
    for context in list(server.requests):
        context.cancel()
    for download in downloads:
        download.give_up()
    until = time.monotonic() + 2
    while time.monotonic() < until and any(download.writing for download in downloads):
        time.sleep(0.005)
    if how == "torn" and writing:
        with open(writing[0].path, "wb"):
            pass


def serve() -> int:
    """Serve until SIGTERM or SIGINT; the exit code."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("ollama")
    try:
        with told("listen tcp", "{}:{}: bind".format(*listen_address())):
            server = Server(listen_address())
        start_store()
    except EngineError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    server.models.start()
    host, port = server.server_address[:2]
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    log(f"Listening on {host!s}:{port} (version {VERSION})")
    stopped.wait()
    server.socket.close()
    end_downloads(server)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`serve` is all it can do."""
    if list(sys.argv[1:] if argv is None else argv) != ["serve"]:
        sys.stderr.write("usage: engine serve\n")
        return 2
    return serve()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Threads that still wait for a retry must not keep the process.
    os._exit(code)

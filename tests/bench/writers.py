"""A pull as the server's file calls make it: 16 writers into one sparse file, sidecars beside it.

``python -m tests.bench.writers STORE BYTES [BYTES_PER_SECOND]``; prints the seconds it took.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from .stores import sidecar

WRITERS = 16
CHUNK = 32 * 1024


def main(store: str, size: int, rate: int) -> None:
    """Write one layer of `size` bytes; `rate` 0 means as fast as it goes."""
    blobs = Path(store) / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    final = blobs / f"sha256-{os.urandom(32).hex()}"
    data = Path(f"{final}-partial")
    part = size // WRITERS
    began = time.perf_counter()
    for number in range(WRITERS):
        Path(f"{data}-{number}").write_text(sidecar(number, part))
    fd = os.open(data, os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(fd, part * WRITERS)
    threads = [
        threading.Thread(target=_write, args=(fd, data, number, part, rate))
        for number in range(WRITERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    for number in range(WRITERS):
        Path(f"{data}-{number}").unlink()
    data.rename(final)
    sys.stdout.write(f"{time.perf_counter() - began:.6f}\n")
    final.unlink()


def _write(fd: int, data: Path, number: int, part: int, rate: int) -> None:
    chunk = os.urandom(CHUNK)
    # No two parts end at the same moment, as it is with a network in between.
    pace = rate / WRITERS * (0.8 + 0.4 * number / WRITERS)
    began = time.perf_counter()
    for at in range(0, part, CHUNK):
        os.pwrite(fd, chunk[: part - at], number * part + at)
        if rate and at % (32 * CHUNK) == 0:
            time.sleep(max(0.0, at / pace - (time.perf_counter() - began)))
    Path(f"{data}-{number}").write_text(sidecar(number, part, part))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)

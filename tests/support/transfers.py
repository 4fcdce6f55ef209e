"""What a transfer of ours has left, laid out file by file."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from watcher.model import Ranges

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def folder(store: Path, digest: str) -> Path:
    """Where a layer arrives."""
    return store / ".ollama-watch" / "transfers" / digest


def lay_out(
    store: Path,
    digest: str,
    content: bytes,
    durable: Ranges = (),
    arrived: Ranges = (),
    *,
    taken: Ranges = (),
    aged: float = 0.0,
) -> Path:
    """The folder of a transfer of which these ranges are there; `arrived` in this start."""
    here = folder(store, digest)
    here.mkdir(parents=True)
    with (here / "data").open("wb") as data:
        for start, end in (*durable, *arrived):
            data.seek(start)
            data.write(content[start:end])
    document = {
        "schema": "ollama-watch/transfer/1",
        "digest": digest,
        "total": len(content),
        "durable": durable,
        "taken": taken,
        "wrong": False,
    }
    (here / "ledger").write_text(json.dumps(document))
    (here / "arrived").write_text("\n".join([BOOT, *(f"{a} {b}" for a, b in arrived), ""]))
    (here / "lock").write_text("pid 1\n")
    (here / "lock").chmod(0o600)
    at = time.time() - aged
    for path in here.iterdir():
        os.utime(path, (at, at))
    return here


@contextmanager
def held(here: Path) -> Iterator[None]:
    """Somebody goes on with it."""
    with (here / "lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

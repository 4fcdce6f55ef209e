"""What costs that grow with the store and with its log are at most."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

from .benches import Setting
from .measure import US, Daemon, Row, interleaved, make, megabytes, middle, ratio, run
from .stores import sidecar

_LOG_BYTES = 100_000_000
_FEW, _MANY = 500, 20_000


class _Cost(NamedTuple):
    """Of one event: CPU seconds and bytes written; and the memory at rest after some."""

    cpu: float
    written: float
    memory: int


def verified(setting: Setting) -> Iterator[Row]:
    """One change in a store of verified blobs, beside the same with none verified."""
    plain = setting.large_store()
    known = setting.folder / "known"
    make("healthy", str(known), "100000", "2000")
    make("known", str(known))
    pairs = [(_events(plain), _events(known)) for _ in range(setting.rounds)]
    shutil.rmtree(known)
    times = median(ours.cpu / none.cpu for none, ours in pairs)
    written = max(ours.written for _, ours in pairs)
    memory = max(ours.memory for _, ours in pairs)
    work = "one changed download in a store of 100,000 verified blobs, daemon running"
    yield Row(f"{work}: CPU, compared with none verified", "1.2 ×", f"{times:.2f} ×", times <= 1.2)
    yield Row(f"{work}: written", "64 kB", f"{written / 1e3:.1f} kB", written <= 64e3)
    yield Row(f"{work}: memory at rest afterwards", "40 MB", megabytes(memory), memory <= 40e6)


def _events(store: Path) -> _Cost:
    data = store / "blobs" / f"sha256-{os.urandom(32).hex()}-partial"
    sidecars = Path(f"{data}-0")
    with ExitStack() as left:
        sidecars.write_text(sidecar(0, 1_000_000))
        left.callback(sidecars.unlink)
        data.write_bytes(b"")
        left.callback(data.unlink)
        os.truncate(data, 1_000_000)
        with Daemon(store) as daemon:
            daemon.settle()
            costs = [_event(daemon, data) for _ in range(5)]
            memory = daemon.memory()["Rss"]
    return _Cost(median(each[0] for each in costs), max(each[1] for each in costs), memory)


def _event(daemon: Daemon, data: Path) -> tuple[float, float]:
    """A pull that begins and breaks off: CPU seconds and bytes written for each of the two."""
    cpu, written = daemon.cpu(), _written(daemon)
    with data.open("r+b"):
        os.close(os.open(data, os.O_RDWR))
        daemon.wait("download_resumed")
    daemon.wait("download_interrupted")
    daemon.settle()
    return (daemon.cpu() - cpu) / 2, (_written(daemon) - written) / 2


def _written(daemon: Daemon) -> int:
    text = Path(f"/proc/{daemon.process.pid}/io").read_text()
    return int(text.partition("\nwrite_bytes: ")[2].split()[0])


def log(setting: Setting) -> Iterator[Row]:
    """A log of 100 MB, read as a whole and for one model, with few and with many digests."""
    few, many = setting.folder / "few", setting.folder / "many"
    make("log", str(few), str(_FEW), str(_LOG_BYTES))
    make("log", str(many), str(_MANY), str(_LOG_BYTES))
    words = {store: (*US, "--store", str(store), "log") for store in (few, many)}
    whole, of_few, of_many = interleaved(
        (
            lambda: run(words[few]),
            lambda: run((*words[few], "model3")),
            lambda: run((*words[many], "model3")),
        ),
        setting.rounds,
    )
    for store in (few, many):
        shutil.rmtree(store)
    rate = _LOG_BYTES / middle(whole)
    yield Row("`log` of 100 MB", "20 MB/s", f"{rate / 1e6:.1f} MB/s", rate >= 20e6)
    times = ratio(of_many, of_few)
    yield Row(
        f"`log MODEL` of 100 MB with {_MANY:,} digests, compared with {_FEW}",
        "1.5 ×",
        f"{times:.2f} × ({middle(of_many):.1f} s to {middle(of_few):.1f} s)",
        times <= 1.5,
    )


ALL: dict[str, Callable[[Setting], Iterator[Row]]] = {"verified": verified, "log": log}

"""A day of the service, compressed: what its memory does from hour to hour."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import linear_regression

from .benches import Setting
from .measure import Daemon, Row, megabytes
from .stores import sidecar

HOURS = 24
#: In each hour so many downloads begin, half of which are broken off; and six full looks.
DOWNLOADS, LOOKS = 10, 6
_PART = 100_000
_PARTS = 16


def day(setting: Setting) -> Iterator[Row]:
    """Downloads, kills and full looks of 24 hours, without the waiting in between."""
    store = setting.folder / "day"
    for name in ("blobs", "manifests"):
        (store / name).mkdir(parents=True, exist_ok=True)
    resident: list[int] = []
    with Daemon(store) as daemon:
        for _ in range(HOURS):
            for number in range(DOWNLOADS):
                _download(store, daemon, whole=number % 2 == 0)
            for _ in range(LOOKS):
                os.kill(daemon.process.pid, signal.SIGHUP)
                daemon.wait("settings_read")
            for path in (store / "blobs").iterdir():
                path.unlink()
            daemon.settle()
            resident.append(daemon.memory()["Rss"])
    # The first hours load what a quiet start does not need.
    settled = resident[HOURS // 4 :]
    slope, _ = linear_regression(range(len(settled)), settled)
    yield Row(
        f"one day of the daemon, compressed ({HOURS} × {DOWNLOADS} downloads, {LOOKS} full scans): "
        "memory at the end, and growth per hour",
        "35 MB, 50 kB",
        f"{megabytes(resident[-1])}, {slope / 1e3:+.1f} kB",
        resident[-1] <= 35e6 and slope <= 50e3,
    )


def _download(store: Path, daemon: Daemon, *, whole: bool) -> None:
    """A download as a pull makes it, seen by the daemon; broken off in its middle, or whole."""
    final = store / "blobs" / f"sha256-{os.urandom(32).hex()}"
    data = Path(f"{final}-partial")
    for number in range(_PARTS):
        Path(f"{data}-{number}").write_text(sidecar(number, _PART))
    with data.open("wb") as file:
        file.truncate(_PART * _PARTS)
        for number in range(_PARTS):
            file.seek(number * _PART)
            file.write(os.urandom(_PART if whole else _PART // 2))
        daemon.wait("download_started")
        if whole:
            for number in range(_PARTS):
                Path(f"{data}-{number}").unlink()
            data.rename(final)
    daemon.wait("download_completed" if whole else "download_interrupted")


ALL: dict[str, Callable[[Setting], Iterator[Row]]] = {"day": day}

"""Our command line as a process that is killed at a chosen changing call.

    python -m tests.machine.us ORDER WORD...

ORDER is JSON. `at`: the call, 0 for none. `room`: so many bytes fit on the disk, until several
writes were refused. `notes`: a folder, for `Pulls`. The guard waits for no server: in a history
nobody begins a pull just then, which `tests/repair/test_races.py` is about.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.breaking import Breaking, break_files
from tests.transfer.pulling import count
from watcher import cli
from watcher.decide import safety
from watcher.model import MIB
from watcher.state import fs, transfers
from watcher.transfer import values

from .pulls import REFUSALS, SYNC, identity


class _Disk(Breaking):
    """Keeps what was synced of the data of transfers, and is full for a while."""

    def __init__(self, order: dict[str, Any], told: int) -> None:
        super().__init__(order, told)
        self._synced = Path(order["notes"], "synced")
        self._room, self._refusals = order.get("room"), REFUSALS

    def call(self, name: str, do: Callable[..., Any], *words: Any, **more: Any) -> Any:
        if name in ("pwritev", "write") and self._room is not None:
            size = sum(map(len, words[1])) if name == "pwritev" else len(words[1])
            if self._room < size and self._refusals:
                self._refusals -= 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._room -= size
        if name == "pwritev":
            self._keep(words[0], first=True)  # what was taken over was synced before
        made = super().call(name, do, *words, **more)
        if name == "fsync":
            self._keep(words[0])
        return made

    def sync(self, fd: int) -> None:
        """What was written is on the disk."""
        self.call("fdatasync", self._keep, fd)

    def _keep(self, fd: int, *, first: bool = False) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.name != "data":
            return
        kept = self._synced / identity(path)
        if first and kept.exists():
            return
        new = kept.with_suffix(".new")
        shutil.copyfile(path, new)
        new.replace(kept)


def main(order: dict[str, Any]) -> int:
    safety.GUARD_SECONDS = 0.0
    transfers.reserve = lambda room: 0
    small: dict[str, Any] = {
        "piece": 3 * MIB,
        "sync_bytes": SYNC,
        "first_pause": 0.01,
        "longest_pause": 0.05,
    }
    values.Options = functools.partial(values.Options, **small)  # type: ignore[assignment, misc]
    count(os.path.join(order["notes"], "received", str(os.getpid())))
    made: list[_Disk] = []

    def disk(order: dict[str, Any], told: int) -> _Disk:
        made.append(_Disk(order, told))
        return made[0]

    with open("/dev/null", "wb") as nowhere:
        break_files({**order, "how": "kill"}, nowhere.fileno(), disk)
        fs.sync_data = made[0].sync
        return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))

"""Print the table of `docs/benchmarks.md`, measured on this machine."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from . import acting, benches, day, fleet, keeping, pages, pulls, queueing, transfers
from .benches import Setting
from .measure import Row, file_system, machine

_ROOMS = (benches, acting, keeping, pulls, transfers, queueing, pages, day, fleet)
ALL = {name: bench for room in _ROOMS for name, bench in room.ALL.items()}
_VERDICT = {True: "met", False: "**missed**", None: ""}


def main() -> int:
    """Run the benches that are named, or all. Exit code 1 where a promise is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}")
    parser.add_argument("--rounds", type=int, default=9, help="of each comparison (9)")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="pulled, and hashed (4)")
    parser.add_argument("--rest", type=float, default=30.0, help="seconds of rest (30)")
    parser.add_argument("--kills", type=int, default=30, help="kills and changes (30)")
    parser.add_argument("--folder", type=Path, help="where the stores are made")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(ALL))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(ALL)}")
    folder = Path(tempfile.mkdtemp(prefix="ollama-watch-bench-", dir=given.folder))
    fast = folder
    if os.access("/dev/shm", os.W_OK):
        fast = Path(tempfile.mkdtemp(prefix="ollama-watch-bench-", dir="/dev/shm"))
    setting = Setting(
        folder, fast, given.rounds, int(given.gigabytes * 1e9), given.rest, given.kills
    )
    try:
        return _measure(setting, given.names or list(ALL))
    finally:
        for each in {folder, fast}:
            shutil.rmtree(each, ignore_errors=True)


def _measure(setting: Setting, names: list[str]) -> int:
    rows: list[Row] = []
    sys.stdout.write("| work | limit | measured | |\n|---|---|---|---|\n")
    for name in names:
        for row in ALL[name](setting):
            rows.append(row)
            cells = (row.work, row.promised, row.measured, _VERDICT[row.kept])
            sys.stdout.write(f"| {' | '.join(cells)} |\n".replace("|  |", "| |"))
            sys.stdout.flush()
    where = f"; the pull on {file_system(setting.fast)}" if setting.fast != setting.folder else ""
    sys.stdout.write(f"\nMeasured on {machine(setting.folder)}{where}.\n")
    return int(any(row.kept is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""Processes run and measured: time, CPU, memory, wake-ups."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
US = (PYTHON, "-m", "watcher")
_LONGEST = 120.0


class Run(NamedTuple):
    """A process from its start to its end: wall and CPU seconds, most memory in bytes."""

    seconds: float
    cpu: float
    peak: int


class Row(NamedTuple):
    """A line of the table. `kept` is None where nothing was promised."""

    work: str
    promised: str
    measured: str
    kept: bool | None = None


def environment() -> dict[str, str]:
    """As little as needed, so that no setting of this machine counts.

    A server of another's forbids a clean-up: then measure where none is seen, by ``unshare --pid
    --fork --mount-proc`` and OLLAMA_WATCH_WRITERS_VISIBLE=true.
    """
    keys = ("PATH", "HOME", "TMPDIR", "OLLAMA_WATCH_WRITERS_VISIBLE")
    kept = {key: os.environ[key] for key in keys if key in os.environ}
    return {**kept, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}


def run(words: Sequence[str], *, codes: Sequence[int] = (0,)) -> Run:
    """Run a command with its output thrown away. Raises RuntimeError on another exit code.

    The peak is the kernel's own for that process; it starts from ours (vfork), so ours must stay
    small: stores are made by other processes.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(), cwd="/"
    )
    assert process.stderr is not None
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode not in codes:
        raise RuntimeError(f"{words} ended with {process.returncode}: {told.decode()[-2000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def make(*words: str) -> None:
    """Make a store: see `stores`."""
    run((PYTHON, "-m", "tests.bench.stores", *words))


def interleaved(commands: Sequence[Callable[[], Run]], rounds: int) -> list[list[Run]]:
    """Run A B C, A B C, …; one round more than asked for, the first of them not counted."""
    found: list[list[Run]] = [[] for _ in commands]
    for turn in range(rounds + 1):
        for command, runs in zip(commands, found, strict=True):
            done = command()
            if turn:
                runs.append(done)
    return found


def ratio(ours: Sequence[Run], theirs: Sequence[Run]) -> float:
    """The median of the ratios, taken pair by pair."""
    return median(a.seconds / b.seconds for a, b in zip(ours, theirs, strict=True))


def middle(runs: Sequence[Run]) -> float:
    """The median of the seconds."""
    return median(run.seconds for run in runs)


def milliseconds(seconds: float) -> str:
    """Seconds, shown in milliseconds."""
    return f"{seconds * 1000:,.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:,.1f} ms"


def megabytes(size: float) -> str:
    """Bytes, shown in MB."""
    return f"{size / 1e6:.1f} MB"


def share(values: Sequence[float], part: float) -> float:
    """The value below which `part` of all lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


# ---------------------------------------------------------------- a daemon


class Daemon:
    """A running daemon on a store, and the moments at which its lines were read."""

    def __init__(self, store: Path, words: Sequence[str] = US) -> None:
        self.process = subprocess.Popen(
            [*words, "--store", str(store), "--json", "daemon"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=environment(),
            cwd="/",
        )
        self._told: queue.Queue[tuple[float, dict[str, Any]]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.wait("check_started")
        self.settle()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._told.put((time.perf_counter(), json.loads(line)))

    def wait(self, event_type: str) -> float:
        """Wait for an event, and give back when its line was read (`time.perf_counter`)."""
        until = time.perf_counter() + _LONGEST
        while True:
            with contextlib.suppress(queue.Empty):
                at, event = self._told.get(timeout=1.0)
                if event["event_type"] == event_type:
                    return at
            if self.process.poll() is not None or time.perf_counter() > until:
                raise RuntimeError(f"the daemon told no {event_type}")

    def settle(self) -> None:
        """Wait until it has done nothing for a while."""
        before = -1.0
        until = time.perf_counter() + _LONGEST
        while before != self.cpu() and time.perf_counter() < until:
            before = self.cpu()
            time.sleep(0.7)

    def cpu(self) -> float:
        """CPU seconds of all its threads so far, from the scheduler's own clock."""
        return sum(
            int(path.read_text().split()[0]) / 1e9
            for path in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        )

    def wakeups(self) -> int:
        """How often its threads were switched to so far."""
        return sum(
            int(line.split()[1])
            for path in Path(f"/proc/{self.process.pid}/task").glob("*/status")
            for line in path.read_text().splitlines()
            if "ctxt_switches" in line
        )

    def memory(self) -> dict[str, int]:
        """Bytes by the kernel's names, such as ``Rss`` and ``Pss``."""
        found: dict[str, int] = {}
        for line in Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith("kB"):
                found[name] = int(value.split()[0]) * 1024
        return found

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# ---------------------------------------------------------------- the machine


def machine(folder: Path) -> str:
    """The line that says what was measured on."""
    processor = next(_lines("/proc/cpuinfo", "model name"), platform.machine())
    memory = int(next(_lines("/proc/meminfo", "MemTotal"), "0 kB").split()[0]) * 1024
    return (
        f"{os.cpu_count()} × {processor}, {memory / 1e9:.0f} GB, Linux {platform.release()}, "
        f"{file_system(folder)}, Python {platform.python_version()}"
    )


def file_system(folder: Path) -> str:
    """The type of the file system that a folder lies on."""
    done = subprocess.run(
        ["findmnt", "--noheadings", "--output=FSTYPE", "--target", str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()[-1]


def _lines(file: str, key: str) -> Iterator[str]:
    for line in Path(file).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            yield value.strip()

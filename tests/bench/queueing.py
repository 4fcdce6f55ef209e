"""How long each operation on a long queue takes, and each update of a record."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

from watcher.pull import queue, running
from watcher.pull.queue import Driven, Item, Queue, Result
from watcher.state import fs, records

from .benches import Setting
from .measure import PYTHON, ROOT, Row, environment, milliseconds

_ITEMS = 10_000
_RECORDS = 10
_MODEL = "namespace/model{}:latest"
#: Medians in seconds.
Times = dict[str, float]


def queueing(setting: Setting) -> Iterator[Row]:
    """Each operation on a queue of 10,000, in a process of its own, the writing included."""
    times, cpu = _measured(setting, "queue")
    kept = max(times.values()) <= 0.02
    yield Row(f"a queue of {_ITEMS:,}: each operation", "20 ms", _told(times), kept)
    yield Row("the same: CPU", "", _told(cpu))


def recording(setting: Setting) -> Iterator[Row]:
    """What it costs to keep the progress of a pull."""
    times, cpu = _measured(setting, "records")
    yield Row(f"a change of one of {_RECORDS} records", "", _told(times))
    yield Row("the same: CPU", "", _told(cpu))


def _told(times: Times) -> str:
    return ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in times.items())


def _measured(setting: Setting, what: str) -> tuple[Times, Times]:
    """By what was done: time and CPU."""
    folder = setting.folder / what
    folder.mkdir()
    words = (PYTHON, "-m", "tests.bench.queueing", what, str(folder), str(3 * setting.rounds))
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, check=True)
    times, cpu = json.loads(done.stdout)
    return times, cpu


def _queue(store: int, rounds: int) -> tuple[Times, Times]:
    now = time.time() - 2 * _ITEMS
    items = (Item(_MODEL.format(n), 0, now + n, now + n) for n in range(_ITEMS))
    line = tuple(items)
    queue.FILE.change(store, lambda _: Queue(line))

    def change(do: Callable[[Queue, int], Queue]) -> Callable[[int], object]:
        return lambda turn: queue.FILE.change(store, lambda kept: do(kept, turn))

    def run(_: int) -> None:
        running.run_next(store, lambda *_: Driven(Result.DONE))

    def ls(_: int) -> None:
        kept = queue.revived(queue.FILE.read(store), running.driven_by(store), now)
        queue.arrivals(kept, now, lambda _: 10**9, 1e8)

    last = _ITEMS - 1
    acts: dict[str, Callable[[int], object]] = {
        "add": change(lambda kept, turn: queue.add(kept, f"new{turn}", 10, 0.0, now)),
        "move": change(lambda kept, turn: queue.move(kept, _MODEL.format(last - turn), 50)),
        "pause": change(lambda kept, turn: queue.pause(kept, [_MODEL.format(last - turn)], now)),
        "resume": change(lambda kept, turn: queue.resume(kept, [_MODEL.format(last - turn)], now)),
        "rm": change(lambda kept, turn: queue.remove(kept, [f"new{turn}"])),
        "ls": ls,
        "start and end one": run,
    }
    found = _times(acts, rounds)
    for each in found:
        each["start and end one"] /= 2  # two operations
    return found


def _records(store: int, rounds: int) -> tuple[Times, Times]:
    for number in range(_RECORDS):
        for each in ("starting", "pulling_manifest", "downloading"):
            records.change(store, f"m{number}", {"state": each, "total_bytes": 10**12})

    def progress(turn: int) -> None:
        records.change(store, "m0", {"downloaded_bytes": turn << 20, "bytes_per_second": 1e8})

    def state(turn: int) -> None:
        records.change(store, "m1", {"state": ("starting", "error")[turn % 2]})

    return _times({"progress": progress, "state": state}, 10 * rounds)


def _times(acts: dict[str, Callable[[int], object]], rounds: int) -> tuple[Times, Times]:
    wall: Times = {}
    cpu: Times = {}
    for name, act in acts.items():
        taken = []
        for turn in range(rounds):
            began = time.perf_counter(), time.process_time()
            act(turn)
            taken.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        wall[name], cpu[name] = (median(each) for each in zip(*taken, strict=True))
    return wall, cpu


def main(what: str, folder: str, rounds: str) -> None:
    """Measure in this process, and print the times as JSON."""
    gc.set_threshold(50_000)  # as the command line does
    with fs.opened_folder(folder) as store:
        measure = {"queue": _queue, "records": _records}[what]
        sys.stdout.write(json.dumps(measure(store, int(rounds))))


ALL: dict[str, Callable[[Setting], Iterator[Row]]] = {"queue": queueing, "records": recording}

if __name__ == "__main__":
    main(*sys.argv[1:])

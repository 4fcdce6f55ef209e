"""Many threads of several processes change what we keep: nothing is lost, all is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.driving import environment
from watcher.errors import LockedError
from watcher.pull import queue
from watcher.state import fs, json_file, records

THREADS, PROCESSES, CHANGES = 10, 3, 10

#: Each thread has a model of its own and changes it; nobody may lose or undo it.
CHANGE = """
import os, sys, threading
from watcher.state import records

store, name, threads, changes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
folder = os.open(store, os.O_RDONLY)
wrong = []

def work(model):
    try:
        records.change(folder, model, {"state": "starting"})
        for number in range(1, changes + 1):
            records.change(folder, model, {"downloaded_bytes": number})
            if number % 5 == 0:
                records.change(folder, "all", {"state": ("starting", "error")[number % 2]})
            if records.read(folder)[model + ":latest"].downloaded_bytes != number:
                wrong.append(model)
    except BaseException as error:
        wrong.append(repr(error))

print("ready", flush=True)
sys.stdin.readline()
workers = [threading.Thread(target=work, args=(name + str(n),)) for n in range(threads)]
for worker in workers: worker.start()
for worker in workers: worker.join()
sys.exit(str(wrong) if wrong else 0)
"""


def test_ten_threads_in_each_of_three_processes_lose_nothing(tmp_path: Path) -> None:
    store = tmp_path / "models"
    store.mkdir()
    words = [sys.executable, "-c", CHANGE, str(store)]
    workers = [
        subprocess.Popen(
            [*words, f"p{number}-", str(THREADS), str(CHANGES)],
            env=environment(tmp_path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    file = store / ".ollama-watch" / "models.json"
    while any(worker.poll() is None for worker in workers):
        if file.exists():
            assert json.loads(file.read_bytes())["schema"] == records.SCHEMA
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    folder = os.open(store, os.O_RDONLY)
    try:
        found = records.read(folder)
    finally:
        os.close(folder)
    models = {f"p{p}-{t}:latest" for p in range(PROCESSES) for t in range(THREADS)}
    assert set(found) == models | {"all:latest"}
    assert {found[model].downloaded_bytes for model in models} == {CHANGES}
    assert {path.name for path in file.parent.iterdir()} == {"models.json", "models.json.lock"}


RUN = """
import os, sys, threading
from watcher.pull import queue, running
from watcher.pull.queue import Driven, Result

store, name, threads, adds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
folder = os.open(store, os.O_RDONLY)

def add(kept, model):
    return queue.add(kept, model, 0, 0.0, 1.0)

def drive(model, why):
    print(model, flush=True)
    return Driven(Result.DONE)

def work(number):
    for each in range(adds):
        queue.FILE.change(folder, lambda kept: add(kept, f"{name}-{number}-{each}"))
        running.run_next(folder, drive)

workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
for worker in workers: worker.start()
for worker in workers: worker.join()
"""


def test_many_that_add_and_drive_drive_each_model_once(tmp_path: Path) -> None:
    store = tmp_path / "models"
    store.mkdir()
    words = [sys.executable, "-c", RUN, str(store)]
    workers = [
        subprocess.Popen(
            [*words, f"p{number}", str(THREADS), "2"],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    driven: list[str] = []
    for worker in workers:
        told, errors = worker.communicate(timeout=120)
        assert (worker.returncode, errors) == (0, "")
        driven += told.split()
    wanted = {
        f"p{p}-{t}-{n}:latest" for p in range(PROCESSES) for t in range(THREADS) for n in range(2)
    }
    assert sorted(driven) == sorted(wanted)
    with fs.opened_folder(str(store)) as folder:
        assert queue.FILE.read(folder).line == ()


HOLD = """
import os, sys
from watcher.state import fs
folder = os.open(sys.argv[1], os.O_RDONLY)
with fs.locked("models.json.lock", folder):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_holder_of_a_lock_held_too_long_is_named(
    folder: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.change(folder, "llama3", {"state": "starting"})
    monkeypatch.setattr(json_file, "_PATIENCE_SECONDS", 0.1)
    ours = os.readlink(f"/proc/self/fd/{folder}") + "/.ollama-watch"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, ours],
        env=environment(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=rf"models\.json for .*: pid {holder.pid}"):
            records.change(folder, "llama3", {"state": "error"})
        assert records.read(folder)["llama3:latest"].state == "starting"
        holder.communicate()
    assert records.change(folder, "llama3", {"state": "error"}).state == "error"

"""We are killed in the middle of a pull: the next call goes on and ends right."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import AT_LENGTH, at_length
from tests.driving import age, environment, lay_out
from tests.fidelity.harness import Server, blob, wait_until
from watcher.demo.registry import Model, Registry

from .driven import MB, MIB, SIZE, add, arrived, drive, site

SMALL = 12 * MB
RATE = 40 * MB


class Killed:
    """A process that pulls, and dies on order."""

    def __init__(self, folder: Path) -> None:
        self._errors = folder / "killed.err"
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.pull.killed"],
                env=environment(folder / "killed"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def pull(self, server: Server, model: Model, at: int = 0) -> tuple[int, list[str]]:
        """The exit code of a pull that is killed at its `at`-th changing call, and its calls."""
        self.order(server, model, at)
        return self.answer()

    def order(self, server: Server, model: Model, at: int = 0) -> None:
        """Begin one."""
        assert self.process.stdin is not None
        order: dict[str, Any] = {"url": server.url, "store": str(server.store), "at": at}
        order |= {"model": model.name, "how": "kill"}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self) -> tuple[int, list[str]]:
        """How it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self._errors.read_text()
        answer = json.loads(line)
        return answer["exit"], answer["calls"]


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Killed]:
    made = Killed(tmp_path)
    yield made
    made.process.communicate(timeout=30)


def blocked(server: Server, registry: Registry, number: int) -> Model:
    """A model whose layer is there by half, and can't go on: one of its sidecars is empty."""
    model = add(registry, server, SMALL, seed=str(number))
    lay_out(registry, server.store, model.digests[0], aged=600)
    sidecar = blob(server.store, model.digests[0], "-partial-1")
    sidecar.write_bytes(b"")
    age(sidecar, 600)
    return model


def on_the_disk(server: Server, model: Model) -> int:
    """Bytes of its layer that have arrived."""
    if blob(server.store, model.digests[0]).exists():
        return SMALL
    return blob(server.store, model.digests[0], "-partial").stat().st_blocks * 512


#: All 117 kinds of calls would take six minutes.
SHOWN = ("mkdir", "write", "rename", "rmdir")


def places(calls: list[str]) -> list[int]:
    """Of calls that are alike but for digits the first one."""
    alike: dict[str, int] = {}
    for number, call in enumerate(calls, 1):
        if call.startswith(SHOWN):
            words = "".join(char for char in call if not char.isdigit())
            alike.setdefault(words.split("-partial")[-1], number)
    return sorted(alike.values())


@at_length
def test_killed_at_any_call_the_next_one_goes_on(
    server: Server, registry: Registry, killed: Killed
) -> None:
    server.start().wait_ready()
    first = blocked(server, registry, 0)
    code, calls = killed.pull(server, first)
    assert code == 0
    assert registry.bytes_served(first.digests[0]) < SMALL
    for at in places(calls):
        model = blocked(server, registry, at)
        code, made = killed.pull(server, model, at)
        wait_until(lambda: "w" not in server.open_files().values(), "the end of what it asked for")
        # Counted anew: of what the registry has sent to the killed one some never arrived.
        left = SMALL - on_the_disk(server, model)
        registry.reset_stats()
        where = f"call {at}: {made[-1:]}"
        assert code in (-signal.SIGKILL, 0), where
        seen = drive(site(server), model)
        assert seen.end.cause is None, (where, seen.end, seen.notes)
        assert arrived(server, model), where
        assert registry.bytes_served(model.digests[0]) <= left + 3 * MIB, where


@pytest.mark.parametrize("seed", range(3 if AT_LENGTH else 1))
def test_killed_at_random_instants(
    server: Server, registry: Registry, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    model = add(registry, server)
    registry.throttle(RATE)
    server.start().wait_ready()
    for _ in range(3):
        words = [sys.executable, "-m", "tests.pull.killed"]
        order = {"url": server.url, "store": str(server.store), "model": model.name}
        process = subprocess.Popen(
            words,
            env=environment(tmp_path / "killed"),
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        threading.Event().wait(chance.uniform(0.3, 2.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    registry.throttle(None)
    seen = drive(site(server), model)
    assert seen.end.cause is None, (seen.end, seen.notes)
    assert arrived(server, model)
    assert registry.bytes_served(model.digests[0]) <= SIZE + 3 * 8 * MIB

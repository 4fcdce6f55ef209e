"""We are killed in the middle of a pull: the next call goes on and ends right."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import age, lay_out
from tests.support.kills import Breaker
from tests.support.servers import Server, blob, wait_until
from watcher.demo.registry import Model, Registry

from .driven import MB, MIB, SIZE, add, arrived, drive, site

SMALL = 12 * MB
RATE = 40 * MB


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Breaker]:
    """A process that pulls, and dies on order."""
    with Breaker("tests.pull.killed", tmp_path) as made:
        yield made


def order(server: Server, model: Model, at: int = 0) -> dict[str, Any]:
    """To pull a model, and to be killed at the `at`-th changing call."""
    where = {"url": server.url, "store": str(server.store), "model": model.name}
    return {**where, "at": at, "how": "kill"}


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


@pytest.mark.slow("a process and a pull for each call")
def test_killed_at_any_call_the_next_one_goes_on(
    server: Server, registry: Registry, killed: Breaker
) -> None:
    server.start().wait_ready()
    first = blocked(server, registry, 0)
    killed.begin(**order(server, first))
    code, calls = killed.end()
    assert code == 0
    assert registry.bytes_served(first.digests[0]) < SMALL
    for at in places(calls):
        model = blocked(server, registry, at)
        killed.begin(**order(server, model, at))
        code, made = killed.end()
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


MORE = pytest.mark.slow("more random instants")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=MORE) for seed in (1, 2))])
def test_killed_at_random_instants(
    server: Server, registry: Registry, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    model = add(registry, server)
    registry.throttle(RATE)
    server.start().wait_ready()
    for _ in range(3):
        with Breaker("tests.pull.killed", tmp_path) as breaker:
            breaker.begin(**order(server, model))
            threading.Event().wait(chance.uniform(0.3, 2.0))
            breaker.kill()
    registry.throttle(None)
    seen = drive(site(server), model)
    assert seen.end.cause is None, (seen.end, seen.notes)
    assert arrived(server, model)
    assert registry.bytes_served(model.digests[0]) <= SIZE + 3 * 8 * MIB

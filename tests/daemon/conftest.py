"""A store with nothing wrong in it, a registry, and a server that is not started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.driving import HealthyStore
from tests.support.servers import EngineServer, Pull, blob, wait_written
from watcher.demo.registry import Layer, Model, Registry

#: Bytes of the layer that is pulled, and how many of them arrive before it is held back.
SIZE, HELD = 3_000_000, 2_000_000

Begin = Callable[..., tuple[Model, Pull]]


@pytest.fixture
def store(tmp_path: Path) -> HealthyStore:
    return HealthyStore(tmp_path / "models")


@pytest.fixture
def server(store: HealthyStore) -> Iterator[EngineServer]:
    with EngineServer(store.path) as made:
        yield made


@pytest.fixture
def begin(registry: Registry) -> Iterator[Begin]:
    """Begins a pull of one layer, which is held back when some bytes have arrived."""
    pulls: list[Pull] = []

    def start(server: EngineServer) -> tuple[Model, Pull]:
        model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
        digest = model.digests[0]
        registry.hold(digest, after=HELD)
        pulls.append(server.start_pull(model.name))
        registry.wait_held(digest, 1)
        wait_written(blob(server.store, digest, "-partial"), [HELD])
        return model, pulls[-1]

    yield start
    registry.release()
    for pull in pulls:
        pull.close()

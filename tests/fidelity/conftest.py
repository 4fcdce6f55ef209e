"""Fixtures: a registry, and a server that is the engine or, with OLLAMA_BIN set, the real one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from watcher.demo.registry import Registry

from .harness import EngineServer, RealServer, Server

MakeServer = Callable[..., Server]

REAL = pytest.param(
    RealServer,
    id="real",
    marks=pytest.mark.skipif("OLLAMA_BIN" not in os.environ, reason="OLLAMA_BIN is not set"),
)


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as served:
        yield served


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def engine(store: Path) -> Iterator[EngineServer]:
    """The engine on an empty store, not started."""
    with EngineServer(store) as server:
        yield server


@pytest.fixture(params=[pytest.param(EngineServer, id="engine"), REAL])
def make_server(request: pytest.FixtureRequest, store: Path) -> Iterator[MakeServer]:
    """Makes servers of the store, not started; each is killed at the end."""
    with ExitStack() as stack:

        def make(env: Mapping[str, str] | None = None) -> Server:
            server: Server = request.param(store, env)
            return stack.enter_context(server)

        yield make

"""Fixtures: a server that is the engine or, with OLLAMA_BIN set, the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import SERVERS
from tests.support.servers import EngineServer, Server

MakeServer = Callable[..., Server]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def engine(store: Path) -> Iterator[EngineServer]:
    """The engine on an empty store, not started."""
    with EngineServer(store) as server:
        yield server


@pytest.fixture(params=SERVERS)
def make_server(request: pytest.FixtureRequest, store: Path) -> Iterator[MakeServer]:
    """Makes servers of the store, not started; each is killed at the end."""
    with ExitStack() as stack:

        def make(env: Mapping[str, str] | None = None) -> Server:
            server: Server = request.param(store, env)
            return stack.enter_context(server)

        yield make

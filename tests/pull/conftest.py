"""A registry, a server at a port that it keeps, and pulls of ours that are looked at all along."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.servers import EngineServer, RealServer, Server
from watcher.pull import by_server, driver

from .driven import at_a_port

SERVERS = [
    pytest.param(EngineServer, id="engine"),
    pytest.param(
        RealServer,
        id="real",
        marks=pytest.mark.skipif("OLLAMA_BIN" not in os.environ, reason="OLLAMA_BIN is not set"),
    ),
]


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    """Layers of 120 MB; the file system plays no part here."""
    return in_memory


@pytest.fixture(autouse=True)
def _soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between tries only as long as it takes to see that there is a pause."""
    monkeypatch.setattr(by_server, "_LONGEST_PAUSE", 0.3)


#: Those where the server moves the bytes.
_BY_SERVER = frozenset({"test_hopeless", "test_network", "test_server", "test_told"})


@pytest.fixture(autouse=True)
def _through_the_server(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As for a user who can't write the store, with the store to look at."""
    if request.module.__name__.rpartition(".")[2] in _BY_SERVER:
        monkeypatch.setattr(driver, "why_server", lambda *_: "a test wants it so")


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """Not started; it comes back at the same port."""
    with at_a_port(request.param, tmp_path) as made:
        yield made

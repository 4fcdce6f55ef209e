"""A registry, a server at a port that it keeps, and pulls of ours that are looked at all along."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.servers import EngineServer, RealServer, Server
from watcher.pull import driver

SERVERS = [
    pytest.param(EngineServer, id="engine"),
    pytest.param(
        RealServer,
        id="real",
        marks=pytest.mark.skipif("OLLAMA_BIN" not in os.environ, reason="OLLAMA_BIN is not set"),
    ),
]


@pytest.fixture(autouse=True)
def _soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between tries only as long as it takes to see that there is a pause."""
    monkeypatch.setattr(driver, "_LONGEST_PAUSE", 0.3)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """Not started; it comes back at the same port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with request.param(tmp_path / "models", {"OLLAMA_HOST": f"127.0.0.1:{port}"}) as made:
        made.port = port
        yield made

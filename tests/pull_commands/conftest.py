"""A store, and a server on it, for commands that pull."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.servers import EngineServer


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


@pytest.fixture
def server(store: Path) -> Iterator[EngineServer]:
    with EngineServer(store) as running:
        yield running.start().wait_ready()

"""A server on an empty store: the engine or, with OLLAMA_BIN set, the real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SERVERS
from tests.support.servers import Server


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """Not started; killed at the end."""
    with request.param(tmp_path / "models") as made:
        yield made

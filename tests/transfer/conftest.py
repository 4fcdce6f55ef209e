"""A store and a registry with a model of 12 MB."""

from __future__ import annotations

from pathlib import Path

import pytest

from watcher.demo.registry import Registry

from .driven import Here


@pytest.fixture
def here(tmp_path: Path, registry: Registry) -> Here:
    return Here(tmp_path / "models", registry, 12_000_000)

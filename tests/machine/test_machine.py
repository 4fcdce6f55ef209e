"""Random histories of a server, a user and us; `MACHINE_HISTORIES` sets how many there are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.servers import EngineServer, RealServer
from watcher.demo.registry import Registry

from .machine import Machine

HISTORIES = int(os.environ.get("MACHINE_HISTORIES", "4"))
MANY = pytest.mark.slow("each history takes ten seconds, and a few are enough to see a mistake")
SEEDS = [*range(HISTORIES), *(pytest.param(each, marks=MANY) for each in range(HISTORIES, 30))]
STEPS = 14


@pytest.mark.parametrize("seed", SEEDS)
def test_random_histories_end_with_right_models_and_nothing_lost(seed: int, tmp_path: Path) -> None:
    with Registry() as registry:
        Machine(tmp_path, EngineServer, registry, seed).run(STEPS)
    shutil.rmtree(tmp_path)


@pytest.mark.skipif("OLLAMA_BIN" not in os.environ, reason="OLLAMA_BIN is not set")
@pytest.mark.parametrize("seed", SEEDS)
def test_random_histories_of_a_real_server_end_with_right_models(seed: int, tmp_path: Path) -> None:
    with Registry() as registry:
        Machine(tmp_path, RealServer, registry, seed).run(STEPS)
    shutil.rmtree(tmp_path)

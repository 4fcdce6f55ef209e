"""The forecast equals what a start really does, on hundreds of random stores."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.forecast.stores import RandomStore, names
from tests.support.examples import some
from tests.support.runs import rules
from tests.support.servers import RealServer, ServerDiedError
from tests.unit.decide.seen import diagnosis
from watcher.demo.server.errors import EngineError
from watcher.demo.server.start import start_store
from watcher.model import Forecast
from watcher.observe.evidence import observe
from watcher.observe.host import Host
from watcher.state.memory import Memory

BATCHES = 10
STORES_IN_A_BATCH = some(25)


def stage(store: Path) -> Forecast:
    forecast = diagnosis(observe(Host(str(store)), rules(), Memory(), None), rules()).forecast
    assert forecast is not None
    return forecast


def check(store: Path, forecast: Forecast, before: set[str], *, failed: bool) -> None:
    assert forecast.start_fails == failed, forecast.why
    if forecast.start_fails:
        return  # it is told that it fails, not how far it comes
    renamed = {each.path for each in forecast.renames}
    gone = before - names(store) - renamed
    assert {each.path for each in forecast.deletes} - renamed == gone, forecast.why
    deleted_after_renaming = {
        path for path in renamed if not os.path.lexists(store / path.replace("sha256:", "sha256-"))
    }
    assert {each.path for each in forecast.deletes} & renamed == deleted_after_renaming


@pytest.mark.parametrize("batch", range(BATCHES))
def test_forecast_names_what_a_start_of_the_engine_deletes(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(batch * STORES_IN_A_BATCH, (batch + 1) * STORES_IN_A_BATCH):
        store = tmp_path / str(seed)
        RandomStore(store, seed, time.time()).fill()
        monkeypatch.setenv("OLLAMA_MODELS", str(store))
        monkeypatch.setenv("OLLAMA_NOPRUNE", "")
        forecast, before = stage(store), names(store)
        try:
            start_store()
            failed = False
        except (OSError, EngineError):
            failed = True
        try:
            check(store, forecast, before, failed=failed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from None


@pytest.mark.skipif(not os.environ.get("OLLAMA_BIN"), reason="OLLAMA_BIN names no server")
@pytest.mark.parametrize("batch", range(BATCHES))
def test_forecast_names_what_a_start_of_the_real_server_deletes(batch: int, tmp_path: Path) -> None:
    for seed in range(1000 + batch * STORES_IN_A_BATCH, 1000 + (batch + 1) * STORES_IN_A_BATCH):
        store = tmp_path / str(seed)
        RandomStore(store, seed, time.time()).fill()
        forecast, before = stage(store), names(store)
        with RealServer(store) as server:
            server.start()
            try:
                server.wait_ready()
                failed = False
            except ServerDiedError:
                failed = True
        try:
            check(store, forecast, before, failed=failed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from None

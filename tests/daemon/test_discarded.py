"""The daemon keeps what a server's own pull has finished, and says once where it can't."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.driving import Daemon, HealthyStore, host
from tests.support.runs import rules
from tests.support.servers import EngineServer, blob, collapsed, wait_until
from watcher.demo.registry import Fault, Layer, Registry
from watcher.service.daemon import Children, _Service
from watcher.service.metrics import Metrics
from watcher.state import fs
from watcher.state.event_log import Event

REPAIRS = {"OLLAMA_WATCH_REPAIR": "true"}


def test_a_mismatch_leaves_the_bytes_and_a_success_nothing(
    store: HealthyStore, server: EngineServer, registry: Registry
) -> None:
    model = registry.add_model("demo", "1b", [Layer(3_000_000)])
    digest = model.digests[0]
    second = store.ours / "transfers" / digest[7:] / "data"
    page = Fault("page", status=200, cut=True, digest=digest, times=1)
    with server.start().wait_ready(), Daemon(store.path, REPAIRS) as daemon:
        daemon.wait_event("check_started")
        daemon.wait_idle()
        registry.add_fault(page)
        registry.hold(model.digests[1], after=0)  # else a busy machine may not see the first one
        pull = server.start_pull(model.name)
        wait_until(second.exists, "the second name")
        registry.release()
        assert "digest mismatch" in collapsed(pull.result())[-1]
        daemon.wait_event("download_discarded")
        assert not blob(store.path, digest).exists()
        assert (second.stat().st_nlink, second.stat().st_size) == (1, 3_000_000)
        assert collapsed(server.pull(model.name))[-1] == "success"
        wait_until(lambda: not list(store.ours.glob("transfers/*")), "the end of all of them")
        daemon.wait_idle()
        assert len(daemon.of("download_discarded")) == 1
        assert not daemon.of("error")


def test_without_repair_nothing_is_kept(store: HealthyStore) -> None:
    digest = store.text_blob("finished", 0)
    service, told = _service(store, repair=False)
    service.keep(frozenset({digest}))
    assert not (store.ours / "transfers").exists()
    assert not told


def test_where_it_can_t_be_kept_it_is_said_once(
    store: HealthyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(fs, "second_name", refuse)
    service, told = _service(store, repair=True)
    for text in ("one", "another"):
        service.keep(frozenset({store.text_blob(text, 0)}))
    (event,) = told
    assert event.event_type == "error"
    assert "can't be kept here: a hard link fails: Operation not permitted" in event.message
    assert not list(Path(store.ours).glob("transfers/*"))


def _service(store: HealthyStore, *, repair: bool) -> tuple[_Service, list[Event]]:
    """What a daemon is between two looks, and its events."""
    told: list[Event] = []
    around = replace(host(store), report=told.append)
    settings = rules(repair=repair, writers_visible=True).settings
    service = _Service(around, settings, Metrics(around.store, settings), Children([]))
    status = os.stat(store.path)
    service._store = status.st_dev, status.st_ino
    return service, told

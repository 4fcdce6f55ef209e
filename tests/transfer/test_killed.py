"""Kills at any instant, and two of us at one layer: what has arrived is not fetched again."""

from __future__ import annotations

import random
import shutil
from contextlib import AbstractContextManager

import pytest

from watcher.model import MIB
from watcher.ollama import ranges
from watcher.transfer import ledger
from watcher.transfer.ledger import Ledger
from watcher.transfer.store import Store
from watcher.transfer.values import Layer

from .driven import CONNECTIONS, Here, Process, wait_for, with_options


@pytest.mark.parametrize(("seed", "connections"), [(1, 1), (2, 2), (3, 8)])
def test_a_kill_costs_a_mib_for_each_connection(here: Here, seed: int, connections: int) -> None:
    chance, options = random.Random(seed), with_options(connections=connections, piece=6 * MIB)
    here.registry.throttle(8_000_000)
    while here.served < here.size * 0.8:
        until = min(here.served + chance.randint(1_000_000, 6_000_000), here.size)
        with Process(here, options) as pulling:
            wait_for(lambda until=until: here.served >= until)  # type: ignore[misc]
            pulling.kill()
        believed = here.believed()
        assert here.written() - ranges.size(believed) <= connections * MIB
        here.check_right(believed)
    here.registry.throttle(None)
    left, before = here.size - ranges.size(here.believed()), len(here.registry.asked)
    with Process(here, options) as pulling:
        pulling.end()
    here.check()
    assert here.asked(before) == left


def test_after_a_kill_between_names_and_manifest_nothing_is_fetched(here: Here) -> None:
    with here.opened() as opened:
        assert not opened.publish(here.fetch().verified).changed
    assert here.blob.exists()
    assert not here.manifest.exists()
    here.registry.reset_stats()
    here.pull()
    assert not here.registry.stats()["bytes"]


def test_after_a_kill_between_a_name_and_the_removal_of_its_ledger_nothing_is_believed(
    here: Here,
) -> None:
    here.fetch()
    (here.folder / "data").rename(here.blob)  # and no more
    here.registry.reset_stats()
    here.pull()
    assert here.served == 0


def test_a_ledger_without_its_data_claims_nothing(here: Here) -> None:
    here.fetch()
    (here.folder / "data").unlink()
    here.registry.hold(here.model.digests[0], at=(here.size - 10,))
    with Process(here) as pulling:
        here.registry.wait_held(here.model.digests[0], 1)
        pulling.kill()
    here.check_right(here.believed())
    here.registry.release()
    here.pull()


def test_a_second_pull_waits_for_the_first_and_fetches_nothing(here: Here) -> None:
    digest = here.model.digests[0]
    here.registry.hold(digest, at=(5 * MIB,))
    with Process(here) as first:
        here.registry.wait_held(digest, 1)
        with Process(here) as second:
            wait_for(lambda: "another process is downloading this layer: pid" in second.printed())
            wait_for(lambda: "shared=True" in second.printed())
            here.registry.release()
            second.end()
        first.end()
    here.check()
    assert here.served == here.size + 1


def test_a_second_pull_takes_over_where_the_first_dies(here: Here) -> None:
    digest = here.model.digests[0]
    here.registry.hold(digest, at=(5 * MIB,))
    with Process(here) as first:
        here.registry.wait_held(digest, 1)
        with Process(here) as second:
            wait_for(lambda: "another process" in second.printed())
            wait_for(lambda: here.written() == here.served - 1)
            first.kill()
            here.registry.release()
            second.end()
    here.check()
    assert here.served <= here.size + 2 + CONNECTIONS * MIB


def test_a_layer_that_another_pull_names_at_the_last_moment_has_not_changed(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched, real = here.fetch(), ledger.opened

    def late(ours: int, layer: Layer, boot: str) -> AbstractContextManager[Ledger]:
        if layer.digest == here.digest:
            (here.folder / "data").rename(here.blob)
            shutil.rmtree(here.folder)
        return real(ours, layer, boot)

    monkeypatch.setattr(ledger, "opened", late)
    here.publish(fetched)
    here.check()


def test_a_layer_that_gets_its_name_just_before_its_lock_is_free_is_not_fetched(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Store.ledger

    def late(store: Store, layer: Layer, boot: str) -> AbstractContextManager[Ledger]:
        if layer.digest == here.digest:
            here.blob.write_bytes(here.content())
        return real(store, layer, boot)

    monkeypatch.setattr(Store, "ledger", late)
    here.pull()
    assert here.served == 0

"""A rate: kept, shared with what else is fetched into the store, and changed on the way."""

from __future__ import annotations

import errno
import itertools
import os
import time

import pytest

from watcher import config
from watcher.config import Settings
from watcher.pull.account import Options
from watcher.pull.driver import Pull
from watcher.pull.target import Target
from watcher.transfer.rate import Limit
from watcher.transfer.store import Store
from watcher.transfer.values import Layer

from .driven import BOOT, Background, Here, wait_for, with_options

OTHER = Layer("e" * 64, 1000)


def test_it_is_kept_and_who_waits_is_neither_silent_nor_slow(here: Here) -> None:
    begun = time.monotonic()
    here.pull(with_options(limit=Limit(6_000_000), stall=0.5, slow_seconds=0.2))
    assert time.monotonic() - begun > 0.9 * here.size / 6_000_000
    assert not here.waits()
    assert not here.notices()


def test_it_is_shared_with_whoever_else_fetches_into_the_store(here: Here) -> None:
    begun = time.monotonic()
    with here.opened() as opened, opened.ledger(OTHER, BOOT):
        here.fetch(with_options(limit=Limit(12_000_000)))
    assert time.monotonic() - begun > 0.8 * 2 * here.size / 12_000_000


def test_a_layer_that_nobody_fetches_any_more_gets_no_share(here: Here) -> None:
    with here.opened() as opened:
        with opened.ledger(OTHER, BOOT):
            assert opened.running() == 1
        assert opened.running() == 0


def test_a_pull_goes_on_where_the_others_can_not_be_counted(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Store) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Store, "running", fail)
    here.pull(with_options(limit=Limit(100_000_000)))


@pytest.mark.parametrize("then", [0, 1_000_000_000])
def test_a_rate_that_is_changed_counts_for_the_transfer_under_way(here: Here, then: int) -> None:
    limit = Limit(1000)
    with Background(here.transfer(with_options(limit=limit))) as running:
        wait_for(lambda: here.served > 100_000)
        limit.per_second = then
        running.result()
    assert not here.waits()


def test_what_continues_a_pull_has_its_rate() -> None:
    (word,) = Options(limit=Limit(5_000_000)).words()
    option, _, value = word.partition("=")
    assert (option, config.rate(value)) == ("--rate", 5_000_000)


def test_a_server_s_pull_says_that_its_rate_is_not_limited() -> None:
    far = Target("http://127.0.0.1:1", Settings(), None, "it is far away")
    updates = Pull(far, "demo", Options(limit=Limit(5_000_000))).updates()
    notes = [update.note for update in itertools.islice(updates, 1)]
    assert notes == ["the server downloads it, and its rate is not limited: it is far away"]


def test_turns_that_are_rare_make_nobody_slow(here: Here) -> None:
    limit = Limit(500_000)
    options = with_options(limit=limit, slow_seconds=0.2)
    with Background(here.transfer(options)) as running:
        wait_for(lambda: here.folder.exists() and here.written_if_any() > 1_000_000)
        assert not here.notices()
        limit.per_second = 0
        running.result()

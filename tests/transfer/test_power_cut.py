"""Power cuts: after another start only what was synced counts, and that is there byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.power import Disk
from watcher.demo.registry import Registry
from watcher.model import MIB
from watcher.ollama import ranges
from watcher.transfer import values as transfer
from watcher.transfer.values import Cause

from .driven import BOOT, Background, Here, Process, wait_for, with_options

AFTER = "another start"
NEVER = 10**12


def test_bytes_that_were_not_synced_do_not_count_after_another_start(here: Here) -> None:
    kill_at(here, 5 * MIB, with_options(sync_bytes=NEVER, sync_seconds=1e6))
    assert here.arrived() >= here.size - 2 * MIB
    assert here.believed(AFTER) == ()
    # What another start has found is the new truth.
    assert here.believed() == ()


def test_where_no_start_is_known_nothing_counts_but_what_is_durable(here: Here) -> None:
    kill_at(here, 5 * MIB, with_options(sync_bytes=NEVER, sync_seconds=1e6), boot="")
    assert here.believed("") == ()


def test_durable_bytes_count_after_another_start(here: Here) -> None:
    kill_at(here, 5 * MIB, with_options(sync_bytes=MIB))
    assert ranges.size(here.believed(AFTER)) >= 5 * MIB
    here.check_right(here.believed(AFTER))
    left = here.size - ranges.size(here.believed(AFTER))
    here.registry.release()
    before = here.served
    here.pull(boot=AFTER)
    assert here.served - before == left + 1


def kill_at(here: Here, stop: int, options: transfer.Options, boot: str = BOOT) -> None:
    """Kill a transfer of which all has arrived but a piece from `stop` on."""
    digest = here.model.digests[0]
    here.registry.hold(digest, at=(stop,))
    with Process(here, options, boot) as pulling:
        here.registry.wait_held(digest, 1)
        wait_for(lambda: here.registry.stats()["requests"]["data"] >= 7)
        wait_for(lambda: here.written() == here.served - 1)
        wait_for(lambda: here.durable() >= 5 * MIB or options.sync_bytes == NEVER)
        pulling.kill()


@pytest.mark.parametrize("stop", [3 * MIB + 1, 7 * MIB, 11 * MIB + 12345])
def test_bytes_that_the_ledger_calls_durable_are_on_the_disk(
    tmp_path: Path, registry: Registry, stop: int
) -> None:
    with Disk(tmp_path / "disk") as disk:
        here = Here(disk.path / "models", registry, 12_000_000)
        disk.keep_all()
        registry.hold(here.model.digests[0], at=(stop,))
        with Background(here.transfer(with_options(sync_bytes=2 * MIB))):
            registry.wait_held(here.model.digests[0], 1)
            wait_for(lambda: here.durable() >= 5 * MIB)
            with disk.power_cut() as after:
                there = here.moved(after.path / "models")
                claimed = there.believed(AFTER)
                there.check_right(claimed)
        assert claimed  # at least what was durable when the last ledger was begun


def test_a_name_is_given_only_to_what_is_on_the_disk(tmp_path: Path, registry: Registry) -> None:
    with Disk(tmp_path / "disk") as disk:
        here = Here(disk.path / "models", registry, 12_000_000)
        disk.keep_all()
        here.pull()
        with disk.power_cut() as after:
            here.moved(after.path / "models").check()


def test_a_sync_that_fails_as_it_stops_leaves_nothing_that_is_believed(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    from watcher.state import fs

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    digest = here.model.digests[0]
    here.registry.hold(digest, at=(7 * MIB,))
    with Background(here.transfer(with_options(sync_bytes=NEVER, sync_seconds=1e6))) as running:
        here.registry.wait_held(digest, 1)
        wait_for(lambda: here.written() == here.served - 1)
        monkeypatch.setattr(fs, "sync_data", fail)
        running.work.stop()
        running.join()
    monkeypatch.undo()
    assert here.believed() == ()
    here.registry.release()
    here.pull()


def test_a_sync_that_fails_ends_it_and_what_was_not_durable_is_not_believed(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    from watcher.state import fs

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fs, "sync_data", fail)
    with pytest.raises(transfer.TransferError, match="Input/output error") as caught:
        here.fetch(with_options(sync_bytes=2 * MIB))
    assert caught.value.cause is Cause.DISK
    monkeypatch.undo()
    assert here.believed() == ()
    here.pull()

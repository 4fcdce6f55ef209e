"""A full disk: nothing is begun that would touch the reserve, and room is enough to go on."""

from __future__ import annotations

import errno
import resource
import subprocess
from pathlib import Path

import pytest

from tests.conftest import needs_root
from watcher.demo.registry import Fault, Registry
from watcher.model import MIB
from watcher.state import fs
from watcher.state.transfers import LEDGER
from watcher.transfer import engine
from watcher.transfer import values as transfer
from watcher.transfer.store import Store
from watcher.transfer.values import Cause

from .driven import Background, Here, wait_for, with_options


def test_a_transfer_stops_before_the_reserve_says_what_is_missing_and_continues_by_itself(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [20 * MIB]
    # What the disk has free falls as bytes are written.
    monkeypatch.setattr(Store, "free", lambda _: room[0] - here.written_if_any())
    options = with_options(reserve=15 * MIB, connections=2)
    with Background(here.transfer(options)) as running:
        wait_for(here.waits)
        wait_for(lambda: here.written_if_any() == 4 * MIB)
        wait = here.waits()[0]
        left = here.size - here.written_if_any()
        assert "the disk is full" in wait.reason
        number, unit = wait.reason.split()[4:6]
        assert unit == "MB"
        assert left - MIB <= float(number) * 1_000_000 < here.size
        assert here.registry.sent < 5 * MIB
        room[0] = 100 * MIB
        here.publish(running.result())
    here.check()
    assert here.served == here.size + 1


@needs_root
def test_a_disk_that_is_full_all_the_same_is_waited_for(tmp_path: Path, registry: Registry) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("can't mount here")
    try:
        here = Here(disk / "models", registry, 12_000_000)
        with Background(here.transfer(with_options(tries=2))) as running:
            wait_for(lambda: len(here.waits()) > 5)
            subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
            here.publish(running.result())
        here.check()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_marks_that_could_not_be_written_are_written_later(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    with here.ledger() as ledger:
        fs.write_at(ledger.data, [b"x" * 3000], 0)
        real = fs.write_at

        def full(fd: int, pieces: list[bytes], at: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(fs, "write_at", full)
        ledger.mark(0, 1000)
        monkeypatch.setattr(fs, "write_at", real)
        ledger.mark(2000, 3000)
    assert here.believed() == ((0, 1000), (2000, 3000))


def test_a_limit_of_this_process_ends_it_with_what_raises_it(here: Here) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * MIB, before[1]))
    try:
        with pytest.raises(transfer.TransferError) as caught:
            here.fetch()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.cause is Cause.DISK
    assert "LimitFSIZE" in caught.value.next_step
    here.pull()


def test_a_ledger_that_can_not_be_written_is_tried_again_and_the_bytes_go_on(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = fs.save, [0]

    def full(name: str, parent: int, data: bytes, *, durable: bool = True) -> None:
        if name == LEDGER and tries[0] < 3:
            tries[0] += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        real(name, parent, data, durable=durable)

    monkeypatch.setattr(fs, "save", full)
    here.pull(with_options(sync_bytes=MIB))
    assert tries[0] == 3
    assert here.served == here.size + 1


def test_bytes_for_which_there_is_no_room_all_the_same_are_fetched_when_there_is(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = fs.write_at, [0]

    def full(fd: int, pieces: list[bytes], at: int) -> None:
        if sum(map(len, pieces)) > 1000 and refused[0] < 12:
            refused[0] += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, pieces, at)

    monkeypatch.setattr(fs, "write_at", full)
    here.pull(with_options(tries=2, connections=2))
    assert any("No space left" in wait.reason for wait in here.waits())


def test_wrong_bytes_are_fetched_anew_once_there_is_room_to_note_that(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_ROOM_SECONDS", 0.01)
    here.registry.add_fault(Fault("flip", begin=2 * MIB, after=1000, times=1))
    real, tries = fs.save, [0]

    def full(name: str, parent: int, data: bytes, *, durable: bool = True) -> None:
        if name == LEDGER and tries[0] < 3 and "checksum mismatch" in here.notices():
            tries[0] += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        real(name, parent, data, durable=durable)

    monkeypatch.setattr(fs, "save", full)
    here.pull()
    assert tries[0] == 3
    assert here.served == 2 * here.size + 1

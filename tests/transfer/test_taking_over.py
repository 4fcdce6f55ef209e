"""Ranges of a server's download are copied and not fetched; what is wrong in them is fetched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.filesize import decimal

from watcher.model import MIB
from watcher.transfer.store import Store
from watcher.transfer.values import Partial

from .driven import BOOT, Background, Here, wait_for

TAKEN = ((100, 3 * MIB), (5 * MIB + 1, 9 * MIB))
SIZE = sum(end - start for start, end in TAKEN)


def take(here: Here, data: bytes, *, pieces: int | None = None) -> None:
    partial = here.path / "blobs" / f"sha256-{here.digest}-partial"
    partial.write_bytes(data)
    source = os.open(partial, os.O_RDONLY)
    try:
        with here.ledger() as ledger:
            for number, _ in enumerate(ledger.take(source, TAKEN)):
                if number + 1 == pieces:
                    return
            ledger.make_durable(ledger.arrived)
    finally:
        os.close(source)


def test_ranges_of_a_partial_are_not_fetched(here: Here) -> None:
    take(here, here.content())
    pull(here)
    assert here.served == here.size - SIZE + 1


def test_bytes_that_were_taken_over_count_after_a_power_cut(here: Here) -> None:
    take(here, here.content())
    assert here.believed("another start") == TAKEN


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_kill_while_they_are_copied_leaves_what_was_copied_and_where_it_is_from(
    here: Here, pieces: int
) -> None:
    take(here, here.content(), pieces=pieces)
    with here.ledger() as ledger:
        assert ledger.arrived == TAKEN[:pieces]
        assert ledger.taken == TAKEN


def test_wrong_bytes_in_them_cost_what_was_taken_and_no_more(here: Here) -> None:
    data = bytearray(here.content())
    data[6 * MIB] ^= 1
    take(here, bytes(data))
    pull(here)
    assert f"{decimal(SIZE)} from the server's download must be downloaded again" in here.notices()
    assert here.served == here.size + 1


def test_what_has_arrived_is_not_taken(here: Here) -> None:
    take(here, here.content())
    source = os.open(os.devnull, os.O_RDONLY)
    try:
        with here.ledger(BOOT) as ledger:
            assert list(ledger.take(source, TAKEN)) == []
    finally:
        os.close(source)


def test_a_partial_that_ends_before_is_an_error(here: Here) -> None:
    with pytest.raises(OSError, match="ended before"):
        take(here, here.content()[: 6 * MIB])
    pull(here)


def pull(here: Here, partials: tuple[Partial, ...] = ()) -> None:
    """All of it, once the server's download is gone: beside it ours keeps its second name."""
    fetched = here.fetch(partials=partials)
    (here.path / "blobs" / f"sha256-{here.digest}-partial").unlink()
    here.publish(fetched)
    here.check()


def partial_of(here: Here, data: bytes) -> Partial:
    path = here.path / "blobs" / f"sha256-{here.digest}-partial"
    path.write_bytes(data)
    status = path.stat()
    return Partial(here.digest, status.st_dev, status.st_ino, TAKEN)


def test_a_pull_goes_on_from_a_servers_download_and_leaves_it_where_it_is(here: Here) -> None:
    partial = partial_of(here, here.content())
    fetched = here.fetch(partials=(partial,))
    assert here.served == here.size - SIZE + 1
    assert f"copied {decimal(SIZE)} from the server's download" in here.notices()
    left = here.path / "blobs" / f"sha256-{here.digest}-partial"
    assert left.read_bytes() == here.content()
    left.unlink()
    here.publish(fetched)
    here.check()


def test_another_file_under_its_name_is_not_taken(here: Here) -> None:
    partial = partial_of(here, here.content())._replace(inode=1)
    pull(here, partials=(partial,))
    assert here.served == here.size + 1


def test_a_symlink_under_its_name_is_not_followed(here: Here, tmp_path: Path) -> None:
    partial = partial_of(here, here.content())
    path = here.path / "blobs" / f"sha256-{here.digest}-partial"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    pull(here, partials=(partial,))
    assert here.served == here.size + 1


def test_of_a_download_that_was_cut_meanwhile_what_is_there_is_taken(here: Here) -> None:
    partial = partial_of(here, here.content()[: 6 * MIB])
    pull(here, partials=(partial,))
    assert here.served == here.size - (3 * MIB - 100) - (MIB - 1) + 1


def test_a_servers_bytes_are_copied_once_there_is_room_beside_the_reserve(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [MIB]
    monkeypatch.setattr(Store, "free", lambda _: room[0])
    with Background(here.transfer(partials=(partial_of(here, here.content()),))) as running:
        wait_for(here.waits)
        assert here.written_if_any() == 0
        room[0] = 1 << 40
        running.result()
    pull(here)

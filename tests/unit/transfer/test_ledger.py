"""A ledger is input: what is out of bounds, of another shape or of somebody else claims nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import NOBODY, needs_root
from watcher.state import fs, transfers
from watcher.state.transfers import ARRIVED, DATA, LEDGER, LOCK
from watcher.transfer import ledger
from watcher.transfer.ledger import Ledger
from watcher.transfer.values import Layer

LAYER = Layer("a" * 64, 1000)
BOOT = "one"


class Kept:
    """A ledger's folder."""

    def __init__(self, path: Path) -> None:
        self.ours = path / ".ollama-watch"
        self.ours.mkdir()
        self.folder = self.ours / transfers.FOLDER / LAYER.digest

    @contextmanager
    def opened(self, boot: str = BOOT) -> Iterator[Ledger]:
        fd = os.open(self.ours, os.O_RDONLY)
        try:
            with ledger.opened(fd, LAYER, boot) as found:
                yield found
        finally:
            os.close(fd)

    def fill(self) -> None:
        """Bytes 0 to 300 are durable, and 500 to 700 have arrived."""
        with self.opened() as found:
            fs.write_at(found.data, [b"x" * 700], 0)
            found.mark(0, 300)
            found.make_durable(found.arrived)
            found.mark(500, 700)

    def change(self, **said: Any) -> None:
        path = self.folder / LEDGER
        path.write_text(json.dumps({**json.loads(path.read_text()), **said}))


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    found = Kept(tmp_path)
    found.fill()
    return found


def test_in_the_same_start_all_that_arrived_counts(kept: Kept) -> None:
    with kept.opened() as found:
        assert found.arrived == ((0, 300), (500, 700))
        assert found.durable == ((0, 300),)
        assert found.lost == ""


@pytest.mark.parametrize("boot", ["another", ""])
def test_in_another_or_an_unknown_one_only_what_is_durable(kept: Kept, boot: str) -> None:
    with kept.opened(boot) as found:
        assert found.arrived == ((0, 300),)


@pytest.mark.parametrize(
    "said",
    [
        {"schema": "ollama-watch/transfer/0"},
        {"digest": "b" * 64},
        {"total": 999},
        {"total": True},
        {"durable": [[0, 701]]},
        {"durable": [[-1, 5]]},
        {"durable": [[0, 10**30]]},
        {"durable": [[0, "5"]]},
        {"durable": [0, 5]},
        {"durable": 7},
        {"durable": None},
        {"taken": [[0]]},
        {"wrong": 0},
    ],
)
def test_a_damaged_ledger_is_set_aside_and_nothing_is_durable(
    kept: Kept, said: dict[str, Any]
) -> None:
    kept.change(**said)
    with kept.opened() as found:
        assert "damaged" in found.lost
        assert found.arrived == found.durable == ()
    assert (kept.folder / "ledger.damaged").exists()
    with kept.opened() as found:
        assert found.lost == ""
        assert found.arrived == ()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
class TestWhatIsNoFile:
    """What lies in the place of a file is not read, not written to, and named."""

    @pytest.mark.parametrize("name", [DATA, LEDGER, ARRIVED])
    def test_an_odd_file_in_place_of_one_of_a_transfer_is_set_aside(
        self, kept: Kept, name: str, make: Callable[[Path], None]
    ) -> None:
        place = kept.folder / name
        place.unlink()
        make(place)
        with kept.opened():
            pass
        assert place.is_file()
        assert not place.is_symlink()

    def test_a_lock_is_named_by_its_path(self, kept: Kept, make: Callable[[Path], None]) -> None:
        (kept.folder / LOCK).unlink()
        make(kept.folder / LOCK)
        with pytest.raises(OSError, match=r".") as caught, kept.opened():
            pass
        assert caught.value.filename == f".ollama-watch/transfers/{LAYER.digest}/lock"


def test_a_file_in_place_of_the_transfers_folder_is_named_by_its_path(kept: Kept) -> None:
    shutil.rmtree(kept.ours / transfers.FOLDER)
    (kept.ours / transfers.FOLDER).touch()
    with pytest.raises(NotADirectoryError) as caught, kept.opened():
        pass
    assert caught.value.filename == ".ollama-watch/transfers"


@given(raw=st.binary(max_size=200))
def test_a_ledger_of_any_bytes_claims_nothing_and_does_not_fail(
    raw: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kept = Kept(tmp_path_factory.mktemp("ledger"))
    kept.fill()
    (kept.folder / LEDGER).write_bytes(raw)
    (kept.folder / ARRIVED).write_bytes(BOOT.encode() + b"\n" + raw)
    with kept.opened() as found:
        assert not found.durable
        assert not found.arrived or found.arrived[-1][1] <= LAYER.size


def test_the_log_is_believed_up_to_its_first_line_that_makes_no_sense(kept: Kept) -> None:
    log = kept.folder / ARRIVED
    log.write_bytes(b"one\n300 310\n320 330\n5 4\n340 350\n")
    with kept.opened() as found:
        assert found.arrived == ((0, 310), (320, 330))
    log.write_bytes(b"one\n300 310\n320 3")
    with kept.opened() as found:
        assert found.arrived == ((0, 310),)
    log.write_bytes(b"one\n300 310\n320 9999\n")
    with kept.opened() as found:
        assert found.arrived == ((0, 310),)


def test_data_that_was_cut_is_believed_no_further(kept: Kept) -> None:
    os.truncate(kept.folder / DATA, 600)
    with kept.opened() as found:
        assert found.arrived == ((0, 300),)
    os.truncate(kept.folder / DATA, 299)
    with kept.opened() as found:
        assert "beyond the data's end" in found.lost
        assert found.arrived == ()


def test_data_beyond_the_layers_end_is_cut(kept: Kept) -> None:
    os.truncate(kept.folder / DATA, 2000)
    with kept.opened() as found:
        assert os.fstat(found.data).st_size == LAYER.size


def test_nothing_beyond_the_layers_end_is_claimed(kept: Kept) -> None:
    """As when a manifest gave it another size, and a kill came before the first ledger."""
    os.truncate(kept.folder / DATA, 2000)
    (kept.folder / LEDGER).unlink()
    (kept.folder / ARRIVED).write_bytes(b"one\n0 310\n900 1500\n1600 1700\n")
    with kept.opened() as found:
        assert found.arrived == ((0, 310), (900, 1000))
        found.make_durable(found.arrived)
    with kept.opened("another") as found:
        assert found.lost == ""
        assert found.arrived == ((0, 310), (900, 1000))
    kept.change(taken=[[0, 10], [990, 1 << 40]], mirrored=[[2000, 3000]])
    with kept.opened() as found:
        assert found.taken == ((0, 10), (990, 1000))
        assert found.mirrored == ()


def test_data_with_a_second_name_is_never_written_to(kept: Kept, tmp_path: Path) -> None:
    os.link(kept.folder / DATA, tmp_path / "precious")
    with kept.opened() as found:
        fs.write_at(found.data, [b"y"], 0)
        assert found.arrived == ()
    assert (tmp_path / "precious").read_bytes() == b"x" * 700


@pytest.mark.parametrize("name", [DATA, ARRIVED, LEDGER])
def test_a_symlink_in_a_files_place_is_not_followed(kept: Kept, tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"kept")
    (kept.folder / name).unlink()
    (kept.folder / name).symlink_to(target)
    with kept.opened() as found:
        found.mark(0, 1)
        found.make_durable(found.arrived)
    assert target.read_bytes() == b"kept"


@needs_root
@pytest.mark.parametrize("name", [DATA, LEDGER])
def test_a_file_of_a_user_who_has_no_say_there_claims_nothing(kept: Kept, name: str) -> None:
    os.chown(kept.folder / name, NOBODY, NOBODY)
    with kept.opened() as found:
        assert found.arrived == ()


def test_a_second_process_is_kept_out_and_named(kept: Kept) -> None:
    with kept.opened(), pytest.raises(fs.BusyError, match=f"pid {os.getpid()}"), kept.opened():
        pass


def test_after_a_lost_sync_only_what_was_durable_counts(kept: Kept) -> None:
    with kept.opened() as found:
        found.lose()
        assert found.arrived == ((0, 300),)
    with kept.opened() as found:
        assert found.arrived == ((0, 300),)


def test_a_wrong_hash_is_remembered_until_something_is_forgotten(kept: Kept) -> None:
    def is_wrong() -> bool:
        return bool(json.loads((kept.folder / LEDGER).read_bytes())["wrong"])

    with kept.opened() as found:
        arrived = found.arrived
        found.note_wrong()
    with kept.opened() as found:
        assert (found.lost, found.arrived) == ("", arrived)
        assert is_wrong()
        found.forget(((0, 10),))
        assert not is_wrong()


def test_a_long_log_is_made_short(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "LONGEST_LOG", 200)
    with kept.opened() as found:
        for at in range(300, 400):
            found.mark(at, at + 1)
        found.make_durable(((0, 400),))
        found.shorten()
        found.mark(800, 801)
        assert (kept.folder / ARRIVED).stat().st_size < 100
    with kept.opened() as found:
        assert found.durable == ((0, 400),)
        assert found.arrived[:2] == ((0, 400), (500, 700))


def test_a_sync_comes_before_the_ledger_that_says_so(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, save = fs.sync_data, fs.save

    def noted_sync(fd: int) -> None:
        order.append("data")
        sync(fd)

    def noted_save(name: str, parent: int, data: bytes, **more: Any) -> None:
        order.append(name)
        save(name, parent, data, **more)

    monkeypatch.setattr(fs, "sync_data", noted_sync)
    monkeypatch.setattr(fs, "save", noted_save)
    with kept.opened() as found:
        order.clear()
        found.make_durable(found.arrived)
    assert order == ["data", LEDGER]

"""``hashes/``: one file for each beginning of a digest, and nothing lost on the way there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from watcher.ollama import names
from watcher.state import fs, hashes, memory
from watcher.state.hashes import Hashed, Hashes
from watcher.state.memory import Memory

RIGHT = [f"{number:02x}" * 32 for number in (0, 1, 171)]
ROW = Hashed(5, 6, 7, RIGHT[0])
WRONG = names.blob("ab" + "1" * 62)
PARTIAL = f"{names.blob('cd' * 32)}-partial"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    with fs.opened_folder(str(tmp_path)) as fd:
        yield fd


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / ".ollama-watch/hashes"


def known() -> dict[str, Hashed]:
    rows = {names.blob(digest): ROW._replace(sha256=digest) for digest in RIGHT}
    return {
        **rows,
        names.blob("ef" * 32): Hashed(1, 2, 3, "ef" * 32, "this start"),
        WRONG: Hashed(1, 2, 3, "2" * 64, "an earlier start"),
        PARTIAL: Hashed(1, 2, 3, "cd" * 32),
    }


def kept(folder: int, boot: str = "this start") -> dict[str, Hashed]:
    of_disk = Hashes().of_disk(folder, boot)
    return {name: found for name in known() if (found := of_disk.get(name)) is not None}


def blobs(of_disk: Hashes) -> tuple[set[str], set[str]]:
    """The digests with a right hash, and the names with a wrong one."""
    right, wrong = zip(*of_disk.blobs(), strict=True)
    return set().union(*right), set().union(*wrong)


def test_new_hashes_replace_stored_ones(folder: int) -> None:
    hashes.keep(folder, known())
    good, bad = names.blob(RIGHT[0]), names.blob(RIGHT[1])
    more = {bad: ROW, WRONG: ROW._replace(sha256=WRONG[7:]), good: ROW._replace(boot="another")}
    of_disk = Hashes(more).of_disk(folder, "this start")
    assert blobs(of_disk) == ({RIGHT[2], "ef" * 32, WRONG[7:]}, {bad})
    assert (of_disk.get(good), of_disk.get(bad)) == (None, ROW)


def test_saved_hashes_are_found_again_in_files_by_digest(folder: int, place: Path) -> None:
    hashes.keep(folder, known())
    assert kept(folder) == known()
    assert sorted(os.listdir(place)) == [f"{each}.json" for each in ("00", "01", "ab", "cd", "ef")]
    right, wrong = blobs(Hashes().of_disk(folder, "this start"))
    assert right == {*RIGHT, "ef" * 32}
    assert wrong == {WRONG}


def test_a_hash_of_another_start_counts_only_where_it_is_wrong(folder: int) -> None:
    hashes.keep(folder, known())
    left = kept(folder, "the next start")
    assert names.blob("ef" * 32) not in left
    assert WRONG in left
    assert blobs(Hashes().of_disk(folder, "the next start")) == (set(RIGHT), {WRONG})


def test_only_files_that_change_are_written(folder: int, place: Path) -> None:
    hashes.keep(folder, known())
    before = {path.name: path.stat().st_ino for path in place.iterdir()}
    hashes.keep(folder, {**known(), WRONG: Hashed(9, 9, 9, "3" * 64)})
    after = {path.name: path.stat().st_ino for path in place.iterdir()}
    assert [name for name in before if before[name] != after[name]] == ["ab.json"]
    assert kept(folder)[WRONG] == Hashed(9, 9, 9, "3" * 64)
    hashes.keep(folder, {WRONG: Hashed(9, 9, 9, WRONG[7:])})
    assert blobs(Hashes().of_disk(folder, "")) == ({*RIGHT, WRONG[7:]}, set())


def test_one_digest_is_read_from_one_file(folder: int, place: Path) -> None:
    hashes.keep(folder, known())
    for path in place.iterdir():
        if path.name != "00.json":
            path.write_bytes(b"damaged")
    of_disk = Hashes().of_disk(folder, "")
    assert of_disk.get(names.blob(RIGHT[0])) == ROW
    assert not of_disk.unread
    assert of_disk.get(names.blob(RIGHT[1])) is None
    assert of_disk.unread.startswith(".ollama-watch/hashes/01.json is damaged: ")


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"null", b'{"schema":"ollama-watch/hashes/1","right":{"":5},"others":{}}']
)
def test_a_damaged_file_is_set_aside_and_costs_its_own_hashes(
    folder: int, place: Path, raw: bytes
) -> None:
    hashes.keep(folder, known())
    (place / "00.json").write_bytes(raw)
    more = {names.blob("00" + "f" * 62): ROW._replace(sha256="00" + "f" * 62)}
    hashes.keep(folder, more)
    assert (place / "00.json.damaged").read_bytes() == raw
    left = {name: each for name, each in known().items() if name != names.blob(RIGHT[0])}
    assert kept(folder) == left
    assert Hashes().of_disk(folder, "").get(next(iter(more))) == next(iter(more.values()))


def test_a_file_of_a_stranger_is_not_believed(folder: int, place: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    hashes.keep(folder, known())
    os.chown(place / "00.json", 12345, 12345)
    of_disk = Hashes().of_disk(folder, "")
    assert of_disk.get(names.blob(RIGHT[0])) is None
    assert "belongs to user id 12345" in of_disk.unread
    os.chown(place, 12345, 12345)
    assert kept(folder) == {}


def test_an_unreadable_file_of_hashes_is_not_overwritten(folder: int, place: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root can read everything")
    hashes.keep(folder, known())
    (place / "00.json").chmod(0)
    with pytest.raises(PermissionError):
        hashes.keep(folder, {names.blob("00" + "f" * 62): ROW})
    (place / "00.json").chmod(0o600)
    assert kept(folder) == known()


# ---------------------------------------------------------------- with the memory


def test_a_memory_from_before_differs_from_one_that_knows_more(folder: int) -> None:
    before = memory.save(folder, Memory())
    memory.save(folder, Memory(hashes=Hashes(known())))
    assert memory.load(folder) != before


def test_a_memory_never_says_more_than_the_hashes_that_are_kept(
    folder: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where hashes can't be written the memory stays as it was: what is unproven stays so."""
    memory.save(folder, Memory(unproven=frozenset({RIGHT[0]})))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fs, "save_all", full)
    with pytest.raises(OSError, match="No space"):
        memory.save(folder, Memory(hashes=Hashes(known())))
    assert memory.load(folder).unproven == {RIGHT[0]}


def test_models_are_written_only_when_they_change(folder: int, place: Path) -> None:
    first = memory.save(folder, Memory(models={"m:latest": (1, 2)}))
    (seen,) = place.parent.glob("seen-*.json")
    inode = seen.stat().st_ino
    memory.save(folder, Memory(models=first.models, looked_at=5.0))
    assert seen.stat().st_ino == inode
    memory.save(folder, Memory(models={"m:latest": (1, 3)}))
    (other,) = place.parent.glob("seen-*.json")
    assert other.name != seen.name
    assert memory.load(folder).models == {"m:latest": (1, 3)}


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_models_that_are_lost_are_as_before_the_first_look(
    folder: int, place: Path, how: str
) -> None:
    saved = memory.save(folder, Memory(models={"m:latest": (1, 2)}, looked_at=5.0))
    (seen,) = place.parent.glob("seen-*.json")
    seen.unlink() if how == "gone" else seen.write_text(seen.read_text().replace("m:l", "x:l"))
    found = memory.load(folder)
    assert (found.models, found.looked_at, found.lost) == (None, 5.0, "")
    memory.save(folder, saved)
    assert memory.load(folder).models == {"m:latest": (1, 2)}

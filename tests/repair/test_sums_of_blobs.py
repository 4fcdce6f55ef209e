"""`verify` makes sums of the chunks of right blobs, and names the damaged ranges of wrong ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import OLD, HealthyStore, audit, run
from tests.support.notation import age
from tests.support.runs import one_run, rules
from watcher.decide import modes
from watcher.model import Ranges, Rules
from watcher.observe.host import Host
from watcher.reconcile import Report
from watcher.state import sums

VERIFY = Rules(mode=modes.VERIFY)
CHUNK, SIZE = 1000, 10_500

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a size that a test can afford."""
    pytest.importorskip("xxhash")
    monkeypatch.setattr(sums, "CHUNK", CHUNK)
    monkeypatch.setattr(sums, "FROM", 2 * CHUNK)


class OneBlob(HealthyStore):
    """A store with a layer of several chunks, and small ones."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.content = b"".join(b"%08d" % number for number in range(SIZE))[:SIZE]
        self.layer = self.digest(self.content.decode())
        self.large = self.blobs / f"sha256-{self.layer}"
        self.large.write_bytes(self.content)
        age(self.large, OLD)
        self.manifest_of("large", self.layer, self.digests[1])
        self.kept = self.ours / sums.FOLDER / self.layer

    def digest(self, text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    def verify(self) -> Report:
        return one_run(Host(str(self.path)), VERIFY)

    def damaged(self, content: bytes) -> None:
        """The same file with other bytes."""
        self.large.write_bytes(content)

    def flipped(self, *places: int) -> bytes:
        found = bytearray(self.content)
        for place in places:
            found[place] ^= 0xFF
        return bytes(found)

    def of_registry(self) -> bytes:
        lines = ""
        for start in range(0, SIZE, 3 * CHUNK):
            part = self.content[start : start + 3 * CHUNK]
            lines += f"sha256:{hashlib.sha256(part).hexdigest()} {start}-{start + len(part) - 1}\n"
        return lines.encode()

    def keep(self, raw: bytes) -> None:
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        self.kept.write_bytes(raw)


@pytest.fixture
def store(tmp_path: Path) -> OneBlob:
    return OneBlob(tmp_path / "models")


def wrong(report: Report) -> list[Ranges]:
    """What findings say."""
    found = [each for each in report.diagnosis.findings if each.kind == "blob_corrupt"]
    assert len(found) == 1
    return [each.wrong for each in found]


def test_sums_are_made_of_what_is_right_and_not_again(store: OneBlob) -> None:
    store.verify()
    chunks = sums.parsed(store.kept.read_bytes(), SIZE)
    assert [(each.start, each.end) for each in chunks] == [
        (start, min(start + CHUNK, SIZE)) for start in range(0, SIZE, CHUNK)
    ]
    assert {each.kind for each in chunks} == {sums.OURS}
    with store.large.open("rb") as file:
        assert not any(sums.wrong(file.fileno(), each) for each in chunks)
    assert os.listdir(store.kept.parent) == [store.layer], "the others are too small"
    before = store.kept.stat()
    store.damaged(store.content)  # of the same bytes, and of another time
    assert store.verify().outcomes
    after = store.kept.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_none_are_made_of_what_is_wrong(store: OneBlob) -> None:
    store.damaged(store.flipped(5))
    assert wrong(store.verify()) == [()]
    assert not store.kept.exists()


DAMAGES: dict[str, tuple[Callable[[OneBlob], bytes], Ranges]] = {
    "a byte": (lambda store: store.flipped(3500), ((3000, 4000),)),
    "the first and the last": (lambda x: x.flipped(0, SIZE - 1), ((0, 1000), (10_000, SIZE))),
    "neighbors": (lambda store: store.flipped(3500, 4500), ((3000, 5000),)),
    # What is there of the chunk in which it ends can't be compared.
    "cut": (lambda store: store.content[:8500], ((8500, SIZE),)),
    "cut to nothing": (lambda _: b"", ((0, SIZE),)),
    "longer": (lambda store: store.content + b"more", ((SIZE, SIZE + 4),)),
    "longer and a byte": (lambda x: x.flipped(1500) + b"m", ((1000, 2000), (SIZE, SIZE + 1))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ranges_are_named_now_and_later(store: OneBlob, damage: str) -> None:
    change, expected = DAMAGES[damage]
    store.verify()
    store.damaged(change(store))
    assert wrong(store.verify()) == [expected]
    assert wrong(store.verify()) == [expected], "what was not read again is known"
    listed = [list(each) for each in expected]
    document: dict[str, Any] = json.loads(run(store.path, "--json", "verify").stdout)
    assert [each["wrong"] for each in document["wrong"]] == [listed]
    (found,) = [each for each in audit(store.path)["findings"] if each["kind"] == "blob_corrupt"]
    assert found["wrong"] == listed
    store.damaged(store.content)
    assert not store.verify().diagnosis.findings


def test_people_see_how_much_is_damaged_and_where(store: OneBlob) -> None:
    store.verify()
    store.damaged(store.flipped(1, 5500))
    words = " ".join(run(store.path, "verify").stdout.split())
    assert "damaged: 2.0 kB in 2 ranges, starting at 0 bytes" in words
    store.damaged(store.flipped(5500))
    words = " ".join(run(store.path, "verify").stdout.split())
    assert "damaged: 1.0 kB, starting at 5.0 kB" in words


def test_the_registrys_sums_name_them_as_well_and_are_not_replaced(store: OneBlob) -> None:
    store.keep(store.of_registry())
    store.verify()
    assert store.kept.read_bytes() == store.of_registry()
    store.damaged(store.flipped(3500))
    assert wrong(store.verify()) == [((3000, 6000),)]


def test_sums_by_which_all_is_right_are_of_something_else(store: OneBlob) -> None:
    store.verify()
    ours = store.kept.read_bytes()
    store.damaged(store.flipped(5))
    lines = ours.splitlines(keepends=True)
    found = sums.hasher(sums.OURS)
    found.update(memoryview(store.flipped(5)[:CHUNK]))
    store.keep(f"xxh3-128:{found.hexdigest()} 0-999\n".encode() + b"".join(lines[1:]))
    assert wrong(store.verify()) == [()]
    assert not store.kept.exists()
    store.damaged(store.content)
    store.verify()
    assert store.kept.read_bytes() == ours


def test_a_stop_while_chunks_are_compared_leaves_the_blob_for_the_next_run(
    store: OneBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.verify()
    store.damaged(store.flipped(3500))
    stopped: list[bool] = []

    def then_stop(*_: object) -> bool:
        stopped.append(True)
        return True

    with monkeypatch.context() as patched:
        patched.setattr(sums, "wrong", then_stop)
        report = one_run(Host(str(store.path)), VERIFY, stop=lambda: bool(stopped))
    assert len(stopped) == 1
    assert not report.outcomes
    assert wrong(store.verify()) == [((3000, 4000),)]


def test_so_many_ranges_and_no_more_are_remembered(
    store: OneBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("watcher.act.answering._MOST_RANGES", 2)
    store.verify()
    store.damaged(store.flipped(500, 2500, 5500, 8500))
    assert wrong(store.verify()) == [((0, 1000), (2000, 9000))]


def _a_folder(kept: Path) -> None:
    kept.mkdir(parents=True)


def _a_symlink(kept: Path) -> None:
    kept.parent.mkdir(parents=True)
    kept.symlink_to("/dev/zero")


def _a_pipe(kept: Path) -> None:
    kept.parent.mkdir(parents=True)
    os.mkfifo(kept)


def _a_flood(kept: Path) -> None:
    kept.parent.mkdir(parents=True)
    with kept.open("wb") as file:
        file.truncate(1 << 40)


def _a_file_for_the_folder(kept: Path) -> None:
    kept.parent.parent.mkdir(parents=True, exist_ok=True)
    kept.parent.write_text("no folder")


@pytest.mark.parametrize("put", [_a_folder, _a_symlink, _a_pipe, _a_flood, _a_file_for_the_folder])
def test_what_is_no_file_of_sums_keeps_nobody_from_verifying(
    store: OneBlob, put: Callable[[Path], None]
) -> None:
    put(store.kept)
    assert not store.verify().diagnosis.findings
    store.damaged(store.flipped(5))
    wrong(store.verify())


def test_without_the_library_nothing_is_made_and_all_else_works(
    store: OneBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.verify()
    monkeypatch.setitem(sys.modules, "xxhash", None)
    store.damaged(store.flipped(5))
    assert wrong(store.verify()) == [()]
    assert store.kept.exists(), "they are of use where the library is there"
    shutil.rmtree(store.kept.parent)
    store.damaged(store.content)
    assert not store.verify().diagnosis.findings
    assert not store.kept.exists()


def test_sums_of_a_removed_blob_are_removed_by_the_next_clean_up(store: OneBlob) -> None:
    store.verify()
    one_run(Host(str(store.path)), rules(clean=True))
    assert store.kept.exists()
    store.large.unlink()
    one_run(Host(str(store.path)), rules(clean=True))
    assert not store.kept.exists()

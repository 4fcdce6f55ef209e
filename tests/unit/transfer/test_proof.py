"""Which chunks are looked at, and what is made of wrong ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from watcher.model import MIB
from watcher.state import sums
from watcher.state.sums import Chunk
from watcher.transfer.proof import Proof

CHUNKS = tuple(Chunk(name * 64, at, at + 10) for at, name in ((0, "a"), (10, "b"), (20, "c")))


def proof(*arrived: tuple[int, int]) -> Proof:
    return Proof(CHUNKS, arrived)


def test_a_layer_without_sums_has_no_chunk_to_be_checked() -> None:
    without = Proof((), ())
    assert without.front(30) == 30
    assert without.ready(((0, 30),)) is None
    assert not without.look_again()


def test_the_first_one_that_is_all_there_is_looked_at() -> None:
    found = proof()
    assert found.front(30) == 0
    assert found.ready(((0, 9), (11, 29))) is None
    assert found.ready(((5, 25),)) == CHUNKS[1]
    assert found.judge(CHUNKS[1], "b" * 64) == 0
    assert found.ready(((5, 25),)) is None
    assert found.front(30) == 0
    assert found.judge(CHUNKS[0], "a" * 64) == 0
    assert found.front(30) == 20


def test_earlier_chunks_are_checked_once_the_whole_layer_is_wrong() -> None:
    found = proof((0, 15))
    assert found.front(30) == 10
    found.judge(CHUNKS[1], "b" * 64)
    found.judge(CHUNKS[2], "c" * 64)
    assert found.front(30) == 30
    assert found.look_again()
    assert found.ready(((0, 30),)) == CHUNKS[0]
    found.judge(CHUNKS[0], "a" * 64)
    assert not found.look_again()


def test_a_wrong_one_is_counted_and_the_same_again_means_wrong_sums() -> None:
    found = proof()
    assert [found.judge(CHUNKS[0], each * 64) for each in "xyx"] == [1, 2, None]
    assert found.front(30) == 0
    found.drop()
    assert (found.front(30), found.chunks) == (30, ())


def test_sums_that_never_were_right_cost_one_chunk() -> None:
    found, all_of_it = proof(), ((0, 30),)
    found.judge(CHUNKS[1], "x" * 64)
    assert found.ready(all_of_it) == CHUNKS[1]
    assert found.ready(((0, 10), (20, 30))) is None
    found.judge(CHUNKS[1], "b" * 64)
    assert found.ready(all_of_it) == CHUNKS[0]


def raw(*pairs: tuple[int, int]) -> bytes:
    return b"".join(b"sha256:%s %d-%d\n" % (b"a" * 64, *pair) for pair in pairs)


def ours(*pairs: tuple[int, int]) -> bytes:
    return raw(*pairs).replace(b"sha256:" + b"a" * 64, b"xxh3-128:" + b"a" * 32)


def test_sums_of_ours_are_read_as_the_registrys() -> None:
    assert sums.parsed(ours((0, 29))) == (Chunk("a" * 32, 0, 30, sums.OURS),)
    assert sums.parsed(raw((0, 29))) == (Chunk("a" * 64, 0, 30, sums.REGISTRY),)


@pytest.mark.parametrize("kind", [sums.REGISTRY, sums.OURS])
def test_a_chunk_is_compared_by_its_kind(kind: str, tmp_path: Path) -> None:
    if kind == sums.OURS:
        pytest.importorskip("xxhash")
    content = b"a" * (3 * MIB + 1)
    path = tmp_path / "data"
    path.write_bytes(b"before" + content + b"behind")
    found = sums.hasher(kind)
    found.update(memoryview(content))
    chunk = Chunk(found.hexdigest(), 6, 6 + len(content), kind)
    with path.open("rb") as file:
        assert sums.hash_of(file.fileno(), chunk) == chunk.digest
        assert sums.hash_of(file.fileno(), chunk._replace(start=7)) != chunk.digest
        assert sums.hash_of(file.fileno(), chunk._replace(end=chunk.end + 100)) != chunk.digest


def test_without_the_library_sums_of_ours_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    ours_fd = os.open(tmp_path, os.O_RDONLY)
    try:
        for text, number in ((raw((0, 29)), 1), (ours((0, 29)), 0)):
            sums.keep(ours_fd, "d", text)
            assert len(sums.kept(ours_fd, "d", 30)) == number
    finally:
        os.close(ours_fd)


def test_sums_are_read_with_any_space_between() -> None:
    text = raw((0, 9), (10, 29)).replace(b"\n", b" \t\r\n ")
    assert [each[1:3] for each in sums.parsed(text, 30)] == [(0, 10), (10, 30)]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        raw((0, 9)),
        raw((0, 9), (10, 30)),
        raw((0, 9), (11, 29)),
        raw((0, 9), (9, 29)),
        raw((0, 9), (10, 9), (10, 29)),
        raw((10, 29)),
        raw((10, 29), (0, 9)),
        raw((0, 29))[:-1] + b"9" * 30,
        raw((0, 29)) + b"x",
        raw((0, 29)).replace(b"sha256:", b"md5:"),
        raw((0, 29)).replace(b"a" * 64, b"a" * 63),
        raw((0, 29)).replace(b"sha256:", b"xxh3-128:"),
        ours((0, 29)).replace(b"xxh3-128:", b"sha256:"),
        ours((0, 9)) + raw((10, 29)),
        b"<html>",
        b"\xff" * 100,
    ],
)
def test_sums_that_do_not_cover_the_whole_layer_are_rejected(text: bytes) -> None:
    with pytest.raises(ValueError, match="sums"):
        sums.parsed(text, 30)


def test_a_chunk_that_might_never_be_all_there_is_not_believed() -> None:
    size = 1 << 30
    with pytest.raises(ValueError, match="sums"):
        sums.parsed(raw((0, size - 1)), size)

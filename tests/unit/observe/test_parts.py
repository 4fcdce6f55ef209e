"""Which bytes of a data file can be trusted, on real sparse files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from watcher.model import MIB, Part, Trust
from watcher.observe import parts
from watcher.observe.parts import Content
from watcher.ollama import ranges

K = 4096
X = b"\x5a"


class File:
    """A sparse file, and what is trusted of it."""

    def __init__(self, path: Path, size: int) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.size = size
        os.ftruncate(self.fd, size)

    def write(self, start: int, end: int, byte: bytes = X) -> None:
        os.pwrite(self.fd, byte * (end - start), start)

    def trust(self, *given: Part, **more: Any) -> Trust:
        limits = parts.Limits(more.pop("read_limit", None), more.pop("stop", lambda: False))
        return parts.trust(Content(self.fd, self.size), given, parts.Doubts(**more), limits)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    made = File(tmp_path / "data", 64 * MIB)
    yield made
    os.close(made.fd)


def whole(completed: int = 0, size: int = 64 * MIB) -> Part:
    return Part(0, 0, size, completed)


def test_nothing_written_is_nothing_trusted(file: File) -> None:
    trust = file.trust(whole())
    assert (trust.claimed, trust.present, trust.trusted) == ((), (), ())
    assert trust.has_holes


def test_bytes_that_are_claimed_and_present_are_trusted(file: File) -> None:
    file.write(0, 8 * MIB)
    trust = file.trust(whole(8 * MIB))
    assert trust.claimed == trust.present == trust.trusted == ((0, 8 * MIB),)


def test_the_first_mebibyte_behind_the_claim_is_doubted(file: File) -> None:
    # Each retry starts there, and a failed one may have written an error page over good data.
    file.write(0, 8 * MIB)
    assert file.trust(whole(3 * MIB)).trusted == ((0, 3 * MIB), (4 * MIB, 8 * MIB))
    assert file.trust(whole(0)).trusted == ((MIB, 8 * MIB),)


def test_less_than_a_mebibyte_behind_the_claim_adds_nothing(file: File) -> None:
    file.write(0, 4 * MIB)
    assert file.trust(whole(3 * MIB)).trusted == ((0, 3 * MIB),)
    assert file.trust(whole(3 * MIB + 1)).trusted == ((0, 3 * MIB + 1),)


def test_only_what_touches_the_claim_is_trusted(file: File) -> None:
    file.write(0, 2 * MIB)
    file.write(8 * MIB, 16 * MIB)
    trust = file.trust(whole(2 * MIB))
    assert trust.trusted == ((0, 2 * MIB),)
    assert trust.present == ((0, 2 * MIB), (8 * MIB, 16 * MIB))


def test_trust_ends_at_the_last_byte_that_is_not_zero(file: File) -> None:
    # The allocation is rounded up to a block, and behind the last byte written there are zeros.
    file.write(0, 8 * MIB + 100)
    assert file.trust(whole()).trusted == ((MIB, 8 * MIB + 100),)


def test_zeros_at_the_end_are_not_believed(file: File) -> None:
    file.write(0, 4 * MIB)
    file.write(4 * MIB, 8 * MIB, b"\0")
    assert file.trust(whole()).trusted == ((MIB, 4 * MIB),)


def test_sixteen_mebibytes_of_zeros_are_enough_to_stop_looking(file: File) -> None:
    file.write(0, 2 * MIB)
    file.write(2 * MIB, 30 * MIB, b"\0")
    end = 30 * MIB - parts.ZEROS_ENOUGH
    assert file.trust(whole()).trusted == ((MIB, end),)


def test_zeros_within_a_claim_are_believed(file: File) -> None:
    file.write(0, 8 * MIB, b"\0")
    assert file.trust(whole(8 * MIB)).trusted == ((0, 8 * MIB),)


def test_the_block_at_a_parts_end_belongs_to_the_next_part_too(file: File) -> None:
    # Part 0 ends within a block that part 1 has begun: no hole shows that its end is missing.
    border = 10 * MIB + 256
    first, second = Part(0, 0, border, 0), Part(1, border, 64 * MIB - border, 0)
    file.write(border, border + 4 * MIB)
    trust = file.trust(first, second)
    assert trust.trusted == ((border + MIB, border + 4 * MIB),)
    file.write(0, border - 256)
    assert ranges.intersection(file.trust(first, second).trusted, ((border - 256, border),)) == ()


def test_each_part_has_a_doubted_head_of_its_own(file: File) -> None:
    file.write(0, 64 * MIB)
    half = 32 * MIB
    trust = file.trust(Part(0, 0, half, 0), Part(1, half, half, 5 * MIB))
    assert trust.trusted == ((MIB, half + 5 * MIB), (half + 6 * MIB, 64 * MIB))


def test_holes_in_a_claim_make_only_those_ranges_missing(file: File) -> None:
    file.write(0, 4 * MIB)
    file.write(8 * MIB, 16 * MIB)
    trust = file.trust(whole(16 * MIB))
    assert trust.claimed == ((0, 16 * MIB),)
    assert trust.trusted == ((0, 4 * MIB), (8 * MIB, 16 * MIB))


def test_zeros_beside_a_hole_in_a_claim_are_missing_as_well(file: File) -> None:
    """The data was cut within a block, and a server has made it longer again and gone on behind."""
    file.write(0, 3 * MIB + 100)
    file.write(9 * MIB + 300, 9 * MIB + 500)
    for completed in (9 * MIB + 300, 9 * MIB + 500):
        trust = file.trust(whole(completed))
        expected = ranges.normal([(0, 3 * MIB + 100), (9 * MIB + 300, completed)])
        assert trust.trusted == expected


def test_sixteen_mebibytes_of_zeros_beside_a_hole_are_enough(file: File) -> None:
    file.write(10 * MIB, 50 * MIB, b"\0")
    assert file.trust(whole(60 * MIB)).trusted == ((26 * MIB, 34 * MIB),)


def test_claims_beyond_the_end_of_the_data_are_not_trusted(tmp_path: Path) -> None:
    short = File(tmp_path / "short", 3 * MIB)
    short.write(0, 3 * MIB)
    trust = short.trust(whole(8 * MIB), Part(1, 64 * MIB, MIB, MIB))
    os.close(short.fd)
    assert trust.trusted == ((0, 3 * MIB),)
    assert trust.claimed == ((0, 8 * MIB), (64 * MIB, 65 * MIB))


def test_no_data_is_no_trust() -> None:
    trust = parts.trust(None, [whole(5 * MIB)], parts.Doubts(), parts.Limits())
    assert trust.claimed == ((0, 5 * MIB),)
    assert trust.present == trust.trusted == ()


def test_a_part_whose_sidecar_is_lost_is_trusted_behind_its_first_mebibyte(file: File) -> None:
    lost = Part(-1, 16 * MIB, 16 * MIB, 0)
    file.write(16 * MIB, 24 * MIB)
    assert file.trust(Part(0, 0, 16 * MIB, 0), lost).trusted == ((17 * MIB, 24 * MIB),)


@pytest.mark.parametrize("rebooted", [True, False])
def test_blocks_of_zeros_are_doubted_after_a_reboot(file: File, rebooted: bool) -> None:
    # A power cut leaves blocks that were allocated and never written.
    file.write(0, 8 * MIB)
    file.write(2 * MIB, 2 * MIB + K, b"\0")
    file.write(6 * MIB + 100, 6 * MIB + 100 + 2 * K, b"\0")
    trust = file.trust(whole(4 * MIB), rebooted=rebooted)
    expected: tuple[tuple[int, int], ...] = ((0, 4 * MIB), (5 * MIB, 8 * MIB))
    if rebooted:
        zeros = ((2 * MIB, 2 * MIB + K), (6 * MIB + K, 6 * MIB + 2 * K))
        expected = ranges.difference(expected, zeros)
    assert trust.trusted == expected
    assert trust.rebooted is rebooted


def test_zeros_at_the_border_of_a_claim_are_found_within_their_block(file: File) -> None:
    file.write(0, 8 * MIB)
    file.write(2 * MIB, 2 * MIB + K, b"\0")
    trusted = file.trust(whole(2 * MIB + 100), rebooted=True).trusted
    assert trusted == ((0, 2 * MIB), (3 * MIB + 100, 8 * MIB))


def test_a_file_without_holes_goes_by_its_last_bytes(tmp_path: Path) -> None:
    # exFAT, or `cp --sparse=never`: what was never written is zeros, however many.
    copy = File(tmp_path / "copy", 40 * MIB)
    copy.write(0, 40 * MIB, b"\0")
    copy.write(0, 5 * MIB)
    copy.write(20 * MIB, 23 * MIB)
    trust = copy.trust(Part(0, 0, 20 * MIB, 0), Part(1, 20 * MIB, 20 * MIB, MIB))
    os.close(copy.fd)
    assert not trust.has_holes
    assert trust.trusted == ((MIB, 5 * MIB), (20 * MIB, 21 * MIB), (22 * MIB, 23 * MIB))


def test_a_file_without_holes_is_not_read_beyond_the_limit(tmp_path: Path) -> None:
    copy = File(tmp_path / "copy", 8 * MIB)
    copy.write(0, 8 * MIB)
    trust = copy.trust(whole(3 * MIB, size=8 * MIB), read_limit=MIB)
    os.close(copy.fd)
    assert not trust.zeros_read
    assert trust.trusted == ((0, 3 * MIB),)


def test_a_whole_file_is_present_to_the_last_byte(tmp_path: Path) -> None:
    full = File(tmp_path / "full", 8 * MIB + 5)
    full.write(0, 8 * MIB + 5)
    assert full.trust(whole(0, size=8 * MIB + 5)).present == ((0, 8 * MIB + 5),)
    os.close(full.fd)


def test_data_that_can_not_be_read_is_an_error(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write(0, 8 * MIB)

    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(OSError):
        file.trust(whole())


def test_the_time_of_access_and_the_holes_stay(file: File, tmp_path: Path) -> None:
    file.write(0, 8 * MIB)
    before = os.fstat(file.fd).st_blocks
    file.trust(whole(), rebooted=True)
    assert os.fstat(file.fd).st_blocks == before

"""Sidecars: bytes, the part rule, and what is wrong with a set."""

from __future__ import annotations

import itertools

import pytest

from watcher.model import Entry, Kind, Part, Sidecar
from watcher.ollama import ranges, sidecars

MB = 1_000_000
ENTRY = Entry("x", Kind.FILE, 60, 4096, 1, 1, 1, 0, 0, 0, 0, 0o644)


def sidecar(number: int | None, part: Part | None, fault: str | None = None) -> Sidecar:
    if part is not None and fault is None:
        fault = sidecars.part_fault(number, part)
    return Sidecar(ENTRY, number, part, fault)


def sound(total: int) -> list[Sidecar]:
    return [sidecar(part.number, part) for part in sidecars.part_rule(total)]


def test_bytes_are_to_the_letter_the_servers() -> None:
    raw = b'{"N":1,"Offset":100000000,"Size":100000000,"Completed":48000000}\n'
    part = Part(1, 100 * MB, 100 * MB, 48 * MB)
    assert sidecars.parse(raw) == part
    assert sidecars.write(part) == raw


@pytest.mark.parametrize("raw", [b"{}", b"null", b"null ", b'{"n":0}', b'{"Unknown":[1]}'])
def test_text_that_the_server_reads_as_an_empty_part_is_a_faulty_part(raw: bytes) -> None:
    part = sidecars.parse(raw)
    assert part == Part(0, 0, 0, 0)
    assert sidecars.part_fault(0, part)


@pytest.mark.parametrize("raw", [b"", b"\n", b"[]", b'"x"', b"0", b'{"N":"0"}', b'{"Size":1.0}'])
def test_text_that_the_server_rejects_does_not_parse(raw: bytes) -> None:
    with pytest.raises(ValueError):
        sidecars.parse(raw)


@pytest.mark.parametrize(
    ("total", "sizes"),
    [
        (0, []),
        (1, [1]),
        (100 * MB, [100 * MB]),
        (262 * MB, [100 * MB, 100 * MB, 62 * MB]),
        (1600 * MB, [100 * MB] * 16),
        (1600 * MB + 5, [100 * MB] * 16 + [5]),
        (16 * 250 * MB + 3, [250 * MB] * 16 + [3]),
        (17_000 * MB, [1000 * MB] * 17),
    ],
)
def test_the_part_rule(total: int, sizes: list[int]) -> None:
    parts = sidecars.part_rule(total)
    assert [part.size for part in parts] == sizes
    assert [part.number for part in parts] == list(range(len(sizes)))
    assert sum(part.size for part in parts) == total


@pytest.mark.parametrize(
    ("number", "part"),
    [
        (None, Part(0, 0, 5, 0)),
        (1, Part(0, 0, 5, 0)),
        (0, Part(0, -1, 5, 0)),
        (0, Part(0, 0, 5, -1)),
        (0, Part(0, 0, 0, 0)),
        (0, Part(0, 0, -5, 0)),
        (0, Part(0, 0, 5, 6)),
    ],
)
def test_faults_of_one_part(number: int | None, part: Part) -> None:
    assert sidecars.part_fault(number, part)


def test_a_valid_set_has_no_faults() -> None:
    assert sidecars.faults(sound(262 * MB), None) == ()
    assert sidecars.faults(sound(262 * MB), 262 * MB) == ()


def test_any_partition_is_sound() -> None:
    edges = [0, 1, 5, 1000, 1001, 50_000]
    parts = [Part(n, a, b - a, 0) for n, (a, b) in enumerate(itertools.pairwise(edges))]
    assert sidecars.faults([sidecar(part.number, part) for part in parts], 50_000) == ()


def test_a_missing_number() -> None:
    assert sidecars.faults([*sound(262 * MB)[:1], *sound(262 * MB)[2:]], None)
    assert sidecars.faults(sound(262 * MB)[1:], None)


def test_a_wrong_total() -> None:
    assert sidecars.faults(sound(262 * MB), 263 * MB)
    assert sidecars.faults(sound(262 * MB)[:2], 262 * MB)


def test_gaps_and_overlaps() -> None:
    gap = [sidecar(0, Part(0, 0, 5, 0)), sidecar(1, Part(1, 6, 5, 0))]
    overlap = [sidecar(0, Part(0, 0, 7, 0)), sidecar(1, Part(1, 6, 5, 0))]
    inside = [sidecar(0, Part(0, 0, 100, 0)), sidecar(1, Part(1, 10, 90, 0))]
    assert sidecars.faults(gap, None)
    assert sidecars.faults(overlap, None)
    assert sidecars.faults(inside, 100)


def test_an_unparsable_one_spoils_the_set() -> None:
    broken = [*sound(262 * MB)[:2], sidecar(2, None, "empty")]
    assert any("empty" in fault for fault in sidecars.faults(broken, 262 * MB))


def test_of_overlapping_parts_none_is_believed() -> None:
    wide, inside, behind = Part(0, 0, 100, 0), Part(1, 10, 10, 10), Part(2, 30, 10, 10)
    apart = Part(3, 100, 50, 5)
    each = [sidecar(part.number, part) for part in (wide, inside, behind, apart)]
    assert sidecars.believable(each, 200) == (apart,)


def test_a_part_beyond_the_total_is_not_believed() -> None:
    assert sidecars.believable([sidecar(0, Part(0, 0, 100, 0))], 99) == ()


def test_lost_parts_follow_the_part_rule_between_their_neighbours() -> None:
    kept = Part(1, 100 * MB, 100 * MB, 7)
    assert sidecars.fill_gaps([kept], 262 * MB, ()) == (
        Part(-1, 0, 100 * MB, 0),
        kept,
        Part(-1, 200 * MB, 62 * MB, 0),
    )


def test_parts_with_filled_gaps_cover_every_byte_once() -> None:
    known = [Part(0, 30 * MB, 100 * MB, 0), Part(1, 200 * MB, 5, 0)]
    parts = sidecars.fill_gaps(known, 262 * MB, ())
    assert ranges.normal((part.offset, part.end) for part in parts) == ((0, 262 * MB),)
    assert sum(part.size for part in parts) == 262 * MB


def test_claims_are_what_the_sidecars_say() -> None:
    parts = [Part(0, 0, 100, 40), Part(1, 100, 100, 100), Part(2, 200, 10, 1)]
    assert sidecars.claims(parts) == ((0, 40), (100, 201))
    assert sidecars.claims([part._replace(completed=0) for part in parts]) == ()


def test_a_fault_names_its_part() -> None:
    faulty = sidecar(7, None, "empty")
    assert "part 7" in sidecars.faults([faulty], None)[0]

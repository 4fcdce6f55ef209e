"""The algebra of ranges, against sets of integers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from watcher.model import Ranges
from watcher.ollama import ranges

PIECES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8)
RANGES = PIECES.map(ranges.normal)


def members(pieces: Ranges | list[tuple[int, int]]) -> set[int]:
    return {number for start, end in pieces for number in range(start, end)}


def is_normal(made: Ranges) -> bool:
    edges = [edge for piece in made for edge in piece]
    return edges == sorted(set(edges))


@given(PIECES)
def test_normal_has_the_same_members_and_one_form(pieces: list[tuple[int, int]]) -> None:
    made = ranges.normal(pieces)
    assert members(made) == members(pieces)
    assert is_normal(made)
    assert ranges.normal(made) == made
    assert ranges.size(made) == len(members(pieces))


@given(RANGES, RANGES)
def test_two_sets(first: Ranges, second: Ranges) -> None:
    for made, expected in (
        (ranges.union(first, second), members(first) | members(second)),
        (ranges.intersection(first, second), members(first) & members(second)),
        (ranges.difference(first, second), members(first) - members(second)),
    ):
        assert members(made) == expected
        assert is_normal(made)


@given(RANGES, st.integers(0, 45))
def test_complement(first: Ranges, end: int) -> None:
    made = ranges.complement(first, end)
    assert members(made) == set(range(end)) - members(first)
    assert is_normal(made)

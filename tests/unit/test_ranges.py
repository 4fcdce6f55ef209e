"""Sets of byte ranges: the cases that go wrong. The algebra is in ``tests/laws``."""

from __future__ import annotations

from watcher.ollama import ranges


def test_normal_joins_what_touches_and_drops_what_is_empty() -> None:
    assert ranges.normal([(5, 9), (0, 3), (3, 5), (20, 20), (30, 25)]) == ((0, 9),)


def test_a_range_inside_another_adds_nothing() -> None:
    assert ranges.normal([(0, 100), (10, 20), (90, 110)]) == ((0, 110),)


def test_complement_ends_at_the_given_end() -> None:
    assert ranges.complement(((2, 4), (8, 20)), 10) == ((0, 2), (4, 8))
    assert ranges.complement((), 3) == ((0, 3),)
    assert ranges.complement((), 0) == ()


def test_difference_with_nothing_is_the_same() -> None:
    assert ranges.difference(((1, 5),), ()) == ((1, 5),)
    assert ranges.difference((), ((1, 5),)) == ()


def test_size_counts_bytes() -> None:
    assert ranges.size(((0, 3), (10, 14))) == 7

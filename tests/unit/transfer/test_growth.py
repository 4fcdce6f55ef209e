"""How many connections are used on lines of all kinds, by a clock of the test's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from watcher.transfer.growth import Growth

MB = 1_000_000
#: Bytes per second of a line, by the seconds since it began and the connections that are used.
Line = Callable[[float, int], float]


def settled(line: Line, first: int = 8, most: int = 16) -> list[int]:
    """The numbers that were used one after the other in a minute."""
    growth, came, used = Growth(first, most), 0.0, [first]
    for turn in range(120):
        number = growth.look(100 + turn / 2, int(came), all_used=True)
        if number != used[-1]:
            used.append(number)
        came += line(turn / 2, number) / 2
    return used


def test_where_each_connection_is_limited_more_are_used() -> None:
    assert settled(lambda _, number: 10 * MB * number) == [8, 12, 16]


def test_where_the_line_is_the_limit_a_try_is_the_end_of_it() -> None:
    assert settled(lambda _, __: 12 * MB) == [8, 12, 8]


def test_where_the_line_holds_only_some_more_those_are_used() -> None:
    assert settled(lambda _, number: MB * min(10 * number, 125)) == [8, 12, 16, 12]


def test_a_line_that_still_gets_faster_is_not_judged_yet() -> None:
    def line(seconds: float, number: int) -> float:
        return MB * min(10 * math.exp(0.4 * seconds), 100)

    assert settled(line) == [8, 12, 8]


def test_a_line_that_is_never_steady_keeps_what_it_began_with() -> None:
    assert settled(lambda seconds, _: MB * (50 if seconds % 3 < 1.5 else 10)) == [8]


def test_a_line_without_a_byte_keeps_what_it_began_with() -> None:
    assert settled(lambda *_: 0.0) == [8]


@pytest.mark.parametrize("first", [1, 2, 3, 16, 64])
def test_one_number_alone_is_never_left(first: int) -> None:
    assert settled(lambda _, number: MB * number, first, first) == [first]


def test_one_connection_may_become_many() -> None:
    assert settled(lambda _, number: MB * number, 1, 5) == [1, 2, 3, 4, 5]


def test_after_a_complaint_no_more_are_tried() -> None:
    growth = Growth(8, 16)
    growth.stop()
    assert {growth.look(turn, 80 * MB * turn, all_used=True) for turn in range(60)} == {8}


def test_while_some_have_nothing_to_do_nothing_is_measured() -> None:
    growth = Growth(8, 16)
    seen = {growth.look(turn / 2, 40 * MB * turn, all_used=turn % 2 > 0) for turn in range(60)}
    assert seen == {8}

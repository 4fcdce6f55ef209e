"""Which bytes are asked for next."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from watcher.ollama import ranges
from watcher.transfer.pieces import Piece, Pieces

MANY = 10**9


def taken(pieces: Pieces, hashed: int = 0) -> list[tuple[int, int]]:
    found = []
    while (piece := pieces.take(hashed)) is not None:
        found.append((piece.at, piece.end))
    return found


def test_pieces_come_in_order_on_a_grid() -> None:
    assert taken(Pieces(10, ((3, 5),), 4, MANY)) == [(0, 3), (5, 8), (8, 10)]


def test_a_piece_given_back_comes_first() -> None:
    pieces = Pieces(100, (), 10, MANY)
    first, second = pieces.take(0), pieces.take(0)
    assert first is not None
    assert second is not None
    first.at = 7
    pieces.give_back(first)
    again = pieces.take(0)
    assert again is not None
    assert (again.at, again.end) == (7, 10)


def test_the_front_is_the_first_byte_that_has_not_arrived() -> None:
    pieces = Pieces(20, ((0, 5),), 10, MANY)
    assert pieces.front == 5
    first, second = pieces.take(5), pieces.take(5)
    assert first is not None
    assert second is not None
    first.at = 8
    assert pieces.front == 8
    first.at = first.end
    assert pieces.front == 10
    pieces.give_back(first)
    second.at = second.end
    pieces.give_back(second)
    assert (pieces.front, pieces.rest) == (20, 0)


def test_nothing_is_given_too_far_ahead_of_the_hash() -> None:
    pieces = Pieces(100, (), 10, 20)
    assert taken(pieces) == [(0, 10), (10, 20)]


def test_a_front_that_moves_lets_more_be_given() -> None:
    pieces = Pieces(100, (), 10, 20)
    first = pieces.take(0)
    pieces.take(0)
    assert first is not None
    assert pieces.take(0) is None
    first.at = 10
    pieces.give_back(first)
    assert pieces.take(0) is None  # it has arrived and is not hashed yet
    assert pieces.take(10) is not None


def test_bytes_that_were_there_before_do_not_count_as_distance() -> None:
    pieces = Pieces(1000, ((10, 900),), 10, 20)
    assert taken(pieces) == [(0, 10), (900, 910)]


def test_forgotten_bytes_are_given_out_again() -> None:
    pieces = Pieces(100, ((0, 100),), 10, 20)
    assert pieces.take(0) is None
    pieces.forget(((40, 55),))
    assert pieces.front == 40
    assert taken(pieces, 40) == [(40, 50), (50, 55)]


@given(
    st.integers(0, 300), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300))), st.data()
)
def test_every_missing_byte_is_given_once(
    total: int, arrived: list[tuple[int, int]], data: st.DataObject
) -> None:
    there = ranges.within(ranges.normal(arrived), 0, total)
    pieces = Pieces(total, there, data.draw(st.integers(1, 50)), data.draw(st.integers(1, 80)))
    chance = random.Random(data.draw(st.integers(0, 99)))
    given_out: list[Piece] = []
    received: list[int] = []
    while pieces.rest:
        piece = pieces.take(pieces.front)
        if piece is not None:
            given_out.append(piece)
            if chance.random() < 0.5:
                continue
        piece = given_out.pop(chance.randrange(len(given_out)))
        until = chance.randint(piece.at, piece.end)
        received += range(piece.at, until)
        piece.at = until
        pieces.give_back(piece)
    missing = ranges.complement(there, total)
    assert sorted(received) == [at for start, end in missing for at in range(start, end)]
    assert pieces.front == total

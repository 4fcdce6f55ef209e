"""When a request may be closed, and what was lost without a word, by the lines of a stream."""

from __future__ import annotations

import pytest

from watcher.ollama.pull_stream import Status
from watcher.pull.layers import PREPARED_SECONDS, LayerProgress

A, B = "a" * 64, "b" * 64
MB = 1_000_000


def heard(
    *lines: tuple[str, int, int], every: float = 0.06, **more: dict[str, int]
) -> LayerProgress:
    """What such lines (digest, total, completed) have told; the last one at a whole number."""
    made = LayerProgress(0.0, **more)
    for number, (digest, total, completed) in enumerate(lines):
        made.take(Status("pulling", digest, total, completed), every * (number - len(lines) + 1))
    return made


@pytest.mark.parametrize(
    ("lines", "prepared"),
    [
        ([("", 0, 0)], False),
        ([(A, 0, 0), (A, 0, 0)], False),
        ([(A, 9 * MB, 0), (A, 9 * MB, 0)], False),
        ([(A, 9 * MB, 0), (A, 9 * MB, MB)], True),
        # An attempt that is thrown away has been begun.
        ([(A, 9 * MB, MB), (A, 9 * MB, 0)], True),
        # Sidecars are being read: their sizes and what they claim are added up.
        ([(A, 0, 0), (A, 5 * MB, MB), (A, 9 * MB, 2 * MB)], False),
        # The server may be at the next layer by now.
        ([(A, 9 * MB, MB), (A, 9 * MB, 9 * MB)], False),
        ([(A, 9 * MB, MB), (A, 9 * MB, 2 * MB), (B, 9 * MB, 0)], False),
        # The transfer path tells of all layers in one.
        ([("", 9 * MB, 0)], True),
    ],
)
def test_a_layer_that_moves_is_prepared(lines: list[tuple[str, int, int]], prepared: bool) -> None:
    assert heard(*lines).is_prepared(0.0) is prepared


def test_a_layer_whose_length_is_known_for_long_is_prepared() -> None:
    def still(digest: str, total: int, completed: int, seconds: float) -> bool:
        made = heard((digest, total, completed))
        made.take(Status("pulling", digest, total, completed), seconds)
        return made.is_prepared(seconds)

    assert not still(A, 9 * MB, 0, PREPARED_SECONDS - 1)
    assert still(A, 9 * MB, 0, PREPARED_SECONDS)
    assert not still(A, 0, 0, PREPARED_SECONDS)
    assert not still(A, 9 * MB, 9 * MB, PREPARED_SECONDS)


def test_after_a_silence_the_server_may_be_at_the_next_layer() -> None:
    """Of a layer's end no line tells; while the next one is prepared none comes."""
    made = heard((A, 9 * MB, MB), (A, 9 * MB, 8 * MB))
    assert made.is_prepared(0.5)
    assert not made.is_prepared(1.0)
    assert not made.is_prepared(PREPARED_SECONDS + 1)


def test_who_has_joined_what_another_prepares_hears_no_length() -> None:
    assert heard((A, 0, 0)).is_joined
    assert not heard((A, 9 * MB, 0)).is_joined
    assert not heard(("", 0, 0)).is_joined


def test_what_the_disk_had_before_and_nobody_counts_is_lost() -> None:
    told = heard((A, 90 * MB, 0), uncounted={A: 0})
    assert told.weigh(20 * MB, 1.0) == 0, "it may be counted by the next line"
    assert told.weigh(20 * MB, 2.0) == 20 * MB
    told.take(Status("pulling", A, 90 * MB, 15 * MB), 2.5)
    assert told.weigh(35 * MB, 3.0) == 5 * MB


def test_a_healthy_layer_loses_nothing_however_late_its_lines_come() -> None:
    told = heard((A, 900 * MB, 0), uncounted={A: 0})
    for second in range(1, 9):
        assert told.weigh(100 * MB * second, float(second)) == 0
        told.take(Status("pulling", A, 900 * MB, 100 * MB * second), second + 0.5)


def test_what_was_uncounted_before_is_not_lost_now() -> None:
    told = heard((A, 90 * MB, 10 * MB), uncounted={A: 30 * MB})
    assert [told.weigh(40 * MB, 1.0), told.weigh(40 * MB, 2.0)] == [0, 0]
    unknown = heard((A, 90 * MB, 10 * MB))
    assert [unknown.weigh(40 * MB, 1.0), unknown.weigh(60 * MB, 2.0)] == [0, 0]
    assert unknown.weigh(60 * MB, 3.0) == 20 * MB


def test_another_layer_is_weighed_anew() -> None:
    told = heard((A, 90 * MB, 0), uncounted={A: 0, B: 0})
    told.weigh(50 * MB, 1.0)
    told.take(Status("pulling", B, 90 * MB, 0), 1.5)
    assert not told.wants_weighing(2.0)
    assert told.wants_weighing(2.5)
    assert told.weigh(0, 2.5) == 0


def test_where_blocks_show_nothing_no_layer_is_weighed() -> None:
    """A file system with two copies of each block allocates twice what comes."""
    told = heard((A, 900 * MB, 0), uncounted={A: 1 << 62})
    for second in range(1, 9):
        assert told.weigh(200 * MB * second, float(second)) == 0
        told.take(Status("pulling", A, 900 * MB, 100 * MB * second), second + 0.5)

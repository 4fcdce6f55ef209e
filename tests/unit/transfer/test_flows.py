"""Which connection is called slow."""

from __future__ import annotations

import pytest

from watcher.transfer.flows import is_slow


@pytest.mark.parametrize(
    ("rate", "rates", "slow"),
    [
        (1.0, [1.0, 1.0, 1.0], False),
        (1.0, [1.0, 5.0, 5.0], True),
        (1.25, [1.25, 5.0, 5.0], False),
        (1.0, [1.0, 5.0], False),
        (0.0, [0.0, 0.0, 0.0], False),
    ],
)
def test_a_connection_is_slow_if_it_is_far_below_the_median_of_enough_others(
    rate: float, rates: list[float], slow: bool
) -> None:
    assert is_slow(rate, rates) is slow

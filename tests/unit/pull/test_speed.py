"""Speed: beginnings, clocks that stand still, and bounds."""

from __future__ import annotations

from watcher.pull import speed
from watcher.pull.speed import Meter, Spread


def test_before_anything_is_known_nothing_is_reported() -> None:
    meter = Meter()
    assert (meter.rate(5.0), meter.spread) == (None, None)
    assert meter.seconds_left(5.0, 10) is None
    meter.add(5.0, 0)
    assert (meter.rate(5.0), meter.arrived) == (None, 0)


def test_bytes_of_one_instant_count_with_the_next_one() -> None:
    meter = Meter()
    meter.add(0.0, 0)
    meter.add(0.0, 500)
    assert meter.rate(0.0) is None
    meter.add(1.0, 500)
    assert round(meter.rate(1.0) or 0) == 1000


def test_a_clock_that_goes_backwards_stands_still() -> None:
    meter = Meter()
    meter.add(10.0, 0)
    meter.add(11.0, 100)
    meter.add(5.0, 100)
    meter.add(12.0, 0)
    assert round(meter.rate(12.0) or 0) == 100
    assert meter.rate(3.0) == meter.rate(12.0)
    assert meter.seconds == 2


def test_a_reset_costs_what_was_lost_and_no_negative_rate() -> None:
    meter = Meter()
    for now, change in ((0.0, 0), (1.0, 100), (2.0, -60), (3.0, 100)):
        meter.add(now, change)
    assert (meter.arrived, meter.lost, meter.resets) == (200, 60, 1)
    assert meter.spread == Spread(0, 100, 100)


def test_samples_are_a_ring() -> None:
    meter = Meter()
    for second in range(speed._SAMPLES + 50):
        meter.add(float(second), 0 if second < 25 else 100)
    assert len(meter._samples) == speed._SAMPLES
    assert meter.spread == Spread(100, 100, 100)


def test_a_stall_is_reported_while_it_lasts_and_once() -> None:
    meter = Meter(stall_seconds=30)
    meter.add(0.0, 0)
    meter.add(1.0, 5)
    for now, stalls in ((30.9, 0), (31.0, 1), (60.0, 1), (200.0, 1)):
        meter.add(now, 0)
        assert meter.stalls == stalls
    meter.add(201.0, 1)
    meter.add(231.0, 0)
    assert meter.stalls == 2


def test_while_nothing_is_to_come_no_time_passes() -> None:
    meter = Meter(stall_seconds=30)
    meter.rest(0.0)
    meter.add(5.0, 0)
    meter.add(7.0, 200)
    meter.rest(8.0)
    assert meter.rate(9.0) is None
    meter.rest(50.0)
    meter.add(100.0, 0)
    meter.add(102.0, 200)
    assert (meter.seconds, meter.stalls, meter.spread) == (5, 0, Spread(0, 100, 100))


def test_a_stall_that_our_end_ends_counts() -> None:
    meter = Meter(stall_seconds=30)
    meter.add(0.0, 0)
    meter.rest(30.5)
    meter.rest(99.0)
    assert meter.stalls == 1


def test_the_meter_gives_bytes_resets_stalls_and_rates_as_details() -> None:
    meter = Meter()
    assert meter.facts == {
        "arrived_bytes": 0, "lost_bytes": 0, "resets": 0, "stalls": 0, "seconds": 0,
        "min_bytes_per_second": None, "median_bytes_per_second": None,
        "max_bytes_per_second": None,
    }  # fmt: skip
    for now, change in ((0.0, 0), (1.0, 100), (2.0, -60), (4.5, 500)):
        meter.add(now, change)
    assert meter.facts == {
        "arrived_bytes": 600, "lost_bytes": 60, "resets": 1, "stalls": 0, "seconds": 4.5,
        "min_bytes_per_second": 0, "median_bytes_per_second": 100, "max_bytes_per_second": 200,
    }  # fmt: skip

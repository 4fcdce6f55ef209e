"""Speed: beginnings, clocks that stand still, and bounds."""

from __future__ import annotations

from watcher.pull import speed
from watcher.pull.speed import Meter, Meters, Spread


def test_before_anything_is_known_nothing_is_told() -> None:
    meter = Meter()
    assert (meter.rate(5.0), meter.spread, meter.silence(5.0)) == (None, None, 0.0)
    assert meter.seconds_left(5.0, 10) is None
    meter.note(5.0, 41_000)
    assert (meter.rate(5.0), meter.arrived) == (None, 0)  # they were here before


def test_bytes_of_one_instant_count_with_the_next_one() -> None:
    meter = Meter()
    meter.note(0.0, 0)
    meter.note(0.0, 500)
    assert meter.rate(0.0) is None
    meter.note(1.0, 1000)
    assert round(meter.rate(1.0) or 0) == 1000


def test_a_clock_that_goes_backwards_stands_still() -> None:
    meter = Meter()
    meter.note(10.0, 0)
    meter.note(11.0, 100)
    meter.note(5.0, 200)
    meter.note(12.0, 200)
    assert round(meter.rate(12.0) or 0) == 100
    assert meter.rate(3.0) == meter.rate(12.0)
    assert meter.silence(3.0) == 0


def test_a_reset_costs_what_was_lost_and_no_negative_rate() -> None:
    meter = Meter()
    for now, completed in ((0.0, 0), (1.0, 100), (2.0, 40), (3.0, 140)):
        meter.note(now, completed)
    assert (meter.arrived, meter.lost, meter.resets) == (200, 60, 1)
    assert meter.spread == Spread(0, 100, 100)


def test_samples_are_a_ring() -> None:
    meter = Meter()
    for second in range(speed._SAMPLES + 50):
        meter.add(float(second), 0 if second < 25 else 100)
    assert len(meter._samples) == speed._SAMPLES
    assert meter.spread == Spread(100, 100, 100)


def test_a_stall_is_told_while_it_lasts_and_once() -> None:
    meter = Meter(stall_seconds=30)
    meter.note(0.0, 0)
    meter.note(1.0, 5)
    for now in (30.9, 31.0, 60.0, 200.0):
        meter.note(now, 5)
    assert (meter.stalls, meter.silence(200.0)) == (1, 199)
    meter.note(201.0, 6)
    assert meter.silence(201.0) == 0
    meter.note(231.0, 6)
    assert meter.stalls == 2


def test_a_forgotten_model_begins_anew_and_its_bytes_stay_with_all() -> None:
    meters = Meters()
    meters.note("a", 0.0, 0)
    meters.note("a", 1.0, 100)
    meters.forget("a")
    meters.forget("never there")
    meters.note("a", 2.0, 5000)
    assert meters.of("a").arrived == 0
    assert meters.all.arrived == 100

"""The laws of speed: what a rate is must not depend on how often one looks."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watcher.pull import speed
from watcher.pull.speed import Meter

SECONDS = st.floats(0.01, 100.0)
#: Steps of a download: seconds that pass, and bytes that come in them.
STEPS = st.lists(st.tuples(SECONDS, st.integers(0, 10**10)), min_size=1, max_size=40)
TIME_CONSTANTS = st.floats(0.5, 60.0)


def run(steps: list[tuple[float, int]], meter: Meter | None = None, began: float = 0.0) -> Meter:
    meter = Meter() if meter is None else meter
    now = began
    meter.add(now, 0)
    for seconds, size in steps:
        now += seconds
        meter.add(now, size)
    return meter


def end(steps: list[tuple[float, int]]) -> float:
    return list(accumulate(seconds for seconds, _ in steps))[-1]


def rate(meter: Meter, now: float) -> float:
    found = meter.rate(now)
    assert found is not None
    return found


@given(st.lists(SECONDS, min_size=1, max_size=40), st.integers(1, 10**9), TIME_CONSTANTS)
def test_a_constant_rate_is_reported_as_it_is(
    gaps: list[float], per_second: int, time_constant: float
) -> None:
    meter, now = Meter(time_constant), 0.0
    meter.add(now, 0)
    for gap in gaps:
        now += gap
        # Bytes are whole numbers, and a rate must not depend on that.
        meter.add(now, round(per_second * 1000 * gap))
    assert rate(meter, now) == pytest.approx(per_second * 1000, rel=0.1)


@given(STEPS)
def test_a_rate_lies_between_the_slowest_and_the_fastest_step(
    steps: list[tuple[float, int]],
) -> None:
    meter = run(steps)
    each = [size / seconds for seconds, size in steps]
    assert min(each) * 0.999 - 1e-6 <= rate(meter, end(steps)) <= max(each) * 1.001 + 1e-6


@given(STEPS, st.integers(0, 39), st.floats(0.1, 0.9))
def test_the_rate_does_not_depend_on_how_often_it_is_read(
    steps: list[tuple[float, int]], which: int, where: float
) -> None:
    which %= len(steps)
    seconds, size = steps[which]
    size -= size % 1000
    steps[which] = (seconds, size)
    first = size * round(where * 1000) // 1000
    part = seconds * round(where * 1000) / 1000
    split = [*steps[:which], (part, first), (seconds - part, size - first), *steps[which + 1 :]]
    once, twice = rate(run(steps), end(steps)), rate(run(split), end(split))
    assert twice == pytest.approx(once, rel=1e-6, abs=1e-6)


@given(STEPS, st.integers(2, 50))
def test_twice_the_bytes_is_twice_the_rate(steps: list[tuple[float, int]], times: int) -> None:
    more = [(seconds, size * times) for seconds, size in steps]
    assert rate(run(more), end(more)) == pytest.approx(times * rate(run(steps), end(steps)))


@given(STEPS, st.floats(-1e6, 1e6))
def test_when_the_clock_began_plays_no_part(steps: list[tuple[float, int]], began: float) -> None:
    moved = rate(run(steps, began=began), began + end(steps))
    assert moved == pytest.approx(rate(run(steps), end(steps)), rel=1e-4, abs=1e-3)


@given(TIME_CONSTANTS, st.integers(1, 20))
def test_after_the_time_constant_63_percent_of_a_change_are_reported(
    time_constant: float, looks: int
) -> None:
    meter = Meter(time_constant)
    meter.add(0.0, 0)
    meter.add(1000 * time_constant, 10**12 * 1000)
    before = rate(meter, 1000 * time_constant)
    now = 1000 * time_constant
    for _ in range(looks):
        now += time_constant / looks
        meter.add(now, 0)
    assert rate(meter, now) / before == pytest.approx(math.exp(-1), rel=1e-6)


@given(STEPS, SECONDS)
def test_asking_changes_nothing_and_silence_counts_as_slow(
    steps: list[tuple[float, int]], later: float
) -> None:
    meter, now = run(steps), end(steps)
    before = rate(meter, now)
    assert rate(meter, now + later) <= before * (1 + 1e-12)
    assert rate(meter, now) == before
    asked = rate(meter, now + later)
    meter.add(now + later, 0)
    assert rate(meter, now + later) == pytest.approx(asked)


@given(st.lists(st.tuples(SECONDS, st.integers(-(10**6), 10**6)), min_size=1, max_size=40))
def test_bytes_are_conserved_resets_and_all(changes: list[tuple[float, int]]) -> None:
    meter, now = Meter(), 0.0
    for seconds, change in changes:
        now += seconds
        meter.add(now, change)
    sizes = [change for _, change in changes]
    assert meter.arrived - meter.lost == sum(sizes)
    assert meter.resets == sum(change < 0 for change in sizes)
    assert meter.rate(now) is None or rate(meter, now) >= 0


@given(st.lists(st.tuples(st.floats(0.01, 80.0), st.booleans()), max_size=60))
def test_stalls_are_gaps_between_bytes_however_often_one_looks(
    looks: list[tuple[float, bool]],
) -> None:
    meter, now = Meter(), 0.0
    meter.add(now, 0)
    arrivals = [now]
    for seconds, arrives in looks:
        now += seconds
        meter.add(now, int(arrives))
        arrivals += [now] * arrives
    gaps = [b - a for a, b in zip(arrivals, [*arrivals[1:], now], strict=True)]
    assert meter.stalls == sum(gap >= speed.STALL_SECONDS for gap in gaps)


@given(st.lists(st.tuples(STEPS, SECONDS), min_size=1, max_size=5))
def test_rests_leave_no_trace_in_what_is_counted(
    stretches: list[tuple[list[tuple[float, int]], float]],
) -> None:
    meter, now = Meter(stall_seconds=math.inf), 0.0
    for steps, pause in stretches:
        meter.add(now, 0)
        for seconds, size in steps:
            now += seconds
            meter.add(now, size)
        meter.rest(now)
        now += pause
    once = run([step for steps, _ in stretches for step in steps])
    assert (meter.arrived, meter.lost) == (once.arrived, once.lost)
    assert meter.seconds == pytest.approx(once.seconds)
    assert (meter.spread is None) == (once.spread is None)


@given(STEPS)
def test_samples_are_bounded_and_in_order(steps: list[tuple[float, int]]) -> None:
    meter = run(steps)
    found = meter.spread
    assert (found is None) == (end(steps) < 1)
    if found is not None:
        each = [size / seconds for seconds, size in steps]
        assert found.minimum <= found.median <= found.maximum <= max(each) * 1.001 + 1e-6


@given(STEPS, st.integers(-5, 10**12))
def test_time_left_times_rate_is_what_is_missing(
    steps: list[tuple[float, int]], missing: int
) -> None:
    meter, now = run(steps), end(steps)
    left = meter.seconds_left(now, missing)
    if missing <= 0:
        assert left == 0
    elif left is None:
        assert rate(meter, now) < 1e-100
    else:
        assert left * rate(meter, now) == pytest.approx(missing)

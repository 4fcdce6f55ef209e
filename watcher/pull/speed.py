"""How fast downloads are: a decaying mean, samples, stalls and resets.

It reads no clock: `now` is a monotonic time in seconds, given by the caller.
"""

import math
from collections import deque
from collections.abc import Collection
from statistics import median
from typing import NamedTuple

TIME_CONSTANT = 10.0  #: seconds after which the mean has followed 63 % of a change
#: No byte for so long is a stall; the server gives a part up after the same time.
STALL_SECONDS = 30.0
#: A sample spans a second at least, and so many are kept: an hour at most of a steady download.
_SAMPLE_SECONDS = 1.0
_SAMPLES = 3600


class Spread(NamedTuple):
    """The rates of some samples, bytes per second."""

    minimum: float
    median: float
    maximum: float


def spread(rates: Collection[float]) -> Spread | None:
    """The spread of rates; None where there are none."""
    return Spread(min(rates), median(rates), max(rates)) if rates else None


class Meter:
    def __init__(
        self, time_constant: float = TIME_CONSTANT, stall_seconds: float = STALL_SECONDS
    ) -> None:
        self._time_constant, self._stall_seconds = time_constant, stall_seconds
        #: Bytes that arrived, including those that were lost later, and the seconds of that.
        self.arrived, self.seconds = 0, 0.0
        #: Bytes that arrived and were thrown away, and how often that happened.
        self.lost, self.resets = 0, 0
        self.stalls = 0  #: how often no byte arrived for `stall_seconds`
        # Bytes and seconds, each faded by its age; bytes of this instant, not yet in them.
        self._bytes, self._seconds, self._fresh = 0.0, 0.0, 0
        self._at: float | None = None
        self._last_byte_at, self._in_stall = 0.0, False
        self._samples: deque[float] = deque(maxlen=_SAMPLES)
        self._sample_seconds, self._sample_bytes = 0.0, 0

    def add(self, now: float, change: int) -> None:
        """Bytes that arrived since the last call; negative: that were lost."""
        arrived = max(0, change)
        if change < 0:
            self.resets += 1
            self.lost -= change
        self.arrived += arrived
        if self._at is None:
            self._at = self._last_byte_at = now
        now = max(now, self._at)
        if not self._in_stall and now - self._last_byte_at >= self._stall_seconds:
            self.stalls += 1
            self._in_stall = True
        if arrived:
            self._last_byte_at, self._in_stall = now, False
        self._fresh += arrived
        if now > self._at:
            self.seconds += now - self._at
            self._sample_seconds += now - self._at
            self._bytes, self._seconds = self._faded(now)
            self._at, self._fresh = now, 0
        self._sample_bytes += arrived
        if self._sample_seconds >= _SAMPLE_SECONDS:
            self._samples.append(self._sample_bytes / self._sample_seconds)
            self._sample_seconds, self._sample_bytes = 0.0, 0

    def rest(self, now: float) -> None:
        """No bytes are expected until the next call of `add`: that time does not count."""
        if self._at is not None:
            self.add(now, 0)
            self._at, self._in_stall = None, False

    def rate(self, now: float) -> float | None:
        """Bytes per second, the time since the last call without a byte included; None: unknown."""
        if self._at is None:
            return None
        size, seconds = self._faded(max(now, self._at))
        return size / seconds if seconds else None

    def seconds_left(self, now: float, missing: int) -> float | None:
        """Until `missing` bytes arrive at this rate; None for unknown."""
        if missing <= 0:
            return 0.0
        rate = self.rate(now)
        left = missing / rate if rate else math.inf
        return left if math.isfinite(left) else None

    @property
    def spread(self) -> Spread | None:
        """Of the samples that are kept; None while there is none."""
        return spread(self._samples)

    @property
    def facts(self) -> dict[str, int | float | None]:
        """All of it, as an event's details have it; the rates None where it took no second."""
        rates = [None] * 3 if self.spread is None else map(round, self.spread)
        names = (f"{each}_bytes_per_second" for each in ("min", "median", "max"))
        return {
            "arrived_bytes": self.arrived,
            "lost_bytes": self.lost,
            "resets": self.resets,
            "stalls": self.stalls,
            "seconds": round(self.seconds, 3),
            **dict(zip(names, rates, strict=True)),
        }

    def _faded(self, now: float) -> tuple[float, float]:
        """Bytes and seconds at `now`; fresh bytes arrived evenly since the last call."""
        assert self._at is not None
        passed = now - self._at
        if passed <= 0:
            return self._bytes, self._seconds
        gone = -math.expm1(-passed / self._time_constant)
        weight = gone * self._time_constant
        size = self._bytes * (1 - gone) + self._fresh * weight / passed
        return size, self._seconds * (1 - gone) + weight

"""How fast downloads come: a decaying mean, samples, stalls and resets.

No clock is asked: `now` is a monotonic time in seconds that the caller hands in.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import NamedTuple

#: What is older than this counts little: seconds after which a mean has gone 63 % of a change.
TIME_CONSTANT = 10.0
#: No byte for so long is a stall; the server itself gives a part up after the same time.
STALL_SECONDS = 30.0
#: A sample spans a second at least, and so many are kept: an hour at most of a steady download.
_SAMPLE_SECONDS = 1.0
_SAMPLES = 3600


class Spread(NamedTuple):
    """The rates of the samples, bytes per second."""

    minimum: float
    median: float
    maximum: float


class Meter:
    """The speed of one download, or of all together."""

    def __init__(
        self, time_constant: float = TIME_CONSTANT, stall_seconds: float = STALL_SECONDS
    ) -> None:
        self._time_constant, self._stall_seconds = time_constant, stall_seconds
        #: Bytes that came, those included that were lost later.
        self.arrived = 0
        #: Bytes that came and were thrown away, and how often that happened.
        self.lost, self.resets = 0, 0
        #: How often no byte came for `stall_seconds`.
        self.stalls = 0
        self._completed: int | None = None
        # Bytes and seconds, each faded by its age; bytes of this very instant, not yet in them.
        self._bytes, self._seconds, self._fresh = 0.0, 0.0, 0
        self._at: float | None = None
        self._last_byte_at, self._in_stall = 0.0, False
        self._samples: deque[float] = deque(maxlen=_SAMPLES)
        self._sample_at, self._sample_bytes = 0.0, 0

    def note(self, now: float, completed: int) -> int:
        """Bytes that are here by now, and give back by how many they have changed.

        The first ones count as having been there. Fewer than before are a reset.
        """
        change = 0 if self._completed is None else completed - self._completed
        self._completed = completed
        self.add(now, change)
        return change

    def add(self, now: float, change: int) -> None:
        """Bytes that have come since the last call; negative: that were lost."""
        arrived = max(0, change)
        if change < 0:
            self.resets += 1
            self.lost -= change
        self.arrived += arrived
        if self._at is None:
            self._at = self._last_byte_at = self._sample_at = now
        now = max(now, self._at)
        self._look_for_stall(now, arrived)
        self._fresh += arrived
        if now > self._at:
            self._bytes, self._seconds = self._faded(now)
            self._at, self._fresh = now, 0
        self._sample_bytes += arrived
        if now - self._sample_at >= _SAMPLE_SECONDS:
            self._samples.append(self._sample_bytes / (now - self._sample_at))
            self._sample_at, self._sample_bytes = now, 0

    def rate(self, now: float) -> float | None:
        """Bytes per second, the time since the last call without a byte included; None: unknown."""
        if self._at is None:
            return None
        size, seconds = self._faded(max(now, self._at))
        return size / seconds if seconds else None

    def seconds_left(self, now: float, missing: int) -> float | None:
        """Until `missing` bytes will have come at this rate; None where that can't be told."""
        if missing <= 0:
            return 0.0
        rate = self.rate(now)
        left = missing / rate if rate else math.inf
        return left if math.isfinite(left) else None

    def silence(self, now: float) -> float:
        """Seconds since the last byte came, or since the first call."""
        return 0.0 if self._at is None else max(0.0, now - self._last_byte_at)

    @property
    def spread(self) -> Spread | None:
        """Of the samples that are kept; None while there is none."""
        if not self._samples:
            return None
        return Spread(min(self._samples), median(self._samples), max(self._samples))

    def _faded(self, now: float) -> tuple[float, float]:
        """Bytes and seconds as they are at `now`; fresh bytes came evenly since the last call."""
        assert self._at is not None
        passed = now - self._at
        if passed <= 0:
            return self._bytes, self._seconds
        gone = -math.expm1(-passed / self._time_constant)
        weight = gone * self._time_constant
        size = self._bytes * (1 - gone) + self._fresh * weight / passed
        return size, self._seconds * (1 - gone) + weight

    def _look_for_stall(self, now: float, arrived: int) -> None:
        if not self._in_stall and now - self._last_byte_at >= self._stall_seconds:
            self.stalls += 1
            self._in_stall = True
        if arrived:
            self._last_byte_at, self._in_stall = now, False


class Meters:
    """The speed of each of several downloads, and of all together."""

    def __init__(self) -> None:
        self._of: dict[str, Meter] = {}
        self.all = Meter()

    def note(self, model: str, now: float, completed: int) -> None:
        """Bytes that are here of one model by now."""
        self.all.add(now, self.of(model).note(now, completed))

    def of(self, model: str) -> Meter:
        """The meter of one model; a new one where there was none."""
        return self._of.setdefault(model, Meter())

    def forget(self, model: str) -> None:
        """A model's download has ended; what it brought stays with that of all."""
        self._of.pop(model, None)

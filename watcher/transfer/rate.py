"""How fast bytes may come: each transfer of a store takes its share of one rate. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from watcher.model import MIB

#: What could have come so long ago, and did not, may still come.
_SLACK = 0.25
#: So much is paid for at once: what libcurl gives at a time, or a hundredth of a second's bytes.
_LEAST, _MOST = 16 * 1024, MIB
_PARTS = 100
#: So long after somebody had to wait the rate counts as what limits.
_BOUND_SECONDS = 1.0
#: Who has to wait looks so often whether the rate has changed.
_LONGEST_WAIT = 0.25


@dataclass(slots=True)
class Limit:
    """What all transfers of a store may fetch; it may be changed while they run."""

    #: Bytes; 0 for no limit.
    per_second: int = 0


class Bucket:
    """Says when the next bytes of one transfer may come."""

    def __init__(self, limit: Limit, clock: Callable[[], float]) -> None:
        """`clock`: seconds of any."""
        self._limit, self._clock = limit, clock
        #: The part of the rate that is this transfer's.
        self.share = 1.0
        self._rate = 0.0
        self._free_at = clock()
        self._bound_at = -math.inf

    @property
    def is_limited(self) -> bool:
        """Whether there is a rate just now."""
        return self._limit.per_second > 0

    @property
    def quantum(self) -> int:
        """How many bytes to take at once."""
        return min(_MOST, max(_LEAST, int(self._limit.per_second * self.share) // _PARTS))

    def take(self, size: int) -> float:
        """Take bytes, or give some back (negative); the time at which they may come."""
        now = self._now()  # first: it follows the rate
        at = max(self._free_at, now - _SLACK)
        self._free_at = at + (size / self._rate if self._rate else 0.0)
        return at

    def left(self, at: float) -> float:
        """Seconds until that time; none where the rate has changed since."""
        now = self._now()
        if min(at, self._free_at) <= now:
            return 0.0
        self._bound_at = now
        return min(min(at, self._free_at) - now, _LONGEST_WAIT)

    def binds(self) -> bool:
        """Whether the rate, not the line, limits the connections at this time."""
        return self._clock() < self._bound_at + _BOUND_SECONDS

    def _now(self) -> float:
        now, rate = self._clock(), self._limit.per_second * self.share
        if rate != self._rate:
            self._rate, self._free_at = rate, min(self._free_at, now)
        return now

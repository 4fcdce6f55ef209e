"""How many connections a line is worth: more, as long as each brings as much as before. Pure.

Where a registry or a line limits each connection, twice as many are twice as fast. Where the whole
line is the limit they bring nothing, and a weak one suffers.
"""

from __future__ import annotations

#: Seconds over which it is measured what comes; so long nothing is measured after a change.
_WINDOW = 1.0
#: Before more are tried, two windows in a row may differ by so much.
_STEADY = 0.1
#: Of what the new ones would bring if they were as fast as the others, they have to bring so much.
_WORTH = 0.7


def bounds(connections: int | tuple[int, int]) -> tuple[int, int]:
    """At how many to begin, and how many there may be: one number is both."""
    return (connections, connections) if isinstance(connections, int) else connections


class Growth:
    """Tells how many connections to use, by what comes over them."""

    def __init__(self, first: int, most: int) -> None:
        self.number = first
        self._most = most
        #: What came in a second over the number before, while more are tried.
        self._before: tuple[int, float] | None = None
        self._last = 0.0
        #: When the window began, and what had come by then; None: none has.
        self._began: tuple[float, int] | None = None
        self._not_before = 0.0
        self._is_over = first >= most

    def stop(self) -> None:
        """Somebody has complained, or something else limits what comes: no more are tried."""
        self._is_over = True

    def look(self, now: float, came: int, *, all_used: bool) -> int:
        """How many to use from `now` on (seconds), when `came` bytes have come in all."""
        if self._is_over:
            return self.number
        if not all_used or now < self._not_before:
            self._began = None
        elif self._began is None:
            self._began = now, came
        elif now - self._began[0] >= _WINDOW:
            began, had_come = self._began
            self._began = now, came
            self._judge(now, (came - had_come) / (now - began))
        return self.number

    def _judge(self, now: float, rate: float) -> None:
        if self._before is not None:
            number, before = self._before
            if rate < before * (1 + _WORTH * (self.number / number - 1)):
                self.number, self._is_over = number, True
                return
        elif rate == 0 or abs(rate - self._last) > _STEADY * rate:
            self._last = rate
            return
        self._before = self.number, rate
        self.number = min(self._most, self.number + max(1, self.number // 2))
        self._is_over = self.number == self._before[0]
        self._not_before = now + _WINDOW

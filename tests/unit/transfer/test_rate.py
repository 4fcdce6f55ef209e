"""How exactly a rate is kept, by a clock of the test's own."""

from __future__ import annotations

import heapq

import pytest

from watcher.transfer.rate import Bucket, Limit

RATE = 20_000_000
GIVEN = 16 * 1024  # by libcurl, at a time


class Lines:
    """Connections whose bytes are always there, and what they have brought."""

    def __init__(self, limit: Limit, shares: list[float], connections: int = 8) -> None:
        self.now = 0.0
        self.buckets = [Bucket(limit, lambda: self.now) for _ in shares]
        for bucket, share in zip(self.buckets, shares, strict=True):
            bucket.share = share
        #: When each asks next, of which bucket it is, what it has paid for, and when that may come.
        self._next = [
            (0.0, number, each, 0, 0.0)
            for number in range(connections)
            for each in range(len(shares))
        ]
        self.came = [0] * len(shares)

    def run(self, until: float) -> int:
        """Bring what may come until then; how much that is."""
        before = sum(self.came)
        while self._next[0][0] < until:
            self.now, number, each, paid, at = heapq.heappop(self._next)
            bucket = self.buckets[each]
            if paid < GIVEN:
                paid, at = paid + bucket.quantum, bucket.take(bucket.quantum)
            seconds = bucket.left(at)
            if seconds == 0:
                paid -= GIVEN
                self.came[each] += GIVEN
            heapq.heappush(self._next, (self.now + max(seconds, 1e-6), number, each, paid, at))
        self.now = until
        return sum(self.came) - before


@pytest.mark.parametrize("shares", [[1.0], [1 / 3] * 3, [0.75, 0.25]])
@pytest.mark.parametrize("rate", [100_000, RATE, 200_000_000])
def test_all_transfers_together_keep_the_rate_and_share_it(rate: int, shares: list[float]) -> None:
    lines = Lines(Limit(rate), shares)
    lines.run(1.0)
    assert lines.run(11.0) == pytest.approx(10 * rate, rel=0.02)
    for came, share in zip(lines.came, shares, strict=True):
        assert came == pytest.approx(11 * rate * share, rel=0.05, abs=8 * GIVEN)


def test_a_rate_is_kept_from_the_first_byte_on() -> None:
    assert Lines(Limit(RATE), [1.0]).run(1.0) <= 1.02 * RATE


def test_each_connection_gets_its_turn() -> None:
    limit = Limit(1000)
    bucket = Bucket(limit, lambda: 0.0)
    assert [bucket.take(500) for _ in range(4)] == [0.0, 0.5, 1.0, 1.5]


def test_a_pause_of_the_line_is_not_made_up_for() -> None:
    lines = Lines(Limit(RATE), [1.0])
    lines.run(1.0)
    silent, lines._next = lines._next, [(11.0, *each[1:]) for each in sorted(lines._next)]
    assert silent
    assert lines.run(12.0) <= 1.4 * RATE


def test_a_change_counts_at_once_for_those_who_wait_too() -> None:
    now = [0.0]
    limit = Limit(1000)
    bucket = Bucket(limit, lambda: now[0])
    at = [bucket.take(100_000) for _ in range(3)][-1]
    assert bucket.left(at) > 0
    limit.per_second = RATE
    assert bucket.left(at) == 0
    limit.per_second = 0
    assert bucket.left(bucket.take(1 << 40)) == bucket.left(bucket.take(1 << 40)) == 0


@pytest.mark.parametrize("then", [0, RATE])
def test_after_a_change_the_next_one_waits_for_nobody(then: int) -> None:
    limit = Limit(1000)
    bucket = Bucket(limit, lambda: 0.0)
    bucket.take(100_000)
    limit.per_second = then
    assert bucket.take(500) == 0.0


def test_what_did_not_come_is_given_back() -> None:
    bucket = Bucket(Limit(1000), lambda: 0.0)
    bucket.take(500)
    bucket.take(-500)
    assert bucket.take(500) == 0.0


def test_it_binds_while_somebody_waits() -> None:
    now = [0.0]
    bucket = Bucket(Limit(1000), lambda: now[0])
    assert bucket.left(bucket.take(500)) == 0
    assert not bucket.binds()
    assert bucket.left(bucket.take(500)) > 0
    assert bucket.binds()
    now[0] = 5.0
    assert not bucket.binds()

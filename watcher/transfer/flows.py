"""The body of one answer on its way to its place: written, marked, and how fast it comes."""

from __future__ import annotations

import contextlib
import statistics
from collections import deque
from collections.abc import Collection

from watcher.model import MIB
from watcher.state import fs
from watcher.transfer import answers
from watcher.transfer.answers import Head
from watcher.transfer.ledger import Ledger
from watcher.transfer.pieces import Piece
from watcher.transfer.rate import Bucket
from watcher.transfer.tasks import Wakeup
from watcher.transfer.values import Cause, TryError

#: So many speeds have to be known before one of them is called slow.
_ENOUGH = 3
_SLOW = 0.25
#: So much is written at once: libcurl gives 16 KiB at a time, and each write costs a turn of the
#: interpreter's lock, for which the hash waits, too.
_AT_ONCE = 256 * 1024
#: With what is not written yet, a kill costs less than a MiB.
_MARK = MIB - _AT_ONCE


class Flow:
    """Where the bytes of a piece go, as they come (a `client.Sink`)."""

    def __init__(
        self, ledger: Ledger, piece: Piece, wakeup: Wakeup, bucket: Bucket, now: float
    ) -> None:
        self._ledger, self._piece, self._wakeup = ledger, piece, wakeup
        self._bucket = bucket
        #: Bytes that were taken out of the bucket and did not come yet, and when they may.
        self._paid, self._may_at = 0, now
        #: The rate made it wait since it was looked at last.
        self._has_waited = False
        self._began_with = self._marked = piece.at
        #: Why the answer is not the range that was asked for; "" where it is; None: no body came.
        self.fault: str | None = None
        #: What came and is not written yet.
        self._pieces: list[bytes] = []
        self._held = 0
        self._seen = deque([(now, piece.at)])
        self._moved_at = now

    @property
    def received(self) -> int:
        """Bytes that were written."""
        return self._piece.at - self._began_with

    def begin(self, head: Head) -> bool:
        """Whether the body is this range of the layer, and nothing else."""
        piece, total = self._piece, self._ledger.layer.size
        self.fault = answers.fault(head, piece.at, piece.end, total)
        return not self.fault

    def wait(self, size: int) -> float:
        """In how many seconds to ask again for the next `size` bytes; 0: they may be written."""
        if not self._bucket.is_limited:
            self._paid = size  # as most are; libcurl asks for each 16 KiB
            return 0.0
        if size > self._paid:
            taken = max(size - self._paid, self._bucket.quantum)
            self._paid += taken
            self._may_at = self._bucket.take(taken)
        seconds = self._bucket.left(self._may_at)
        self._has_waited |= seconds > 0
        return seconds

    def write(self, data: bytes) -> None:
        """Take the next bytes. Raises OSError, and TryError for more than were asked for."""
        self._paid -= len(data)
        fitting = data[: self._piece.end - self._piece.at - self._held]
        self._pieces.append(fitting)
        self._held += len(fitting)
        if self._held >= _AT_ONCE or self._piece.at + self._held == self._piece.end:
            self._flush()
        if len(fitting) < len(data):
            raise TryError("more bytes came than were asked for", Cause.WRONG_ANSWER)

    def end(self, now: float) -> None:
        """No more comes: write and mark the rest.

        What can't be written is missing then, as if it had not come.
        """
        with contextlib.suppress(OSError):
            self._flush()
        self._mark()
        self._bucket.take(-self._paid)
        self._seen.append((now, self._piece.at))

    def _flush(self) -> None:
        """Write what came; mark it from time to time."""
        if self._held:
            fs.write_at(self._ledger.data, self._pieces, self._piece.at)
            self._piece.at += self._held
            self._pieces.clear()
            self._held = 0
        if self._piece.at - self._marked >= _MARK or self._piece.at == self._piece.end:
            self._mark()

    def _mark(self) -> None:
        if self._piece.at > self._marked:
            self._ledger.mark(self._marked, self._piece.at, mirrored=self._piece.is_mirrored)
            self._marked = self._piece.at
            self._wakeup.send()

    # ------------------------------------------------------------ its speed

    def look(self, now: float, seconds: float) -> bool:
        """Note how far it is, and forget what is older than `seconds`. Whether it covers them.

        Raises OSError where what came can't be written.
        """
        self._flush()
        if self._piece.at != self._seen[-1][1] or self._has_waited:
            self._moved_at, self._has_waited = now, False
        self._seen.append((now, self._piece.at))
        while len(self._seen) > 2 and self._seen[1][0] <= now - seconds:
            self._seen.popleft()
        return self.covers(seconds)

    def silence(self) -> float:
        """Seconds without a byte, as far as was looked."""
        return self._seen[-1][0] - self._moved_at

    def covers(self, seconds: float) -> bool:
        """Whether it was watched for so long."""
        return self._seen[-1][0] - self._seen[0][0] >= seconds

    def rate(self) -> float:
        """Bytes per second, over what was seen."""
        (before, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - before) if now > before else 0.0


def is_slow(rate: float, rates: Collection[float]) -> bool:
    """Whether a connection is far behind the others, those included that have ended."""
    return len(rates) >= _ENOUGH and rate < _SLOW * statistics.median(rates)

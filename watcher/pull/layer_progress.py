"""The layer under way as our own stream reports it, and whether its request may be closed. Pure.

The server keeps what ends a download only once it has prepared it. A request that joins a layer
which another one is still preparing, and leaves before that, makes the server panic
(docs/store.md).
"""

from __future__ import annotations

from watcher.ollama.pull_stream import Status

#: How often the disk is asked what of a layer it has.
_WEIGH_SECONDS = 1.0
#: While a layer arrives, a line comes each 60 ms, and none at its end: after a silence the server
#: may be preparing the next one.
_LINES_STOP_SECONDS = 1.0
#: Preparing a layer takes no longer once its length is known: sidecars are written or were read.
PREPARED_SECONDS = 30.0


class LayerProgress:
    """The last line of a layer and those before it; times are monotonic seconds."""

    def __init__(self, now: float, uncounted: dict[str, int] | None = None) -> None:
        """`uncounted`: bytes of layers that were on the disk before, and that nobody counts."""
        self.digest = ""
        self.total = self.completed = 0
        #: Bytes of this layer that an attempt had downloaded and that were thrown away.
        self.lost = 0
        #: When the last line came, and the last one with news.
        self.at = self.changed_at = now
        self._moved = False
        self._total_at = now
        self._uncounted = dict(uncounted or {})
        self._weighed, self._weighed_at = -1, now

    def take(self, status: Status, now: float) -> bool:
        """Take up a line. Returns whether its layer is another one than before."""
        fresh = status.digest != self.digest
        if fresh:
            self.digest, self._moved, self.lost = status.digest, False, 0
            self._weighed, self._weighed_at = -1, now
        if fresh or status.total != self.total:
            self._total_at = now
        elif status.completed != self.completed:
            self._moved = True
        if fresh or status.completed != self.completed:
            self.changed_at = now
        self.total, self.completed, self.at = status.total, status.completed, now
        return fresh

    def wants_weighing(self, now: float) -> bool:
        """Whether it is time for `weigh`."""
        return bool(self.digest) and now - self._weighed_at >= _WEIGH_SECONDS

    def weigh(self, allocated: int, now: float) -> int:
        """Bytes that were lost, by what the disk has of this layer.

        On a fast network an attempt arrives and is thrown away between two lines. This compares
        what the disk had at the call before with what is counted now: lines may come late.
        """
        before, self._weighed, self._weighed_at = self._weighed, allocated, now
        if before < 0:
            return 0
        uncounted = before - self.completed
        return max(0, uncounted - self._uncounted.setdefault(self.digest, max(0, uncounted)))

    def is_prepared(self, now: float) -> bool:
        """Whether the layer under way has been prepared, so that leaving it does no harm.

        After one that is complete, or without a line, the server may be at the next one already.
        """
        if not self.digest:
            return self.total > 0  # the transfer path prepares nothing
        if now - self.at >= _LINES_STOP_SECONDS:
            return False
        known_for = now - self._total_at
        return 0 <= self.completed < self.total and (self._moved or known_for >= PREPARED_SECONDS)

    @property
    def is_joined(self) -> bool:
        """Whether another request prepares the layer that ours waits for.

        The client that began it may be gone: then its length never comes.
        """
        return bool(self.digest) and self.total == 0

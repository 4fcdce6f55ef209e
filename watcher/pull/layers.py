"""The layers of a pull: their bytes in one sum, the one under way, and which pull downloads which.

The server keeps what ends a download only once it has prepared it. A request that joins a layer
which another one is still preparing, and leaves before that, makes the server panic
(docs/store.md).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from watcher.ollama.pull_stream import Status
from watcher.ollama.sidecars import LARGEST_LAYER

#: The limit of layers that no manifest names; the largest models have thousands.
_MOST_LAYERS = 10_000
#: Fewer bytes than this come from roundings, not from a lost attempt.
_NOISE = 64 * 1024

#: How often the disk is asked what of a layer it has.
_WEIGH_SECONDS = 1.0
#: While a layer arrives, a line comes each 60 ms, and none at its end: after a silence the server
#: may be preparing the next one.
_LINES_STOP_SECONDS = 1.0
#: Preparing a layer takes no longer once its length is known: sidecars are written or were read.
PREPARED_SECONDS = 30.0


class ModelProgress:
    """How far a pull is, by the manifest's sizes and the server's lines on each layer."""

    def __init__(self) -> None:
        #: Bytes of each layer and of the config, by digest.
        self.sizes: dict[str, int] = {}
        self._present: frozenset[str] = frozenset()
        self._completed: dict[str, int] = {}
        #: Bytes of all layers together, where the server reports no more: total, and completed.
        self._all = 0, 0

    def expect(self, sizes: Mapping[str, int], present: Iterable[str]) -> None:
        """The layers and the config with their bytes, and those that are in the store already.

        Layers that are no longer among them are forgotten.
        """
        self.sizes = dict(sizes)
        self._present = frozenset(present)
        self._completed = {each: self._completed.get(each, 0) for each in sizes}
        self._all = 0, 0

    def here(self, partial: Mapping[str, int], present: Iterable[str]) -> None:
        """What the store has by now: bytes that a pull need not download, and finished layers."""
        self._present = frozenset(present)
        self._completed = {each: partial.get(each, 0) for each in self.sizes}

    def note(self, digest: str, total: int, completed: int) -> int:
        """So many bytes of a layer are on disk by the server's count; returns how many were lost.

        A layer that the manifest does not name is counted: the manifest may not be known. A line
        without a total means nothing: the layer is being prepared.
        """
        if not 0 < total <= LARGEST_LAYER:
            return 0
        if digest not in self.sizes and len(self.sizes) >= _MOST_LAYERS:
            return 0
        self.sizes[digest] = max(total, self.sizes.get(digest, 0))
        before = self._completed.get(digest, 0)
        self._completed[digest] = completed
        return before - completed if before - completed > _NOISE else 0

    def complete(self) -> None:
        self._completed = dict(self.sizes)

    def note_all(self, total: int, completed: int) -> None:
        """So many bytes of all layers are on disk, as a server counts on its other path."""
        if total:
            self._all = total, completed

    @property
    def total(self) -> int:
        return sum(self.sizes.values()) or self._all[0]

    @property
    def done(self) -> int:
        """Bytes of them that are on disk."""
        layers = sum(
            size if digest in self._present else min(size, self._completed.get(digest, 0))
            for digest, size in self.sizes.items()
        )
        return max(layers, min(self._all[1], self.total))

    @property
    def missing(self) -> list[int]:
        """The sizes of those layers that are not complete."""
        return [size for digest, size in self.sizes.items() if digest not in self._present]

    @property
    def present(self) -> int:
        """Bytes of those layers that were in the store before."""
        return sum(size for digest, size in self.sizes.items() if digest in self._present)


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


class LayerLocks:
    """The model that downloads each layer. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by: dict[str, str] = {}

    def claim(self, model: str, digests: Iterable[str]) -> str:
        """Take layers for a model, all or none; returns the model that has one, or ""."""
        wanted = tuple(digests)
        with self._lock:
            others = {self._by[each] for each in wanted if each in self._by} - {model}
            if others:
                return min(others)
            self._by.update(dict.fromkeys(wanted, model))
            return ""

    def release(self, model: str) -> None:
        with self._lock:
            self._by = {digest: by for digest, by in self._by.items() if by != model}

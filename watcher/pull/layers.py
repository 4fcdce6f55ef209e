"""The layers of a pull: their bytes in one sum."""

from collections.abc import Iterable, Mapping

from watcher.ollama.sidecars import LARGEST_LAYER

#: The limit of layers that no manifest names; the largest models have thousands.
_MOST_LAYERS = 10_000
_NOISE = 64 * 1024  #: fewer bytes than this come from roundings, not from a lost attempt


class ModelProgress:
    """How far a pull is, by the manifest's sizes and the server's lines on each layer."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}  #: bytes of each layer and of the config, by digest
        self._present: frozenset[str] = frozenset()
        self._completed: dict[str, int] = {}
        #: Bytes of all layers, and of them those that are on disk.
        self._total = self._done = 0
        #: Bytes of all layers together, where the server reports no more: total, and completed.
        self._all = 0, 0

    def expect(self, sizes: Mapping[str, int], present: Iterable[str]) -> None:
        """The layers and the config with their bytes, and those that are in the store already."""
        self.sizes = dict(sizes)
        self._present = frozenset(present)
        self._completed = {each: self._completed.get(each, 0) for each in sizes}
        self._all = 0, 0
        self._count()

    def here(self, partial: Mapping[str, int], present: Iterable[str]) -> None:
        """What the store has by now: bytes that a pull need not download, and finished layers."""
        self._present = frozenset(present)
        self._completed = {each: partial.get(each, 0) for each in self.sizes}
        self._count()

    def _count(self) -> None:
        self._total = sum(self.sizes.values())
        self._done = sum(map(self._here, self.sizes))

    def _here(self, digest: str) -> int:
        size = self.sizes.get(digest, 0)
        return size if digest in self._present else min(size, self._completed.get(digest, 0))

    def note(self, digest: str, total: int, completed: int) -> int:
        """So many bytes of a layer are on disk by the server's count; returns how many were lost.

        A layer that the manifest does not name is counted: the manifest may not be known. A line
        without a total means nothing: the layer is being prepared.
        """
        if not 0 < total <= LARGEST_LAYER:
            return 0
        if digest not in self.sizes and len(self.sizes) >= _MOST_LAYERS:
            return 0
        known, was_here = self.sizes.get(digest, 0), self._here(digest)
        self.sizes[digest] = max(total, known)
        before = self._completed.get(digest, 0)
        self._completed[digest] = completed
        # Not summed up anew: that would cost a model of many layers the square of their number.
        self._total += self.sizes[digest] - known
        self._done += self._here(digest) - was_here
        return before - completed if before - completed > _NOISE else 0

    def complete(self) -> None:
        self._completed = dict(self.sizes)
        self._count()

    def note_all(self, total: int, completed: int) -> None:
        """So many bytes of all layers are on disk, as a server counts on its other path."""
        if total:
            self._all = total, completed

    @property
    def total(self) -> int:
        return self._total or self._all[0]

    @property
    def done(self) -> int:
        """Bytes of them that are on disk."""
        return max(self._done, min(self._all[1], self.total))

    @property
    def missing(self) -> list[int]:
        """The sizes of those layers that are not complete."""
        return [size for digest, size in self.sizes.items() if digest not in self._present]

    @property
    def present(self) -> int:
        """Bytes of those layers that were in the store before."""
        return sum(size for digest, size in self.sizes.items() if digest in self._present)

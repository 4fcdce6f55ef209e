"""The bytes of a model that is pulled, all its layers in one sum. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

#: Fewer bytes than this are given back by roundings, not by a lost attempt.
_NOISE = 64 * 1024


class Bar:
    """How far a pull has come, by the manifest's sizes and what the server tells of each layer."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._present: frozenset[str] = frozenset()
        self._completed: dict[str, int] = {}

    def expect(self, sizes: Mapping[str, int], present: Iterable[str]) -> None:
        """The layers and the config with their bytes, and those that are in the store already.

        What came of layers that are not among them any more is forgotten.
        """
        self._sizes = dict(sizes)
        self._present = frozenset(present)
        self._completed = {each: self._completed.get(each, 0) for each in sizes}

    def here(self, partial: Mapping[str, int]) -> None:
        """Bytes of unfinished layers that a pull need not fetch."""
        for digest, size in partial.items():
            self._completed[digest] = size

    def note(self, digest: str, total: int, completed: int) -> int:
        """So many bytes of a layer are here, as the server counts; gives back how many were lost.

        A layer that the manifest does not name is taken on: the manifest may not be known.
        """
        self._sizes.setdefault(digest, total)
        before = self._completed.get(digest, 0)
        self._completed[digest] = completed
        return before - completed if before - completed > _NOISE else 0

    @property
    def total(self) -> int:
        """Bytes of all layers and of the config."""
        return sum(self._sizes.values())

    @property
    def done(self) -> int:
        """Bytes of them that are here."""
        return sum(
            size if digest in self._present else min(size, self._completed.get(digest, 0))
            for digest, size in self._sizes.items()
        )

    @property
    def present(self) -> int:
        """Bytes of those layers that were in the store before."""
        return sum(size for digest, size in self._sizes.items() if digest in self._present)

"""Pulls side by side in one process: one of them downloads a layer that several miss."""

from __future__ import annotations

import threading
from collections.abc import Iterable


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
        """Return the layers of a model."""
        with self._lock:
            self._by = {digest: by for digest, by in self._by.items() if by != model}

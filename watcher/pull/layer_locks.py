"""Pulls side by side in one process: a layer that two of them miss is fetched by one."""

from __future__ import annotations

import threading
from collections.abc import Iterable


class LayerLocks:
    """Who fetches which layer. Safe among threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by: dict[str, str] = {}

    def claim(self, model: str, digests: Iterable[str]) -> str:
        """Take layers for a model, all or none; gives back the model that has one, or ""."""
        wanted = tuple(digests)
        with self._lock:
            others = {self._by[each] for each in wanted if each in self._by} - {model}
            if others:
                return min(others)
            self._by.update(dict.fromkeys(wanted, model))
            return ""

    def release(self, model: str) -> None:
        """Give back what a model has taken."""
        with self._lock:
            self._by = {digest: by for digest, by in self._by.items() if by != model}

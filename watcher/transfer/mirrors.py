"""Mirrors of registries: asked first, and never with a registry's credentials.

Only the hash says that their bytes are right. One that fails is left alone for the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from watcher.transfer import redirects
from watcher.transfer.client import Answer, Request
from watcher.transfer.values import Emit, Noticed, TryError

T = TypeVar("T")
CONNECT_SECONDS = 3.0
_LACKING = frozenset({404, 410})


class Mirrors:
    """The mirrors of one run, in their order."""

    def __init__(self, ask: redirects.Ask, urls: Sequence[str], emit: Emit) -> None:
        self._ask, self._emit = ask, emit
        self._used = list(urls)

    async def first(
        self, request: Request, judged: Callable[[str, Answer], T]
    ) -> tuple[str, T] | None:
        """Which mirror has it, and what `judged` makes of the address and the answer.

        `request`: with the path alone. `judged` raises TryError for what is no good answer.
        """
        for mirror in tuple(self._used):
            asked = request._replace(url=mirror + request.url, connect=CONNECT_SECONDS)
            try:
                url, answer = await redirects.followed(self._ask, asked)
                if answer.head.status not in _LACKING:
                    return mirror, judged(url, answer)
            except TryError as error:
                self.leave(mirror, str(error))
        return None

    def leave(self, mirror: str, why: str) -> None:
        """Ask a mirror nothing more."""
        if mirror in self._used:
            self._used.remove(mirror)
            self._emit(Noticed("", f"the mirror {mirror} is no longer used: {why}"))

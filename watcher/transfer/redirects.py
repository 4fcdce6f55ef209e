"""Redirects: where they may lead. Whoever asks decides what goes along; nothing does by itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias
from urllib.parse import urljoin, urlsplit

from watcher.transfer.client import Answer, Request
from watcher.transfer.values import Cause, TryError

Ask: TypeAlias = Callable[[Request], Awaitable[Answer]]
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5


async def followed(ask: Ask, request: Request) -> tuple[str, Answer]:
    """The answer at the end of a few redirects, and the address of that. Raises TryError."""
    first = request.url
    for _ in range(_MOST_REDIRECTS + 1):
        answer = await ask(request)
        location = answer.head.headers.get("location")
        if answer.head.status not in _REDIRECTS or not location:
            return request.url, answer
        request = request._replace(url=referred(request.url, location))
    raise TryError(f"{urlsplit(first).hostname}: more than {_MOST_REDIRECTS} redirects")


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Whom an address belongs to. Raises ValueError."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def referred(url: str, location: str) -> str:
    """Where a redirect, or a realm, is. From https nothing leads to http. Raises TryError."""
    try:
        target = urljoin(url, location)
        scheme, host, _ = origin(target)
    except ValueError:
        target, scheme, host = "", "", None
    if scheme not in ("", "http", "https"):
        why = f"an unsupported protocol: {scheme}"
    elif not host or not (target.isascii() and target.isprintable()):
        why = "what is not an address"
    elif scheme == "http" and url.startswith("https:"):
        why = "http, which is not encrypted"
    else:
        return target
    raise TryError(f"{urlsplit(url).hostname} refers to {why}", Cause.WRONG_ANSWER, final=True)

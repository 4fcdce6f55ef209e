"""What is asked of others by HTTP: the server's API."""

from __future__ import annotations

import contextlib
from urllib.parse import urlsplit

import orjson

#: A server that starts has its port open and does not answer: the wait must be short.
ANSWER_SECONDS = 1.0
_LONGEST_ANSWER = 64 * 1024


def version(url: str) -> str | None:
    """The version of the server at `url`, or None where no Ollama answers there in time."""
    # Only where there is a server to ask: the import alone costs 5 MB and 25 ms.
    import http.client

    try:
        parts = urlsplit(url)
        with contextlib.closing(
            http.client.HTTPConnection(
                parts.hostname or "127.0.0.1", parts.port or 11434, timeout=ANSWER_SECONDS
            )
        ) as connection:
            connection.request("GET", "/api/version")
            answer = orjson.loads(connection.getresponse().read(_LONGEST_ANSWER))
    except (OSError, ValueError, http.client.HTTPException):
        return None  # nobody there, no Ollama, or no address at all
    found = answer.get("version") if isinstance(answer, dict) else None
    return found if isinstance(found, str) else None

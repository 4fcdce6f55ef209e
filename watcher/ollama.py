"""What is asked of others by HTTP: the server's API, and the registry that a model came from."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import orjson

from watcher.names import ModelName

if TYPE_CHECKING:
    import http.client

#: A server that starts has its port open and does not answer: the wait must be short.
ANSWER_SECONDS = 1.0
_LONGEST_ANSWER = 64 * 1024
REGISTRY_SECONDS = 10.0
_MOST_REDIRECTS = 5
_LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})


def version(url: str) -> str | None:
    """The version of the server at `url`, or None where no Ollama answers there in time."""
    # Only where there is a server to ask: the imports alone cost 5 MB and 25 ms.
    import http.client
    from urllib.parse import urlsplit

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


def registry_length(model: ModelName, digest: str) -> int | None:
    """How many bytes a model's registry has of a digest; None where it does not say so.

    Loopback registries are asked over http, as Ollama's insecure pulls do, all others over https.
    Redirects are followed a few times, as the server does for its downloads.
    """
    import http.client
    from urllib.parse import urljoin

    host = model.host
    loopback = host.rsplit(":", 1)[0] in _LOOPBACK_HOSTS
    url = (
        f"{'http' if loopback else 'https'}://{host}/v2/{model.namespace}/{model.model}"
        f"/blobs/sha256:{digest}"
    )
    for _ in range(_MOST_REDIRECTS):
        try:
            answer = _head(url)
        except (OSError, ValueError, http.client.HTTPException):
            return None
        location = answer.getheader("Location")
        if answer.status in (301, 302, 303, 307, 308) and location:
            url = urljoin(url, location)
            continue
        length = answer.getheader("Content-Length", "")
        return int(length) if answer.status == 200 and length.isdecimal() else None
    return None


def _head(url: str) -> http.client.HTTPResponse:
    import http.client
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    with contextlib.closing(
        kind(parts.hostname or "", parts.port, timeout=REGISTRY_SECONDS)
    ) as connection:
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request("HEAD", path)
        answer = connection.getresponse()
        answer.read()
        return answer

"""What is asked of others by HTTP: the server's API, and the registry that a model came from."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import orjson

from watcher import manifests
from watcher.names import ModelName

if TYPE_CHECKING:
    import http.client

#: A server that starts has its port open and does not answer: the wait must be short.
ANSWER_SECONDS = 1.0
_LONGEST_ANSWER = 64 * 1024
REGISTRY_SECONDS = 10.0
_MOST_REDIRECTS = 5
_MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
_LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})


def version(url: str) -> str | None:
    """The version of the server at `url`, or None where no Ollama answers there in time."""
    # Only where there is a server to ask: the imports alone cost 5 MB and 25 ms.
    import http.client
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(
            parts.hostname or "127.0.0.1", parts.port or 11434, timeout=ANSWER_SECONDS
        )
        with _deadline(connection, ANSWER_SECONDS):
            connection.request("GET", "/api/version")
            answer = orjson.loads(connection.getresponse().read(_LONGEST_ANSWER))
    except (OSError, ValueError, http.client.HTTPException):
        return None  # nobody there, no Ollama, or no address at all
    found = answer.get("version") if isinstance(answer, dict) else None
    return found if isinstance(found, str) else None


@contextlib.contextmanager
def _deadline(connection: http.client.HTTPConnection, seconds: float) -> Iterator[None]:
    """Connect, and end all talk over this connection after so long.

    A socket's own time-out begins anew with each byte, so a slow answer could take for ever.
    """
    with contextlib.closing(connection):
        connection.connect()
        talk: socket.socket = connection.sock

        def end() -> None:
            with contextlib.suppress(OSError):
                talk.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def registry_length(model: ModelName, digest: str) -> int | None:
    """How many bytes a model's registry has of a digest; None where it does not say so.

    Loopback registries are asked over http, as Ollama's insecure pulls do, all others over https.
    Redirects are followed a few times, as the server does for its downloads.
    """
    import http.client
    from urllib.parse import urljoin

    host = model.host
    url = (
        f"{'http' if is_loopback(host) else 'https'}://{host}/v2/{model.namespace}/{model.model}"
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


class Fetched(NamedTuple):
    """A registry's answer for a manifest: 200 with its bytes, 304, or what is wrong."""

    status: int
    raw: bytes = b""
    #: What the registry calls this version; "" where it does not say.
    etag: str = ""


def registry_manifest(model: ModelName, etag: str = "", *, insecure: bool = False) -> Fetched:
    """Ask a model's registry for its manifest; 304 where it is still the one with that `etag`.

    Proxies are taken from the environment, as the server does. Raises OSError where nobody answers
    in time.
    """
    answers: queue.SimpleQueue[Fetched | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(_manifest(model, etag, insecure=insecure))
        except OSError as error:
            answers.put(error)

    threading.Thread(target=ask, name="registry", daemon=True).start()
    try:
        answer = answers.get(timeout=REGISTRY_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"{model.host} gives no whole answer in time") from None
    if isinstance(answer, OSError):
        raise answer
    return answer


def _manifest(model: ModelName, etag: str, *, insecure: bool) -> Fetched:
    import http.client
    import ssl
    from urllib.error import HTTPError
    from urllib.request import BaseHandler, HTTPSHandler, ProxyHandler, Request, build_opener

    loopback = is_loopback(model.host)
    scheme = "http" if loopback else "https"
    request = Request(  # noqa: S310 - one of two schemes
        f"{scheme}://{model.host}/v2/{model.namespace}/{model.model}/manifests/{model.tag}",
        headers={"Accept": _MANIFEST_TYPE, **({"If-None-Match": etag} if etag else {})},
    )
    handlers: list[BaseHandler] = [ProxyHandler({})] if loopback else []
    if insecure:
        trust = ssl.create_default_context()
        trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
        handlers.append(HTTPSHandler(context=trust))
    try:
        with build_opener(*handlers).open(request, timeout=REGISTRY_SECONDS) as answer:
            raw = answer.read(manifests.READ_LIMIT)
            return Fetched(answer.status, raw, answer.headers.get("ETag", ""))
    except HTTPError as error:
        with error:
            return Fetched(error.code)
    except (ValueError, http.client.HTTPException) as error:
        raise OSError(f"{model.host} gives no answer that makes sense: {error}") from None


def is_loopback(host: str) -> bool:
    """Whether a host, with or without a port, is this machine by its loopback."""
    if host in _LOOPBACK_HOSTS:
        return True
    return host.rsplit(":", 1)[0] in _LOOPBACK_HOSTS


def _head(url: str) -> http.client.HTTPResponse:
    import http.client
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=REGISTRY_SECONDS)
    with _deadline(connection, REGISTRY_SECONDS):
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request("HEAD", path)
        answer = connection.getresponse()
        answer.read()
        return answer

"""What a registry answers: manifests, and the lengths of layers. Nothing is kept here."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from watcher.errors import without_secrets
from watcher.ollama import manifests, server
from watcher.ollama.names import ModelName
from watcher.ollama.sidecars import LARGEST_LAYER

if TYPE_CHECKING:
    import http.client
    from urllib.parse import SplitResult

#: All layers together have no more, so that every sum of them is a number that can be kept.
_MOST_BYTES = 1 << 55
ANSWER_SECONDS = 10.0
_MOST_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PROXIES = frozenset({"http_proxy", "https_proxy"})
_MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"


class Fetched(NamedTuple):
    """A registry's answer: its status, with 200 its bytes, and its headers."""

    status: int
    raw: bytes = b""
    etag: str = ""  #: what the registry calls this version; "" where it gives none
    length: int | None = None


def length(model: ModelName, digest: str, *, insecure: bool = False) -> int | None:
    """How many bytes a registry has of a digest; None where it does not report that. OSError."""
    found = _ask("HEAD", model, f"blobs/sha256:{digest}", {}, insecure=insecure)
    length = found.length if found.status == 200 else None
    return None if length is None or length > LARGEST_LAYER else length


def fetch(model: ModelName, etag: str = "", *, insecure: bool = False) -> Fetched:
    """A model's manifest from its registry; 304 where it still has that `etag`. Raises OSError."""
    headers = {"Accept": _MANIFEST_TYPE, **({"If-None-Match": etag} if etag else {})}
    return _ask("GET", model, f"manifests/{model.tag}", headers, insecure=insecure)


def _ask(
    method: str, model: ModelName, path: str, headers: Mapping[str, str], *, insecure: bool
) -> Fetched:
    """One question to a model's registry. Raises OSError where nobody answers in time.

    Loopback registries are asked over http, as Ollama's insecure pulls do, all others over https.
    Proxies are taken from the environment, and a few redirects are followed, as the server does.
    """
    import http.client

    scheme = "http" if server.is_loopback(model.host) else "https"
    url = f"{scheme}://{model.host}/v2/{model.namespace}/{model.model}/{path}"
    try:
        return server.within(
            ANSWER_SECONDS, lambda opened: _follow(method, url, headers, insecure, opened)
        )
    except TimeoutError:
        raise TimeoutError(f"{model.host} sent no complete response in time") from None
    except (ValueError, http.client.HTTPException) as error:
        why = without_secrets(str(error))
        raise OSError(f"{model.host} sent an invalid response: {why}") from None
    except ImportError as error:
        raise OSError(f"this Python can't speak https: {error}") from None


def _follow(
    method: str, url: str, headers: Mapping[str, str], insecure: bool, opened: list[socket.socket]
) -> Fetched:
    """The answer at the end of a few redirects. `opened` gets each socket."""
    # Only where there is a registry to ask: the imports alone take 5 MB and 25 ms.
    import http.client
    from urllib.parse import urljoin

    for _ in range(_MOST_REDIRECTS):
        parts = _split(url)
        connection, proxy = _connection(parts, insecure)
        with contextlib.ExitStack() as held:
            held.callback(connection.close)

            def answered(*given: Any, held: contextlib.ExitStack = held, **more: Any) -> Any:
                return held.enter_context(http.client.HTTPResponse(*given, **more))

            # By itself it leaves open what a proxy answers that refuses a tunnel.
            connection.response_class = answered  # type: ignore[assignment]
            connection.connect()
            opened.append(connection.sock)
            target = url if proxy else parts._replace(scheme="", netloc="").geturl()
            connection.request(method, target, headers={**headers, **_authorization(proxy)})
            answer = connection.getresponse()
            location = answer.getheader("Location")
            if answer.status in _REDIRECTS and location:
                url = urljoin(url, location)
                continue
            size = answer.getheader("Content-Length", "")
            return Fetched(
                answer.status,
                answer.read(manifests.READ_LIMIT) if answer.status == 200 else b"",
                answer.getheader("ETag", ""),
                int(size) if size.isdecimal() and len(size) < 20 else None,
            )
    raise OSError(f"more than {_MOST_REDIRECTS} redirects")


def _connection(
    parts: SplitResult, insecure: bool
) -> tuple[http.client.HTTPConnection, SplitResult | None]:
    """Whom to connect to for a URL, and the proxy that needs it, if any."""
    import http.client

    if not parts.hostname or parts.scheme not in ("http", "https"):
        raise OSError(f"unsupported protocol: {without_secrets(parts.geturl())}")
    proxy = _proxy(parts)
    host, port = parts.hostname, parts.port
    if proxy:
        host, port = proxy.hostname or "", proxy.port or 80
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=ANSWER_SECONDS), proxy
    import ssl

    trust = ssl.create_default_context()
    if insecure:
        trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    made = http.client.HTTPSConnection(host, port, timeout=ANSWER_SECONDS, context=trust)
    if proxy:
        made.set_tunnel(parts.hostname, parts.port, _authorization(proxy))
    return made, None


def _split(url: str) -> SplitResult:
    """The parts of a URL, of which `hostname` and `port` can be asked. Raises ValueError."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        _ = parts.hostname, parts.port
    except ValueError:
        # Python's own words quote what is in it, a password's rest as the port.
        raise ValueError(f"not an address: {without_secrets(url)}") from None
    return parts


def _proxy(parts: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for a URL; none for this machine itself."""
    named = any(name.lower() in _PROXIES and value for name, value in os.environ.items())
    if server.is_loopback(parts.netloc) or not named:
        return None
    from urllib.parse import quote
    from urllib.request import getproxies, proxy_bypass

    found = getproxies().get(parts.scheme)
    if not found or proxy_bypass(parts.netloc):
        return None
    scheme, _, rest = (found if "://" in found else f"http://{found}").partition("://")
    user, at, address = rest.rpartition("@")
    try:
        # A password may have any characters, also those that end an address.
        proxy = _split(f"{scheme}://{quote(user, safe=':%')}{at}{address}")
    except ValueError:
        raise OSError(f"{parts.scheme}_proxy is not the address of a proxy: {address}") from None
    if proxy.scheme != "http":
        raise OSError(f"a proxy by {proxy.scheme} can't be used here: {proxy.hostname}")
    return proxy


def _authorization(proxy: SplitResult | None) -> dict[str, str]:
    if proxy is None or proxy.username is None:
        return {}
    from urllib.parse import unquote

    word = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(word.encode()).decode()}"}


def sizes(raw: bytes, right: Mapping[str, int] = MappingProxyType({})) -> dict[str, int]:
    """The digests of layers and config with their bytes, by the manifest or as they are `right`.

    Raises ValueError for what is no manifest, and for bytes that no layer can have. A server pulls
    such a model all the same: it goes by the lengths that the registry answers.
    """
    found = {digest: size for digest, (size, _) in manifests.parse(raw).named.items()}
    absurd = [size for size in found.values() if not 0 <= size <= LARGEST_LAYER]
    if absurd:
        raise ValueError(f"a layer of {absurd[0]:,} bytes")
    if (total := sum(found.values())) > _MOST_BYTES:
        raise ValueError(f"{total:,} bytes together")
    return {digest: right.get(digest, size) for digest, size in found.items()}

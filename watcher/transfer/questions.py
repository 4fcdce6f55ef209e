"""Single questions to a registry, besides transfers: a model's manifest, and a layer's length.

No credentials go along. What answers is kept in the store, for when nobody answers.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from watcher.observe.host import Host
from watcher.ollama import manifests, server
from watcher.ollama.names import ModelName
from watcher.ollama.sidecars import LARGEST_LAYER
from watcher.state import registry_cache

if TYPE_CHECKING:
    from watcher.transfer.client import Answer

ANSWER_SECONDS = 10.0
_MANIFEST = "Accept: application/vnd.docker.distribution.manifest.v2+json"


def asking(host: Host) -> Host:
    """A host that asks registries so, where it has no other way."""
    return replace(
        host,
        registry_length=host.registry_length or length,
        registry_manifest=host.registry_manifest or manifest,
    )


def length(model: ModelName, digest: str, *, insecure: bool = False) -> int | None:
    """How many bytes a registry has of a digest; None where it does not report that. OSError."""
    head = _asked(model, f"blobs/sha256:{digest}", "HEAD", insecure=insecure).head
    size = head.headers.get("content-length", "") if head.status == 200 else ""
    found = int(size) if size.isdecimal() and len(size) < 20 else None
    return None if found is None or found > LARGEST_LAYER else found


def manifest(
    store: int | None, model: ModelName, *, insecure: bool = False
) -> registry_cache.Answer:
    """Ask a model's registry for its manifest; where nobody answers, the one kept in `store`."""
    known = None if store is None else registry_cache.cached(store).get(model.key)
    kept = known.raw.encode() if known else None
    headers = (_MANIFEST, *((f"If-None-Match: {known.etag}",) if known and known.etag else ()))
    try:
        found = _asked(model, f"manifests/{model.tag}", "GET", *headers, insecure=insecure)
    except OSError as error:
        why = f"{model.host} does not answer: {error.strerror or error}"
        return registry_cache.Answer(kept, why, silent=True)
    status = found.head.status
    if status == 304 and known:
        return registry_cache.Answer(kept)
    if status == 404:
        return registry_cache.Answer(None, f"{model.host} has no {model.shown}")
    if status != 200:
        return registry_cache.Answer(kept, f"{model.host} answers {status}")
    try:
        manifests.sizes(found.body)
    except ValueError as error:
        return registry_cache.Answer(None, f"{model.host} sent an invalid manifest: {error}")
    if store is not None:
        etag = found.head.headers.get("etag", "")
        registry_cache.keep(store, model, found.body, etag, time.time())
    return registry_cache.Answer(found.body)


def _asked(model: ModelName, path: str, method: str, *headers: str, insecure: bool) -> Answer:
    """The answer at the end of a few redirects. Raises OSError where nobody answers in time.

    Loopback registries are asked over http, as Ollama's insecure pulls do, all others over https.
    """
    try:
        # Only where there is a registry to ask: the imports alone take 11 MB and 50 ms.
        import asyncio

        from watcher.transfer import client, redirects
        from watcher.transfer.values import TryError
    except ImportError as error:
        raise OSError(f"pycurl can't be loaded: {error}") from None
    scheme = "http" if server.is_loopback(model.host) else "https"
    request = client.Request(
        f"{scheme}://{model.host}/v2/{model.namespace}/{model.model}/{path}",
        headers,
        limit=manifests.READ_LIMIT,
        insecure=insecure,
        seconds=ANSWER_SECONDS,
        method=method,
    )

    async def ask() -> Answer:
        with client.Client(1) as asked:
            return (await redirects.followed(asked.ask, request))[1]

    try:
        return server.within(ANSWER_SECONDS, lambda _: asyncio.run(ask()))
    except TimeoutError:
        raise TimeoutError(f"{model.host} sent no complete response in time") from None
    except TryError as error:
        raise OSError(str(error)) from None

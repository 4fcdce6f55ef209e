"""A model's registry: its manifest, and where the bytes of a layer are.

A layer is asked for at the registry, which answers with the bytes (a plain OCI registry) or with
the address of another host, which expires. Tokens go to the registry alone, never along a redirect,
and no redirect leads from https to http. What an address signs with is in no text.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from watcher.ollama import manifests, names, server
from watcher.ollama import registry as answered
from watcher.ollama.names import ModelName
from watcher.transfer import answers, auth
from watcher.transfer.client import Answer, Client, Request
from watcher.transfer.values import BusyError, Cause, Layer, TryError

_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5
#: One wrong answer is anybody's.
_SURE = 3
_GONE = frozenset({404, 410})
_LATER = frozenset({429, 503})
#: Refusals that may pass: a request that took too long, or came too early.
_PASSING = frozenset({408, 425})


class Access(NamedTuple):
    """How a registry is asked."""

    #: Take unknown certificates.
    insecure: bool = False
    #: By http, for who asks for both; this machine's own registries are asked so anyway.
    plain: bool = False
    #: The key that signs for tokens; "" for none.
    key: str = ""
    stall: float = 30.0


class Address(NamedTuple):
    """Where a layer's bytes are."""

    url: str
    #: The registry's own: a token goes with it.
    is_own: bool


class Registry:
    """The registry of one model."""

    def __init__(self, client: Client, model: ModelName, access: Access) -> None:
        self._client, self._access = client, access
        plain = server.is_loopback(model.host) or (access.insecure and access.plain)
        scheme = "http" if plain else "https"
        self._model = model
        self._base = f"{scheme}://{model.host}/v2/{model.namespace}/{model.model}"
        self._token = ""
        self._addresses: dict[str, Address] = {}
        #: How often in a row a layer was missing or had another size, where it was asked for anew.
        self._refused = Counter[str]()
        #: One asks, the others wait for what it finds.
        self._asking = asyncio.Lock()
        #: The last question that failed: when, and how.
        self._failed: tuple[float, TryError] | None = None

    # ------------------------------------------------------------ the manifest

    async def manifest(self) -> bytes:
        """The bytes of the manifest, verbatim. Raises TryError."""
        request = Request(
            f"{self._base}/manifests/{self._model.tag}",
            (f"Accept: {_MANIFEST}",),
            limit=manifests.READ_LIMIT,
        )
        _, answer = await self._followed(request)
        if answer.head.status == 404:
            words = answers.words(answer.body)
            text = f"model {self._model.shown} not found: {self._model.host} answers 404: {words}"
            raise TryError(text.rstrip(": "), Cause.NO_SUCH_MODEL, final=True)
        if answer.head.status != 200:
            raise self.failure(answer)
        try:
            answered.sizes(answer.body)
        except ValueError as error:
            if answer.body.lstrip().startswith(b"<"):
                words = answers.words(answer.body)
                text = f"{self._model.host} answers with a web page: {words}"
                raise TryError(text, Cause.WRONG_ANSWER, final=True) from None
            text = f"its manifest is invalid: {error}"
            raise TryError(text, Cause.BAD_MANIFEST, final=True) from None
        named = answer.head.headers.get("docker-content-digest", "")
        if named.startswith("sha256:") and named[7:] != hashlib.sha256(answer.body).hexdigest():
            text = f"{self._model.host} sent a manifest that is not the one it names"
            raise TryError(text, Cause.WRONG_ANSWER)
        return answer.body

    # ------------------------------------------------------------ layers

    async def address(self, layer: Layer) -> Address:
        """Where a layer's bytes are, by now. Raises TryError."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with self._asking:
            known = self._addresses.get(layer.digest)
            if known is not None:
                return known
            if self._failed is not None and self._failed[0] >= began:
                raise self._failed[1]  # whoever waited for that answer has it, too
            try:
                known = self._addresses[layer.digest] = await self._ask(layer)
            except TryError as error:
                self._failed = loop.time(), error
                raise
            return known

    def expire(self, layer: Layer, address: Address) -> bool:
        """An address works no longer: the next one who needs it asks anew.

        False where somebody else has found that out before.
        """
        is_current = self._addresses.get(layer.digest) == address
        if is_current:
            del self._addresses[layer.digest]
        return is_current

    def request(self, address: Address, start: int, end: int, *, fresh: bool = False) -> Request:
        """The request for a range of bytes at an address."""
        headers = self._authorization() if address.is_own else ()
        return self._as_asked(Request(address.url, headers, (start, end), fresh=fresh))

    async def _ask(self, layer: Layer) -> Address:
        own = f"{self._base}/blobs/sha256:{layer.digest}"
        address, answer = await self._followed(Request(own, range=(0, 1)))
        fault = answers.fault(answer.head, 0, 1, layer.size)
        if answer.head.status in (200, 206) and fault:
            raise self._other_size(layer, answer) or wrong_answer(address.url, fault, answer)
        if fault:
            failure = self.failure(answer, address)
            if answer.head.status in _GONE and self._is_sure(layer):
                raise TryError(str(failure), Cause.NO_SUCH_MODEL, final=True)
            raise failure
        del self._refused[layer.digest]
        return address

    def _is_sure(self, layer: Layer) -> bool:
        """Whether what is wrong with a layer has been so several times in a row."""
        self._refused[layer.digest] += 1
        return self._refused[layer.digest] >= _SURE

    def _other_size(self, layer: Layer, answer: Answer) -> TryError | None:
        """The end of a layer whose size by its manifest is another one, time and again."""
        found = answers.total(answer.head)
        if found in (None, layer.size) or not self._is_sure(layer):
            return None
        what = f"layer {names.short(layer.digest)}"
        text = f"{self._model.host} has {found:,} bytes of {what}, and the manifest {layer.size:,}"
        return TryError(text, Cause.WRONG_SIZE, final=True)

    async def _followed(self, request: Request) -> tuple[Address, Answer]:
        """The answer at the end of a few redirects, and where that is."""
        own = request.url
        for _ in range(_MOST_REDIRECTS + 1):
            if _origin(request.url) == _origin(own):
                answer = await self._authorized(request)
            else:
                answer = await self._client.get(self._as_asked(request))
            location = answer.head.headers.get("location")
            if answer.head.status not in _REDIRECTS or not location:
                return Address(request.url, _origin(request.url) == _origin(own)), answer
            request = request._replace(url=_referred(request.url, location))
        raise TryError(f"{self._model.host}: more than {_MOST_REDIRECTS} redirects")

    def _as_asked(self, request: Request) -> Request:
        return request._replace(insecure=self._access.insecure, seconds=self._access.stall)

    # ------------------------------------------------------------ tokens

    async def _authorized(self, request: Request) -> Answer:
        """The registry's answer; with a token, where it wants one."""
        answer = await self._with_token(request)
        if answer.head.status == 401:
            asked = auth.challenge(answer.head.headers.get("www-authenticate", ""))
            for is_signed in (False, True):
                if asked is None or not await self._renew(asked, is_signed=is_signed):
                    break
                answer = await self._with_token(request)
                if answer.head.status != 401:
                    break
        return answer

    async def _with_token(self, request: Request) -> Answer:
        headers = (*request.headers, *self._authorization())
        return await self._client.get(self._as_asked(request._replace(headers=headers)))

    def _authorization(self) -> tuple[str, ...]:
        return (f"Authorization: Bearer {self._token}",) if self._token else ()

    async def _renew(self, asked: auth.Challenge, *, is_signed: bool) -> bool:
        """Get a token; False where this registry gives none this way. Raises TryError."""
        self._token = ""
        asked = asked._replace(realm=_referred(self._base, asked.realm))
        url, headers = asked.address(), tuple[str, ...]()
        if is_signed:
            if urlsplit(asked.realm).hostname != urlsplit(self._base).hostname:
                return False  # a signature is for the registry alone
            try:
                url, signature = auth.signed(asked, self._access.key)
            except auth.NoKeyError as error:
                text = f"{self._model.host} wants a signature, and {error}"
                raise TryError(text, Cause.NOT_ALLOWED, final=True) from None
            headers = (f"Authorization: {signature}",)
        answer = await self._client.get(self._as_asked(Request(url, headers, limit=128 * 1024)))
        if answer.head.status in _LATER or answer.head.status >= 500:
            raise self.failure(answer)
        self._token = auth.token(answer.body) if answer.head.status == 200 else ""
        # Where the first way gives nothing, the second one is tried, too.
        return bool(self._token) or not is_signed

    # ------------------------------------------------------------ failures

    def failure(self, answer: Answer, address: Address | None = None) -> TryError:
        """What an answer that is not the wanted one means. `address`: where a layer was asked."""
        status, host = answer.head.status, self._model.host
        words = answers.words(answer.body)
        text = f"{host} answers {status}" + (f": {words}" if words else "")
        if status in _LATER:
            return BusyError(text, answers.retry_after(answer.head, time.time()))
        if address is not None and not address.is_own:
            # Another host's: a new address may do better.
            text = f"{urlsplit(address.url).hostname} answers {status}: {words}"
            return TryError(text.rstrip(": "))
        if status in _GONE:
            return TryError(text, Cause.NO_SUCH_MODEL, final=True)
        if status == 412:
            return TryError(text, Cause.NEWER_OLLAMA, final=True)
        if status in (401, 403):
            return TryError(text, Cause.NOT_ALLOWED, final=True)
        is_refused = 400 <= status < 500 and status not in _PASSING
        cause = Cause.NETWORK if status >= 500 else Cause.WRONG_ANSWER
        return TryError(text, cause, final=is_refused)


def wrong_answer(url: str, fault: str, answer: Answer) -> TryError:
    """An answer that is not the range that was asked for."""
    words = answers.words(answer.body)
    text = f"{urlsplit(url).hostname} sent {fault}"
    return TryError(f"{text}: {words}" if words else text, Cause.WRONG_ANSWER)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _referred(url: str, location: str) -> str:
    """Where a redirect, or a realm, is. From https nothing leads to http. Raises TryError."""
    try:
        target = urljoin(url, location)
        scheme, host, _ = _origin(target)
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

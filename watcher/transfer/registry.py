"""A model's registry: its manifest, and where the bytes of a layer are.

A layer is asked for at the registry, which answers with the bytes (a plain OCI registry) or with
the address of another host, which expires. Tokens go to the registry alone, never along a redirect,
and no redirect leads from https to http. What an address signs with is in no text.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, defaultdict
from urllib.parse import urlsplit

from watcher.ollama import manifests, names, server
from watcher.ollama.names import ModelName
from watcher.state import sums
from watcher.transfer import answers, asking, mirrors
from watcher.transfer.asking import Access, Asker
from watcher.transfer.client import Answer, Client, Request
from watcher.transfer.mirrors import Mirrors
from watcher.transfer.values import Address, Cause, Emit, Layer, Noticed, TryError

#: One wrong answer is anybody's.
_SURE = 3


class Registry:
    """The registry of one model."""

    def __init__(self, client: Client, model: ModelName, access: Access, emit: Emit) -> None:
        plain = server.is_loopback(model.host) or (access.insecure and access.plain)
        scheme = "http" if plain else "https"
        self._asker = Asker(client, f"{scheme}://{model.host}", access)
        self._model, self._emit = model, emit
        self._path = f"/v2/{model.namespace}/{model.model}"
        self._mirrors = Mirrors(self._asker.ask_unknown, access.mirrors, emit)
        #: Digests of which a mirror has sent wrong bytes.
        self._own_only: set[str] = set()
        self._addresses: dict[str, Address] = {}
        #: How often in a row a layer was missing or had another size, where it was asked for anew.
        self._refused = Counter[str]()
        #: By digest: one asks, the others wait for what it finds.
        self._asking = defaultdict[str, asyncio.Lock](asyncio.Lock)
        #: The last question about a digest that failed: when, and how.
        self._failed: dict[str, tuple[float, TryError]] = {}

    # ------------------------------------------------------------ the manifest

    async def manifest(self) -> bytes:
        """The bytes of the manifest, verbatim. Raises TryError."""
        request = Request(
            f"{self._path}/manifests/{self._model.tag}",
            (f"Accept: {asking.MANIFEST}",),
            limit=manifests.READ_LIMIT,
        )
        try:
            _, answer = await self._followed(request)
        except TryError as error:
            found = None
            if error.is_unreached:
                found = await self._mirrors.first(request, lambda _, answer: self._checked(answer))
            if found is None:
                raise
            mirror, raw = found
            text = f"{error}; using the manifest of the mirror {mirror}"
            self._emit(Noticed("", text))
            return raw
        return self._checked(answer)

    def _checked(self, answer: Answer) -> bytes:
        """The manifest that an answer is. Raises TryError."""
        if answer.head.status == 404:
            words = answers.words(answer.body)
            text = f"model {self._model.shown} not found: {self._model.host} answers 404: {words}"
            raise TryError(text.rstrip(": "), Cause.NO_SUCH_MODEL, final=True)
        if answer.head.status != 200:
            raise self.failure(answer)
        try:
            manifests.sizes(answer.body)
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
        async with self._asking[layer.digest]:
            known = self._addresses.get(layer.digest)
            if known is not None:
                return known
            failed_at, failed = self._failed.get(layer.digest, (0.0, None))
            if failed is not None and failed_at >= began:
                raise failed  # whoever waited for that answer has it, too
            try:
                known = self._addresses[layer.digest] = await self._ask(layer)
            except TryError as error:
                self._failed[layer.digest] = loop.time(), error
                raise
            return known

    async def sums(self, layer: Layer) -> bytes:
        """What the chunks of a layer hash to, as the registry says it; b"" where it does not.

        Whom it redirects to is not believed.
        """
        digest = f"sha256:{layer.digest}"
        request = Request(f"{self._path}/chunksums/{digest}", limit=sums.LONGEST)
        for _ in range(_SURE):
            try:
                address, answer = await self._followed(request)
                if answer.head.status != 200 or not address.is_own:
                    break
                if sums.parsed(answer.body, layer.size)[0].kind != sums.REGISTRY:
                    break
            except TryError as error:
                if error.final or error.is_unreached:
                    break
            except ValueError:
                continue  # it was cut short
            else:
                return answer.body
        return b""

    def leave(self, mirror: str, why: str) -> None:
        """Ask a mirror nothing more, for any layer."""
        self._mirrors.leave(mirror, why)
        known = self._addresses.items()
        self._addresses = {digest: each for digest, each in known if each.mirror != mirror}

    def distrust(self, layer: Layer) -> None:
        """A mirror has sent wrong bytes of a layer: the registry's own are fetched."""
        known = self._addresses.get(layer.digest)
        self._own_only.add(layer.digest)
        if known is not None and known.mirror:
            self.leave(known.mirror, f"{names.short(layer.digest)}: checksum mismatch")

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
        headers = self._asker.authorization() if address.is_own else ()
        asked = self._asker.as_asked(Request(address.url, headers, (start, end), fresh=fresh))
        return asked._replace(connect=mirrors.CONNECT_SECONDS) if address.mirror else asked

    async def _ask(self, layer: Layer) -> Address:
        request = Request(f"{self._path}/blobs/sha256:{layer.digest}", range=(0, 1))
        if layer.digest not in self._own_only:

            def judged(url: str, answer: Answer) -> str:
                if fault := answers.fault(answer.head, 0, 1, layer.size):
                    raise wrong_answer(url, fault, answer)
                return url

            found = await self._mirrors.first(request, judged)
            if found is not None:
                return Address(found[1], is_own=False, mirror=found[0])
        address, answer = await self._followed(request)
        fault = answers.fault(answer.head, 0, 1, layer.size)
        if answer.head.status in (200, 206) and fault:
            raise self._other_size(layer, answer) or wrong_answer(address.url, fault, answer)
        if fault:
            failure = self.failure(answer, address)
            if answer.head.status in asking.GONE and self._is_sure(layer):
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
        """The registry's answer at the end of a few redirects, and where that is."""
        url, answer = await self._asker.followed(request)
        return Address(url, self._asker.is_own(url)), answer

    def failure(self, answer: Answer, address: Address | None = None) -> TryError:
        """What an answer that is not the wanted one means. `address`: where a layer was asked."""
        if address is None or address.is_own:
            return asking.failure(self._model.host, answer)
        return asking.failure(str(urlsplit(address.url).hostname), answer, is_own=False)


def wrong_answer(url: str, fault: str, answer: Answer) -> TryError:
    """An answer that is not the range that was asked for."""
    words = answers.words(answer.body)
    text = f"{urlsplit(url).hostname} sent {fault}"
    return TryError(f"{text}: {words}" if words else text, Cause.WRONG_ANSWER)

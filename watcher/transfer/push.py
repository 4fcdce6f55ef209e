"""A model, from a store to a plain registry: the layers that it lacks, and the manifest last.

Nothing in the store is changed. A layer is hashed while it is sent, and its last bytes leave once
its hash is right, so that no registry ever completes a wrong one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

import orjson

from watcher.ollama import manifests, names, ranges
from watcher.ollama.names import ModelName
from watcher.state import folders, fs
from watcher.transfer import answers, asking, auth, redirects, store
from watcher.transfer.asking import Access, Asker
from watcher.transfer.client import Answer, Client, Request
from watcher.transfer.values import (
    BusyError,
    Cause,
    Emit,
    Layer,
    Options,
    Progress,
    TransferError,
    TryError,
    Waiting,
)

T = TypeVar("T")
#: A registry may move what it has received for so long before it answers.
_STORING_SECONDS = 300.0
_STEPS = {
    Cause.NO_SUCH_MODEL: "check the address: is a registry there, and may new names be added?",
    Cause.NOT_ALLOWED: "put a login for that host into ~/.netrc; it is sent by https only",
    Cause.CERTIFICATE: "name the bundle with its authority: SSL_CERT_FILE=/path/to/bundle.pem",
    Cause.NETWORK: "run it again when that works: layers that are there are not sent again",
    Cause.WRONG_ANSWER: "find out what answers in the registry's place: a proxy, a login page",
    Cause.WRONG_SIZE: "delete that layer there, or find out what answers in the registry's place",
}


class Order(NamedTuple):
    """What to push, and where to."""

    #: The store's folder.
    store: str
    model: ModelName
    #: Scheme, host, and perhaps port and path.
    registry: str
    #: Take unknown certificates.
    insecure: bool = False


class Pushed(NamedTuple):
    """What came of it."""

    #: The SHA-256 of the manifest.
    digest: str
    #: Each layer, the config among them, and whether it was sent: else it was there.
    layers: tuple[tuple[Layer, bool], ...]
    #: The manifest was sent, too.
    is_new: bool


class Push:
    """One model's way to a registry."""

    def __init__(self, order: Order, options: Options, emit: Emit) -> None:
        self._order, self._options, self._emit = order, options, emit
        self._path = f"/v2/{order.model.namespace}/{order.model.model}"

    def run(self) -> Pushed:
        """Send what is missing. Raises TransferError, FileNotFoundError for no manifest, OSError.

        An interrupt ends it: the registry has whole layers only.
        """
        order = self._order
        with folders.opened_store(order.store) as opened:
            raw = store.manifest(opened, order.model)
            layers = _layers(raw, order.model)
            with folders.opened_blobs(opened) as blobs:
                return asyncio.run(self._pushed(raw, layers, blobs))

    async def _pushed(self, raw: bytes, layers: list[Layer], blobs: int) -> Pushed:
        with Client(1) as client:
            order = self._order
            access = Access(order.insecure, key=auth.usual_key(), logins=auth.usual_logins())
            asker = Asker(client, order.registry, access)
            found = [await self._patiently(partial(self._has, asker, each)) for each in layers]
            pairs = tuple(
                (layer, not is_there) for layer, is_there in zip(layers, found, strict=True)
            )
            for layer, is_missing in pairs:
                if is_missing:
                    await self._send(asker, layer, blobs)
            is_new = await self._patiently(partial(self._place, asker, raw))
            return Pushed(hashlib.sha256(raw).hexdigest(), pairs, is_new)

    # ------------------------------------------------------------ layers

    async def _has(self, asker: Asker, layer: Layer) -> bool:
        """Whether the registry has a layer. Raises TryError where it has other bytes."""
        path = f"{self._path}/blobs/sha256:{layer.digest}"
        _, answer = await asker.followed(Request(path, method="HEAD"))
        if answer.head.status == 404:
            return False
        length = answer.head.headers.get("content-length", str(layer.size))
        if answer.head.status == 200 and length != str(layer.size):
            what = f"layer {names.short(layer.digest)} with {length[:20]} bytes"
            text = f"{self._host} has {what}, and the manifest says {layer.size}"
            raise TryError(text, Cause.WRONG_SIZE, final=True)
        self._expect(answer, 200)
        return True

    async def _send(self, asker: Asker, layer: Layer, blobs: int) -> None:
        what = names.short(layer.digest)
        try:
            fd = fs.open_followed(names.blob(layer.digest), blobs)
        except FileNotFoundError:
            raise _damaged(f"{what}: the blob is missing") from None
        with fs.closing(fd):
            if (found := os.fstat(fd).st_size) != layer.size:
                has, wanted = ranges.in_words(found, layer.size)
                raise _damaged(f"{what}: the blob has {has}, and the manifest says {wanted}")
            blob = _Blob(fd, layer, self._emit)
            await self._patiently(partial(self._upload, asker, blob))

    async def _upload(self, asker: Asker, blob: _Blob) -> None:
        """Send a layer in one request, to where the registry wants it. Raises TryError."""
        path = f"{self._path}/blobs/uploads/"
        address = self._order.registry + path
        answer = await asker.ask(Request(address, ("Content-Length: 0",), method="POST"))
        self._expect(answer, 202)
        target = redirects.referred(address, answer.head.headers.get("location", ""))
        mark = "&" if urlsplit(target).query else "?"
        digest = f"sha256:{blob.layer.digest}"
        request = Request(
            f"{target}{mark}digest={quote(digest)}",
            ("Content-Type: application/octet-stream",),
            method="PUT",
            body=blob,
            seconds=_STORING_SECONDS,
        )
        is_own = asker.is_own(target)
        answer = await (asker.ask(request) if is_own else asker.ask_unknown(request))
        self._expect(answer, 201)
        self._agree(answer, digest)

    # ------------------------------------------------------------ the manifest

    async def _place(self, asker: Asker, raw: bytes) -> bool:
        """Have the registry give this very manifest; whether it had to be sent. Raises TryError."""
        if await self._placed(asker) == raw:
            return False
        path = f"{self._path}/manifests/{self._order.model.tag}"
        request = Request(
            self._order.registry + path,
            (f"Content-Type: {_kind(raw)}",),
            method="PUT",
            body=_Bytes(raw),
        )
        answer = await asker.ask(request)
        self._expect(answer, 201)
        self._agree(answer, f"sha256:{hashlib.sha256(raw).hexdigest()}")
        if await self._placed(asker) != raw:
            text = f"{self._host} gives another manifest than it got"
            raise TryError(text, Cause.WRONG_ANSWER, final=True)
        return True

    async def _placed(self, asker: Asker) -> bytes:
        """The manifest that the registry has; b"" for none. Raises TryError."""
        accept = f"Accept: {asking.MANIFEST}, application/vnd.oci.image.manifest.v1+json"
        path = f"{self._path}/manifests/{self._order.model.tag}"
        _, answer = await asker.followed(Request(path, (accept,), limit=manifests.READ_LIMIT))
        if answer.head.status == 404:
            return b""
        self._expect(answer, 200)
        return answer.body

    # ------------------------------------------------------------ answers

    @property
    def _host(self) -> str:
        return urlsplit(self._order.registry).netloc

    def _expect(self, answer: Answer, status: int) -> None:
        if answer.head.status == status:
            return
        if answer.head.status < 400:
            words = answers.words(answer.body)
            text = f"{self._host} answers {answer.head.status} in place of {status}"
            raise TryError(f"{text}: {words}" if words else text, Cause.WRONG_ANSWER, final=True)
        raise asking.failure(self._host, answer)

    def _agree(self, answer: Answer, digest: str) -> None:
        named = answer.head.headers.get("docker-content-digest", digest)
        if named != digest:
            text = f"{self._host} took {digest} for {named[:80]}"
            raise TryError(text, Cause.WRONG_ANSWER, final=True)

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What it brings, tried again where that can help. Raises TransferError."""
        tries = 0
        while True:
            try:
                return await ask()
            except TryError as error:
                tries += 1
                if error.final or tries == self._options.tries:
                    step = _STEPS.get(error.cause, "")
                    raise TransferError(str(error), step, error.cause) from None
                longest = self._options.longest_pause
                seconds = min(self._options.first_pause * 2.0 ** min(tries - 1, 20), longest)
                if isinstance(error, BusyError) and error.seconds is not None:
                    seconds = error.seconds
                self._emit(Waiting("", str(error), tries, seconds))
            await asyncio.sleep(seconds)


def _layers(raw: bytes, model: ModelName) -> list[Layer]:
    try:
        found, flaw = manifests.sizes(raw), manifests.flaw(raw)
    except ValueError as error:
        found, flaw = {}, str(error)
    if flaw:
        raise _damaged(f"the manifest of {model.shown} is invalid: {flaw}")
    return [Layer(*each) for each in found.items()]


def _kind(raw: bytes) -> str:
    """The media type of a manifest, as it says itself."""
    try:
        kind = orjson.loads(raw).get("mediaType")
    except (ValueError, AttributeError):
        kind = None
    is_kind = isinstance(kind, str) and re.fullmatch(r"[\w.+-]+/[\w.+-]+", kind, re.ASCII)
    return kind if is_kind else asking.MANIFEST


class _Bytes:
    """A body that is in memory."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self.size = len(data)

    def begin(self) -> None:
        self._at = 0

    def read(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]


class _Blob:
    """A layer on its way, hashed as it is read; its last bytes wait until the hash is right."""

    def __init__(self, fd: int, layer: Layer, emit: Emit) -> None:
        self._fd, self.layer, self._emit = fd, layer, emit
        self.size = layer.size
        self.begin()

    def begin(self) -> None:
        self._at, self._hash = 0, hashlib.sha256()

    def read(self, size: int) -> bytes:
        """The next bytes. Raises TransferError where they are not the layer's, and OSError."""
        data = os.pread(self._fd, min(size, self.size - self._at), self._at)
        self._hash.update(data)
        self._at += len(data)
        is_last = self._at == self.size or not data
        if is_last and self._hash.hexdigest() != self.layer.digest.lower():
            what = names.short(self.layer.digest)
            raise _damaged(f"{what}: checksum mismatch: the blob is damaged, and is not pushed")
        self._emit(Progress(self.layer.digest, self.size, self._at, self._at))
        return data


def _damaged(why: str) -> TransferError:
    return TransferError(why, "repair the store, then push again", Cause.DAMAGED_BLOB)

"""``sums/<digest>``: what each chunk of a layer must hash to.

    <kind>:<hex of the chunk> <start>-<end, inclusive>

``sha256`` is what its registry has said, ``xxh3-128`` what was made of bytes with the right hash.
They localize damage. Only the layer's own digest says that it is right.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import re
from typing import NamedTuple, Protocol, TypeAlias

from watcher.model import MIB
from watcher.state import folders, fs, state_folder, transfers

FOLDER = "sums"
LONGEST = 8 * MIB  #: of layers of 1 TiB; what is longer counts for nothing
#: Layers from this size on are worth sums. A smaller one is fetched as a whole about as soon as a
#: chunk, and a store may have thousands of them.
FROM = 64 * MIB
#: The bytes of a chunk of ours.
CHUNK = 16 * MIB
#: A larger chunk is not worth a sum, and might never be all there at once.
_LARGEST_CHUNK = 128 * MIB
#: Read at once: it fits into a core's own cache together with what hashes it.
READ = MIB
#: Kinds of sums, and how many digits each has.
REGISTRY, OURS = "sha256", "xxh3-128"
_DIGITS = {REGISTRY: 64, OURS: 32}
_PAIR = re.compile(rb"([a-z0-9-]+):([0-9a-f]+)\s+([0-9]{1,18})-([0-9]{1,18})(?:\s+|$)")


class Chunk(NamedTuple):
    """The bytes ``[start, end)`` of a layer, and the digits of their hash, which is of a kind."""

    digest: str
    start: int
    end: int
    kind: str = REGISTRY


Chunks: TypeAlias = tuple[Chunk, ...]


class Hasher(Protocol):
    """What hashes bytes, piece by piece."""

    def update(self, data: memoryview, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The digits of all."""


def hasher(kind: str) -> Hasher:
    """What makes sums of a kind. Raises ImportError for ours without the library."""
    if kind == REGISTRY:
        return hashlib.sha256()
    made: Hasher = importlib.import_module("xxhash").xxh3_128()
    return made


def add(found: Hasher, fd: int, start: int, end: int) -> None:
    """Add the bytes ``[start, end)`` of a file, as far as it has them. Raises OSError."""
    buffer = memoryview(bytearray(min(READ, end - start)))
    while start < end and (count := os.preadv(fd, [buffer[: end - start]], start)):
        found.update(buffer[:count])
        start += count


def hash_of(fd: int, chunk: Chunk) -> str:
    """What the chunk's bytes in a file hash to. Raises OSError."""
    found = hasher(chunk.kind)
    add(found, fd, chunk.start, chunk.end)
    return found.hexdigest()


class Whole:
    """What hashes a layer, first byte to last, and makes sums of ours beside, if wanted.

    Without the library there are none.
    """

    def __init__(self, *, with_sums: bool) -> None:
        self._all = hasher(REGISTRY)
        self._chunk: Hasher | None = None
        self._start, self._end, self._lines = 0, 0, list[str]()
        if with_sums:
            with contextlib.suppress(ImportError):
                self._chunk = hasher(OURS)

    def update(self, data: memoryview, /) -> None:
        """Add bytes."""
        self._all.update(data)
        while self._chunk is not None and data:
            part = data[: self._start + CHUNK - self._end]
            self._chunk.update(part)
            self._end += len(part)
            data = data[len(part) :]
            if self._end == self._start + CHUNK:
                self._close(self._chunk)

    def hexdigest(self) -> str:
        """The digits of all."""
        return self._all.hexdigest()

    def sums(self) -> bytes:
        """The sums, once all bytes were added; b"" where none are made."""
        if self._chunk is not None and self._end > self._start:
            self._close(self._chunk)
        return "".join(self._lines).encode()

    def _close(self, chunk: Hasher) -> None:
        self._lines.append(f"{OURS}:{chunk.hexdigest()} {self._start}-{self._end - 1}\n")
        self._start, self._chunk = self._end, hasher(OURS)


def wrong(fd: int, chunk: Chunk) -> bool:
    """Whether the chunk's bytes in a file are wrong, missing, or can't be read."""
    try:
        return hash_of(fd, chunk) != chunk.digest
    except OSError:
        return True


def parsed(raw: bytes, size: int | None = None) -> Chunks:
    """The chunks of a layer of `size` bytes, all of one kind.

    Raises ValueError where they are not all of it, one after the other.
    """
    found, at, raw = list[Chunk](), 0, raw.strip()
    while at < len(raw):
        pair = _PAIR.match(raw, at)
        begin = found[-1].end if found else 0
        if pair is None or int(pair[3]) != begin or not 0 <= int(pair[4]) - begin < _LARGEST_CHUNK:
            raise ValueError("sums that make no sense")
        kind, digest = pair[1].decode(), pair[2].decode()
        if len(digest) != _DIGITS.get(kind) or (found and kind != found[-1].kind):
            raise ValueError("sums of another kind")
        found.append(Chunk(digest, begin, int(pair[4]) + 1, kind))
        at = pair.end()
    if not found or size not in (None, found[-1].end):
        raise ValueError("sums of another number of bytes")
    return tuple(found)


def kept(ours: int, digest: str, size: int | None = None) -> Chunks:
    """What is known of a layer (of `size` bytes); () for nothing that can be compared.

    `ours`: the store's ``.ollama-watch``.
    """
    unusable = (OSError, ValueError, ImportError)
    with contextlib.suppress(*unusable), state_folder.opened_in(FOLDER, ours) as folder:
        found = parsed(fs.read_ours(digest, folder, LONGEST), size)
        hasher(found[0].kind)
        return found
    return ()


def keep(ours: int, digest: str, raw: bytes) -> None:
    """Keep sums, as far as that can be done; b"": none any more."""
    with contextlib.suppress(OSError), state_folder.made_in(FOLDER, ours) as folder:
        if raw:
            fs.save(digest, folder, raw, durable=False)
        else:
            fs.remove(digest, folder)


def tidy(store: int) -> None:
    """Remove those of layers that are neither there, nor in quarantine, nor on their way."""
    with (
        contextlib.suppress(OSError),
        state_folder.opened(store) as ours,
        state_folder.opened_in(FOLDER, ours) as folder,
        folders.opened_blobs(store) as blobs,
    ):
        files = os.listdir(blobs)
        aside = state_folder.opened_in(state_folder.QUARANTINE, ours)
        with contextlib.suppress(OSError), aside as quarantine:
            files += [label.partition("-")[2] for label in os.listdir(quarantine)]
        digests = [name[len("sha256-") :][:64] for name in files]
        there = {each.lower() for each in digests + transfers.digests(ours)}
        for name in {*os.listdir(folder)} - there:
            fs.remove(name, folder)

"""``sums/<digest>``: what each chunk of a layer must hash to, as its registry has said it.

    sha256:<hex of the chunk> <start>-<end, inclusive>

They localize damage. Only the layer's own digest says that it is right.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import NamedTuple, TypeAlias

from watcher.model import MIB
from watcher.state import folders, fs, state_folder, transfers

FOLDER = "sums"
LONGEST = 16 * MIB
#: A larger chunk is not worth a sum, and might never be all there at once.
_LARGEST_CHUNK = 128 * MIB
_PAIR = re.compile(rb"sha256:([0-9a-f]{64})\s+([0-9]{1,18})-([0-9]{1,18})(?:\s+|$)")


class Chunk(NamedTuple):
    """The bytes ``[start, end)`` of a layer, and the 64 digits of their hash."""

    digest: str
    start: int
    end: int


Chunks: TypeAlias = tuple[Chunk, ...]


def parsed(raw: bytes, size: int) -> Chunks:
    """The chunks of a layer of `size` bytes.

    Raises ValueError where they are not all of it, one after the other.
    """
    found, at, raw = list[Chunk](), 0, raw.strip()
    while at < len(raw):
        pair = _PAIR.match(raw, at)
        begin = found[-1].end if found else 0
        if pair is None or int(pair[2]) != begin or not 0 <= int(pair[3]) - begin < _LARGEST_CHUNK:
            raise ValueError("sums that make no sense")
        found.append(Chunk(pair[1].decode(), begin, int(pair[3]) + 1))
        at = pair.end()
    if not found or found[-1].end != size:
        raise ValueError("sums of another number of bytes")
    return tuple(found)


def kept(ours: int, digest: str, size: int) -> Chunks:
    """What is known of a layer; () for nothing. `ours`: the store's ``.ollama-watch``."""
    with contextlib.suppress(OSError, ValueError), state_folder.opened_in(FOLDER, ours) as folder:
        return parsed(fs.read_ours(digest, folder, LONGEST), size)
    return ()


def keep(ours: int, digest: str, raw: bytes) -> None:
    """Keep sums, as far as that can be done; b"": none any more."""
    with contextlib.suppress(OSError), state_folder.made_in(FOLDER, ours) as folder:
        if raw:
            fs.save(digest, folder, raw, durable=False)
        else:
            fs.remove(digest, folder)


def tidy(store: int) -> None:
    """Remove those of layers that are neither there nor on their way."""
    with (
        contextlib.suppress(OSError),
        state_folder.opened(store) as ours,
        state_folder.opened_in(FOLDER, ours) as folder,
        folders.opened_blobs(store) as blobs,
    ):
        digests = [name[len("sha256-") :][:64] for name in os.listdir(blobs)]
        there = {each.lower() for each in digests + transfers.digests(ours)}
        for name in {*os.listdir(folder)} - there:
            fs.remove(name, folder)

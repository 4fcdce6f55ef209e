"""What is trusted is true, after any history of attempts, resets, error pages and kills.

A server is modelled by what `docs/store.md` says of it: each attempt starts at Offset + Completed
and writes front to back; only an attempt that ends well, or is cancelled, moves Completed; a reset
moves nothing; an error page is written over at most the first MiB of an attempt; a kill forgets
nothing on the disk, and a power cut leaves blocks of zeros where something was allocated and never
written.
"""

from __future__ import annotations

import functools
import os
import random
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.examples import some
from watcher.model import MIB, Part, Ranges, Reads, Trust
from watcher.observe import parts as looking
from watcher.observe.parts import Content
from watcher.ollama import ranges

K = 1024
PIECE = 128 * K
#: What an attempt ends in, and how far it gets (in pieces, odd bytes added).
STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["well", "cancelled", "reset", "page", "killed"]),
        st.integers(0, 30),
        st.integers(0, 5000),
    ),
    max_size=14,
)
#: Sizes of the three parts: borders lie on blocks, or within them.
SIZES = st.tuples(*[st.integers(10, 30).map(lambda n: n * PIECE + 4096 * (n % 3))] * 3).flatmap(
    lambda sizes: st.tuples(*[st.sampled_from([size, size + 1, size - 256]) for size in sizes])
)


def content_of(length: int, seed: int) -> bytes:
    """Bytes with runs of zeros in them, at the ends of blocks above all."""
    return _made(seed)[:length]


@functools.cache
def _made(seed: int) -> bytes:
    made = bytearray(random.Random(seed).randbytes(3 * (30 * PIECE + 3 * 4096)))
    for at in range(0, len(made), 7 * 4096):
        made[at + 4096 - 300 : at + 4096] = bytes(300)
    return bytes(made)


def trusted(fd: int, size: int, parts: list[Part], *, rebooted: bool = False) -> Trust:
    """What is trusted; the same where all that was read for it is known from before."""
    doubts, limits = looking.Doubts(rebooted=rebooted), looking.Limits()
    content = Content(fd, size)
    trust = looking.trust(content, parts, doubts, limits)
    known = Reads(size, 0, "", content.answers)
    assert looking.trust(Content(fd, size, known), parts, doubts, limits) == trust
    return trust


class Server:
    """The disk and the sidecars of a download, as a server leaves them."""

    def __init__(self, fd: int, sizes: tuple[int, ...], content: bytes) -> None:
        self.fd, self.content = fd, content
        starts = [sum(sizes[:at]) for at in range(len(sizes))]
        self.parts = [
            Part(n, start, size, 0)
            for n, (start, size) in enumerate(zip(starts, sizes, strict=True))
        ]
        os.ftruncate(fd, len(content))

    def attempt(self, number: int, end: str, length: int) -> None:
        part = self.parts[number]
        start = part.starts_at
        stop = part.end if end == "well" else min(part.end, start + length)
        if end == "page":
            page = b"<html>502 Bad Gateway</html>" * 40_000
            os.pwrite(self.fd, page[: min(stop - start, MIB, length)], start)
            return
        os.pwrite(self.fd, self.content[start:stop], start)
        if end in ("well", "cancelled"):
            self.parts[number] = part._replace(completed=stop - part.offset)


def wrong(fd: int, trusted: Ranges, content: bytes) -> list[tuple[int, int]]:
    return [
        (start, end)
        for start, end in trusted
        if os.pread(fd, end - start, start) != content[start:end]
    ]


@settings(max_examples=some(120))
@given(SIZES, STEPS, st.integers(0, 3))
def test_trusted_bytes_are_right(
    sizes: tuple[int, ...], steps: list[tuple[int, str, int, int]], seed: int
) -> None:
    content = content_of(sum(sizes), seed)
    with tempfile.TemporaryFile() as file:
        server = Server(file.fileno(), sizes, content)
        for number, end, pieces, odd in steps:
            server.attempt(number, end, pieces * PIECE + odd)
        trust = trusted(file.fileno(), len(content), server.parts)
        false = wrong(file.fileno(), trust.trusted, content)
        assert not false
        assert not ranges.difference(trust.claimed, trust.trusted), "what is claimed is there"


@settings(max_examples=some(60))
@given(SIZES, STEPS, st.integers(0, 3), st.lists(st.integers(0, 2500), max_size=20))
def test_trusted_bytes_are_right_after_a_power_cut(
    sizes: tuple[int, ...], steps: list[tuple[int, str, int, int]], seed: int, lost: list[int]
) -> None:
    content = content_of(sum(sizes), seed)
    with tempfile.TemporaryFile() as file:
        fd = file.fileno()
        server = Server(fd, sizes, content)
        for number, end, pieces, odd in steps:
            server.attempt(number, end, pieces * PIECE + odd)
        held = looking.segments(fd, len(content))
        for block in lost:
            piece = ranges.intersection(held, ((block * 4096, block * 4096 + 4096),))
            for start, end_of in piece:
                os.pwrite(fd, bytes(end_of - start), start)
        trust = trusted(fd, len(content), server.parts, rebooted=True)
        false = wrong(fd, trust.trusted, content)
        assert not false


@settings(max_examples=some(60))
@given(SIZES, STEPS, st.integers(0, 3))
def test_a_copy_without_holes_is_trusted_no_further(
    sizes: tuple[int, ...], steps: list[tuple[int, str, int, int]], seed: int
) -> None:
    content = content_of(sum(sizes), seed)
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as copy:
        server = Server(file.fileno(), sizes, content)
        for number, end, pieces, odd in steps:
            server.attempt(number, end, pieces * PIECE + odd)
        copy.write(os.pread(file.fileno(), len(content), 0))
        copy.flush()
        trust = trusted(copy.fileno(), len(content), server.parts)
        assert not trust.has_holes
        false = wrong(copy.fileno(), trust.trusted, content)
        assert not false


def test_the_model_reaches_what_it_is_for(tmp_path: Path) -> None:
    """A page over good data: without the doubted MiB the claim would be false."""
    content = content_of(3 * 20 * PIECE, 1)
    with (tmp_path / "data").open("w+b") as file:
        server = Server(file.fileno(), (20 * PIECE,) * 3, content)
        server.attempt(0, "reset", 16 * PIECE)
        server.attempt(0, "page", MIB)
        false = wrong(file.fileno(), ((0, 16 * PIECE),), content)
        assert false
        trust = trusted(file.fileno(), len(content), server.parts)
        assert trust.trusted == ((MIB, trust.trusted[0][1]),)

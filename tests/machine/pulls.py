"""Pulls of ours in a history: what they have received, what is here, and what a power cut leaves.

A process of ours (`us.py`) notes in a folder what no kill may lose: the bytes that it has received,
and a copy of each data file as it was when it was synced last.
"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.support import commands
from tests.support.driving import is_right
from tests.support.servers import blob
from tests.support.transfers import BOOT, folder
from watcher.demo.registry import Content, Fault, Manners, Registry
from watcher.model import MIB, Ranges
from watcher.ollama import ranges
from watcher.state import fs, transfers

CONNECTIONS = 4
SYNC = 16 * MIB
#: Writes that a full disk refuses before there is room again.
REFUSALS = 6


class Pulls:
    """Pulls of ours on one store."""

    def __init__(self, store: Path) -> None:
        self.store, self._notes = store, store.with_name("notes")
        for name in ("received", "synced"):
            (self._notes / name).mkdir(parents=True)
        self._count = 0
        self._rotten: list[tuple[Path, int, bytes]] = []

    @property
    def received(self) -> int:
        """The bytes of all bodies so far, error pages included."""
        raw = [path.read_bytes() for path in (self._notes / "received").iterdir()]
        return sum(struct.unpack("q", each)[0] for each in raw if each)

    @property
    def is_syncing(self) -> bool:
        """Whether data is being synced, or was when its process was killed."""
        return any((self._notes / "synced").glob("*.new"))

    def order(self, **more: object) -> str:
        """What a process of ours is given as its first word."""
        return json.dumps({"notes": str(self._notes), **more})

    def start(self, words: list[str], env: Mapping[str, str], **more: object) -> Pull:
        """Begin a pull."""
        self._count += 1
        options = ["--insecure", "--until-done", "--connections", str(CONNECTIONS)]
        given = [self.order(**more), "--store", str(self.store), "pull", *options, *words]
        return Pull(given, env, self._notes / f"printed-{self._count}")

    def cut_power(self) -> None:
        """Of the data of transfers what was not synced is gone, and the machine starts again."""
        for path in (self._notes / "synced").glob("*.new"):
            path.unlink()
        for path in self.store.glob("blobs/sha256-*"):
            self._lose(path)
        for path in self.store.glob(".ollama-watch/transfers/*/data"):
            self._lose(path)
        for path in self.store.glob(".ollama-watch/transfers/*/arrived"):
            path.write_bytes(path.read_bytes().replace(BOOT.encode(), b"another start"))

    def rot(self) -> None:
        """Another byte is read of each transfer than what has arrived, until `mend`."""
        for path in self.store.glob(".ollama-watch/transfers/*/data"):
            for start, end in believed(self.store, path.parent.name)[:1]:
                at = (start + end) // 2
                self._rotten.append((path, at, _change(path, at, b"\0")))

    def mend(self) -> None:
        """What has rotted and is there all the same is as it was."""
        while self._rotten:
            path, at, byte = self._rotten.pop()
            if not path.exists():
                continue
            for each in (path, self._notes / "synced" / identity(path)):
                if each.exists() and each.stat().st_size > at:
                    _change(each, at, byte)

    def forget_given(self) -> None:
        """What was given back is a server's: nobody notes what that syncs."""
        for path in self.store.glob("blobs/*-partial"):
            (self._notes / "synced" / identity(path)).unlink(missing_ok=True)

    def _lose(self, path: Path) -> None:
        kept = self._notes / "synced" / identity(path)
        if kept.exists():  # it is of ours
            had = path.read_bytes()
            left = kept.read_bytes()[: len(had)].ljust(len(had), b"\0")
            if left != had:
                path.write_bytes(left)


class Pull:
    """A pull of ours, as a process."""

    def __init__(self, words: list[str], env: Mapping[str, str], out: Path) -> None:
        self._out = out
        with out.open("wb") as file:
            self._process = commands.start(
                words, env, cwd=out.parent, stdout=file, stderr=file, module="tests.machine.us"
            )

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def end(self) -> int:
        """Wait for its end; its exit code."""
        try:
            return self._process.wait(120)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.printed}") from None

    @property
    def printed(self) -> str:
        return self._out.read_text(errors="replace")


def _change(path: Path, at: int, byte: bytes) -> bytes:
    """Write a byte, in place of the one that it returns."""
    with path.open("r+b") as file:
        file.seek(at)
        was = file.read(1)
        file.seek(at)
        file.write(byte)
    return was


def identity(path: Path) -> str:
    """Which file that is, whatever its name: the number of an inode may be used again."""
    at_cwd = -100
    return f"{path.stat().st_ino}-{fs.born(str(path), at_cwd)}"


def draw_line(registry: Registry, chance: random.Random) -> None:
    """The line to the registry is another one from now on."""
    registry.clear_faults()
    registry.manners = Manners(lifetime=chance.choice([None, 5, 20]), plain=chance.random() < 0.2)
    for fault in (
        Fault("reset", begin=1, after=chance.randint(1, 3_000_000), every=chance.randint(2, 5)),
        Fault("page", begin=1, every=chance.randint(4, 9), body="sorry"),
        Fault("truncate", begin=1, after=chance.randint(1, 2_000_000), every=3),
        Fault("wrong_total", begin=1, every=9),
        Fault("other_range", begin=1, every=9),
    ):
        if chance.random() < 0.4:
            registry.add_fault(fault)


def believed(store: Path, digest: str, *, sure: bool = True) -> Ranges:
    """What a transfer of ours believes to have; not `sure`: but for what a server had left."""
    here = folder(store, digest.removeprefix("sha256:"))
    try:
        size, fd = (here / "data").stat().st_size, os.open(here, os.O_RDONLY)
    except FileNotFoundError:
        return ()
    try:
        kept = transfers.kept(fd, here.name, size)
        arrived = ranges.union(kept.durable, transfers.logged(fd, BOOT, size))
    finally:
        os.close(fd)
    if kept.is_wrong:
        return ()
    return arrived if sure else ranges.difference(arrived, kept.taken)


def lacking(store: Path, content: Content, theirs: Ranges, *, sure: bool) -> int:
    """The bytes of a layer that have to be fetched, `theirs` not, which a server has left.

    Not `sure`: its bytes, or what is claimed of them, were damaged.
    """
    if blob(store, content.digest).exists():
        return 0 if is_right(store, content.digest) else content.size
    here = believed(store, content.digest, sure=sure)
    return content.size - ranges.size(ranges.union(here, theirs if sure else ()))

"""What stands in a store, told from the truth: what is claimed falsely, what is finished and right.

Nothing here asks us what we think of a store, but for `trusted`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.runs import one_look, rules
from tests.support.servers import blob
from tests.support.transfers import folder
from watcher.demo.registry import Content
from watcher.model import Ranges
from watcher.observe.host import Host
from watcher.ollama import ranges, sidecars

from . import pulls

POLICY = rules(repair=True, repair_stale=True, writers_visible=True)


@dataclass(frozen=True)
class Seen:
    """A store at one moment."""

    #: Files that must stay as they are, by path: manifests, and what is the user's own.
    kept: dict[str, bytes]
    #: Finished blobs by digest: inode, size, modification time in seconds.
    blobs: dict[str, tuple[int, int, float]]
    #: Digests that a manifest names, a broken one by what it named before aside.
    named: frozenset[str]
    #: By digest, what sidecars or a ledger of ours claim and the data does not hold.
    false: dict[str, Ranges]
    #: By digest, what we believe of an unfinished download.
    trusted: dict[str, Ranges]
    #: Names under ``blobs/`` that no start of a server may delete once it was prepared for.
    wanted: frozenset[str]
    #: An act that a kill has left half done.
    unfinished: bool


def see(store: Path, contents: dict[str, Content], proc: str) -> Seen:
    """Look at a store; of the machine's processes `proc` shows those that count."""
    report = one_look(Host(str(store), proc=proc), POLICY)
    seen = report.evidence
    wanted = {
        entry.name
        for entry in seen.census.unnamed
        if seen.now - entry.changed_at < POLICY.settings.stale_after
    }
    for diagnosed in report.diagnosis.diagnosed:
        if not (diagnosed.stale or diagnosed.download.ours):
            wanted.update(entry.name for entry in diagnosed.download.entries)
    return Seen(
        dict(_kept(store)),
        {path.name.replace("-", ":"): _identity(path) for path in store.glob("blobs/sha256-*")
         if "-" not in path.name[7:] and len(path.name) == 71},
        frozenset(_named(store)),
        {digest: false_claims(store, content) for digest, content in contents.items()},
        {
            f"sha256:{each.digest}": each.download.trust.trusted
            for each in report.diagnosis.diagnosed
            if not each.download.ours
        },
        frozenset(wanted),
        any(store.glob(".ollama-watch/intents/*")),
    )  # fmt: skip


def _identity(path: Path) -> tuple[int, int, float]:
    info = path.stat()
    return info.st_ino, info.st_size, info.st_mtime


def _kept(store: Path) -> Iterator[tuple[str, bytes]]:
    for path in store.rglob("*"):
        name = str(path.relative_to(store))
        if path.is_file() and (name.startswith("manifests/") or path.suffix == ".txt"):
            yield name, path.read_bytes()


def _named(store: Path) -> Iterator[str]:
    for path in store.glob("manifests/*/*/*/*"):
        try:
            manifest = json.loads(path.read_bytes())
        except ValueError:
            continue
        for layer in (manifest["config"], *manifest["layers"]):
            yield layer["digest"]


def claims(store: Path, digest: str) -> Ranges:
    """What the sidecars that can be read claim."""
    found = []
    for path in blob(store, digest).parent.glob(f"{blob(store, digest, '-partial-').name}*"):
        try:
            part = sidecars.parse(path.read_bytes())
        except ValueError:
            continue
        found.append((part.offset, part.starts_at))
    return ranges.normal(found)


def false_claims(store: Path, content: Content) -> Ranges:
    """What the sidecars, or a ledger of ours, claim and the data does not hold."""
    digest = content.digest
    data = folder(store, digest.removeprefix("sha256:")) / "data"
    return ranges.union(
        ranges.normal(
            _wrong(blob(store, digest, "-partial"), content, claims(store, digest)),
        ),
        ranges.normal(_wrong(data, content, pulls.believed(store, digest))),
    )


def _wrong(
    data: Path, content: Content, claimed: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    fd = os.open(data if data.exists() else os.devnull, os.O_RDONLY)
    try:
        for start, end in claimed:
            at = start
            for piece in content.slices(start, end):
                found = os.pread(fd, len(piece), at).ljust(len(piece), b"\0")
                if found != piece:
                    yield from _differing(bytes(piece), found, at)
                at += len(piece)
            if at < end:
                yield at, end
    finally:
        os.close(fd)


def _differing(true: bytes, found: bytes, at: int) -> Iterator[tuple[int, int]]:
    if not found.strip(b"\0"):
        yield at, at + len(true)
        return
    for number, (one, other) in enumerate(zip(true, found, strict=True)):
        if one != other:
            yield at + number, at + number + 1

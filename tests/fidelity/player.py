"""Lays out a recorded store anew, with layers of our own, and compares with what was recorded.

The recordings were made with layers whose digests nobody can make again. So each recorded digest
stands for the layer of the same place in a model of ours with the same sizes; the recorded host
`localhost:5000` stands for our registry.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support.servers import Entry, Line, collapsed, tree
from watcher.demo.registry import Content, Layer, Model, Registry

TRUTH = Path(__file__).parent / "truth"
MODELS = {"a": 262_144_000, "b": 20_971_520}
BLOCK = 4096
# Shorter downloads may end before the first progress line is due.
SHORT = 50_000_000

Recorded = dict[str, Any]


def load(name: str) -> Recorded:
    """A recording by its file's stem."""
    recording: Recorded = json.loads((TRUTH / f"{name}.json").read_text())
    return recording


class Player:
    """One recording, a registry with models of the same shape, and a store to play it on."""

    def __init__(self, registry: Registry, store: Path) -> None:
        self.registry = registry
        self.store = store
        self.models: dict[str, Model] = {
            name: registry.add_model(name, "1b", [Layer(size)]) for name, size in MODELS.items()
        }
        self._ours = _recorded_digests(self.models)

    # From recorded to ours

    def digest(self, recorded: str) -> str:
        """Our hex for a recorded one; an orphan's stays as it is."""
        return self._ours.get(recorded, recorded)

    def text(self, recorded: str) -> str:
        """A recorded text with our digests, our host and our store in it."""
        text = re.sub(r"\b[0-9a-f]{64}\b", lambda match: self.digest(match[0]), recorded)
        text = re.sub(r"\b[0-9a-f]{12}\b", lambda match: self._short(match[0]), text)
        text = re.sub(r"BASE/\w+", str(self.store), text)
        text = re.sub(r"got sha256:\w+", "got sha256:", text)
        text = re.sub(r"127.0.0.1:\d+->127.0.0.1:\d+", "A->B", text)
        return text.replace("localhost:5000", self.registry.host)

    def _short(self, recorded: str) -> str:
        return next((x[:12] for y, x in self._ours.items() if y.startswith(recorded)), recorded)

    def expected_tree(self, recorded: Sequence[Recorded]) -> dict[str, Entry]:
        """A recorded tree as `servers.tree` would show ours."""
        return dict(sorted((self._path(entry), self._entry(entry)) for entry in recorded))

    def _path(self, entry: Recorded) -> str:
        return self.text(entry["path"].rstrip("/"))

    def _entry(self, entry: Recorded) -> Entry:
        if "size" not in entry:
            return Entry("folder")
        content = self._content(entry)
        segments = tuple((start, end) for start, end in entry.get("data_segments", ()))
        text = None if content is None else content.decode("utf-8", "backslashreplace")
        if segments:
            text = None
        return Entry("file", entry["size"], text, segments, entry["age_s"])

    def _content(self, entry: Recorded) -> bytes | None:
        """The whole content of a small file, None of a large one."""
        size = entry["size"]
        if size > 1024:
            return None
        if entry["path"].startswith("manifests/") and size:
            return self.models[entry["path"].split("/")[-2]].manifest
        content = self._true_content(entry["path"])
        if content is not None:
            return content.read(0, size)
        return self.text(entry["text"]).encode()

    def _true_content(self, path: str) -> Content | None:
        match = re.fullmatch(r"blobs/sha256-([0-9a-f]{64})(-partial)?", path)
        digest = self._ours.get(match[1]) if match else None
        return self.registry.content(f"sha256:{digest}") if digest else None

    # Laying out

    def lay_out(self, recorded: Sequence[Recorded]) -> None:
        """Make the recorded tree: holes, ages and all; true bytes where data is."""
        (self.store / "blobs").mkdir(parents=True, exist_ok=True)
        for entry in recorded:
            path = self.store / self._path(entry)
            if "size" not in entry:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(path, entry)
        now = time.time()
        for entry in recorded:
            if "age_s" in entry:
                then = now - entry["age_s"]
                os.utime(self.store / self._path(entry), (then, then))

    def _write(self, path: Path, entry: Recorded) -> None:
        small = self._content(entry)
        if small is not None:
            path.write_bytes(small)
            return
        content, size = self._true_content(entry["path"]), entry["size"]
        assert content is not None, entry["path"]
        with path.open("wb") as file:
            file.truncate(size)
            for start, end in entry.get("data_segments", [[0, size]]):
                start = _part_start(start)
                file.seek(start)
                file.writelines(content.slices(start, end))

    # Comparing

    def compare_tree(self, recorded: Sequence[Recorded], what: str) -> None:
        """Raise AssertionError where our store is not the recorded one."""
        expected, found = self.expected_tree(recorded), tree(self.store)
        found.pop("blobs", None) if "blobs" not in expected else None
        expected.pop("blobs", None) if "blobs" not in found else None
        assert list(found) == list(expected), what
        for name, entry in expected.items():
            ours = found[name]
            assert _without_segments(ours) == _without_segments(entry), (what, name)
            assert _alike(ours.segments, entry.segments), (what, name, ours.segments)

    def compare_pull(self, recorded: Recorded, lines: Iterable[Line], what: str) -> None:
        """Raise AssertionError where statuses or served bytes are not the recorded ones."""
        served = {
            f"sha256:{self.digest(name.removeprefix('sha256-'))}": size
            for name, size in recorded["bytes_served"].items()
        }
        assert self.registry.stats()["bytes"] == served, what
        expected = [self.text(status) for status in recorded["statuses"]]
        found = [_plain(status) for status in collapsed(lines)]
        # A layer that is there within one progress interval may or may not be told of: a small one
        # on either side, a large one only where this machine was faster than the recorded one.
        optional = {f"pulling {digest[7:19]}" for digest, size in served.items() if size < SHORT}
        optional |= _pulling(expected) - _pulling(found)
        optional |= set() if served else _pulling(found)
        told = [status for status in found if status not in optional]
        wanted = [status for status in expected if status not in optional]
        assert told == wanted, (what, told, wanted)

    def model_of(self, pull: Recorded) -> Model:
        """The model that a recorded pull was for."""
        mentioned = {self.text(status).removeprefix("pulling ") for status in pull["statuses"]}
        of_b = {digest[7:19] for digest in self.models["b"].digests}
        return self.models["b" if mentioned & of_b else "a"]


def _pulling(statuses: Iterable[str]) -> set[str]:
    return {status for status in statuses if re.fullmatch(r"pulling [0-9a-f]{12}", status)}


def _plain(status: str) -> str:
    status = re.sub(r"got sha256:\w+", "got sha256:", status)
    return re.sub(r"127.0.0.1:\d+->127.0.0.1:\d+", "A->B", status)


def _without_segments(entry: Entry) -> Entry:
    return replace(entry, segments=())


def _alike(ours: Sequence[tuple[int, int]], theirs: Sequence[tuple[int, int]]) -> bool:
    """Whether two lists of segments are the same but for a block at each end."""
    return len(ours) == len(theirs) and all(
        abs(a - b) <= BLOCK
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def _part_start(start: int) -> int:
    """Where a part's data begins in the block at `start` that holds its part's first byte."""
    boundary = -(-start // 100_000_000) * 100_000_000
    return boundary if boundary - start < BLOCK else start


def _recorded_digests(models: Mapping[str, Model]) -> dict[str, str]:
    """Recorded hex -> our hex, layer by layer in the order of the manifests."""
    found: dict[str, str] = {}
    for entry in load("blob-corrupt")["before"]:
        if entry["path"].startswith("manifests/"):
            manifest = json.loads(entry["text"])
            model = models[entry["path"].split("/")[-2]]
            theirs = [layer["digest"] for layer in [*manifest["layers"], manifest["config"]]]
            ours = [*model.digests, model.config]
            found |= {a[7:]: b[7:] for a, b in zip(theirs, ours, strict=True)}
    return found

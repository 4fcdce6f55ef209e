"""Random model stores from a seed: names of every kind and age, manifests of every kind."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

MINUTE = 60.0
#: Ages well away from the hour on either side, so that no run depends on its speed.
AGES = (1 * MINUTE, 20 * MINUTE, 50 * MINUTE, 70 * MINUTE, 5 * 60 * MINUTE, 40 * 24 * 60 * MINUTE)

FOREIGN = ("README.txt", ".DS_Store", "sha256-abc", "notes [1]", "x-partial", "sha512-" + "0" * 64)
TEMPORARY = (
    "sha256-123456789",
    "split-copy123",
    "projector-metadata7",
    "COPY1",
    "Q4_K_M88",
    "F16123",
)
BROKEN = (b"", b"{", b"[]", b'"text"', b'{"layers": 5}', b'{"config": {"size": 1.5}}', b"\xff\xfe")
LENIENT = (b"{}", b"null", b'{"layers": null} trailing', b' {"LAYERS": []}')


class RandomStore:
    """Fills a folder with a store; the same seed gives the same store."""

    def __init__(self, store: Path, seed: int, now: float) -> None:
        self.random = random.Random(seed)
        self.store, self.now = store, now
        self.blobs = store / "blobs"
        self.digests = [self._hex() for _ in range(14)]

    def fill(self) -> None:
        """Make the whole store."""
        self.blobs.mkdir(parents=True)
        (self.store / "manifests").mkdir()
        for digest in self.digests:
            self._blob_files(digest)
        for name in (*FOREIGN, *TEMPORARY):
            if self.random.random() < 0.4:
                self._file(self.blobs / name)
        self._folders_and_links()
        self._manifests()

    # ------------------------------------------------------------ blobs

    def _hex(self) -> str:
        digits = "0123456789abcdef" if self.random.random() < 0.85 else "0123456789ABCDEF"
        return "".join(self.random.choice(digits) for _ in range(64))

    def _blob_files(self, digest: str) -> None:
        kind = self.random.choice(("blob", "blob", "blob", "partial", "old", "both", "tmp", "none"))
        if kind in ("blob", "both"):
            self._file(self.blobs / f"sha256-{digest}")
        if kind in ("old", "both"):
            self._file(self.blobs / f"sha256:{digest}")
        if kind == "tmp":
            self._file(self.blobs / f"sha256-{digest}.tmp")
        if kind == "partial":
            self._file(self.blobs / f"sha256-{digest}-partial")
            for number in range(self.random.randrange(4)):
                self._file(self.blobs / f"sha256-{digest}-partial-{number}")
            if self.random.random() < 0.2:
                self._file(self.blobs / f"sha256:{digest}-partial")

    def _folders_and_links(self) -> None:
        if self.random.random() < 0.4:
            folder = self.blobs / "split-gguf-1"
            folder.mkdir()
            self._file(folder / "part")
            if self.random.random() < 0.3:
                self._file(folder / f"sha256:{self._hex()}")
        if self.random.random() < 0.1:
            self._old(self._made_folder(self.blobs / f"sha256-{self._hex()}"))
        if self.random.random() < 0.05:
            self._made_folder(self.blobs / f"sha256:{self._hex()}")
        if self.random.random() < 0.3:
            target = self._file(self.store / "elsewhere")
            for digest in (self.digests[0], self._hex()):
                link = self.blobs / f"sha256-{digest}"
                if not os.path.lexists(link):
                    link.symlink_to(target)
                    self._old(link)

    def _made_folder(self, path: Path) -> Path:
        path.mkdir()
        return path

    def _file(self, path: Path) -> Path:
        path.write_bytes(b"x" * self.random.randrange(1, 9))
        return self._old(path)

    def _old(self, path: Path) -> Path:
        at = self.now - self.random.choice(AGES)
        os.utime(path, (at, at), follow_symlinks=False)
        return path

    # ------------------------------------------------------------ manifests

    def _manifests(self) -> None:
        for number in range(self.random.randrange(5)):
            host = self.random.choice(("registry.ollama.ai", "localhost:5000", "hf.co"))
            self._manifest(f"{host}/library/model{number}/7b", self._named())
        if self.random.random() < 0.25:
            self._manifest("registry.ollama.ai/library/lenient/x", self.random.choice(LENIENT))
        if self.random.random() < 0.12:
            self._manifest("registry.ollama.ai/library/broken/x", self.random.choice(BROKEN))
        if self.random.random() < 0.08:
            self._manifest("registry.ollama.ai/library/model0/.DS_Store", b"x")
        if self.random.random() < 0.08:
            self._manifest("registry.ollama.ai/library/bad name/x", self._named())
        if self.random.random() < 0.2:
            self._manifest("registry.ollama.ai/library/shallow", self._named())
        if self.random.random() < 0.2:
            self._manifest("registry.ollama.ai/library/deep/er/x", self._named())
        if self.random.random() < 0.06:
            link = self._path("registry.ollama.ai/library/dangling/x")
            link.symlink_to("nowhere")
        if self.random.random() < 0.15:
            behind = self.store / "behind"
            behind.write_bytes(self._named())
            self._path("registry.ollama.ai/library/linked/x").symlink_to(behind)
        if self.random.random() < 0.3:
            self._path("registry.ollama.ai/library/empty/x").parent.mkdir(exist_ok=True)

    def _named(self) -> bytes:
        chosen = self.random.sample(self.digests, self.random.randrange(1, 6))
        loose = self.random.random() < 0.15
        spelled = [f"sha256{'-' if loose else ':'}{digest}" for digest in chosen]
        layers = [{"mediaType": "x", "digest": each, "size": 3} for each in spelled[1:]]
        config = {"mediaType": "x", "digest": spelled[0], "size": 3}
        return json.dumps({"schemaVersion": 2, "config": config, "layers": layers}).encode()

    def _manifest(self, path: str, content: bytes) -> None:
        self._path(path).write_bytes(content)

    def _path(self, path: str) -> Path:
        full = self.store / "manifests" / path
        full.parent.mkdir(parents=True, exist_ok=True)
        return full


def names(store: Path) -> set[str]:
    """Every file and link under ``blobs/``, folders aside, as paths below the store."""
    return {
        os.path.join(os.path.relpath(folder, store), name)
        for folder, _, files in os.walk(store / "blobs")
        for name in files
    } | {f"blobs/{entry.name}" for entry in os.scandir(store / "blobs") if entry.is_symlink()}

"""Stores to measure on. Run as processes, so that the measuring process itself stays small."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

PART = 100_000_000


def main(words: list[str]) -> None:
    """``healthy FOLDER BLOBS MODELS`` or ``unfinished FOLDER DOWNLOADS``."""
    match words:
        case ["healthy", folder, blobs, models]:
            healthy(Path(folder), int(blobs), int(models))
        case ["unfinished", folder, downloads]:
            unfinished(Path(folder), int(downloads))
        case _:
            raise SystemExit(f"what is {words}?")


def healthy(store: Path, blobs: int, models: int) -> None:
    """Models that name every blob once; the blobs are sparse, one of 50 per model a config."""
    (store / "blobs").mkdir(parents=True)
    each = blobs // models
    for number in range(models):
        references = []
        for layer in range(each):
            digest = _digest(f"{number} {layer}")
            size = 500 if layer == each - 1 else 1_000_000 + 4096 * number + layer
            _sparse(store / "blobs" / f"sha256-{digest}", size)
            references.append({"digest": f"sha256:{digest}", "size": size})
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {
                "mediaType": "application/vnd.docker.container.image.v1+json",
                **references[-1],
            },
            "layers": [
                {"mediaType": "application/vnd.ollama.image.tensor", **each, "name": f"blk.{at}"}
                for at, each in enumerate(references[:-1])
            ],
        }
        tag = store / "manifests/registry.ollama.ai/library" / f"model{number // 4}" / f"t{number}"
        tag.parent.mkdir(parents=True, exist_ok=True)
        tag.write_text(json.dumps(manifest))


def unfinished(store: Path, downloads: int) -> None:
    """Downloads of 16 parts, each part with a block of data beyond what its sidecar claims."""
    (store / "blobs").mkdir(parents=True)
    for number in range(downloads):
        data = store / "blobs" / f"sha256-{_digest(str(number))}-partial"
        fd = os.open(data, os.O_WRONLY | os.O_CREAT)
        os.ftruncate(fd, 16 * PART)
        for part in range(16):
            os.pwrite(fd, b"x" * 4096, part * PART)
            Path(f"{data}-{part}").write_text(sidecar(part, PART))
        os.close(fd)


def sidecar(number: int, size: int, completed: int = 0) -> str:
    """A sidecar's text, as the server writes it."""
    return f'{{"N":{number},"Offset":{number * size},"Size":{size},"Completed":{completed}}}\n'


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sparse(path: Path, size: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.ftruncate(fd, size)
    os.close(fd)


if __name__ == "__main__":
    main(sys.argv[1:])

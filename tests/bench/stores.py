"""Stores to measure on. Run as processes, so that the measuring process itself stays small."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from watcher.state import fs, memory
from watcher.state.event_log import Event
from watcher.state.hashes import Hashed, Hashes

PART = 100_000_000
_MANIFEST = {
    "schemaVersion": 2,
    "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
}


def main(words: list[str]) -> None:
    """The name of a function below, its folder and its numbers."""
    match words:
        case ["healthy", folder, blobs, models]:
            healthy(Path(folder), int(blobs), int(models))
        case ["unfinished", folder, downloads]:
            unfinished(Path(folder), int(downloads))
        case ["pieces", folder, size, parts]:
            pieces(Path(folder), int(size), int(parts))
        case ["contents", folder, blobs, size]:
            contents(Path(folder), int(blobs), int(size))
        case ["orphans", folder, count]:
            orphans(Path(folder), int(count))
        case ["known", folder]:
            known(Path(folder))
        case ["log", folder, digests, size]:
            log(Path(folder), int(digests), int(size))
        case _:
            raise SystemExit(f"what is {words}?")


def known(store: Path) -> None:
    """Have every blob of a store remembered as verified, as it is now."""
    with os.scandir(store / "blobs") as entries:
        found = ((entry.name, entry.stat()) for entry in entries)
        rows = {
            name: Hashed(status.st_ino, status.st_size, status.st_ctime_ns, name[7:])
            for name, status in found
        }
    with fs.opened_folder(str(store)) as fd:
        memory.save(fd, replace(memory.load(fd), hashes=Hashes(rows)))


def log(store: Path, digests: int, size: int) -> None:
    """A store without blobs, and a log of so many bytes about so many digests of 500 models."""
    for name in ("blobs", "manifests", ".ollama-watch/logs"):
        (store / name).mkdir(parents=True)
    names = [_digest(f"layer {number}") for number in range(digests)]
    with (store / ".ollama-watch/logs/events.jsonl").open("wb") as file:
        number = 0
        while file.tell() < size:
            model = f"model{number % digests % 500}:latest"
            details = {"digest": f"sha256:{names[number % digests]}", "models": [model]}
            message = f"{model}: {number} bytes are here, and the rest is on its way"
            file.write(Event(1e9 + 30 * number, "download_progress", message, model, details).line)
            number += 1


def healthy(store: Path, blobs: int, models: int) -> None:
    """Models that name every blob once; the blobs are sparse, one of 50 per model a config."""
    (store / "blobs").mkdir(parents=True, exist_ok=True)
    each = blobs // models
    for number in range(models):
        references = []
        for layer in range(each):
            digest = _digest(f"{number} {layer}")
            size = 500 if layer == each - 1 else 1_000_000 + 4096 * number + layer
            _sparse(store / "blobs" / f"sha256-{digest}", size)
            references.append({"digest": f"sha256:{digest}", "size": size})
        manifest = {
            **_MANIFEST,
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


def pieces(store: Path, size: int, parts: int) -> None:
    """One sparse download: each part has begun, and has 20 patches further on; no claims."""
    (store / "blobs").mkdir(parents=True)
    (store / "manifests").mkdir()
    part = size // parts
    data = store / "blobs" / f"sha256-{_digest('pieces')}-partial"
    fd = os.open(data, os.O_WRONLY | os.O_CREAT)
    os.ftruncate(fd, parts * part)
    for number in range(parts):
        os.pwrite(fd, b"x" * (4 << 20), number * part)
        for patch in range(1, 21):
            os.pwrite(fd, b"x" * 4096, number * part + (8 << 20) * patch)
        Path(f"{data}-{number}").write_text(sidecar(number, part))
    os.fsync(fd)
    os.close(fd)


def contents(store: Path, blobs: int, size: int) -> None:
    """Models of 50 layers (or fewer), each blob with `size` random bytes and its right name."""
    (store / "blobs").mkdir(parents=True)
    references = [_blob(store, size) for _ in range(blobs)]
    for number in range(0, blobs, 50):
        config, *layers = references[number : number + 50]
        tag = store / "manifests/registry.ollama.ai/library/model" / f"t{number}"
        tag.parent.mkdir(parents=True, exist_ok=True)
        tag.write_text(json.dumps({**_MANIFEST, "config": config, "layers": layers}))


def orphans(store: Path, count: int) -> None:
    """Blobs of 4 KiB that nothing names, 30 days old, beside one model."""
    contents(store, 2, 100)
    old = time.time() - 30 * 86400
    for number in range(count):
        path = store / "blobs" / f"sha256-{_digest(f'orphan {number}')}"
        path.write_bytes(b"x" * 4096)
        os.utime(path, (old, old))
    os.sync()


def _blob(store: Path, size: int) -> dict[str, object]:
    hashed = hashlib.sha256()
    path = store / "blobs" / "new"
    with path.open("wb") as file:
        for at in range(0, size, 16 << 20):
            piece = os.urandom(min(16 << 20, size - at))
            hashed.update(piece)
            file.write(piece)
        file.flush()
        if size > 1 << 20:
            os.fsync(file.fileno())  # what is not on the disk can't be put out of the page cache
    path.rename(path.with_name(f"sha256-{hashed.hexdigest()}"))
    kind = "application/vnd.ollama.image.model"
    return {"mediaType": kind, "digest": f"sha256:{hashed.hexdigest()}", "size": size}


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

"""Pulling a model: its manifest, its layers, and away with what it no longer names."""

from __future__ import annotations

import hashlib
import os

from watcher.demo.server.cleanup import remove_unused
from watcher.demo.server.client import ask_registry
from watcher.demo.server.context import Context
from watcher.demo.server.download import Downloads
from watcher.demo.server.errors import EngineError, NotExistError, told
from watcher.demo.server.files import remove
from watcher.demo.server.gojson import check_end
from watcher.demo.server.log import log
from watcher.demo.server.manifests import MANIFEST, TENSOR, Manifest
from watcher.demo.server.names import Name
from watcher.demo.server.settings import no_prune
from watcher.demo.server.statuses import Emit, progress
from watcher.demo.server.store import blob_path, read_manifest, write_manifest


def pull(context: Context, downloads: Downloads, name: Name, scheme: str, emit: Emit) -> None:
    """Pull a model. Raises EngineError; statuses go to `emit`."""
    old = _old_digests(name)
    emit({"status": "pulling manifest"})
    base = f"{scheme}://{name.host}/v2/{name.namespace}/{name.model}"
    data = _fetch_manifest(context, f"{base}/manifests/{name.tag}")
    manifest = Manifest.of_bytes(data)
    if any(layer.media_type == TENSOR for layer in manifest.layers):
        raise EngineError("this model requires MLX support, but the MLX runtime is not available")
    fetched = set()
    for layer in manifest.all_layers:
        if not layer.digest:
            raise EngineError(f"{name.namespace}/{name.model}: digest is empty")
        if (size := _size(layer.digest)) is not None:
            # It is not looked at any closer.
            emit(progress(layer.digest, size, size))
            continue
        downloads.bring(context, layer.digest, f"{base}/blobs/{layer.digest}", emit)
        fetched.add(layer.digest)
    emit({"status": "verifying sha256 digest"})
    for layer in manifest.all_layers:
        if layer.digest in fetched:
            verify(layer.digest)
    emit({"status": "writing manifest"})
    write_manifest(name, data)
    old -= manifest.digests
    if old and not no_prune():
        emit({"status": "removing unused layers"})
        try:
            remove_unused(old)
        except EngineError as error:
            emit({"status": f"couldn't remove unused layers: {error}"})
    emit({"status": "success"})


def _old_digests(name: Name) -> set[str]:
    try:
        return read_manifest(name).digests
    except NotExistError:
        return set()
    except EngineError as error:
        log(f"pulling model with bad existing manifest {name.short}: {error}")
        return set()


def _fetch_manifest(context: Context, url: str) -> bytes:
    """A manifest's bytes. Unlike on disk, nothing may stand behind its JSON."""
    try:
        with ask_registry(context, "GET", url, {"Accept": MANIFEST}) as answer:
            data = answer.read_all()
        _check(data)
    except EngineError as error:
        raise EngineError(f"pull model manifest: {error}") from error
    return data


def _check(data: bytes) -> None:
    try:
        Manifest.of_bytes(data)
    except EngineError as error:
        if str(error) in ("EOF", "unexpected EOF"):
            raise EngineError("unexpected end of JSON input") from error
        raise
    check_end(data)


def _size(digest: str) -> int | None:
    """The size of a blob, None where there is none."""
    path = blob_path(digest)
    try:
        with told("stat", path):
            return os.stat(path).st_size
    except NotExistError:
        return None


def verify(digest: str) -> None:
    """Hash a blob; one that is not what its digest says is removed, and an EngineError."""
    path = blob_path(digest)
    with told("open", path), open(path, "rb", buffering=0) as file:
        found = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    if found == digest:
        return
    try:
        remove(path)
    except EngineError as error:
        log(f"couldn't remove file with digest mismatch: {error}")
    raise EngineError(f"digest mismatch, file must be downloaded again: want {digest}, got {found}")

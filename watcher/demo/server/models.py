"""Making, copying and removing a model, and storing the layers that one is made of."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterable, Mapping
from typing import Any

from watcher.demo.server.cleanup import remove_layers
from watcher.demo.server.errors import BadRequestError, EngineError, told
from watcher.demo.server.files import prune_folder, read_file, remove
from watcher.demo.server.gojson import go_json, json_str
from watcher.demo.server.manifests import CONFIG, MANIFEST, MODEL, LayerRef, Manifest
from watcher.demo.server.names import Name
from watcher.demo.server.settings import no_prune
from watcher.demo.server.statuses import Emit
from watcher.demo.server.store import (
    blob_path,
    blobs_dir,
    existing_name,
    manifest_path,
    manifests_dir,
    read_manifest,
    write_manifest,
)


def new_layer(source: Iterable[bytes], media_type: str = "") -> tuple[LayerRef, str]:
    """Store a layer through a temporary `sha256-<digits>`; the layer, and the status to tell."""
    temporary = os.path.join(blobs_dir(), f"sha256-{random.randrange(2**32)}")
    sha, size = hashlib.sha256(), 0
    try:
        with told("open", temporary):
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        with told("write", temporary), open(descriptor, "wb") as file:
            for data in source:
                sha.update(data)
                size += file.write(data)
        digest = "sha256:" + sha.hexdigest()
        path, status = blob_path(digest), "using existing layer"
        if not os.path.exists(path):
            status = "creating new layer"
            with told("rename", path):
                os.rename(temporary, path)
                os.chmod(path, 0o644)
        with told("chtimes", path):
            os.utime(path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    return LayerRef(media_type, digest, size), f"{status} {digest}"


def _touched(layer: LayerRef) -> LayerRef:
    """A layer that is there already, with its real size; its blob counts as new from now on."""
    path = blob_path(layer.digest)
    with told("stat", path):
        size = os.stat(path).st_size
        os.utime(path)
    return LayerRef(layer.media_type, layer.digest, size, layer.source)


def create(request: Mapping[str, Any], name: Name, emit: Emit) -> None:
    """Make a model of uploaded blobs (`files`) or of another model (`from`)."""
    old = _manifest_or_none(name)
    made = [(layer, f"using existing layer {layer.digest}") for layer in _base_layers(request)]
    for kind in ("template", "system", "license"):
        if text := request.get(kind):
            media_type = f"application/vnd.ollama.image.{kind}"
            made = [(layer, how) for layer, how in made if layer.media_type != media_type]
            made.append(new_layer([json_str(text).encode()], media_type))
    config = go_json({"model_format": "gguf", "architecture": "amd64", "os": "linux"}) + b"\n"
    config_layer, _ = new_layer([config], CONFIG)
    for _, how in made:
        emit({"status": how})
    emit({"status": "writing manifest"})
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config_layer.to_json(),
        "layers": [layer.to_json() for layer, _ in made],
    }
    write_manifest(name, go_json(manifest) + b"\n")
    if old and not no_prune():
        remove_layers(old)
    emit({"status": "success"})


def _manifest_or_none(name: Name) -> Manifest | None:
    try:
        return read_manifest(name)
    except EngineError:
        return None


def _base_layers(request: Mapping[str, Any]) -> list[LayerRef]:
    if source := request.get("from"):
        name = existing_name(Name.parse(json_str(source)))
        return [
            _touched(LayerRef(layer.media_type, layer.digest, source=name.short))
            for layer in read_manifest(name).layers
        ]
    files = request.get("files")
    if not files:
        raise BadRequestError("neither 'from' or 'files' was specified")
    return [_touched(LayerRef(MODEL, json_str(digest))) for digest in files.values()]


def copy(source: Name, target: Name) -> None:
    """Copy a manifest over another one, in place. Raises NotExistError or EngineError."""
    if source == target:
        return
    source_path, target_path = manifest_path(source), manifest_path(target)
    with told("mkdir", target_path):
        os.makedirs(os.path.dirname(target_path), 0o755, exist_ok=True)
    data, _ = read_file(source_path)
    with told("open", target_path), open(target_path, "wb") as file:
        file.write(data)


def delete(name: Name) -> None:
    """Remove a model's manifest, and at once every blob that no other readable one names."""
    manifest = read_manifest(name)
    remove(manifest.path)
    prune_folder(manifests_dir())
    remove_layers(manifest)

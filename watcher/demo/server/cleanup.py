"""Which blobs are removed: those that no readable manifest names."""

from __future__ import annotations

import contextlib

from watcher.demo.server.errors import EngineError, NotExistError
from watcher.demo.server.files import remove
from watcher.demo.server.log import log
from watcher.demo.server.manifests import Manifest
from watcher.demo.server.store import all_manifests, blob_path


def _used() -> set[str]:
    return {used for known in all_manifests(lenient=True).values() for used in known.digests}


def remove_unused(digests: set[str]) -> None:
    """Remove those blobs that no readable manifest names; each failure is only logged."""
    for digest in sorted(digests - _used()):
        try:
            remove(blob_path(digest))
        except EngineError as error:
            log(f"couldn't remove unused layer {digest}: {error}")


def remove_layers(manifest: Manifest) -> None:
    """What `rm` does with a removed model's layers: gone is fine, any other failure is an error."""
    used = _used()
    for layer in manifest.all_layers:
        if layer.digest and layer.digest not in used:
            with contextlib.suppress(NotExistError):
                remove(blob_path(layer.digest))

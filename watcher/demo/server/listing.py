"""What `list` shows."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import Any

from watcher.demo.server.errors import EngineError
from watcher.demo.server.files import read_file
from watcher.demo.server.gojson import first_json, json_fields
from watcher.demo.server.log import log
from watcher.demo.server.manifests import MODEL, Manifest
from watcher.demo.server.names import Name
from watcher.demo.server.store import all_manifests, blob_path, read_manifest


class ModelList:
    """What `list` shows, remembered by the hash of each manifest.

    So a model whose config or template vanishes stays in the list until its manifest changes or
    the server starts again. A failure at the start stays for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Name, tuple[str, dict[str, Any]]] = {}
        self._failure: EngineError | None = None

    def start(self) -> None:
        """Read all models once."""
        try:
            self._update()
        except EngineError as error:
            self._failure = error

    def models(self) -> list[dict[str, Any]]:
        """All models, the last changed first. Raises EngineError."""
        if self._failure:
            raise self._failure
        self._update()
        with self._lock:
            models = [summary for _, summary in self._known.values()]
        return sorted(models, key=lambda model: str(model["modified_at"]), reverse=True)

    def refresh(self, name: Name) -> None:
        """Read one model again."""
        with self._lock:
            self._known.pop(name, None)
            try:
                manifest = read_manifest(name)
                self._known[name] = manifest.sha, summarize(name, manifest)
            except EngineError as error:
                log(f"failed to refresh model list: {error}")

    def _update(self) -> None:
        manifests = all_manifests(lenient=True)
        with self._lock:
            known, self._known = self._known, {}
            for name, manifest in manifests.items():
                try:
                    entry = known.get(name)
                    if not entry or entry[0] != manifest.sha:
                        entry = manifest.sha, summarize(name, manifest)
                    self._known[name] = entry
                except EngineError as error:
                    log(f"failed to list {name.short}: {error}")


def summarize(name: Name, manifest: Manifest) -> dict[str, Any]:
    """A model as `list` shows it; reads its config and template. Raises EngineError."""
    config: dict[str, Any] = {}
    if manifest.config.digest:
        value = first_json(_read_blob(manifest.config.digest))
        config = json_fields(
            value, "model_format", "model_family", "model_families", "model_type", "file_type",
            "remote_model", "remote_host",
        )  # fmt: skip
    for layer in manifest.layers:
        if layer.media_type.endswith((".image.prompt", ".image.template")):
            _read_blob(layer.digest)
    remote = {key: config[key] for key in ("remote_model", "remote_host") if config.get(key)}
    modified = datetime.fromtimestamp(manifest.modified, UTC).isoformat().replace("+00:00", "Z")
    parents = [layer.source for layer in manifest.layers if layer.media_type == MODEL]
    return {
        "name": name.short,
        "model": name.short,
        **remote,
        "modified_at": modified,
        "size": sum(layer.size for layer in (*manifest.layers, manifest.config)),
        "digest": manifest.sha,
        "details": {
            "parent_model": parents[-1] if parents else "",
            "format": config.get("model_format", ""),
            "family": config.get("model_family", ""),
            "families": config.get("model_families"),
            "parameter_size": config.get("model_type", ""),
            "quantization_level": config.get("file_type", ""),
        },
    }


def _read_blob(digest: str) -> bytes:
    return read_file(blob_path(digest))[0]

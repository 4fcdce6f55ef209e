"""What a manifest says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from watcher.demo.server.errors import EngineError
from watcher.demo.server.gojson import first_json, json_fields, json_int, json_str

MODEL = "application/vnd.ollama.image.model"
TENSOR = "application/vnd.ollama.image.tensor"
CONFIG = "application/vnd.docker.container.image.v1+json"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


@dataclass(frozen=True)
class LayerRef:
    """A layer as a manifest names it."""

    media_type: str = ""
    digest: str = ""
    size: int = 0
    source: str = ""
    name: str = ""

    @classmethod
    def of_json(cls, value: Any) -> LayerRef:
        """From a decoded manifest; null gives an empty one. Raises EngineError."""
        found = json_fields(value, "mediaType", "digest", "size", "from", "name")
        return cls(
            json_str(found.get("mediaType", "")),
            json_str(found.get("digest", "")),
            json_int(found.get("size", 0)),
            json_str(found.get("from", "")),
            json_str(found.get("name", "")),
        )

    def to_json(self) -> dict[str, Any]:
        """As the real server writes it."""
        value = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        optional = {"from": self.source, "name": self.name}
        return value | {key: text for key, text in optional.items() if text}


@dataclass(frozen=True)
class Manifest:
    """A parsed manifest; `sha` is the hash of its file, `modified` its mtime in seconds."""

    config: LayerRef
    layers: tuple[LayerRef, ...]
    path: str = ""
    sha: str = ""
    modified: float = 0.0

    @classmethod
    def of_bytes(cls, data: bytes) -> Manifest:
        """Parse; bytes after the first JSON value are ignored. Raises EngineError."""
        found = json_fields(first_json(data), "schemaVersion", "mediaType", "config", "layers")
        json_int(found.get("schemaVersion", 0))
        json_str(found.get("mediaType", ""))
        layers = found.get("layers", [])
        if not isinstance(layers, list):
            raise EngineError("json: cannot unmarshal into Go struct field Manifest.layers")
        return cls(
            LayerRef.of_json(found.get("config")), tuple(LayerRef.of_json(x) for x in layers)
        )

    @property
    def all_layers(self) -> list[LayerRef]:
        """The layers, then the config where it has a digest: the order of a pull."""
        return [*self.layers, *([self.config] if self.config.digest else [])]

    @property
    def digests(self) -> set[str]:
        """All digests it names, spelled as it spells them."""
        return {layer.digest for layer in self.all_layers} - {""}

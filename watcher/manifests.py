"""A manifest's bytes to its value, exactly as leniently as the server reads it."""

from __future__ import annotations

from typing import NamedTuple

from watcher import gojson, names

#: Real manifests have a few KiB; tensor models some hundred. What is larger is not read whole.
READ_LIMIT = 16 * 1024 * 1024


class Reference(NamedTuple):
    """A layer, or the config, as a manifest names it. `digest` is the text as it stands there."""

    media_type: str
    digest: str
    size: int


class Manifest(NamedTuple):
    """What of a manifest matters here: the layers first, the config last, if it names one."""

    references: tuple[Reference, ...]

    def named(self) -> dict[str, tuple[int, bool]]:
        """Digits to size, and whether it protects the blob from the server's clean-up.

        Either spelling can be loaded; only ``sha256:`` protects.
        """
        found: dict[str, tuple[int, bool]] = {}
        for reference in self.references:
            digest = names.loose_digest(reference.digest)
            if digest is not None:
                protects = names.wanted_digest(reference.digest) is not None
                before = found.get(digest)
                found[digest] = reference.size, protects or (before is not None and before[1])
        return found

    def faults(self) -> tuple[str, ...]:
        """Why what it names can't be looked for: digests that are none, impossible sizes."""
        found: list[str] = []
        for reference in self.references:
            if names.loose_digest(reference.digest) is None:
                shown = names.printable(reference.digest[:80])
                found.append(f"{shown!r} is no sha256 digest")
            elif reference.size < 0:
                found.append(f"a size of {reference.size} bytes")
        return tuple(found)


def parse(raw: bytes) -> Manifest:
    """Read a manifest. Raises ValueError with the reason where the server would fail."""
    value = gojson.record(gojson.first_value(raw), "the manifest")
    gojson.int64(value, "schemaVersion")
    gojson.string(value, "mediaType")
    layers = gojson.lookup(value, "layers")
    if layers is not None and not isinstance(layers, list):
        raise ValueError("layers is no list")
    references = [_reference(layer, "a layer") for layer in layers or ()]
    config = _reference(gojson.lookup(value, "config"), "the config")
    if config.digest:
        references.append(config)
    return Manifest(tuple(references))


def _reference(value: object, what: str) -> Reference:
    fields = gojson.record(value, what)
    gojson.string(fields, "from")
    gojson.string(fields, "name")
    return Reference(
        gojson.string(fields, "mediaType"),
        gojson.string(fields, "digest"),
        gojson.int64(fields, "size"),
    )

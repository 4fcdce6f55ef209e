"""A manifest's bytes to its value, exactly as leniently as the server reads it."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import orjson

from watcher import gojson, names

#: Real manifests have a few KiB; tensor models some hundred. What is larger is not read whole.
READ_LIMIT = 16 * 1024 * 1024

_USUAL_KEYS = frozenset({"schemaVersion", "mediaType", "config", "layers"})
_USUAL_REFERENCE = frozenset({"mediaType", "digest", "size"})


#: A layer, or the config, as a manifest names it: the digest as it stands there, size in bytes.
#: Plain tuples here and below: a large store has a hundred thousand of them.
Reference: TypeAlias = tuple[str, int]
#: What a manifest says of a digest: size, and whether it protects the blob from clean-up.
Naming: TypeAlias = tuple[int, bool]


class Manifest(NamedTuple):
    """What of a manifest matters here."""

    #: The layers first; the config last, if there is one.
    references: tuple[Reference, ...]

    def named(self) -> tuple[dict[str, Naming], tuple[str, ...]]:
        """The digests that the server can load, and why others can't be looked for."""
        found: dict[str, Naming] = {}
        faults: list[str] = []
        for text, size in self.references:
            spelled = names.SPELLED_DIGEST.fullmatch(text)
            if spelled is None:
                faults.append(f"{names.printable(text[:80])!r} is no sha256 digest")
                continue
            if size < 0:
                faults.append(f"a size of {size} bytes")
            colon, digest = spelled.groups()
            # Either spelling can be loaded; only the one with the colon protects.
            protects = colon == ":" or (digest in found and found[digest][1])
            found[digest] = size, protects
        return found, tuple(faults)


def parse(raw: bytes) -> Manifest:
    """Read a manifest. Raises ValueError with the reason where the server would fail."""
    usual = _usual(raw)
    if usual is not None:
        return usual
    value = gojson.record(gojson.first_value(raw), "the manifest")
    gojson.int64(value, "schemaVersion")
    gojson.string(value, "mediaType")
    layers = gojson.lookup(value, "layers")
    if layers is not None and not isinstance(layers, list):
        raise ValueError("layers is no list")
    if isinstance(layers, gojson.Fields):
        raise ValueError("layers is no list")
    references = [_reference(layer, "a layer") for layer in layers or ()]
    config = _reference(gojson.lookup(value, "config"), "the config")
    if config[0]:
        references.append(config)
    return Manifest(tuple(references))


def _usual(raw: bytes) -> Manifest | None:
    """A manifest with just the usual keys, each once; None for any other.

    Nearly all are just so, and a large store has thousands: orjson reads them many times faster,
    but keeps only the last of keys that come twice, and so is no judge of the others.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    if type(value) is not dict or value.keys() != _USUAL_KEYS or type(value["layers"]) is not list:
        return None
    references = [*value["layers"], value["config"]]
    for each in references:
        if type(each) is not dict or each.keys() != _USUAL_REFERENCE:
            return None
        if type(each["digest"]) is not str or not gojson.is_int64(each["size"]):
            return None
    once = len(references)
    counts = (raw.count(b'"digest"'), raw.count(b'"size"'), raw.count(b'"mediaType"'))
    if counts != (once, once, once + 1) or raw.count(b'"layers"') + raw.count(b'"config"') != 2:
        return None
    if not gojson.is_int64(value["schemaVersion"]) or raw.count(b'"schemaVersion"') != 1:
        return None
    if not all(type(each["mediaType"]) is str for each in (value, *references)):
        return None
    if not references[-1]["digest"]:
        return None
    return Manifest(tuple((each["digest"], each["size"]) for each in references))


def _reference(value: object, what: str) -> Reference:
    fields = gojson.record(value, what)
    for key in ("mediaType", "from", "name"):
        gojson.string(fields, key)
    return gojson.string(fields, "digest"), gojson.int64(fields, "size")

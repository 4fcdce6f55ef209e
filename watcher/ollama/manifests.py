"""A manifest's bytes to its value, exactly as leniently as the server reads it."""

from typing import NamedTuple, TypeAlias

from watcher.ollama import gojson, names

#: Real manifests have a few KiB; tensor models some hundred. What is larger is not read whole.
READ_LIMIT = 16 * 1024 * 1024

NAMES_NOTHING = "it names no layer"

#: What a manifest has of a digest: size in bytes, and whether it protects the blob from clean-up.
#: Plain tuples: a large store has a hundred thousand of them.
Naming: TypeAlias = tuple[int, bool]


class Manifest(NamedTuple):
    named: dict[str, Naming]  #: by the digits of each digest that the server can load
    faults: tuple[str, ...]  #: why others can't be looked for


def parse(raw: bytes) -> Manifest:
    """Read a manifest. Raises ValueError with the reason where the server would fail."""
    value = gojson.record(gojson.first_value(raw), "the manifest")
    gojson.int64(value, "schemaVersion")
    gojson.string(value, "mediaType")
    layers = value.get("layers")
    if layers is not None and not isinstance(layers, list):
        raise ValueError("layers is no list")
    references = [_reference(layer, "a layer") for layer in layers or ()]
    references.append(_reference(value.get("config"), "the config"))
    if not references[-1][0]:
        references.pop()  # a config that names nothing
    found: dict[str, Naming] = {}
    faults: list[str] = []
    for text, size in references:
        spelled = names.SPELLED_DIGEST.fullmatch(text)
        if spelled is None:
            faults.append(f"{names.printable(text[:80])!r} is no sha256 digest")
            continue
        if size < 0:
            faults.append(f"a size of {size:,} bytes")
        # Either spelling can be loaded; only the one with the colon protects.
        colon, digest = spelled.groups()
        found[digest] = size, colon == ":" or (digest in found and found[digest][1])
    return Manifest(found, tuple(faults))


def flaw(raw: bytes) -> str:
    """Why what a server takes is no model's manifest, or "". ValueError where it takes none."""
    named, faults = parse(raw)
    return faults[0] if faults else "" if named else NAMES_NOTHING


def _reference(value: object, what: str) -> tuple[str, int]:
    """The digest as it stands there, and the size."""
    fields = gojson.record(value, what)
    for key in ("mediaType", "from", "name"):
        gojson.string(fields, key)
    return gojson.string(fields, "digest"), gojson.int64(fields, "size")

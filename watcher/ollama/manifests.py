"""A manifest's bytes to its value, exactly as leniently as the server reads it."""

from typing import NamedTuple, TypeAlias

from watcher.ollama import gojson, names

#: Real manifests have a few KiB; tensor models some hundred. What is larger is not read whole.
READ_LIMIT = 16 * 1024 * 1024

_NEEDED_KEYS = frozenset({"config", "layers"})
_USUAL_KEYS = _NEEDED_KEYS | {"schemaVersion", "mediaType"}
_USUAL_REFERENCE = frozenset({"mediaType", "digest", "size"})
_KNOWN_REFERENCE = _USUAL_REFERENCE | {"name", "from"}
NAMES_NOTHING = "it names no layer"


#: What a manifest has of a digest: size in bytes, and whether it protects the blob from clean-up.
#: Plain tuples: a large store has a hundred thousand of them.
Naming: TypeAlias = tuple[int, bool]


class Manifest(NamedTuple):
    """What of a manifest matters here."""

    named: dict[str, Naming]  #: by the digits of each digest that the server can load
    faults: tuple[str, ...]  #: why others can't be looked for


def parse(raw: bytes) -> Manifest:
    """Read a manifest. Raises ValueError with the reason where the server would fail."""
    references = _usual(raw)
    if references is None:
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
    """Why a manifest that a server takes is no model's; "" where it may be one.

    Raises ValueError with the reason where the server would not even take it.
    """
    named, faults = parse(raw)
    return faults[0] if faults else "" if named else NAMES_NOTHING


def _usual(raw: bytes) -> list[tuple[str, int]] | None:
    """What a manifest with just the usual keys refers to, the config last; None for any other.

    Nearly all are just so, and a large store has thousands. A null is nothing usual.
    """
    value = gojson.plain(raw)
    if value is None or not _NEEDED_KEYS <= value.keys() <= _USUAL_KEYS:
        return None
    version, kind = value.get("schemaVersion", 0), value.get("mediaType", "")
    if not gojson.is_int64(version) or type(kind) is not str or type(value["layers"]) is not list:
        return None
    references: list[tuple[str, int]] = []
    for each in (*value["layers"], value["config"]):
        # Layers of tensor models have a name, those made from others where they are from.
        if type(each) is not dict or not _USUAL_REFERENCE <= each.keys() <= _KNOWN_REFERENCE:
            return None
        size = each.pop("size")
        if not gojson.is_int64(size) or set(map(type, each.values())) != {str}:
            return None
        references.append((each["digest"], size))
    return references


def _reference(value: object, what: str) -> tuple[str, int]:
    """The digest as it stands there, and the size."""
    fields = gojson.record(value, what)
    for key in ("mediaType", "from", "name"):
        gojson.string(fields, key)
    return gojson.string(fields, "digest"), gojson.int64(fields, "size")

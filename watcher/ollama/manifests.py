"""A manifest's bytes to its value, exactly as leniently as the server reads it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from watcher.ollama import gojson, names
from watcher.ollama.sidecars import LARGEST_LAYER

#: Real manifests have a few KiB; tensor models some hundred. What is larger is not read whole.
READ_LIMIT = 16 * 1024 * 1024

#: All layers together have no more, so that every sum of them is a number that can be kept.
_MOST_BYTES = 1 << 55

NAMES_NOTHING = "it names no layer"
_MANIFEST = {"schemaversion": int, "mediatype": str, "layers": list, "config": tuple}
_LAYER = {"mediatype": str, "digest": str, "size": int, "from": str, "name": str}

#: What a manifest has of a digest: size in bytes, and whether it protects the blob from clean-up.
#: Plain tuples: a large store has a hundred thousand of them.
Naming: TypeAlias = tuple[int, bool]


class Manifest(NamedTuple):
    named: dict[str, Naming]  #: by the digits of each digest that the server can load
    faults: tuple[str, ...]  #: why others can't be looked for


def parse(raw: bytes) -> Manifest:
    """Read a manifest. Raises ValueError with the reason where the server would fail."""
    value = gojson.fields(gojson.first_value(raw), "the manifest", _MANIFEST)
    references = [gojson.fields(each, "a layer", _LAYER) for each in value.get("layers", ())]
    config = gojson.fields(value.get("config"), "the config", _LAYER)
    if config.get("digest"):  # else a config that names nothing
        references.append(config)
    found: dict[str, Naming] = {}
    faults: list[str] = []
    for each in references:
        text, size = each.get("digest", ""), each.get("size", 0)
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


def sizes(raw: bytes, right: Mapping[str, int] = MappingProxyType({})) -> dict[str, int]:
    """The digests of layers and config with their bytes, by the manifest or as they are `right`.

    Raises ValueError for what is no manifest, and for bytes that no layer can have. A server pulls
    such a model all the same: it goes by the lengths that the registry answers.
    """
    found = {digest: size for digest, (size, _) in parse(raw).named.items()}
    absurd = [size for size in found.values() if not 0 <= size <= LARGEST_LAYER]
    if absurd:
        raise ValueError(f"a layer of {absurd[0]:,} bytes")
    if (total := sum(found.values())) > _MOST_BYTES:
        raise ValueError(f"{total:,} bytes together")
    return {digest: right.get(digest, size) for digest, size in found.items()}

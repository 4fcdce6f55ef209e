"""``registry-cache.json``: the manifests that registries gave, for when none answers.

Each is kept by model, with what the registry calls the version, so that an unchanged one is not
sent again. A kept one is never taken for the server's own.
"""

import contextlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from watcher.errors import WatchError
from watcher.ollama import manifests, names
from watcher.state import checks, json_file

SCHEMA = "ollama-watch/registry-cache/1"
NAME = "registry-cache.json"
_MOST = 500  #: more models than this are not kept; the ones asked for last stay
_ROOM = 4 << 20  #: nor more text than this: it is read at each scan that finds a download


class Cached(NamedTuple):
    """A manifest's text as a registry gave it, what the registry calls it, and when it came."""

    raw: str
    etag: str
    at: float
    sizes: Mapping[str, int]  #: the bytes of each digest that it names


class Answer(NamedTuple):
    """What is known of a model's manifest now."""

    raw: bytes | None  #: None where there is none to be had
    problem: str = ""  #: why it was not got from the registry just now; "" where it was
    silent: bool = False  #: nobody has answered


class KnownLayer(NamedTuple):
    """What the kept manifests have of a digest: its bytes, and the models that have it."""

    size: int  #: 0 where they do not agree
    models: tuple[str, ...]
    sizes: tuple[int, ...] = ()  #: what the manifest of each of these has


KnownLayers = Mapping[str, KnownLayer]  #: by digest
Manifests = Mapping[str, Cached]  #: by `ModelName.key`
_NONE: Manifests = MappingProxyType({})


def cached(store: int) -> Manifests:
    """Every manifest that is kept; none where they can't be read."""
    try:
        return FILE.read(store)
    except WatchError:
        return {}


def known_layers(store: int, more: Manifests = _NONE) -> KnownLayers:
    """`more`: what was received and not kept."""
    found: dict[str, KnownLayer] = {}
    for key, each in {**cached(store), **more}.items():
        shown = names.to_model(key).shown
        for digest, size in each.sizes.items():
            before = found.get(digest, KnownLayer(size, ()))
            agreed = size if before.size == size else 0
            found[digest] = KnownLayer(agreed, (*before.models, shown), (*before.sizes, size))
    return found


def keep(store: int, model: names.ModelName, raw: bytes, etag: str, now: float) -> None:
    """Keep a model's manifest, where that can be done; the ones asked for last stay."""
    got = as_kept(raw, now, etag)

    def changed(before: Manifests) -> Manifests:
        known = before.get(model.key)
        if known is not None and known[:2] == got[:2]:
            return before
        newest = sorted({**before, model.key: got}.items(), key=lambda each: -each[1].at)
        found, room = {}, _ROOM
        for key, each in newest[:_MOST]:
            if len(each.raw) <= room:
                found[key] = each
                room -= len(each.raw)
        return found

    with contextlib.suppress(WatchError):  # it is asked for again another time
        FILE.change(store, changed)


def as_kept(raw: bytes, at: float, etag: str = "") -> Cached:
    """A manifest as it is kept. Raises ValueError for what is none."""
    text = raw.decode("utf-8", "replace")
    return Cached(text, etag, at, manifests.sizes(text.encode()))


class _File(json_file.File[Manifests]):
    schema = SCHEMA
    cached = True

    def decode(self, found: Mapping[str, Any]) -> Manifests:
        kept = {}
        for key, (raw, etag, at) in found["models"].items():
            version = checks.text(etag)
            if not version.isprintable() or not version.isascii():
                version = ""  # it is sent to the registry as a header
            with contextlib.suppress(ValueError):  # one that should not have been kept
                text, when = checks.text(raw, _ROOM), checks.day(at)
                kept[names.to_model(key).key] = as_kept(text.encode(), when, version)
        return kept

    def encode(self, value: Manifests) -> Mapping[str, object]:
        return {"models": {key: each[:3] for key, each in value.items()}}

    def is_durable(self, *_: object) -> bool:
        return False  # what a power cut takes is asked for again


FILE = _File(NAME, _NONE)

"""What the registries say of models: their manifests, asked anew and kept for when nobody answers.

Kept in ``registry-cache.json``, by model, with what the registry calls the version: so that an
unchanged manifest is not sent again. It is never taken for the server's own manifest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import orjson

from watcher import kept, manifests, names, ollama
from watcher.errors import WatchError
from watcher.names import ModelName

SCHEMA = "ollama-watch/registry-cache/1"
NAME = "registry-cache.json"
#: More models than this are not kept; the ones asked for last stay.
_MOST = 500
#: Nor more text than this: it is read at each look that finds a download.
_ROOM = 4 << 20


class Cached(NamedTuple):
    """A manifest's text as a registry gave it, what the registry calls it, and when it came."""

    raw: str
    etag: str
    at: float
    #: What it names, as `sizes` tells.
    sizes: Mapping[str, int]


class Answer(NamedTuple):
    """What is known of a model's manifest now."""

    #: None where there is none to be had.
    raw: bytes | None
    #: Why it was not got from the registry just now; "" where it was.
    problem: str = ""


def cached(store: int) -> Mapping[str, Cached]:
    """Every manifest that is kept, by `ModelName.key`; none where they can't be read."""
    try:
        return _FILE.read(store)
    except WatchError:
        return {}


class KnownLayer(NamedTuple):
    """What the kept manifests say of a digest: its bytes, and the models that have it."""

    #: 0 where they do not agree.
    size: int
    models: tuple[str, ...]


def known_layers(store: int) -> dict[str, KnownLayer]:
    """By digest: a download whose model has no manifest yet is known by the one that was kept."""
    found: dict[str, KnownLayer] = {}
    for key, each in cached(store).items():
        shown = names.to_model(key).shown
        for digest, size in each.sizes.items():
            before = found.get(digest)
            models = (shown,) if before is None else (*before.models, shown)
            agreed = size if before is None or before.size == size else 0
            found[digest] = KnownLayer(agreed, models)
    return found


def manifest(
    store: int | None,
    model: ModelName,
    *,
    insecure: bool = False,
    clock: Callable[[], float] = time.time,
    ask: Callable[..., ollama.Fetched] = ollama.registry_manifest,
) -> Answer:
    """Ask a model's registry for its manifest; where nobody answers, the one that was kept.

    `store`: the descriptor of the store that keeps it, or None.
    """
    known = None if store is None else cached(store).get(model.key)
    try:
        found = ask(model, known.etag if known else "", insecure=insecure)
    except OSError as error:
        why = f"{model.host} does not answer: {getattr(error, 'reason', None) or error}"
        return Answer(known.raw.encode() if known else None, why)
    if found.status == 304 and known:
        return Answer(known.raw.encode())
    if found.status == 404:
        return Answer(None, f"{model.host} has no {model.shown}")
    if found.status != 200:
        why = f"{model.host} answers {found.status}"
        return Answer(known.raw.encode() if known else None, why)
    try:
        manifests.parse(found.raw)
    except ValueError as error:
        return Answer(None, f"{model.host} gives no manifest: {error}")
    if store is not None:
        keep(store, model, found.raw, found.etag, clock())
    return Answer(found.raw)


def keep(store: int, model: ModelName, raw: bytes, etag: str, now: float) -> None:
    """Keep a model's manifest, where that can be done; the ones asked for last stay."""
    got = _read(raw.decode("utf-8", "replace"), etag, now)

    def changed(before: Mapping[str, Cached]) -> Mapping[str, Cached]:
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

    try:
        _FILE.change(store, changed, durable=lambda _, __: False)
    except WatchError:
        return  # it is asked for again another time


def sizes(raw: bytes) -> dict[str, int]:
    """The digests of all layers and of the config, each once, with their bytes.

    Raises ValueError for what is no manifest.
    """
    return {digest: size for digest, (size, _) in manifests.parse(raw).named.items()}


def _read(text: str, etag: str, at: float) -> Cached:
    return Cached(text, etag, at, sizes(text.encode()))


def _encode(found: Mapping[str, Cached]) -> bytes:
    document = {"schema": SCHEMA, "models": {key: each[:3] for key, each in found.items()}}
    return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)


@lru_cache(maxsize=1)
def _decode(raw: bytes) -> Mapping[str, Cached]:
    """Made sense of once for all looks that read the same text."""
    try:
        return {
            names.to_model(key).key: _read(str(text), str(etag), float(at))
            for key, (text, etag, at) in kept.document(raw, SCHEMA)["models"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, WatchError) as error:
        raise kept.DamagedError(f"{type(error).__name__}: {error}") from None


_FILE: kept.File[Mapping[str, Cached]] = kept.File(NAME, _decode, _encode, MappingProxyType({}))

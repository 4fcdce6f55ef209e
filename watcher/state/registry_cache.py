"""``registry-cache.json``: the manifests that registries gave, for when none answers.

Each is kept by model, with what the registry calls the version, so that an unchanged one is not
sent again. A kept one is never taken for the server's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import orjson

from watcher.errors import WatchError
from watcher.ollama import names, registry
from watcher.ollama.names import ModelName
from watcher.state import checks, json_file

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
    #: Nobody has answered.
    silent: bool = False


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


def let_go() -> None:
    """Keep nothing of what was read last; it is read again when it is asked for."""
    _decode.cache_clear()


_NOTHING_MORE: Mapping[str, Cached] = MappingProxyType({})


def known_layers(store: int, more: Mapping[str, Cached] = _NOTHING_MORE) -> dict[str, KnownLayer]:
    """By digest: a download whose model has no manifest yet is known by the one that was kept.

    `more`: what was heard and not kept, by `ModelName.key`.
    """
    found: dict[str, KnownLayer] = {}
    for key, each in {**cached(store), **more}.items():
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
) -> Answer:
    """Ask a model's registry for its manifest; where nobody answers, the one that was kept.

    `store`: the descriptor of the store that keeps it, or None.
    """
    known = None if store is None else cached(store).get(model.key)
    try:
        found = registry.fetch(model, known.etag if known else "", insecure=insecure)
    except OSError as error:
        why = f"{model.host} does not answer: {error.strerror or error}"
        return Answer(known.raw.encode() if known else None, why, silent=True)
    if found.status == 304 and known:
        return Answer(known.raw.encode())
    if found.status == 404:
        return Answer(None, f"{model.host} has no {model.shown}")
    if found.status != 200:
        why = f"{model.host} answers {found.status}"
        return Answer(known.raw.encode() if known else None, why)
    try:
        registry.sizes(found.raw)
    except ValueError as error:
        return Answer(None, f"{model.host} sent an invalid manifest: {error}")
    if store is not None:
        keep(store, model, found.raw, found.etag, clock())
    return Answer(found.raw)


# ---------------------------------------------------------------- keeping


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
        _FILE.change(store, changed)
    except WatchError:
        return  # it is asked for again another time


def as_kept(raw: bytes, at: float) -> Cached:
    """A manifest as it is kept. Raises ValueError for what is none."""
    return _read(raw.decode("utf-8", "replace"), "", at)


def _read(text: str, etag: str, at: float) -> Cached:
    return Cached(text, etag, at, registry.sizes(text.encode()))


def _sensible(text: object, etag: object, at: object) -> Cached | None:
    """A manifest that was kept; None for one that should not have been."""
    version = checks.text(etag)
    if not version.isprintable() or not version.isascii():
        version = ""  # it is sent to the registry as a header
    try:
        return _read(checks.text(text, _ROOM), version, checks.seconds(at, checks.LAST_DAY))
    except ValueError:
        return None


@lru_cache(maxsize=1)
def _decode(raw: bytes) -> Mapping[str, Cached]:
    """Made sense of once for all looks that read the same text."""
    rows = json_file.document(raw, SCHEMA)["models"].items()
    return {
        names.to_model(key).key: got
        for key, (text, etag, at) in rows
        if (got := _sensible(text, etag, at)) is not None
    }


class _File(json_file.File[Mapping[str, Cached]]):
    def decode(self, raw: bytes) -> Mapping[str, Cached]:
        return _decode(raw)

    def encode(self, value: Mapping[str, Cached]) -> bytes:
        document = {"schema": SCHEMA, "models": {key: each[:3] for key, each in value.items()}}
        return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)

    def is_durable(self, *_: object) -> bool:
        return False  # what a power cut takes is asked for again


_FILE = _File(NAME, MappingProxyType({}))

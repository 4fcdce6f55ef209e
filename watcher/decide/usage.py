"""Where a store's space is: each inode counted once, for one use. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TypeAlias

from watcher import names
from watcher.memory import FOLDER
from watcher.model import (
    Condition,
    Entry,
    Judged,
    Kind,
    Located,
    Sizes,
    Space,
    Use,
    UseKind,
)
from watcher.names import Role

_Key: TypeAlias = tuple[UseKind, str]

_RANK = {kind: rank for rank, kind in enumerate(UseKind)}


def uses(space: Space, judged: Iterable[Judged]) -> tuple[Use, ...]:
    """What the space is used for, the largest first; each model is there, one of 0 bytes too.

    The allocated bytes of all uses add up to what ``du -s --block-size=1`` says of the store.
    """
    conditions = {each.download.key: each.condition for each in judged}
    keys: dict[tuple[int, int], list[_Key]] = defaultdict(list)
    entries: dict[tuple[int, int], Entry] = {}
    for located in space.entries:
        keys[located.entry.identity].append(_key(located, space, conditions))
        entries[located.entry.identity] = located.entry
    files: Counter[_Key] = Counter()
    apparent: Counter[_Key] = Counter()
    allocated: Counter[_Key] = Counter()
    freed: Counter[_Key] = Counter()
    for identity, of_it in keys.items():
        entry = entries[identity]
        key = min(of_it, key=lambda key: (_RANK[key[0]], key[1]))
        files[key] += 1
        apparent[key] += _apparent(entry)
        allocated[key] += entry.allocated
        if _goes_with(entry, of_it.count(key)):
            freed[key] += entry.allocated
    models = {(UseKind.MODEL, model) for each in space.models.values() for model in each}
    made = (
        Use(*key, files[key], Sizes(apparent[key], allocated[key], freed[key]))
        for key in models | files.keys()
    )
    return tuple(sorted(made, key=lambda use: (-use.sizes.allocated, _RANK[use.kind], use.name)))


def total(space: Space) -> Sizes:
    """The three sizes of the whole store; `freed` is without what has another name elsewhere."""
    count = Counter(located.entry.identity for located in space.entries)
    entries = {located.entry.identity: located.entry for located in space.entries}
    return Sizes(
        sum(map(_apparent, entries.values())),
        sum(entry.allocated for entry in entries.values()),
        sum(e.allocated for e in entries.values() if _goes_with(e, count[e.identity])),
    )


def _apparent(entry: Entry) -> int:
    """The length of what has one: that of a folder says nothing."""
    return 0 if entry.kind is Kind.FOLDER else entry.size


def _goes_with(entry: Entry, removed: int) -> bool:
    """Whether removing so many of its names gives its blocks back."""
    return entry.kind is Kind.FOLDER or removed >= entry.links


def _key(located: Located, space: Space, conditions: dict[str, Condition]) -> _Key:
    path, entry = located
    top, _, inside = path.partition("/")
    if top == "blobs" and inside:
        return _in_blobs(inside, entry, space, conditions)
    if path in ("", "blobs"):
        return UseKind.FOLDERS, ""
    if top == "manifests":
        return UseKind.MANIFESTS, ""
    if top == FOLDER:
        in_quarantine = inside.startswith("quarantine/")
        return UseKind.QUARANTINE if in_quarantine else UseKind.OURS, ""
    if top.startswith("ollama-safetensors") and (inside or entry.kind is Kind.FOLDER):
        return UseKind.TEMPORARY, ""
    return UseKind.FOREIGN, ""


def _in_blobs(inside: str, entry: Entry, space: Space, conditions: dict[str, Condition]) -> _Key:
    name, deeper, _ = inside.partition("/")
    parsed = names.parse_blob(name)
    is_folder = bool(deeper) or entry.kind is Kind.FOLDER
    match parsed.role:
        case Role.BLOB:
            return _of_models(space.models.get(parsed.digest, ()))
        case Role.OLD if spelled := names.SPELLED_DIGEST.fullmatch(name):
            return _of_models(space.models.get(spelled[2], ()))
        case Role.DATA | Role.SIDECAR:
            return UseKind.PARTIAL, conditions.get(parsed.digest, Condition.UNKNOWN).value
        case Role.TRANSFER:
            return UseKind.PARTIAL, conditions.get(f"{parsed.digest}.tmp", Condition.UNKNOWN).value
        case Role.UPLOAD | Role.CREATE if entry.kind is Kind.FILE and not deeper:
            return UseKind.TEMPORARY, ""
        case _ if is_folder and name.startswith("split-gguf-"):
            return UseKind.TEMPORARY, ""
        case _:
            return UseKind.FOREIGN, ""


def _of_models(models: tuple[str, ...]) -> _Key:
    if len(models) == 1:
        return UseKind.MODEL, models[0]
    return (UseKind.SHARED, "") if models else (UseKind.ORPHAN, "")

"""Where a store's space is: each inode counted once, for one use. Pure."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import TypeAlias

from watcher import model
from watcher.model import Condition, Entry, Kind, Located, Sizes, Space, Tally, Use, UseKind
from watcher.ollama import names
from watcher.ollama.names import Role
from watcher.state.memory import FOLDER

_Key: TypeAlias = tuple[UseKind, str]

_TRANSFER = re.compile(r"transfers/([0-9a-fA-F]{64})(?:/|$)")  #: a file of a transfer of ours
_RANK = {kind: rank for rank, kind in enumerate(UseKind)}


def usage(
    space: Space, diagnosed: Iterable[model.Diagnosed], census: model.BlobCensus | None = None
) -> tuple[tuple[Use, ...], Sizes]:
    """What the space is used for, the largest first, and all together: as ``du`` adds it up."""
    conditions = {each.download.key: each.condition for each in diagnosed}
    known: dict[str, _Key] = {}
    if census is not None:  # what the names of blobs alone do not show
        known = {f"blobs/{entry.name}": (UseKind.OTHER_STORE, "") for entry in census.elsewhere}
        for odd in census.odd:
            if odd.lies is not None:
                known[odd.lies.path] = _of_models(odd.models)
    sums = defaultdict[_Key, Tally](Tally)
    sums.update({(UseKind.MODEL, name): Tally() for name in space.every_model})
    for models, tally in space.blobs.items():
        key = _of_models(models)
        sums[key] = sums[key].joined(tally)
    if space.manifests.files:
        sums[UseKind.MANIFESTS, ""] = space.manifests
    several: dict[tuple[int, int], list[tuple[_Key, Entry]]] = defaultdict(list)
    for located in space.entries:
        entry = located.entry
        key = known.get(located.path) or _key(located, space.models, conditions)
        if entry.links > 1 and entry.kind is not Kind.FOLDER:
            several[entry.identity].append((key, entry))
        else:
            sums[key] = sums[key].joined(_one(entry))
    total = reduce(Tally.joined, sums.values(), Tally())
    for found in several.values():
        keys, entry = [key for key, _ in found], found[-1][1]
        key = min(keys, key=lambda key: (_RANK[key[0]], key[1]))
        # A second name of ours goes with what it is of.
        keys = [key if each[0] is UseKind.OURS else each for each in keys]
        # A file goes with the last of its names.
        total = total.joined(_one(entry, goes=len(keys) >= entry.links))
        sums[key] = sums[key].joined(_one(entry, goes=keys.count(key) >= entry.links))
    uses = [Use(*key, each.files, Sizes(*each[1:])) for key, each in sums.items()]
    uses.sort(key=lambda use: (-use.sizes.allocated, _RANK[use.kind], use.name))
    return tuple(uses), Sizes(*total[1:])


def _one(entry: Entry, *, goes: bool = True) -> Tally:
    # The length of a folder means nothing.
    size = 0 if entry.kind is Kind.FOLDER else entry.size
    return Tally(1, size, entry.allocated, entry.allocated if goes else 0)


def _key(
    located: Located, models: Mapping[str, tuple[str, ...]], conditions: Mapping[str, Condition]
) -> _Key:
    path, entry = located
    top, _, inside = path.partition("/")
    if path in ("", "blobs"):
        return UseKind.FOLDERS, ""
    if top == "manifests":
        return UseKind.MANIFESTS, ""
    if top == FOLDER:
        match = _TRANSFER.match(inside)
        if match and (condition := conditions.get(f"{match[1]}{model.OURS}")):
            return UseKind.PARTIAL, condition.value
        in_quarantine = inside.startswith("quarantine/")
        return UseKind.QUARANTINE if in_quarantine else UseKind.OURS, ""
    if top != "blobs":
        left = top.startswith("ollama-safetensors") and (inside or entry.kind is Kind.FOLDER)
        return UseKind.TEMPORARY if left else UseKind.FOREIGN, ""
    name, deeper, _ = inside.partition("/")
    is_old = name.startswith("sha256:")
    role, digest, _ = names.parse_blob(names.new_spelling(name))
    is_file = entry.kind is Kind.FILE and not deeper
    match role:
        case Role.BLOB if (is_file and not is_old) or models.get(digest):
            return _of_models(models.get(digest, ()))  # an orphan where no model names it
        case Role.DATA | Role.SIDECAR | Role.TRANSFER:
            download = f"{digest}.tmp" if role is Role.TRANSFER else digest
            return UseKind.PARTIAL, conditions.get(download, Condition.UNKNOWN).value
        case Role.UPLOAD | Role.CREATE if is_file:
            return UseKind.TEMPORARY, ""
    is_folder = bool(deeper) or entry.kind is Kind.FOLDER
    split = is_folder and name.startswith("split-gguf-")
    return UseKind.TEMPORARY if split else UseKind.FOREIGN, ""


def _of_models(models: tuple[str, ...]) -> _Key:
    if len(models) == 1:
        return UseKind.MODEL, models[0]
    return (UseKind.SHARED, "") if models else (UseKind.ORPHAN, "")

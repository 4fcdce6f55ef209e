"""Where a store's space is: each inode counted once, for one use. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from watcher.model import (
    BlobCensus,
    Condition,
    Diagnosed,
    Entry,
    Kind,
    Located,
    Sizes,
    Space,
    Tally,
    Use,
    UseKind,
)
from watcher.ollama import names
from watcher.ollama.names import Role
from watcher.state.memory import FOLDER

_Key: TypeAlias = tuple[UseKind, str]

_RANK = {kind: rank for rank, kind in enumerate(UseKind)}


class Usage(NamedTuple):
    """What space is used for, the largest use first, and all of it together."""

    uses: tuple[Use, ...]
    total: Sizes


def usage(space: Space, diagnosed: Iterable[Diagnosed], census: BlobCensus | None = None) -> Usage:
    """What the space is used for; each model is there, one of 0 bytes, too.

    `census`: what a look has said of the same blobs, so that both say the same.

    The allocated bytes of all uses add up to what ``du -s --block-size=1`` says of the store.
    """
    conditions = {each.download.key: each.condition for each in diagnosed}
    looked = _Looked(space, conditions, _told(census))
    sums = {(UseKind.MODEL, model): _Sum() for model in space.every_model}
    total = _Sum()
    summed = [(_of_models(models), tally) for models, tally in space.blobs.items()]
    for key, tally in (*summed, ((UseKind.MANIFESTS, ""), space.manifests)):
        if tally.files:
            total.add_all(tally)
            sums.setdefault(key, _Sum()).add_all(tally)
    several: dict[tuple[int, int], list[_Key]] = defaultdict(list)
    linked: dict[tuple[int, int], Entry] = {}
    for located in space.entries:
        key, entry = _key(located, looked), located.entry
        if entry.links > 1 and entry.kind is not Kind.FOLDER:
            several[entry.identity].append(key)
            linked[entry.identity] = entry
            continue
        for each in (total, sums.setdefault(key, _Sum())):
            each.add(entry, freed=True)
    for identity, keys in several.items():
        key, entry = min(keys, key=lambda key: (_RANK[key[0]], key[1])), linked[identity]
        total.add(entry, freed=len(keys) >= entry.links)
        sums.setdefault(key, _Sum()).add(entry, freed=keys.count(key) >= entry.links)
    uses = [Use(*key, each.files, each.sizes) for key, each in sums.items()]
    uses.sort(key=lambda use: (-use.sizes.allocated, _RANK[use.kind], use.name))
    return Usage(tuple(uses), total.sizes)


@dataclass(slots=True)
class _Sum:
    files: int = 0
    apparent: int = 0
    allocated: int = 0
    freed: int = 0

    def add(self, entry: Entry, *, freed: bool) -> None:
        """`freed`: all of its names are among those that are removed together."""
        self.files += 1
        # The length of a folder says nothing.
        self.apparent += 0 if entry.kind is Kind.FOLDER else entry.size
        self.allocated += entry.allocated
        self.freed += entry.allocated if freed else 0

    def add_all(self, tally: Tally) -> None:
        self.files += tally.files
        self.apparent += tally.apparent
        self.allocated += tally.allocated
        self.freed += tally.allocated

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.apparent, self.allocated, self.freed)


class _Looked(NamedTuple):
    """What is known of names below the store."""

    space: Space
    conditions: dict[str, Condition]
    #: Of paths below the store that a look has told apart.
    told: dict[str, _Key]


def _told(census: BlobCensus | None) -> dict[str, _Key]:
    """The uses of blobs that their names alone do not tell."""
    if census is None:
        return {}
    other = {f"blobs/{entry.name}": (UseKind.OTHER_STORE, "") for entry in census.elsewhere}
    astray = {odd.lies.path: _of_models(odd.models) for odd in census.odd if odd.lies is not None}
    return other | astray


def _key(located: Located, looked: _Looked) -> _Key:
    path, entry = located
    if (told := looked.told.get(path)) is not None:
        return told
    top, _, inside = path.partition("/")
    if top == "blobs" and inside:
        return _in_blobs(inside, entry, looked)
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


def _in_blobs(inside: str, entry: Entry, looked: _Looked) -> _Key:
    name, deeper, _ = inside.partition("/")
    is_old = name.startswith("sha256:")
    parsed = names.parse_blob(names.new_spelling(name) if is_old else name)
    is_folder = bool(deeper) or entry.kind is Kind.FOLDER
    match parsed.role:
        case Role.BLOB:
            is_file = entry.kind is Kind.FILE and not deeper
            return _of_blob(parsed.digest, looked, may_go=is_file and not is_old)
        case Role.DATA | Role.SIDECAR:
            return UseKind.PARTIAL, _condition(parsed.digest, looked)
        case Role.TRANSFER:
            return UseKind.PARTIAL, _condition(f"{parsed.digest}.tmp", looked)
        case Role.UPLOAD | Role.CREATE if entry.kind is Kind.FILE and not deeper:
            return UseKind.TEMPORARY, ""
        case _ if is_folder and name.startswith("split-gguf-"):
            return UseKind.TEMPORARY, ""
        case _:
            return UseKind.FOREIGN, ""


def _condition(key: str, looked: _Looked) -> str:
    return looked.conditions.get(key, Condition.UNKNOWN).value


def _of_blob(digest: str, looked: _Looked, *, may_go: bool) -> _Key:
    """`may_go`: it is an orphan where no model names it, and nothing else."""
    models = looked.space.models.get(digest, ())
    return _of_models(models) if models or may_go else (UseKind.FOREIGN, "")


def _of_models(models: tuple[str, ...]) -> _Key:
    if len(models) == 1:
        return UseKind.MODEL, models[0]
    return (UseKind.SHARED, "") if models else (UseKind.ORPHAN, "")

"""Stores that lie in a store, where no server looks: a copy of one that went a folder too deep."""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from watcher.ollama import names
from watcher.state import fs
from watcher.state.memory import FOLDER

_DEEPEST, _MOST_FOLDERS = 4, 500  #: how deep, and how many folders, it looks
_TAG_DEPTH = 4
_PARTS = ("blobs", "manifests")


Files: TypeAlias = tuple[tuple[str, os.stat_result], ...]  #: by their paths below the outer store
Found: TypeAlias = tuple[str, Files, Files]  #: a store's path, its blobs, and its manifests


def find(store: int, in_blobs: Iterable[str]) -> Iterator[Found]:
    """The stores in a store; `in_blobs`: folders in its ``blobs``. What can't be listed is none."""
    budget = [_MOST_FOLDERS]
    yield from _in(store, "blobs", sorted(in_blobs), budget)
    yield from _in(store, "manifests", ("blobs", "manifests", "models"), budget)
    for name in _folders(store, "."):
        if name not in (*_PARTS, FOLDER) and not name.startswith("ollama-safetensors"):
            yield from _in(store, name, _folders(store, name), budget)


def _in(store: int, path: str, inside: Sequence[str], budget: list[int]) -> Iterator[Found]:
    blobs = tuple(_blobs(store, f"{path}/blobs")) if "blobs" in inside else ()
    manifests = tuple(_manifests(store, f"{path}/manifests", 0)) if "manifests" in inside else ()
    if blobs or manifests:
        yield path, blobs, manifests
    for name in inside:
        budget[0] -= 1
        below = f"{path}/{name}"
        if name not in _PARTS and budget[0] > 0 and below.count("/") < _DEEPEST:
            yield from _in(store, below, _folders(store, below), budget)


def _folders(store: int, path: str) -> list[str]:
    return [name for name, status in _listed(store, path) if stat.S_ISDIR(status.st_mode)]


def _blobs(store: int, path: str) -> Iterator[tuple[str, os.stat_result]]:
    for name, status in _listed(store, path):
        known = names.parse_blob(names.new_spelling(name))
        if known.digest and stat.S_ISREG(status.st_mode):
            yield f"{path}/{name}", status


def _manifests(store: int, path: str, depth: int) -> Iterator[tuple[str, os.stat_result]]:
    for name, status in _listed(store, path):
        below = f"{path}/{name}"
        if depth + 1 < _TAG_DEPTH and stat.S_ISDIR(status.st_mode):
            yield from _manifests(store, below, depth + 1)
        elif depth + 1 == _TAG_DEPTH and stat.S_ISREG(status.st_mode):
            yield below, status


def _listed(store: int, path: str) -> list[tuple[str, os.stat_result]]:
    found: list[tuple[str, os.stat_result]] = []
    with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
        at = store
        for name in path.split("/"):
            at = opened.enter_context(fs.opened_folder(name, at))
        for name in sorted(os.listdir(at)):
            with contextlib.suppress(FileNotFoundError):
                found.append((name, os.stat(name, dir_fd=at, follow_symlinks=False)))
    return found

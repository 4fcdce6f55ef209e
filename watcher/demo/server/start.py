"""What a server's start does to its store."""

from __future__ import annotations

import os
import time

from watcher.demo.server.cleanup import remove_unused
from watcher.demo.server.errors import EngineError, told
from watcher.demo.server.files import is_folder, names_in, prune_folder, remove
from watcher.demo.server.log import log
from watcher.demo.server.settings import no_prune
from watcher.demo.server.store import all_manifests, blobs_dir, is_digest, manifests_dir

GRACE_SECONDS = 3600


def start_store() -> None:
    """Rename, then clean up. Raises EngineError where it stops the server."""
    rename_old_spelling(blobs_dir())
    if no_prune():
        return
    try:
        all_manifests(lenient=False)
    except EngineError as error:
        log(f"corrupt manifests detected, skipping prune operation: {error}")
        return
    prune_blobs()
    prune_folder(manifests_dir())


def rename_old_spelling(path: str) -> None:
    """Rename every `sha256:…` at or below `path`; symlinks are not walked.

    A folder's names are read before it is renamed itself, so a folder of that name with anything
    in it stops the server.
    """
    names = names_in(path) if is_folder(path) else []
    folder, base = os.path.split(path)
    if base.startswith("sha256:"):
        with told("rename", path):
            os.rename(path, os.path.join(folder, base.replace(":", "-", 1)))
    for name in names:
        rename_old_spelling(os.path.join(path, name))


def prune_blobs() -> None:
    """Remove what lies in blobs/ for an hour and that no manifest names."""
    folder = blobs_dir()
    with told("open", folder):
        entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    unnamed = set()
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) or _young(entry):
            continue
        digest = entry.name.replace("-", ":")
        if is_digest(digest):
            unnamed.add(digest)
            continue
        try:
            remove(entry.path)
        except EngineError as error:
            log(f"couldn't remove blob {entry.name}: {error}")
    log(f"total blobs: {len(unnamed)}")
    try:
        remove_unused(unnamed)
    except EngineError as error:
        log(f"couldn't remove unused layers: {error}")


def _young(entry: os.DirEntry[str]) -> bool:
    try:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime < GRACE_SECONDS
    except OSError as error:
        log(f"couldn't stat blob {entry.name}: {error}")
        return True

"""Reading and removing files; every failure is an EngineError in the real server's words."""

from __future__ import annotations

import os
import stat

from watcher.demo.server.errors import told

CHUNK = 1 << 18


def read_file(path: str) -> tuple[bytes, os.stat_result]:
    """A file's content and state. Raises NotExistError or EngineError (a folder can't be read)."""
    with told("open", path):
        descriptor = os.open(path, os.O_RDONLY)
    try:
        with told("read", path):
            state = os.fstat(descriptor)
            data = b"".join(iter(lambda: os.read(descriptor, CHUNK), b""))
    finally:
        os.close(descriptor)
    return data, state


def names_in(folder: str) -> list[str]:
    """The names in a folder, in the order of their bytes. Raises EngineError."""
    with told("open", folder):
        return sorted(os.listdir(folder), key=os.fsencode)


def is_folder(path: str) -> bool:
    """Whether a path is a folder; a symlink is none. Raises EngineError where nothing is there."""
    with told("lstat", path):
        return stat.S_ISDIR(os.lstat(path).st_mode)


def remove(path: str) -> None:
    """Remove a file or an empty folder. Raises EngineError."""
    with told("remove", path):
        try:
            os.unlink(path)
        except (IsADirectoryError, PermissionError):
            if not os.path.isdir(path) or os.path.islink(path):
                raise
            os.rmdir(path)


def prune_folder(path: str) -> None:
    """Remove empty folders, the top one included; symlinks are not followed."""
    if not is_folder(path):
        return
    for name in names_in(path):
        prune_folder(os.path.join(path, name))
    if not names_in(path):
        remove(path)

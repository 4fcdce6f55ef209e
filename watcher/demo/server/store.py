"""Where manifests and blobs lie, and what is read there."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import replace

from watcher.demo.server.errors import EngineError, told
from watcher.demo.server.files import read_file
from watcher.demo.server.goglob import glob
from watcher.demo.server.log import log
from watcher.demo.server.manifests import Manifest
from watcher.demo.server.names import Name
from watcher.demo.server.settings import models_dir

_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")


def blobs_dir() -> str:
    """The folder of blobs, made where it is missing."""
    return _made("blobs")


def manifests_dir() -> str:
    """The folder of manifests, made where it is missing."""
    return _made("manifests")


def _made(folder: str) -> str:
    path = os.path.join(models_dir(), folder)
    with told("mkdir", path):
        os.makedirs(path, 0o755, exist_ok=True)
    return path


def is_digest(text: str) -> bool:
    """Whether a text is a digest, with `:` or with `-`."""
    return _DIGEST.fullmatch(text) is not None


def blob_path(digest: str) -> str:
    """Where the blob of a digest lies. Raises EngineError where it is no digest."""
    if not is_digest(digest):
        raise EngineError("invalid digest format")
    return os.path.join(blobs_dir(), digest.replace(":", "-"))


def manifest_path(name: Name) -> str:
    """Where the manifest of a model lies."""
    return os.path.join(manifests_dir(), name.path)


def read_manifest(name: Name) -> Manifest:
    """The manifest of a model. Raises NotExistError or EngineError."""
    if not name.valid:
        raise EngineError(f"unqualified name: {name.short}")
    path = manifest_path(name)
    data, state = read_file(path)
    sha = hashlib.sha256(data).hexdigest()
    return replace(Manifest.of_bytes(data), path=path, sha=sha, modified=state.st_mtime)


def write_manifest(name: Name, data: bytes) -> None:
    """Write the manifest of a model, in place. Raises EngineError."""
    path = manifest_path(name)
    folder = os.path.dirname(path)
    with told("mkdir", folder):
        os.makedirs(folder, 0o755, exist_ok=True)
    with told("open", path), open(path, "wb") as file:
        file.write(data)


def all_manifests(*, lenient: bool) -> dict[Name, Manifest]:
    """Every manifest exactly four folders deep.

    `lenient` passes over invalid names and broken manifests; what can't even be looked at (a
    dangling symlink) is an error either way.
    """
    root = manifests_dir()
    found: dict[Name, Manifest] = {}
    for path in glob(os.path.join(root, "*", "*", "*", "*")):
        with told("stat", path):
            if stat.S_ISDIR(os.stat(path).st_mode):
                continue
        try:
            name = _name_at(os.path.relpath(path, root))
            found[name] = read_manifest(name)
        except EngineError as error:
            if not lenient:
                raise EngineError(f"{path} {error}") from error
            log(f"bad manifest {path}: {error}")
    return found


def _name_at(relative: str) -> Name:
    name = Name.of_path(relative)
    if name is None:
        raise EngineError(f"{relative} %!w(<nil>)")
    return name


def existing_name(name: Name) -> Name:
    """The name in the spelling that the store already uses for its parts."""
    for known in sorted(all_manifests(lenient=True)):
        name = name.folded_like(known)
    return name

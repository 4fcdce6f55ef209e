"""A broken store in one line, and its inverse.

``store.broken("0:48 -:51 {}:62", aged="2h")`` makes the files of one unfinished download. Each word
is a part, ``claimed:present``, in MB (10^6 bytes, fractions allowed):

- *claimed* is the Completed of the part's sidecar; ``-``: there is no such sidecar; ``E``: it is
  empty; anything else, such as ``{}``, is what stands in it.
- *present* is how much of the part was written, front to back, with bytes that are not zero; ``-``
  for every part: there is no data file.

Parts have 100 MB as real ones do, the last one what `total` (in MB) leaves for it. Files are
sparse, so what is not present costs nothing; keep what is present small.

``store.shown(digest)`` is the inverse: the download as it now lies on the disk, each number rounded
to whole MB (``"47:48 50:51 61:62"``). It reads files by itself and asks nothing of the package.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from watcher.observe.host import Host

MB = 1_000_000
PART = 100 * MB
LIBRARY = "registry.ollama.ai/library"

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_CHUNK = (b"0123456789abcdef" * 62_500)[:MB]


def digest_of(what: str | bytes) -> str:
    """A digest for a name, or of a content."""
    return hashlib.sha256(what.encode() if isinstance(what, str) else what).hexdigest()


def seconds(age: str) -> float:
    """Seconds of ``90s``, ``5m``, ``2h``, ``8d``."""
    return float(age[:-1]) * _UNITS[age[-1]]


def part_of(name: bytes | str) -> dict[str, int]:
    """The fields of a sidecar."""
    fields = json.loads(name)
    return {key: int(fields[key]) for key in ("N", "Offset", "Size", "Completed")}


class Store:
    """A models folder under test: real files, made and shown in short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blobs.mkdir(parents=True)
        self.manifests.mkdir()

    @classmethod
    def at(cls, path: Path) -> Self:
        """A store that lies there already."""
        found = cls.__new__(cls)
        found.path = path
        return found

    @property
    def blobs(self) -> Path:
        """The folder ``blobs``."""
        return self.path / "blobs"

    @property
    def manifests(self) -> Path:
        """The folder ``manifests``."""
        return self.path / "manifests"

    # ------------------------------------------------------------ making

    def broken(
        self, parts: str, *, aged: str = "2h", total: float | None = None, name: str = "layer"
    ) -> str:
        """Make the files of an unfinished download; gives back its digest."""
        digest = digest_of(name)
        words = [word.rsplit(":", 1) for word in parts.split()]
        length = PART * len(words) if total is None else round(total * MB)
        data = self.blobs / f"sha256-{digest}-partial"
        made: list[Path] = []
        if any(present != "-" for _, present in words):
            with data.open("wb") as file:
                file.truncate(length)
                for number, (_, present) in enumerate(words):
                    _fill(file.fileno(), number * PART, round(float(present) * MB))
            made.append(data)
        for number, (claimed, _) in enumerate(words):
            offset = number * PART
            content = _sidecar(claimed, number, offset, min(PART, length - offset))
            if content is not None:
                path = self.blobs / f"sha256-{digest}-partial-{number}"
                path.write_bytes(content)
                made.append(path)
        for path in made:
            age(path, aged)
        return digest

    def blob(self, content: bytes | int = b"blob", *, aged: str = "2h", name: str = "") -> str:
        """A finished blob: of this content, or of so many bytes that cost nothing."""
        if isinstance(content, bytes):
            digest = digest_of(name) if name else digest_of(content)
        else:
            digest = digest_of(name or f"{content} bytes")
        path = self.blobs / f"sha256-{digest}"
        with path.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                file.truncate(content)
        age(path, aged)
        return digest

    def manifest(
        self,
        model: str = "llama3/latest",
        layers: Mapping[str, int] | bytes = b"",
        *,
        aged: str = "2h",
    ) -> Path:
        """A manifest that names digests with their sizes, or one of just these bytes."""
        path = self.manifests / (model if model.count("/") == 3 else f"{LIBRARY}/{model}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(layers if isinstance(layers, bytes) else manifest_bytes(layers))
        age(path, aged)
        return path

    def model(self, name: str = "llama3/latest", *, aged: str = "2h") -> str:
        """A healthy model of one layer; gives back the layer's digest."""
        digest = self.blob(f"weights of {name}".encode(), aged=aged)
        self.manifest(name, {digest: len(f"weights of {name}")}, aged=aged)
        return digest

    def orphan(self, name: str = "orphan", *, aged: str = "8d") -> str:
        """A finished blob that no manifest names."""
        return self.blob(f"bytes of {name}".encode(), aged=aged)

    def temporary(self, name: str = "sha256-123456", *, aged: str = "2h") -> Path:
        """What ``ollama create`` leaves behind; any other name makes a foreign file."""
        path = self.blobs / name
        path.write_bytes(b"left over")
        age(path, aged)
        return path

    # ------------------------------------------------------------ showing

    def shown(self, digest: str) -> str:
        """The download as it lies on the disk, in the notation."""
        prefix = f"sha256-{digest}-partial-"
        found = {
            int(path.name.removeprefix(prefix)): path.read_bytes()
            for path in self.blobs.glob(f"{prefix}*")
        }
        data = self.blobs / f"sha256-{digest}-partial"
        length = data.stat().st_size if data.exists() else 0
        count = max([max(found, default=-1) + 1, -(-length // PART) if not found else 0])
        words: list[str] = []
        at = 0
        for number in itertools.count():
            if number >= count and (not found or at >= length):
                break
            raw = found.get(number)
            fields = _fields(raw)
            offset, size = at, min(PART, max(0, length - at)) if length else PART
            if fields is not None:
                offset, size = fields["Offset"], fields["Size"]
            present = str(_present(data, offset, offset + size)) if data.exists() else "-"
            words.append(f"{_claimed(raw, fields)}:{present}")
            at = offset + size
        return " ".join(words)

    def names(self) -> list[str]:
        """The names under ``blobs/``."""
        return sorted(os.listdir(self.blobs))

    def snapshot(self) -> dict[str, tuple[Any, ...]]:
        """All metadata of the whole tree: what must be the same where nothing may change.

        The times of access of folders are left out: a listing changes them.
        """
        found: dict[str, tuple[Any, ...]] = {}
        for folder, folders, names in os.walk(self.path):
            for name in (".", *folders, *names):
                path = os.path.join(folder, name)
                status = os.lstat(path)
                of_names = status.st_mode, status.st_ino, status.st_nlink, status.st_uid
                # Not the blocks: some file systems allot them later.
                of_bytes = status.st_gid, status.st_size, status.st_mtime_ns
                kept = (*of_names, *of_bytes, status.st_ctime_ns)
                is_file = not os.path.isdir(path)
                found[path] = (*kept, status.st_atime_ns) if is_file else kept
        return found

    # ------------------------------------------------------------ the machine around it

    def host(self, **changes: Any) -> Host:
        """A world with nobody else in it: no processes, no server, a machine up for long."""
        proc = changes.pop("proc", None) or quiet_machine(self.path.parent / "machine")
        given: dict[str, Any] = {
            "store": str(self.path),
            "proc": proc,
            "system": proc,
            "sleep": lambda _: None,
            "version": lambda _: None,
        }
        return Host(**{**given, **changes})


def age(path: Path, aged: str | float) -> None:
    """Set a file's times back, by ``5m`` or so many seconds, or, as ``-5m``, forward."""
    then = time.time() - (seconds(aged) if isinstance(aged, str) else aged)
    os.utime(path, (then, then), follow_symlinks=False)


def manifest_bytes(layers: Mapping[str, int]) -> bytes:
    """A manifest as the server writes it, that names digests with their sizes."""
    named = [
        {
            "mediaType": "application/vnd.ollama.image.model",
            "digest": digest if digest.startswith("sha") else f"sha256:{digest}",
            "size": size,
        }
        for digest, size in layers.items()
    ]
    document = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "layers": named,
    }
    return json.dumps(document).encode()


def quiet_machine(folder: Path, *, booted: str = "90d", file_system: str = "ext4") -> str:
    """A ``/proc`` without processes, of a machine that was started so long ago."""
    own = folder / "self" / "ns"
    if not own.exists():
        own.mkdir(parents=True)
        (own / "pid").symlink_to("pid:[4026531836]")
        (folder / "self" / "mounts").write_text(f"none / {file_system} rw 0 0\n")
        started = int(time.time() - seconds(booted))
        (folder / "stat").write_text(f"cpu 0 0 0 0\nbtime {started}\n")
    return str(folder)


def _fill(fd: int, at: int, count: int) -> None:
    while count > 0:
        count -= os.pwrite(fd, _CHUNK[:count], at)
        at += MB


def _sidecar(claimed: str, number: int, offset: int, size: int) -> bytes | None:
    if claimed == "-":
        return None
    if claimed == "E":
        return b""
    if not re.fullmatch(r"-?\d+(\.\d+)?", claimed):
        return claimed.encode()
    fields = number, offset, size, round(float(claimed) * MB)
    return b'{"N":%d,"Offset":%d,"Size":%d,"Completed":%d}\n' % fields


def _fields(raw: bytes | None) -> dict[str, int] | None:
    try:
        return part_of(raw or b"")
    except (ValueError, KeyError, TypeError):
        return None


def _claimed(raw: bytes | None, fields: dict[str, int] | None) -> str:
    if raw is None:
        return "-"
    if fields is None:
        return raw.decode().strip() or "E"
    return str(round(fields["Completed"] / MB))


def _present(data: Path, start: int, end: int) -> int:
    """MB of a part up to its last byte that is not zero."""
    with data.open("rb") as file:
        fd, last, at = file.fileno(), start, start
        while at < end:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                break
            stop = min(end, os.lseek(fd, at, os.SEEK_HOLE))
            if at < end:
                low = max(at, stop - MB)
                kept = os.pread(fd, stop - low, low).rstrip(b"\0")
                last = low + len(kept) if kept else last
            at = max(stop, at + 1)
    return round((last - start) / MB)

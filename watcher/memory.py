"""``state.json``: what is remembered of a store from one look to the next.

Saved atomically and durably; an unreadable file is set aside, and everything goes on without it.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson

from watcher import files
from watcher.model import Condition

SCHEMA = "ollama-watch/state/1"
FOLDER = ".ollama-watch"
NAME = "state.json"
_READ_LIMIT = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Record:
    """One download as it was last seen."""

    device: int
    inode: int
    condition: Condition
    stale: bool
    #: A pull of it was told, and its end was not yet.
    pulling: bool
    #: True length in bytes, where it was known.
    total: int | None
    #: Claimed and present bytes: what changes when something arrives.
    claimed: int
    present: int
    #: When bytes last arrived, seconds since the epoch.
    progress_at: float
    models: tuple[str, ...] = ()

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of the data file, or of its first sidecar."""
        return self.device, self.inode


@dataclass(frozen=True, slots=True)
class Memory:
    """All that is remembered of one store."""

    downloads: Mapping[str, Record] = field(default_factory=dict)
    #: Why the file could not be used, if so; told once.
    lost: str = ""


def load(store: int) -> Memory:
    """Read the memory of the store behind a descriptor. Never raises for what is in the file."""
    try:
        with files.opened_folder(FOLDER, store) as folder:
            raw = files.read_small(NAME, folder, _READ_LIMIT)
    except FileNotFoundError:
        return Memory()
    except OSError as error:
        return Memory(lost=f"{FOLDER}/{NAME} can't be read: {error.strerror}")
    try:
        return _decode(orjson.loads(raw))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return Memory(lost=f"{FOLDER}/{NAME} is damaged: {type(error).__name__}: {error}")


def save(store: int, memory: Memory) -> None:
    """Write the memory; a damaged file is kept beside it as ``state.json.damaged``."""
    files.ensure_folder(FOLDER, store)
    with files.opened_folder(FOLDER, store) as folder:
        if memory.lost:
            _set_aside(folder)
        files.save(NAME, folder, _encode(memory))


def _set_aside(folder: int) -> None:
    try:
        files.replace(NAME, folder, f"{NAME}.damaged", folder)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def _encode(memory: Memory) -> bytes:
    document = {
        "schema": SCHEMA,
        "downloads": {
            digest: {
                "device": record.device,
                "inode": record.inode,
                "condition": record.condition.value,
                "stale": record.stale,
                "pulling": record.pulling,
                "total_bytes": record.total,
                "claimed_bytes": record.claimed,
                "present_bytes": record.present,
                "progress_at": record.progress_at,
                "models": list(record.models),
            }
            for digest, record in memory.downloads.items()
        },
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _decode(document: object) -> Memory:
    if not isinstance(document, dict) or document["schema"] != SCHEMA:
        raise ValueError("an unknown schema")
    records = {
        str(digest): Record(
            device=int(each["device"]),
            inode=int(each["inode"]),
            condition=Condition(each["condition"]),
            stale=bool(each["stale"]),
            pulling=bool(each["pulling"]),
            total=None if each["total_bytes"] is None else int(each["total_bytes"]),
            claimed=int(each["claimed_bytes"]),
            present=int(each["present_bytes"]),
            progress_at=float(each["progress_at"]),
            models=tuple(str(model) for model in each["models"]),
        )
        for digest, each in document["downloads"].items()
    }
    return Memory(records)

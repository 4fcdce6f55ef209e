"""``hashes/<2 hex>.json``: what hashing has found out, in one file for each beginning of a digest.

A look at one digest reads one of them, and what is hashed rewrites one. They are read without a
lock, and written by whoever holds the lock for acting: before the memory, so that the memory never
relies on a hash that a kill has taken.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from watcher.model import UNREADABLE, Ranges
from watcher.ollama import names
from watcher.state import checks, fs, json_file, state_folder

SCHEMA = "ollama-watch/hashes/1"
FOLDER = "hashes"
_BLOB = "sha256-"
_PREFIXES = tuple(f"{number:02x}" for number in range(256))


class Hashed(NamedTuple):
    """A file whose content was hashed, as it was then (inode, bytes, ns), and the hash."""

    inode: int
    size: int
    changed_ns: int
    sha256: str
    #: The start of the machine that it holds for, if read from memory; "": read from the disk.
    boot: str = ""
    wrong: Ranges = ()  #: the bytes that are wrong, as far as sums of its chunks are known

    def counts(self, name: str, boot: str) -> bool:
        """Whether it is about what is on the disk; a mismatch always is.

        What a disk can't give back it may in another start.
        """
        is_wrong = self.sha256 != UNREADABLE and not self.is_right(name)
        return self.boot in ("", boot) or is_wrong

    def is_right(self, name: str) -> bool:
        """Whether it is the one that a file of that name has to have."""
        return names.parse_blob(name).digest.lower() == self.sha256


class Shard(NamedTuple):
    """The rows of one file; each is checked when it is asked for, since most never are."""

    right: dict[str, dict[str, list[Any]]]  #: by the start of the machine, and by digest
    others: dict[str, list[Any]]  #: all others, by file name

    def get(self, name: str) -> Hashed | None:
        """What is known of a file. Raises ValueError or TypeError for what makes no sense."""
        if (row := self.others.get(name)) is not None:
            return hashed(row)
        digest = name.removeprefix(_BLOB)
        for boot, rows in self.right.items():
            if name.startswith(_BLOB) and (row := rows.get(digest)) is not None:
                return hashed([*row, digest, boot])
        return None

    def all(self) -> dict[str, Hashed]:
        """Everything. Raises ValueError or TypeError for what makes no sense."""
        found = {checks.file_name(name): hashed(row) for name, row in self.others.items()}
        for boot, rows in self.right.items():
            for digest, row in rows.items():
                found[_BLOB + digest] = hashed([*row, digest, boot])
        return found


hashed = checks.row(
    Hashed,
    checks.identity,
    checks.whole,
    checks.nanoseconds,
    checks.digest,
    checks.boot,
    checks.byte_ranges,
)


class _File(json_file.File[Shard]):
    schema = SCHEMA
    option = 0

    def decode(self, found: Mapping[str, Any]) -> Shard:
        right, others = found["right"], found["others"]
        if not all(isinstance(each, dict) for each in (right, others, *right.values())):
            raise ValueError("expected objects")
        return Shard(right, others)

    def encode(self, value: Shard) -> Mapping[str, object]:
        return value._asdict()


_EMPTY = Shard({}, {})
_FILES = {prefix: _File(f"{prefix}.json", _EMPTY, FOLDER) for prefix in _PREFIXES}


@dataclass(slots=True)
class Hashes:
    """Hashes by file name: those that are in no file yet, and those in the files of a store."""

    new: Mapping[str, Hashed] = field(default_factory=dict)  #: found out just now
    _store: int | None = field(default=None, compare=False)
    _boot: str = field(default="", compare=False)
    unread: str = field(default="", compare=False)  #: why some of the files could not be used
    _shards: dict[str, Shard] = field(default_factory=dict, compare=False)

    def of_disk(self, store: int, boot: str) -> Self:
        """The same with the files of an open store, as far as they count in this start."""
        return type(self)(self.new, store, boot)

    def plus(self, more: Mapping[str, Hashed]) -> Self:
        return type(self)({**self.new, **more}, self._store, self._boot)

    def get(self, name: str) -> Hashed | None:
        """What is known of a file, as far as it is about what is on the disk."""
        found = self.new.get(name)
        prefix = _prefix_of(name)
        if found is None and prefix:
            if prefix not in self._shards:
                self._shards[prefix] = self._load(prefix)
            try:
                found = self._shards[prefix].get(name)
            except (ValueError, TypeError) as error:
                self.unread = f"{_shown(prefix)} is damaged: {error}"
        return found if found is not None and found.counts(name, self._boot) else None

    def blobs(self) -> Iterator[tuple[set[str], set[str]]]:
        """Digests with the right hash, and names with another: what is new, then file by file."""
        new = {name for name in self.new if names.is_blob(name)}
        right = {name for name in new if self.new[name].is_right(name)}
        on_disk = {name for name in right if self.new[name].counts(name, self._boot)}
        yield {name[len(_BLOB) :] for name in on_disk}, new - right
        hidden = {name[len(_BLOB) :] for name in new}
        for prefix in self._prefixes():
            shard = self._load(prefix)
            rows = (rows for boot, rows in shard.right.items() if boot in ("", self._boot))
            yield set().union(*rows) - hidden, set(filter(names.is_blob, shard.others)) - new

    def _prefixes(self) -> Sequence[str]:
        if self._store is None:
            return ()
        try:
            with state_folder.opened(self._store, FOLDER) as folder:
                there = set(os.listdir(folder))
        except FileNotFoundError:
            return ()
        except OSError:
            return _PREFIXES  # reading one gives the reason
        return [prefix for prefix in _PREFIXES if _FILES[prefix].name in there]

    def _load(self, prefix: str) -> Shard:
        if self._store is None:
            return _EMPTY
        try:
            found = _FILES[prefix].load(self._store)
        except OSError as error:
            self.unread = f"{_shown(prefix)} can't be read: {error.strerror}"
            return _EMPTY
        self.unread = found.lost or self.unread
        return found.value


def _prefix_of(name: str) -> str:
    return names.parse_blob(name).digest[:2].lower()


def _shown(prefix: str) -> str:
    return f"{state_folder.FOLDER}/{FOLDER}/{prefix}.json"


def keep(store: int, new: Mapping[str, Hashed]) -> None:
    """Keep what was found out, on the disk, where the lock for acting is held. Raises OSError."""
    by_prefix: dict[str, dict[str, Hashed]] = {}
    for name, each in new.items():
        if prefix := _prefix_of(name):
            by_prefix.setdefault(prefix, {})[name] = each
    contents: dict[str, bytes] = {}
    damaged: list[str] = []
    for prefix, more in by_prefix.items():
        file = _FILES[prefix]
        shard, lost = file.load(store)
        try:
            known = shard.all()
        except (ValueError, TypeError) as error:
            known, lost = {}, str(error)
        if lost:
            damaged.append(file.name)
        if more.items() - known.items():
            after = Shard({}, {})
            for name, (*row, sha256, boot, wrong) in {**known, **more}.items():
                if name == names.blob(sha256):
                    after.right.setdefault(boot, {})[sha256] = row
                else:
                    after.others[name] = [*row, sha256, boot, wrong]
            contents[file.name] = file.to_bytes(after)
    with state_folder.made(store, FOLDER) as folder:
        for name in damaged:
            fs.set_aside(name, folder)
        fs.save_all(contents, folder)

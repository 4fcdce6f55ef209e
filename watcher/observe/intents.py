"""The intents that a kill has left: what each holds, and whether it is to be believed.

Whoever may write to the store can put one there, so it is input: it is believed only whole. What is
not believed is *foreign*, reported and never changed.
"""

import contextlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import orjson

from watcher.model import ActionKind, Entry, Kind, Part, Unseen
from watcher.observe import scan
from watcher.ollama import names, sidecars
from watcher.ollama.names import Role
from watcher.state import checks, folders, fs, state_folder, transfers

INTENTS = "intents"
NOTE = "intent.json"
NEW = "new"
GUARD = "guard"
OUT = "out"
DECIDED = "decided"
COPY = "copy"  #: the copy of a sidecar while it is made, on file systems without hard links

_SCHEMA = "ollama-watch/intent/3"
READ_LIMIT = 64 << 20  #: what is larger is not read: no file of an intent that we write is
#: So many files one change may be about; each takes 380 bytes at most, with its new content.
MOST_FILES = 170_000

_NUMBER = re.compile(r"[0-9]{8,11}")
#: What an act on single files may take, by the verb.
_SINGLE = {
    ActionKind.REMOVE_ORPHAN: {Role.BLOB},
    ActionKind.REMOVE_TEMPORARY: {Role.UPLOAD, Role.CREATE},
    ActionKind.QUARANTINE_BLOB: {Role.BLOB},
    ActionKind.FETCH_CHUNKS: {Role.BLOB},
    ActionKind.REMOVE_DOWNLOAD: {Role.TRANSFER},
}
_DAMAGED = frozenset({ActionKind.QUARANTINE_BLOB, ActionKind.FETCH_CHUNKS})
_OF_ONE = frozenset({ActionKind.REMOVE_DOWNLOAD, ActionKind.FETCH_CHUNKS})
#: What writes progress files; and all that an act on a download in parts does.
WRITING = frozenset({ActionKind.WRITE_SIDECARS, ActionKind.GIVE_BACK})
IN_PARTS = WRITING | {ActionKind.TAKE_OVER, ActionKind.REMOVE_DOWNLOAD, ActionKind.REMOVE_SURPLUS}


class ForeignError(Exception):
    """An intent is not to be believed, and why."""


class Folder(NamedTuple):
    """What identifies a ``blobs`` folder."""

    boot: str
    device: int  #: maybe another one after a restart: then one of the last two stands in for it
    inode: int
    born_ns: int
    file_system: int

    def is_same(self, now: Self, *, loose: bool) -> bool:
        """Whether this, of an intent, is `now`; `loose`: inodes get other numbers here."""
        if not loose and self.inode != now.inode:
            return False
        if self.boot and self.boot == now.boot:
            return self.device == now.device
        if self.born_ns or now.born_ns:
            return self.born_ns == now.born_ns
        return self.file_system == now.file_system


class File(NamedTuple):
    """A file under ``blobs/`` as the act was planned on it."""

    name: str
    kind: Kind
    size: int
    mtime_ns: int
    inode: int
    taken: bool  #: it goes

    @classmethod
    def of(cls, entry: Entry, taken: bool) -> Self:
        return cls(entry.name, entry.kind, entry.size, entry.mtime_ns, entry.inode, taken)


class Intent(NamedTuple):
    kind: ActionKind
    digest: str  #: the download that it is about; "" where it is about single files
    place: Folder
    guard: int | None  #: the inode of its guard; None for single files
    files: Mapping[str, File]
    writes: Mapping[str, bytes]
    displaced: str = ""  #: hash of the sidecar that the guard stands in for; "": there was none
    loose: bool = False  #: files are compared by size, time and content

    @property
    def guard_name(self) -> str:
        return names.sidecar(self.digest, 0)

    @property
    def data(self) -> File | None:
        return self.files.get(names.data(self.digest))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts whose sidecars are written, by offset."""
        parts = map(sidecars.parse, self.writes.values())
        return tuple(sorted(parts, key=lambda each: each.offset))

    def is_guard(self, found: Entry | None) -> bool:
        """Whether that is the guard, as nobody has written to it."""
        if found is None or found.kind is not Kind.FILE or found.size:
            return False
        return self.loose or found.inode == self.guard

    def is_file(self, found: Entry | None, name: str) -> bool:
        """Whether it is the file of this name from the plan, even if it was written to since."""
        known = self.files.get(name)
        if found is None or known is None or found.kind is not known.kind:
            return False
        if self.loose:
            return (found.size, found.mtime_ns) == (known.size, known.mtime_ns)
        return found.inode == known.inode


def folder_of(blobs: int, boot: str) -> Folder:
    status, born_ns = os.fstat(blobs), fs.born(".", blobs)
    return Folder(boot, status.st_dev, status.st_ino, born_ns, os.fstatvfs(blobs).f_fsid)


def encode(intent: Intent) -> bytes:
    note = {
        "schema": _SCHEMA,
        "verb": intent.kind.value,
        "digest": intent.digest,
        "blobs": intent.place._asdict(),
        "guard": intent.guard,
        "displaced": intent.displaced,
        "loose": intent.loose,
        "writes": {name: content.decode() for name, content in intent.writes.items()},
        "files": [
            [os.fsencode(each.name).decode("latin-1"), each.kind.value, *each[2:]]
            for each in intent.files.values()
        ],
    }
    return orjson.dumps(note, option=orjson.OPT_APPEND_NEWLINE)


def is_number(name: str) -> bool:
    return _NUMBER.fullmatch(name) is not None


def numbers(intents: int) -> list[str]:
    """The names of intents, the oldest first; what has another name is none of ours."""
    return sorted(filter(is_number, os.listdir(intents)))


def read(name: str, intents: int, now: Folder) -> Intent | None:
    """An intent about the `blobs` of `now`; None: nothing begun. Raises ForeignError, OSError."""
    above = os.fstat(intents)
    try:
        with fs.opened_folder(name, intents) as here:
            _check_owner(os.fstat(here), above)
            _check_names(here)
            decided = _small(DECIDED, here, above)
            if decided:
                raise ForeignError(f"{DECIDED} has something in it")
            try:
                value = orjson.loads(_small(NOTE, here, above) or b"")
            except orjson.JSONDecodeError:
                # A kill while it was written: nothing has changed by then, nothing is believed.
                _check_unbegun(here, decided=decided is not None)
                return None
            if not isinstance(value, dict) or value.get("schema") != _SCHEMA:
                raise ForeignError(f"{NOTE} is of no version that is known here")
            intent = _intent(value)
            _check_folders(here, intent)
    except NotADirectoryError:
        raise ForeignError("it is no folder") from None
    if not intent.place.is_same(now, loose=intent.loose):
        raise ForeignError("it was begun in another blobs folder than the one that is there now")
    return intent


def _check_owner(status: os.stat_result, above: os.stat_result) -> None:
    if not fs.is_trusted(status, above):
        raise ForeignError(f"it belongs to the user id {status.st_uid}")


def _check_names(here: int) -> None:
    known = {NOTE, NEW, GUARD, OUT, DECIDED, COPY}
    for name in _listed(here):
        if name not in known:
            raise ForeignError(f"{names.printable(name)} is nothing that an intent has")
        found = scan.look(name, here)
        wanted = Kind.FOLDER if name in (NEW, OUT) else Kind.FILE
        if found is not None and found.kind is not wanted:
            raise ForeignError(f"{name} is {found.kind.words}")


def _listed(folder: int) -> Iterator[str]:
    """The names in a folder, one by one: there may be more of them than there is memory for."""
    with os.scandir(folder) as listing:
        for item in listing:
            yield item.name


def _in(name: str, here: int) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(FileNotFoundError), fs.opened_folder(name, here) as folder:
        for each in _listed(folder):
            yield each, folder


def _small(name: str, here: int, above: os.stat_result) -> bytes | None:
    try:
        fd = fs.open_to_read(name, here)
    except FileNotFoundError:
        return None
    with fs.closing(fd):
        status = os.fstat(fd)
        _check_owner(status, above)
        if status.st_size > READ_LIMIT:
            raise ForeignError(f"{name} has {status.st_size:,} bytes, more than any intent")
        return fs.read_open(fd, READ_LIMIT)


def _check_unbegun(here: int, *, decided: bool) -> None:
    """A kill before ``intent.json`` was whole, or at the very end, has nothing in ``out/``."""
    for name, _ in _in(OUT, here):
        raise ForeignError(f"{names.printable(name)} is in {OUT}/, and no {NOTE} says why")
    for name, _ in _in(NEW, here):
        ours = name == transfers.LEDGER or names.parse_blob(name).role is Role.SIDECAR
        if decided or not ours:
            raise ForeignError(f"{names.printable(name)} is in {NEW}/, and no {NOTE} says why")


def _check_folders(here: int, intent: Intent) -> None:
    for name, folder in _in(NEW, here):
        content, found = intent.writes.get(name), scan.look(name, folder)
        plain = found is not None and found.kind is Kind.FILE and found.links == 1
        if not plain or content is None or content != fs.read_small(name, folder, len(content) + 1):
            raise ForeignError(f"{names.printable(name)} in {NEW}/ is not what it says")
    for name, folder in _in(OUT, here):
        found, known = scan.look(name, folder), intent.files.get(name)
        good = known is not None and intent.is_file(found, name)
        if name != intent.guard_name or intent.guard is None:
            good = good and known is not None and known.taken
        elif known is not None and found is not None:
            # The sidecar that the guard stands in for, or a copy of it.
            alike = (found.kind, found.size) == (known.kind, known.size)
            good = alike and (good or hash_of(name, folder) == intent.displaced != "")
        if found is not None and not good:
            raise ForeignError(f"{names.printable(name)} in {OUT}/ is not what it says")


def hash_of(name: str, folder: int) -> str:
    """The hash of a sidecar's bytes; "" where it is too large for one."""
    import hashlib  # it loads OpenSSL, and usually there is no intent

    raw = fs.read_small(name, folder, sidecars.READ_LIMIT + 1)
    return hashlib.sha256(raw).hexdigest() if len(raw) <= sidecars.READ_LIMIT else ""


def _intent(value: Mapping[str, Any]) -> Intent:
    try:
        boot, *rest = (value["blobs"][name] for name in Folder._fields)
        intent = Intent(
            kind=ActionKind(value["verb"]),
            digest=checks.text(value["digest"]),
            place=Folder(checks.text(boot), *map(checks.identity, rest)),
            guard=None if value["guard"] is None else checks.identity(value["guard"]),
            files={each.name: each for each in map(_file, value["files"])},
            writes={name: checks.text(text).encode() for name, text in value["writes"].items()},
            displaced=checks.text(value["displaced"]),
            loose=value["loose"] is True,
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ForeignError(f"{NOTE} is not as any of ours is") from None
    usual = frozenset(Kind) if intent.kind in _DAMAGED else {Kind.FILE}  # whatever lies there
    if any(each.kind not in usual for each in intent.files.values()):
        raise ForeignError("it is about what is no file")
    if intent.digest:
        _check_in_parts(intent)
    else:
        roles = _SINGLE.get(intent.kind)
        more = intent.kind in _OF_ONE and len(intent.files) != 1
        if roles is None or more or intent.writes or intent.guard is not None:
            raise ForeignError(f"no {intent.kind.value} is as this one")
        _check_all(intent.files, roles)
    return intent


def _row(name: str, *rest: Any) -> File:
    return File(os.fsdecode(name.encode("latin-1")), *rest)


_file = checks.row(
    _row, checks.text, Kind, checks.whole, checks.nanoseconds, checks.identity, checks.flag
)


def _check_in_parts(intent: Intent) -> None:
    """A change of a download has its own names in it, and no others."""
    right = intent.kind in IN_PARTS and intent.guard is not None
    writes = intent.kind in WRITING or intent.kind is ActionKind.TAKE_OVER
    if not right or not names.is_blob(names.blob(intent.digest)) or writes != bool(intent.writes):
        raise ForeignError(f"no {intent.kind.value} is as this one")
    _check_all(intent.files, {Role.DATA, Role.SIDECAR}, intent.digest)
    if intent.kind is ActionKind.TAKE_OVER:
        _check_ledger(intent)
        return
    _check_all(intent.writes, {Role.SIDECAR}, intent.digest)
    if not writes:
        return
    if intent.data is not None and intent.data.taken:
        raise ForeignError("a repair takes no data")
    # Sidecars to the letter as we write them, that together are a partition.
    at = 0
    try:
        parts = intent.parts
    except ValueError:
        raise ForeignError("it writes what is no sidecar") from None
    for part in parts:
        exact = intent.writes.get(names.sidecar(intent.digest, part.number)) == sidecars.write(part)
        if not exact or part.offset != at or sidecars.part_fault(part.number, part):
            raise ForeignError("it writes sidecars that are no set")
        at = part.end


def _check_ledger(intent: Intent) -> None:
    """What is taken over takes the data, and writes a ledger of it and nothing else."""
    raw, data = intent.writes.get(transfers.LEDGER), intent.data
    if raw is not None and len(intent.writes) == 1 and data is not None and data.taken:
        with contextlib.suppress(ValueError):
            transfers.parsed(raw, intent.digest, data.size)
            return
    raise ForeignError("it writes what is no ledger of its data")


def _check_all(wanted: Iterable[str], roles: Collection[Role], digest: str = "") -> None:
    for name in wanted:
        parsed = names.parse_blob(name)
        path = "/" in name or "\0" in name
        if path or parsed.role not in roles or (digest and parsed.digest != digest):
            raise ForeignError(f"it is about {names.printable(name)[:100]}")


def foreign(store: int, boot: str) -> tuple[Unseen, ...]:
    found: list[Unseen] = []
    with (
        contextlib.suppress(OSError),
        state_folder.opened(store, INTENTS) as intents,
        folders.opened_blobs(store, foreign_too=True) as blobs,
    ):
        now = folder_of(blobs, boot)
        for name in numbers(intents):
            # Somebody may be at work on it: then the second time it has another reason, or none.
            why = _why_foreign(name, intents, now)
            if why and why == _why_foreign(name, intents, now):
                found.append(Unseen(f"{state_folder.FOLDER}/{INTENTS}/{name}", why))
    return tuple(found)


def _why_foreign(name: str, intents: int, now: Folder) -> str:
    try:
        read(name, intents, now)
    except ForeignError as error:
        return str(error)
    except OSError:
        pass
    return ""

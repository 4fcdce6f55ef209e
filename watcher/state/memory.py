"""``state.json``: what is remembered of a store from one look to the next.

Saved atomically and durably. A damaged file is set aside, one that can't be read is not written
over; everything goes on without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import orjson

from watcher.model import HOUR, Ahead, Clock, Condition, Entry, Part, Ranges, Reads, Shift
from watcher.ollama import names
from watcher.state import checks, fs, hashes, json_file, state_folder
from watcher.state.hashes import LONGEST_BOOT, Hashes, hashed

SCHEMA = "ollama-watch/state/1"
FOLDER = state_folder.FOLDER
NAME = "state.json"
#: In place of a start's id, which none is: the data has to be looked through in any case.
REFUSED = "refused"
_LONGEST_KEY = 68
#: Of a line that tells an event.
_LONGEST_LINE = 1 << 24
#: No more settings of the clock are believed to be in there.
_MOST_SHIFTS = 8
_READ_LIMIT = 256 * 1024 * 1024


class Sample(NamedTuple):
    """So many bytes were on the disk at an instant."""

    at: float
    allocated: int


@dataclass(frozen=True, slots=True)
class Remembered:
    """One download as it was last seen."""

    device: int
    inode: int
    #: Birth time of the data file, ns since the epoch; 0 where the file system has none. ext4 gives
    #: an inode to the next file at once, so inode and digest alone don't tell a file.
    born_ns: int
    #: As it was last told.
    condition: Condition
    stale: bool
    #: A pull of it was told, and its end was not yet.
    pulling: bool
    #: True length in bytes, where it was known.
    total: int | None
    #: Claimed bytes, and those that the data file has on the disk: they grow when bytes arrive.
    claimed: int
    allocated: int
    #: When bytes last arrived, seconds since the epoch.
    progress_at: float
    models: tuple[str, ...] = ()
    #: The parts last seen as a sound set, or written by us: they stand in for lost sidecars.
    partition: tuple[Part, ...] = ()
    #: Bytes that are there and must not be believed, until a part of the server's covers them.
    doubted: Ranges = ()
    #: Its sidecars were written by us: the finished blob is unproven until it was hashed.
    mended: bool = False
    #: When it was last repaired, zero blocks looked for; seconds since the epoch.
    checked_at: float = 0.0
    #: While it is pulled: the last few instants at which it was looked at, and the bytes on the
    #: disk then.
    samples: tuple[Sample, ...] = ()
    #: When its progress was told last, and whether it was told that none comes.
    told_at: float = 0.0
    stalled: bool = False
    ahead: Ahead | None = None
    #: The note: the start of the machine in which claims of ours were written that the disk may not
    #: have the data of; "" where it has, and `REFUSED` where it may have lost some.
    unsynced: str = ""
    #: Bytes that the disk has refused to take, though memory may still show them.
    lost: Ranges = ()
    #: What was read of the data by the last scan: what has not changed is not read again.
    reads: Reads | None = None

    def is_of(self, device: int, inode: int, born_ns: int) -> bool:
        """Whether this is remembered of the file with these three.

        A device may have another number after a restart, so where births are known they count.
        """
        if (self.inode, self.born_ns) != (inode, born_ns):
            return False
        return born_ns != 0 or self.device == device


class Touched(NamedTuple):
    """A file whose times were set by us: its inode, the time that we set, and its own one (ns)."""

    inode: int
    set_ns: int
    own_ns: int


class Asked(NamedTuple):
    """What a registry said of a digest: its bytes (None: nothing), and when."""

    length: int | None
    at: float
    #: Why a length that it said is not believed, or it said none.
    why: str = ""

    def counts(self, now: float) -> bool:
        """Whether it is an answer still: for an hour, and not from a clock that was wrong."""
        return 0 <= now - self.at < HOUR


@dataclass(frozen=True, slots=True)
class Memory:
    """All that is remembered of one store."""

    downloads: Mapping[str, Remembered] = field(default_factory=dict)
    #: By file name under ``blobs/``.
    touched: Mapping[str, Touched] = field(default_factory=dict)
    hashes: Hashes = field(default_factory=Hashes)
    #: By digest.
    asked: Mapping[str, Asked] = field(default_factory=dict)
    #: Digests of blobs that were finished on sidecars of ours and not hashed since.
    unproven: frozenset[str] = frozenset()
    #: The models that had a manifest at the last full look, with their manifest's inode and time;
    #: None before the first one.
    models: Mapping[str, tuple[int, int]] | None = None
    #: Findings that were told and still hold, by kind and path.
    problems: frozenset[tuple[str, str]] = frozenset()
    #: When the whole store was looked at last.
    looked_at: float = 0.0
    #: The clocks then, or when one had last jumped.
    clock: Clock | None = None
    #: How often hashes were written: a memory from before knows less.
    hashed: int = 0
    #: Lines of events that tell how this differs from what was remembered before: on the disk with
    #: it, so that a kill before they are in the log loses none, and tells none twice.
    untold: tuple[bytes, ...] = field(default=(), compare=False)
    #: The file that `models` and `problems` are in; "" for none.
    seen_in: str = field(default="", compare=False)
    #: Why the file's content could not be used, if so; told once, and set aside.
    lost: str = ""
    #: Why the file could not even be read: then it must not be written either.
    unreadable: str = ""


#: Models with their manifest's inode and time, and findings, as in `Memory`.
Seen: TypeAlias = tuple[Mapping[str, tuple[int, int]] | None, frozenset[tuple[str, str]]]


def bound_to(found: Entry) -> int:
    """The time that a remembered hash is bound to, ns.

    Of a blob the one that nobody can set; of partial data its own modification time, since a
    repair sets times.
    """
    if found.own_mtime_ns is None and names.is_blob(found.name):
        return found.ctime_ns
    return found.mtime_ns if found.own_mtime_ns is None else found.own_mtime_ns


def load(store: int) -> Memory:
    """Read the memory of the store behind a descriptor. Never raises for what is in the file."""
    try:
        found, lost = _FILE.load(store)
    except OSError as error:
        return Memory(unreadable=f"{FOLDER}/{NAME} can't be read: {error.strerror}")
    if lost:
        return Memory(lost=lost)
    if not found.seen_in:
        return found
    models, problems = _seen(store, found.seen_in)
    return replace(found, models=models, problems=problems)


def let_go() -> None:
    """Keep nothing of what was read last: the next text is another one."""
    _decode.cache_clear()
    _decode_seen.cache_clear()


def save(store: int, memory: Memory) -> Memory:
    """Write the memory and give it back as it is on the disk.

    For whoever holds the lock for acting. A damaged file is set aside. Raises OSError.
    """
    if memory.hashes.new:
        # Before the memory: it may say that nothing is left to be hashed.
        hashes.keep(store, memory.hashes.new)
        memory = replace(memory, hashes=Hashes(), hashed=memory.hashed + 1)
    with state_folder.made(store) as folder:
        seen = _encode_seen(memory)
        memory = replace(memory, seen_in=_seen_name(seen) if seen else "")
        if seen and _read_seen(memory.seen_in, folder) != seen:
            fs.save(memory.seen_in, folder, seen)
        _FILE.write(store, memory, memory.lost)
        for name in os.listdir(folder):
            if _SEEN.fullmatch(name) and name != memory.seen_in:
                with contextlib.suppress(OSError):
                    fs.remove(name, folder)
    return replace(memory, lost="")


# ---------------------------------------------------------------- what a full look has seen

#: Models and problems grow with the store and seldom change. The name tells the content, and the
#: memory names it: both are of the same look, whenever a kill comes.
_SEEN = re.compile(r"seen-[0-9a-f]{16}\.json")
_SEEN_SCHEMA = "ollama-watch/seen/1"


def _seen_name(raw: bytes) -> str:
    return f"seen-{hashlib.sha256(raw).hexdigest()[:16]}.json"


def _read_seen(name: str, folder: int) -> bytes:
    """The bytes of such a file; none where it is not there, or can't be used."""
    try:
        raw = fs.read_ours(name, folder, _READ_LIMIT)
    except OSError:
        return b""
    return raw if _seen_name(raw) == name else b""


def _seen(store: int, name: str) -> Seen:
    """What the last full look has seen; as before the first one where that is lost."""
    try:
        with state_folder.opened(store) as folder:
            return _decode_seen(_read_seen(name, folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, json_file.DamagedError):
        return None, frozenset()


def _encode_seen(memory: Memory) -> bytes:
    if memory.models is None and not memory.problems:
        return b""
    models = memory.models
    document = {
        "schema": _SEEN_SCHEMA,
        "models": models if models is None else {key: list(each) for key, each in models.items()},
        "problems": sorted([kind, names.exact(path)] for kind, path in memory.problems),
    }
    return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)


@lru_cache(maxsize=1)
def _decode_seen(raw: bytes) -> Seen:
    return _seen_of(json_file.document(raw, _SEEN_SCHEMA))


def _seen_of(document: Mapping[str, Any]) -> Seen:
    models = document["models"]
    return (
        models if models is None else {name: _manifest(*each) for name, each in models.items()},
        frozenset(
            (checks.text(kind), names.from_exact(checks.text(path)))
            for kind, path in document["problems"]
        ),
    )


# ---------------------------------------------------------------- the file


def _encode(memory: Memory) -> bytes:
    document = {
        "schema": SCHEMA,
        "downloads": {
            digest: {
                "device": record.device,
                "inode": record.inode,
                "born_ns": record.born_ns,
                "condition": record.condition.value,
                "stale": record.stale,
                "pulling": record.pulling,
                "total_bytes": record.total,
                "claimed_bytes": record.claimed,
                "allocated_bytes": record.allocated,
                "progress_at": record.progress_at,
                "models": list(record.models),
                "partition": [list(part) for part in record.partition],
                "doubted": [list(each) for each in record.doubted],
                "mended": record.mended,
                "checked_at": record.checked_at,
                "samples": [list(each) for each in record.samples],
                "told_at": record.told_at,
                "stalled": record.stalled,
                "ahead": record.ahead and list(record.ahead),
                "unsynced": record.unsynced,
                "lost": [list(each) for each in record.lost],
                "reads": record.reads and list(record.reads),
            }
            for digest, record in memory.downloads.items()
        },
        "touched": {names.exact(name): list(each) for name, each in memory.touched.items()},
        "asked": {digest: list(each) for digest, each in memory.asked.items()},
        "unproven": sorted(memory.unproven),
        "looked_at": memory.looked_at,
        "clock": _clock_document(memory.clock),
        "hashed": memory.hashed,
        "seen_in": memory.seen_in,
        "untold": [line.decode() for line in memory.untold],
        # Where an earlier version has them: it goes on without.
        "hashes": {},
        "models": None,
        "problems": [],
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _key(name: object) -> str:
    text = checks.text(name, _LONGEST_KEY)
    checks.digest(text.removesuffix(".tmp"))
    return text


def _ahead(latest: object, seen_at: object, boot: object) -> Ahead:
    return Ahead(checks.seconds(latest), checks.seconds(seen_at), checks.text(boot, LONGEST_BOOT))


def _reads(size: object, changed_ns: object, boot: object, answers: object) -> Reads:
    return Reads(
        checks.whole(size),
        checks.nanoseconds(changed_ns),
        checks.text(boot, LONGEST_BOOT),
        checks.text(answers),
    )


def _clock(known: Mapping[str, Any] | None) -> Clock | None:
    if not known:
        return None
    times = ("wall", "counted", "certain", "held", "begun", "jump")
    return Clock(
        boot=checks.text(known["boot"], LONGEST_BOOT),
        **{name: checks.seconds(known[name]) for name in times},
        jumped=checks.flag(known["jumped"]),
        shifts=tuple(Shift(*map(checks.seconds, each)) for each in known["shifts"][:_MOST_SHIFTS]),
    )


def _clock_document(clock: Clock | None) -> dict[str, object] | None:
    if clock is None:
        return None
    return {**clock._asdict(), "shifts": [list(shift) for shift in clock.shifts]}


def _part(numbers: Iterable[object]) -> Part:
    number, offset, size, completed = map(checks.size, numbers)
    if completed > size:
        raise ValueError("an impossible part")
    return Part(number, offset, size, completed)


def _remembered(each: Mapping[str, Any]) -> Remembered:
    return Remembered(
        device=checks.identity(each["device"]),
        inode=checks.identity(each["inode"]),
        born_ns=checks.nanoseconds(each["born_ns"]),
        condition=Condition(each["condition"]),
        stale=checks.flag(each["stale"]),
        pulling=checks.flag(each["pulling"]),
        total=None if each["total_bytes"] is None else checks.size(each["total_bytes"]),
        claimed=checks.whole(each["claimed_bytes"]),
        allocated=checks.whole(each["allocated_bytes"]),
        progress_at=checks.seconds(each["progress_at"]),
        models=tuple(map(checks.text, each["models"])),
        partition=tuple(map(_part, each["partition"])),
        doubted=checks.byte_ranges(each["doubted"]),
        mended=checks.flag(each["mended"]),
        checked_at=checks.seconds(each["checked_at"]),
        samples=tuple(Sample(checks.seconds(at), checks.whole(n)) for at, n in each["samples"]),
        told_at=checks.seconds(each["told_at"]),
        stalled=checks.flag(each["stalled"]),
        ahead=_ahead(*each["ahead"]) if each.get("ahead") else None,
        unsynced=checks.text(each.get("unsynced", ""), LONGEST_BOOT),
        lost=checks.byte_ranges(each.get("lost", ())),
        reads=_reads(*each["reads"]) if each.get("reads") else None,
    )


def _exact_name(name: object) -> str:
    return checks.file_name(names.from_exact(checks.text(name)))


def _touched(inode: object, set_ns: object, own_ns: object) -> Touched:
    return Touched(checks.identity(inode), checks.nanoseconds(set_ns), checks.nanoseconds(own_ns))


def _asked(length: object, at: object, why: object = "") -> Asked:
    size = None if length is None else checks.size(length)
    return Asked(size, checks.seconds(at), checks.text(why))


def _manifest(inode: object, changed_ns: object) -> tuple[int, int]:
    return checks.identity(inode), checks.nanoseconds(changed_ns)


@lru_cache(maxsize=1)
def _decode(raw: bytes) -> Memory:
    """Made sense of once for who reads the same text again: a cycle does, under the lock."""
    document = json_file.document(raw, SCHEMA)
    models, problems = _seen_of(document)
    seen_in = checks.text(document.get("seen_in", ""))
    if seen_in and not _SEEN.fullmatch(seen_in):
        raise ValueError("no name of what was seen")
    old = {checks.file_name(name): hashed(*each) for name, each in document["hashes"].items()}
    return Memory(
        {_key(digest): _remembered(each) for digest, each in document["downloads"].items()},
        {_exact_name(name): _touched(*each) for name, each in document["touched"].items()},
        Hashes(old),
        {_key(digest): _asked(*each) for digest, each in document["asked"].items()},
        frozenset(map(_key, document["unproven"])),
        models,
        problems,
        checks.seconds(document["looked_at"]),
        _clock(document.get("clock")),
        checks.whole(document.get("hashed", 0)),
        tuple(checks.text(line, _LONGEST_LINE).encode() for line in document.get("untold", ())),
        seen_in,
    )


class _File(json_file.File[Memory]):
    limit = _READ_LIMIT

    def decode(self, raw: bytes) -> Memory:
        return _decode(raw)

    def encode(self, value: Memory) -> bytes:
        return _encode(value)


_FILE = _File(NAME, Memory())

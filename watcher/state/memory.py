"""``state.json``: what is remembered of a store from one scan to the next.

Saved atomically and durably. A damaged file is set aside, one that can't be read is not written
over; everything goes on without it.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import orjson

from watcher import model
from watcher.ollama import names
from watcher.state import checks, fs, hashes, json_file, state_folder
from watcher.state.checks import kept, optional, row
from watcher.state.hashes import Hashes

T = TypeVar("T")
SCHEMA = "ollama-watch/state/1"
FOLDER = state_folder.FOLDER
NAME = "state.json"
REFUSED = "refused"  #: no id of a start: the data has to be looked through in any case
_LONGEST_LINE = 1 << 24  #: of a line of an event
_MOST_SHIFTS = 8  #: no more are believed to be in there
_MOST_MACHINES = 8
_READ_LIMIT = 256 * 1024 * 1024


class Sample(NamedTuple):
    """So many bytes were on the disk at an instant."""

    at: float
    allocated: int


def _part(values: list[object]) -> model.Part:
    part = row(model.Part, *[checks.size] * 4)(values)
    if part.completed > part.size:
        raise ValueError("an impossible part")
    return part


def _several(check: Callable[[Any], T]) -> Callable[[Any], tuple[T, ...]]:
    return lambda values: tuple(map(check, values))


_sample = row(Sample, checks.seconds, checks.whole)
_ahead = row(model.Ahead, checks.seconds, checks.seconds, checks.boot)
_reads = row(model.Reads, checks.whole, checks.nanoseconds, checks.boot, checks.text)


@dataclass(frozen=True, slots=True)
class Remembered:
    """One download as it was last seen; `docs/reference/state-files.md` explains the fields."""

    device: int = kept(checks.identity)
    inode: int = kept(checks.identity)
    #: Birth time, ns since the epoch, or 0: ext4 gives a file's inode to the next file at once.
    born_ns: int = kept(checks.nanoseconds)
    condition: model.Condition = kept(model.Condition)
    stale: bool = kept(checks.flag)
    pulling: bool = kept(checks.flag)
    total: int | None = kept(optional(checks.size), "total_bytes")
    #: Claimed bytes, and those that the data file has on the disk: they grow when bytes arrive.
    claimed: int = kept(checks.whole, "claimed_bytes")
    allocated: int = kept(checks.whole, "allocated_bytes")
    progress_at: float = kept(checks.seconds)
    models: tuple[str, ...] = kept(_several(checks.text), default=())
    partition: tuple[model.Part, ...] = kept(_several(_part), default=())
    doubted: model.Ranges = kept(checks.byte_ranges, default=())  #: until a server's part has them
    mended: bool = kept(checks.flag, default=False)
    checked_at: float = kept(checks.seconds, default=0.0)
    samples: tuple[Sample, ...] = kept(_several(_sample), default=())
    told_at: float = kept(checks.seconds, default=0.0)
    stalled: bool = kept(checks.flag, default=False)
    ahead: model.Ahead | None = kept(optional(_ahead), later=True, default=None)
    #: The id of a start of the machine; "" for no note, and `REFUSED` where bytes may be lost.
    unsynced: str = kept(checks.boot, later=True, default="")
    lost: model.Ranges = kept(checks.byte_ranges, later=True, default=())
    reads: model.Reads | None = kept(optional(_reads), later=True, default=None)

    def is_of(self, device: int, inode: int, born_ns: int) -> bool:
        """Whether it is the same file; a device may have another number after a restart."""
        if (self.inode, self.born_ns) != (inode, born_ns):
            return False
        return born_ns != 0 or self.device == device


class Touched(NamedTuple):
    """A file whose times were set by us: its inode, the time that we set, and its own one (ns)."""

    inode: int
    set_ns: int
    own_ns: int


_touched = row(Touched, checks.identity, checks.nanoseconds, checks.nanoseconds)


class Asked(NamedTuple):
    """What a registry answered about a digest: its bytes (None: nothing), and when."""

    length: int | None
    at: float
    why: str = ""  #: why the length that it gave is not believed, or it gave none

    def counts(self, now: float) -> bool:
        """Whether it is an answer still: for an hour, and not from a clock that was wrong."""
        return 0 <= now - self.at < model.HOUR


_asked = row(Asked, optional(checks.size), checks.seconds, checks.text)


_proven = row(
    model.Proven,
    checks.identity,
    checks.whole,
    checks.nanoseconds,
    checks.boot,
    checks.byte_ranges,
    checks.byte_ranges,
)


@dataclass(frozen=True, slots=True)
class Memory:
    """All that is remembered of one store; `docs/reference/state-files.md` explains the fields."""

    downloads: Mapping[str, Remembered] = field(default_factory=dict)
    touched: Mapping[str, Touched] = field(default_factory=dict)  #: by file name under ``blobs/``
    hashes: Hashes = field(default_factory=Hashes)
    asked: Mapping[str, Asked] = field(default_factory=dict)  #: by digest
    proven: Mapping[str, model.Proven] = field(default_factory=dict)  #: by digest
    unproven: frozenset[str] = frozenset()
    models: Mapping[str, tuple[int, int]] | None = None  #: None before the first full scan
    problems: frozenset[tuple[str, str]] = frozenset()  #: by kind and path
    looked_at: float = 0.0
    clocks: tuple[model.Clock, ...] = ()  #: of each machine; that of the last scan is last
    hashed: int = 0
    untold: tuple[bytes, ...] = field(default=(), compare=False)
    seen_in: str = field(default="", compare=False)  #: has the last two; "" for none
    lost: str = ""  #: why the file's content could not be used, if so; reported once, and set aside
    unreadable: str = ""  #: why the file could not even be read: then it must not be written either


def bound_to(found: model.Entry) -> int:
    """The time that a hash is bound to, ns: of a blob one that nobody can set, bound anew by us."""
    if names.is_blob(found.name):
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
    try:
        with state_folder.opened(store) as folder:
            models, problems = _decode_seen(_read_seen(found.seen_in, folder))
    except (OSError, *json_file.NO_SENSE):
        models, problems = None, frozenset()  # as before the first full scan
    return replace(found, models=models, problems=problems)


def let_go() -> None:
    _FILE.let_go()
    _decode_seen.cache_clear()


def save(store: int, memory: Memory) -> Memory:
    """Write the memory under the lock for acting: as it is on the disk then. Raises OSError."""
    if memory.hashes.new:
        # Before the memory: it may record that nothing is left to be hashed.
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


#: Models and problems grow with the store and seldom change. The name identifies the content, and
#: the memory names it: both are of the same scan, whenever a kill comes.
_SEEN = re.compile(r"seen-[0-9a-f]{16}\.json")
_SEEN_SCHEMA = "ollama-watch/seen/1"


def _seen_name(raw: bytes) -> str:
    return f"seen-{hashlib.sha256(raw).hexdigest()[:16]}.json"


def _read_seen(name: str, folder: int) -> bytes:
    with contextlib.suppress(OSError):
        raw = fs.read_ours(name, folder, _READ_LIMIT)
        return raw if _seen_name(raw) == name else b""
    return b""


def _encode_seen(memory: Memory) -> bytes:
    if memory.models is None and not memory.problems:
        return b""
    problems = sorted([kind, names.exact(path)] for kind, path in memory.problems)
    models = memory.models if memory.models is None else dict(memory.models)
    document = {"schema": _SEEN_SCHEMA, "models": models, "problems": problems}
    return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)


#: Models with their manifest's inode and time, and findings, as in `Memory`.
Seen: TypeAlias = tuple[Mapping[str, tuple[int, int]] | None, frozenset[tuple[str, str]]]


@lru_cache(maxsize=1)
def _decode_seen(raw: bytes) -> Seen:
    document = json_file.document(raw, _SEEN_SCHEMA)
    models = document["models"]
    if models is not None:
        models = {name: _manifest(each) for name, each in models.items()}
    return models, frozenset(map(_problem, document["problems"]))


def _exact(name: object) -> str:
    return names.from_exact(checks.text(name))


_line = partial(checks.text, longest=_LONGEST_LINE)
_manifest = row(lambda inode, at: (inode, at), checks.identity, checks.nanoseconds)
_problem = row(lambda kind, path: (kind, path), checks.text, _exact)


def _key(name: object) -> str:
    text = checks.text(name, 68)
    checks.digest(model.digest_of(text))
    return text


_shift = row(model.Shift, *[checks.seconds] * 3)
_CLOCK: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("wall", "counted", "certain", "held", "begun", "jump"), checks.seconds),
    "boot": checks.boot,
    "machine": checks.boot,
    "jumped": checks.flag,
    "shifts": lambda rows: tuple(map(_shift, rows[:_MOST_SHIFTS])),
    "unsure": optional(row(model.Unsure, checks.seconds, checks.boot, checks.seconds)),
}


def _clock(known: Mapping[str, Any]) -> model.Clock:
    whole = {"machine": "", "unsure": None, **known}  # which earlier versions don't have
    return model.Clock(**{name: check(whole[name]) for name, check in _CLOCK.items()})


def _of_clock(clock: model.Clock) -> dict[str, object]:
    return {key: value for key, value in clock._asdict().items() if key != "others"}


class _File(json_file.File[Memory]):
    schema = SCHEMA
    limit = _READ_LIMIT
    cached = True  # a run reads the same text again, under the lock
    option = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE

    def decode(self, found: Mapping[str, Any]) -> Memory:
        parts = ("downloads", "touched", "asked")
        downloads, touched, asked = (found[part].items() for part in parts)
        last = [found["clock"]] if found.get("clock") else []
        seen_in = checks.text(found.get("seen_in", ""))
        if seen_in and not _SEEN.fullmatch(seen_in):
            raise ValueError("no name of what was seen")
        return Memory(
            downloads={_key(key): checks.from_keys(Remembered, each) for key, each in downloads},
            touched={checks.file_name(_exact(name)): _touched(each) for name, each in touched},
            asked={_key(digest): _asked(each) for digest, each in asked},
            proven={_key(each): _proven(row) for each, row in found.get("proven", {}).items()},
            unproven=frozenset(map(_key, found["unproven"])),
            looked_at=checks.seconds(found["looked_at"]),
            clocks=tuple(map(_clock, [*found.get("other_clocks", ())[:_MOST_MACHINES], *last])),
            hashed=checks.whole(found.get("hashed", 0)),
            untold=tuple(_line(each).encode() for each in found.get("untold", ())),
            seen_in=seen_in,
        )

    def encode(self, value: Memory) -> Mapping[str, object]:
        return {
            "downloads": {digest: checks.to_keys(each) for digest, each in value.downloads.items()},
            "touched": {names.exact(name): each for name, each in value.touched.items()},
            "asked": dict(value.asked),
            "proven": dict(value.proven),
            "unproven": sorted(value.unproven),
            "looked_at": value.looked_at,
            "clock": _of_clock(value.clocks[-1]) if value.clocks else None,
            "other_clocks": list(map(_of_clock, value.clocks[:-1])),
            "hashed": value.hashed,
            "seen_in": value.seen_in,
            "untold": [line.decode() for line in value.untold],
        }


_FILE = _File(NAME, Memory())

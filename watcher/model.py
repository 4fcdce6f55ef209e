"""The words of the domain, as plain immutable values.

Bytes are integers, instants are seconds since the epoch (float), durations are seconds.
File names are ``str`` as ``os.fsdecode`` gives them (surrogate escapes where they are no UTF-8).
A digest is its 64 hexadecimal digits, spelled as in the file name.
"""

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Self, TypeAlias

from watcher.config import Settings

Ranges: TypeAlias = tuple[tuple[int, int], ...]  #: ``[start, end)``: sorted, disjoint, not touching

MIB = 1 << 20
UNREADABLE = "0" * 64  #: in place of the hash of a file that the disk can't give back as a whole
HOUR = 3600.0
DAY = 24 * HOUR

QUIET_SECONDS = 90.0  #: so long nothing may have changed; see `docs/store.md`
QUIET_UNSEEN_SECONDS = HOUR  #: the same where some process could not be inspected
#: Two scans agree if wall clock and machine have counted alike between them, up to this; a clock
#: that was set is believed once it has agreed for so long.
CLOCK_TOLERANCE_SECONDS = 60.0
CLOCK_SETTLED_SECONDS = 2 * HOUR
LIVE_LOOK_SECONDS = 60.0  #: how often a pull under way is inspected: its bytes make no file events


class Kind(enum.StrEnum):
    """What an entry of a folder is, links not followed."""

    FILE = "file"
    FOLDER = "folder"
    SYMLINK = "symlink"
    OTHER = "other"

    @property
    def words(self) -> str:
        return "a device, a pipe or a socket" if self is Kind.OTHER else f"a {self.value}"


OURS = ".own"  #: what stands behind a digest in the key of a transfer of ours


def digest_of(key: str) -> str:
    """The digest of the download that is remembered by a key."""
    return key.removesuffix(".tmp").removesuffix(OURS)


class Entry(NamedTuple):
    """One name in a folder, as ``lstat`` saw it."""

    name: str
    kind: Kind
    size: int
    allocated: int
    device: int
    inode: int
    links: int
    mtime_ns: int
    ctime_ns: int
    uid: int
    gid: int
    mode: int
    own_mtime_ns: int | None = None  #: where the one on the disk was set by us
    sha256: str | None = None  #: where it was computed and still holds

    @property
    def mtime(self) -> float:
        """Modification time on the disk: the one that the server goes by."""
        return self.mtime_ns / 1e9

    @property
    def changed_at(self) -> float:
        """When its content changed last, whatever times we have set."""
        return (self.mtime_ns if self.own_mtime_ns is None else self.own_mtime_ns) / 1e9

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: what stays the same when the file is renamed."""
        return self.device, self.inode

    @property
    def freed(self) -> int:
        """Bytes that removing this name gives back: none while another hard link stays."""
        return self.allocated if self.links <= 1 else 0


class Part(NamedTuple):
    """A part of a download as its sidecar claims it: ``completed`` bytes from ``offset`` on."""

    number: int
    offset: int
    size: int
    completed: int

    @property
    def starts_at(self) -> int:
        """Where the next attempt writes first."""
        return self.offset + self.completed

    @property
    def end(self) -> int:
        return self.offset + self.size


class Sidecar(NamedTuple):
    """One ``-partial-<N>`` file: its part, or why the server can't use it."""

    entry: Entry
    number: int | None  #: N of the name; None where that is no plain number
    part: Part | None
    fault: str | None


class Holder(NamedTuple):
    """A process that has an entry open."""

    pid: int
    process: str
    entry: str
    writes: bool
    by_name: bool = False  #: seen by name only: identities can't be compared there
    since: float | None = None  #: it holds the lock of a transfer of ours, since then

    @property
    def doubt(self) -> str:
        """What to add where only its name shows it; "" where the file is known to be the same."""
        return ", by the name alone: it is on an overlay or a share" if self.by_name else ""


class Trust(NamedTuple):
    """What can be believed of a data file, as byte ranges. The rules are in `docs/store.md`."""

    claimed: Ranges = ()
    present: Ranges = ()
    trusted: Ranges = ()
    has_holes: bool = True  #: not so in a copy, or where a file system has none
    rebooted: bool = False  #: some may have been written before the start
    zeros_read: bool = True  #: zero blocks were looked for
    proven: Ranges = ()  #: present, and as the sums of its chunks say


class Proven(NamedTuple):
    """What the sums of its chunks have shown of a data file, as it was then, in that start."""

    inode: int
    size: int
    changed_ns: int  #: by its own time
    boot: str
    right: Ranges
    wrong: Ranges  #: of what was trusted


class Reads(NamedTuple):
    """What a scan read of a data file to find where zeros end, and which bytes that covers."""

    #: Size and time of the last change (ns), which nobody can set, as the file had them then.
    size: int
    changed_ns: int
    boot: str  #: the machine's start then: a power cut may change what is on the disk
    answers: str  #: see `observe.parts`


class Ahead(NamedTuple):
    """The latest time of a download's files, where it lies in the future: a clock was set back."""

    latest: float
    #: When it was first seen: seconds that the machine had been awake since its start, and that
    #: start's id. Of another machine, or after a restart, the seconds mean nothing.
    seen_at: float
    boot: str

    def still(self, latest: float, boot: str) -> bool:
        """Whether it is that time still, and was first seen in this start of this machine."""
        return (self.latest, self.boot) == (latest, boot)


class Shift(NamedTuple):
    """Times from `start` to `end` are of a clock that was set since: by so many seconds."""

    start: float
    end: float
    by: float


class Unsure(NamedTuple):
    """A start that seems to lie before the last scan's: of another machine, or of a set clock."""

    jump: float
    #: The other start, and what was counted in it by then.
    boot: str
    counted: float


class Clock(NamedTuple):
    """The clocks of a machine at a scan, and what is known of them from its scans before."""

    #: The machine's start, the wall clock, and the seconds counted since that start.
    boot: str
    wall: float
    counted: float
    certain: float  #: what time it is at least
    held: float  #: seconds for which wall clock and count have agreed
    begun: float  #: when, by itself, the wall clock began to be as it is now
    #: By how much it has jumped since the scan before, and whether a jump ahead was its beginning.
    jump: float = 0.0
    jumped: bool = False
    shifts: tuple[Shift, ...] = ()
    machine: str = ""  #: its id; "" where it has none
    unsure: Unsure | None = None
    others: tuple[Shift, ...] = ()  #: of other machines; those that make something younger

    @property
    def at_most(self) -> float:
        """The time by which things are old: nothing is older than either clock makes it."""
        return min(self.certain, self.wall)

    def age_of(self, at: float) -> float:
        """How long something has certainly been so, by a time that some clock has given it."""
        for start, end, by in (*self.shifts, *self.others):
            # A time that no later setting explains may be any clock's: then it is the younger one.
            if start <= at <= end and (by > 0 or at > self.wall):
                at += by
                break
        return max(0.0, self.at_most - at)


@dataclass(frozen=True, slots=True)
class Download:
    """All that was seen of one unfinished download: the entries of a digest but its blob."""

    digest: str
    data: Entry | None = None
    sidecars: tuple[Sidecar, ...] = ()
    transfer: bool = False  #: a ``.tmp`` of the transfer path: data without parts
    #: A transfer of ours: its entries have paths below the store as names, and no server sees it.
    ours: bool = False
    finished: Entry | None = None
    #: The true length where known, and its source ("sidecars", "manifest", "memory", "data",
    #: "registry").
    total: int | None = None
    total_from: str | None = None
    faults: tuple[str, ...] = ()
    trust: Trust = field(default_factory=Trust)
    reads: Reads | None = None  #: what was read for that, if another scan may use it
    proven: Proven | None = None  #: what of it was compared with sums, as it is now
    holders: tuple[Holder, ...] = ()
    models: tuple[str, ...] = ()
    progress_at: float | None = None
    ahead: Ahead | None = None  #: as remembered, where its files' times lie in the future
    born_ns: int = 0  #: of its data file or first sidecar, ns since the epoch; 0: not known
    #: Bytes that the registry of one of its models has of it; None where it was not asked lately.
    registry: int | None = None
    doubted_length: str = ""  #: why a length that somebody has given for it is not believed
    unreadable: str | None = None  #: why something of it could not be read at all
    #: One of ours: a server had finished it, and has removed the blob. As it is left, its hash is
    #: wrong, or nobody knows whether it was removed because of a mismatch.
    by_server: bool = False
    discarded: bool = False
    may_be_right: bool = False
    #: One of ours: what of it a hash may yet find wrong, since the registry has not sent it, or all
    #: of it, since a hash was wrong.
    doubted: Ranges = ()
    is_refuted: bool = False

    entries: tuple[Entry, ...] = field(init=False, repr=False, compare=False)  #: the data first

    def __post_init__(self) -> None:
        entries = tuple([sidecar.entry for sidecar in self.sidecars])
        entries = entries if self.data is None else (self.data, *entries)
        object.__setattr__(self, "entries", entries)

    @property
    def key(self) -> str:
        """What it is remembered by: a digest may have one in parts, a ``.tmp``, and one of ours."""
        return f"{self.digest}{'.tmp' if self.transfer else OURS if self.ours else ''}"

    @property
    def paths(self) -> tuple[str, ...]:
        """Its entries as paths below the store, the data first."""
        return tuple(e.name if self.ours else f"blobs/{e.name}" for e in self.entries)

    @property
    def has_old_names(self) -> bool:
        """Whether its files, all alike, have older servers' spelling: no pull looks for it."""
        return any(entry.name.startswith("sha256:") for entry in self.entries[:1])

    @property
    def is_wrong(self) -> bool:
        """Whether it was hashed as it is, at its true length, and does not match the digest."""
        data = self.data
        if data is None or data.size != self.total:
            return False
        return data.sha256 not in (None, self.digest.lower())

    @property
    def is_useless(self) -> bool:
        """Whether its data is wrong, and none of it is worth keeping."""
        return self.is_wrong and not self.trust.trusted

    @property
    def is_needless(self) -> bool:
        """Whether none of it is worth keeping: its data is wrong, or its finished blob is right."""
        blob = self.finished
        return self.is_useless or (blob is not None and blob.sha256 == self.digest.lower())

    @property
    def allocated(self) -> int:
        return sum(entry.allocated for entry in self.entries)

    @property
    def freed(self) -> int:
        return sum(entry.freed for entry in self.entries)

    @property
    def writers(self) -> tuple[Holder, ...]:
        return tuple(holder for holder in self.holders if holder.writes)

    @property
    def changed_at(self) -> float | None:
        return max((entry.changed_at for entry in self.entries), default=None)


class Located(NamedTuple):
    """An entry with its path below the store."""

    path: str
    entry: Entry


class ServerUser(NamedTuple):
    """The user whom the server runs as, or would: what it may do depends on that."""

    uid: int = 0
    groups: frozenset[int] = frozenset()
    by: str = "the store's owner"
    unbarred: bool = True  #: no owner and no mode keeps it from anything, as root
    elsewhere: bool = False  #: it sees other folders above the store than we do

    def may(self, wanted: int, mode: int, uid: int, gid: int) -> bool:
        """Whether it has all the `wanted` rights (``rwx`` as bits) to what has this mode, owner."""
        shift = 6 if uid == self.uid else 3 if gid in self.groups else 0
        return self.unbarred or (mode >> shift) & wanted == wanted


class Subject(enum.StrEnum):
    """What the server's user can be kept from."""

    BLOB = "blob"
    DOWNLOAD = "download"  #: a file of an unfinished download
    MANIFEST = "manifest"
    FOLDER = "folder"  #: ``blobs``, a folder in it, or one above the store
    MANIFEST_FOLDER = "manifest_folder"
    STORE = "store"  #: in which a missing ``blobs`` or ``manifests`` has to be made


class Need(enum.StrEnum):
    READ = "read"
    WRITE = "write"
    ENTER = "enter"  #: pass through a folder


class Barred(NamedTuple):
    """What the server's user can't use as a server has to, all in the same way."""

    subject: Subject
    need: Need
    own: bool  #: it belongs to that user: its mode is in the way
    total: int
    first: tuple[Located, ...]


class NextStart(NamedTuple):
    """What is known of the server's next start besides the store itself."""

    user: ServerUser = ServerUser()
    #: Its unit has ``OLLAMA_NOPRUNE`` set; its unit calls ``ollama-watch prepare`` before.
    no_prune: bool = False
    prepared: bool = False
    watched: bool = False  #: a daemon of ours watches the store, and keeps what is needed


class BlobFault(enum.StrEnum):
    CORRUPT = "corrupt"  #: its hash was computed, and is not that of its name
    SHORT = "short"  #: of another size than the manifest gives it, and not hashed as it is now
    LONG = "long"
    MISSING = "missing"
    SYMLINK = "symlink"  #: to a file of which nothing bad is known
    DANGLING = "dangling"  #: a symlink to nothing
    NO_FILE = "no_file"  #: a folder, a FIFO or a device, or a symlink to one


#: Blobs that don't match their names, whatever a hash would be.
WRONG = frozenset({BlobFault.CORRUPT, BlobFault.DANGLING, BlobFault.NO_FILE})
DOUBTFUL = frozenset({BlobFault.SHORT, BlobFault.LONG})  #: blobs of which a hash decides


class SecondName(NamedTuple):
    """A blob that has a second name in our folder, too, where the server may yet remove it."""

    digest: str
    blob: Entry
    held: bool = False  #: a process has it open: a server may be hashing it


class OddBlob(NamedTuple):
    """A digest that a manifest names and whose blob is not as it should be."""

    digest: str
    fault: BlobFault
    wanted: int | None
    entry: Entry | None
    models: tuple[str, ...]
    #: Bytes that the registry of one of its models has of it; None where it gives none, or was
    #: not `asked` within the hour.
    registry: int | None = None
    asked: bool = False
    behind: Entry | None = None
    lies: Located | None = None  #: where its bytes lie under a name that no server looks for
    wrong: Ranges = ()  #: the bytes of a corrupt one that are wrong, as far as that is known

    @property
    def content(self) -> Entry | None:
        """The file that the server reads for it; None where there is none."""
        found = self.entry if self.behind is None else self.behind
        return found if found is not None and found.kind is Kind.FILE else None


class Unseen(NamedTuple):
    """A path below the store that could not be inspected, or is not believed, and why."""

    path: str
    why: str
    forbidden: bool = False  #: no right of this user's, and no fault of the disk


class Nested(NamedTuple):
    """A store that lies in the store, where no server looks; paths are below the outer one."""

    path: str
    blobs: tuple[Located, ...]
    manifests: tuple[Located, ...]
    apart: int  #: so many of them have no name of theirs in the outer store
    collides: bool  #: whether unfinished downloads of both stores have the same names
    used: bool = False


class ManifestFault(enum.StrEnum):
    CORRUPT = "corrupt"
    UNREADABLE = "unreadable"
    MISPLACED = "misplaced"
    BAD_NAME = "bad_name"
    DANGLING = "dangling"
    BAD_DIGEST = "bad_digest"
    EMPTY = "empty"  #: it names nothing: an index of images, or an error in place of one
    WRONG_SIZE = "wrong_size"  #: it gives a blob another size than that of the right bytes
    CASE = "case"  #: another manifest's path differs from its own by case alone


#: Manifests that may name any blob.
BLINDING = frozenset({ManifestFault.CORRUPT, ManifestFault.UNREADABLE, ManifestFault.DANGLING})


class OddManifest(NamedTuple):
    """A file or folder under ``manifests/`` that is not one whole manifest in its place."""

    path: str
    fault: ManifestFault
    why: str
    model: str | None = None
    changed_at: float | None = None
    barred: bool = False  #: we can read it, and the server's user can't
    hidden: bool = False  #: the other way round
    published: bool = False  #: the registry's own manifest was as wrong when it was asked last


class Kept(NamedTuple):
    """A file in quarantine: its label there, its own name, and what is in its place now."""

    label: str
    name: str
    entry: Entry
    replaced: bool  #: what is in its place was hashed and found right
    there: Entry | None = None
    place_seen: bool = True


class BlobCensus(NamedTuple):
    """``blobs/`` and ``manifests/``: the healthy are counted, the oddities kept."""

    manifests: int = 0
    #: Each model with a readable manifest: inode and time distinguish manifests.
    models: Mapping[str, tuple[int, int]] = MappingProxyType({})
    entries: int = 0
    allocated: int = 0
    healthy: int = 0  #: finished blobs that a manifest names and that have the right size
    healthy_bytes: int = 0
    hashed: int = 0  #: as many of these were hashed, and were right then
    named: tuple[tuple[Entry, tuple[str, ...]], ...] = ()  #: readable blobs, for `verify`
    unproven: tuple[Entry, ...] = ()
    odd: tuple[OddBlob, ...] = ()
    unnamed: tuple[Entry, ...] = ()
    elsewhere: tuple[Entry, ...] = ()
    old_names: tuple[Located, ...] = ()  #: as ``sha256:<hex>``, below ``blobs/``
    rename_faults: tuple[str, ...] = ()
    old_protected: frozenset[str] = frozenset()  #: that a manifest protects once renamed
    unprotected: tuple[Entry, ...] = ()  #: named by a manifest, yet not kept from deletion
    temporaries: tuple[Located, ...] = ()  #: of ``ollama create`` and uploads
    foreign: tuple[Entry, ...] = ()
    odd_manifests: tuple[OddManifest, ...] = ()
    unlisted: tuple[str, ...] = ()  #: folders, as paths below the store
    failing: tuple[Unseen, ...] = ()  #: of these the ones that no right of anybody's opens, and why
    behind_foreign: tuple[str, ...] = ()  #: below ``manifests``, by a foreign symlink
    unseen: tuple[Unseen, ...] = ()  #: names of which not even the kind is known
    unlisted_by_server: tuple[str, ...] = ()  #: the same for the server, by owner and modes
    barred: tuple[Barred, ...] = ()
    stuck_folders: tuple[str, ...] = ()  #: folders that the start finds empty and can't remove
    sealed: bool = False  #: the server's user can add, rename and remove no name under ``blobs/``
    empty_folders: tuple[str, ...] = ()
    nested: tuple[Nested, ...] = ()

    @property
    def hides_manifests(self) -> bool:
        """Whether there may be manifests in what could not be listed or inspected."""
        paths = (*self.unlisted, *(each.path for each in self.unseen))
        return any(path.startswith("manifests") for path in paths)


class Sharing(NamedTuple):
    """Other stores whose blobs lie in the same folder, as far as they are seen."""

    stores: tuple[str, ...] = ()
    named: frozenset[str] = frozenset()
    unread: tuple[str, ...] = ()  #: what of them can't be read, and may name any blob


class Visibility(enum.StrEnum):
    FULL = "full"
    NAMED = "named"
    PARTIAL = "partial"


class Blind(enum.StrEnum):
    """What keeps processes from being seen."""

    USERS = "users"  #: other users' open files, which root sees
    NETWORK = "network"
    CONTAINER = "container"
    PROC = "proc"  #: ``/proc`` is not there, or hides processes from root, too


class View(NamedTuple):
    """The visibility, which processes could not be seen, and why."""

    visibility: Visibility
    unseen: tuple[str, ...] = ()  #: ``name (pid)``, the first few
    why: str = ""
    blind: Blind = Blind.USERS


class ServerState(enum.StrEnum):
    STARTING = "starting"
    ANSWERING = "answering"
    UNREACHABLE = "unreachable"  #: from here, for five minutes and more: counts as started


class Server(NamedTuple):
    """A running ``ollama serve``."""

    pid: int
    user: str
    since: float
    state: ServerState
    store: str | None = None
    ours: bool | None = None  #: its blobs lie in the inspected store; None: not known
    elsewhere: bool = False  #: whether it is another one, which has its blobs in the same folder
    url: str | None = None
    version: str | None = None
    connections: int | None = None  #: to its API; None where they can't be counted
    no_prune: bool | None = None
    uid: int | None = None  #: who may end it besides root; None where not known
    unit: str = ""


class ForeignLink(NamedTuple):
    """A symlink that belongs neither to root nor to the owner of what it points to."""

    path: str
    uid: int
    target: str
    target_uid: int


class Place(NamedTuple):
    """The store's folder and what it stands on."""

    path: str
    found_by: str
    file_system: str = ""
    network: bool = False
    blobs: tuple[int, int] = (0, 0)
    owner: int = 0  #: user id of the store's folder: the one that the server runs as, most likely
    #: ``blobs`` is a symlink, or a mount or link to another file system.
    blobs_linked: bool = False
    blobs_elsewhere: bool = False
    foreign: ForeignLink | None = None  #: for whose sake nothing is changed
    #: Our folder is not whose it has to be: its owner's user id, the ones of user and group that it
    #: should have, and whether nothing in it is believed. None where it is right.
    state_owner: tuple[int, tuple[int, int], bool] | None = None
    globbed: bool = False  #: the server sees neither manifests nor sidecars there
    glob_fails: bool = False  #: its search for manifests fails: it deletes nothing
    #: ``blobs`` is there and no folder: no server starts. Where it is a link, what it points to.
    blobs_broken: bool = False
    blobs_target: str = ""
    free_bytes: int = 0
    reserve_bytes: int = 0  #: of these so many stay free of what is fetched
    free_inodes: int = 0
    read_only: bool = False
    writable: bool = True  #: names may be added and removed in it and in ``blobs``


class Caller(NamedTuple):
    """Who reads what is printed, and how this user calls ollama-watch: `advice` makes commands."""

    uid: int = 0
    #: The words that run it, for this user and behind ``sudo``.
    program: tuple[str, ...] = ("ollama-watch",)
    program_of_root: tuple[str, ...] = ("ollama-watch",)
    config: str = ""


class Tally(NamedTuple):
    """Some files together, and what removing them gives back."""

    files: int = 0
    apparent: int = 0
    allocated: int = 0
    freed: int = 0

    def plus(self, size: int, blocks: int) -> Self:
        """With one file more, of one name, of so many bytes and the kernel's blocks of 512."""
        taken = blocks * 512
        files, apparent, allocated, freed = self
        return type(self)(files + 1, apparent + size, allocated + taken, freed + taken)

    def joined(self, other: Self) -> Self:
        files, apparent, allocated, freed = self
        more, its, theirs, gone = other
        return type(self)(files + more, apparent + its, allocated + theirs, freed + gone)


class Space(NamedTuple):
    """Every name below a store: valid blobs and manifests summed up, all else one by one."""

    entries: tuple[Located, ...] = ()
    blobs: Mapping[tuple[str, ...], Tally] = MappingProxyType({})  #: by the models that name them
    manifests: Tally = Tally()
    #: The models that name the digests of `entries`; and all models.
    models: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    every_model: frozenset[str] = frozenset()
    unlisted: tuple[str, ...] = ()
    linked: tuple[str, ...] = ()  #: of the two, a link to a folder elsewhere


class Evidence(NamedTuple):
    """Everything that one scan of a store has shown. Deciding reads nothing else."""

    place: Place
    now: float
    view: View
    #: Seconds that the machine has been awake since its start, and that start's id; "": not known.
    uptime: float = 0.0
    boot: str = ""
    clock: Clock | None = None  #: None: the wall clock is all there is, and is right
    other_clocks: tuple[Clock, ...] = ()  #: of machines that share the store
    servers: tuple[Server, ...] = ()
    others: tuple[str, ...] = ()  #: other Ollama processes (clients, runners): ``name (pid)``
    downloads: tuple[Download, ...] = ()
    census: BlobCensus = BlobCensus()
    sharing: Sharing = Sharing()
    scope: frozenset[str] | None = None
    next_start: NextStart = NextStart()  #: of a scan of the whole store
    uid: int = 0
    #: The models that a registry's manifest gives a blob which no manifest of the store names.
    known_as: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    caller: Caller = Caller()
    forgotten: str = ""  #: why what was remembered of the store is not known, if so
    quarantine: tuple[Kept, ...] = ()
    quarantine_unseen: Unseen | None = None
    intents: tuple[Unseen, ...] = ()  #: what is not believed among the intents that a kill has left
    pulling: frozenset[str] = frozenset()  #: by key; those outside of the scope as remembered
    space: Space | None = None
    transfers_unseen: Unseen | None = None
    second_names: tuple[SecondName, ...] = ()

    def age_of(self, at: float) -> float:
        """Seconds that have certainly passed since `at`: what may go depends on this alone."""
        return max(0.0, self.now - at) if self.clock is None else self.clock.age_of(at)


class Known(NamedTuple):
    """The models and digests that a command may name."""

    models: dict[str, frozenset[str]]  #: shown names, with their digests
    digests: frozenset[str]
    unseen: tuple[str, ...] = ()  #: paths that could not be read


class Condition(enum.StrEnum):
    """What a download is. Each has exactly one; `docs/reference/conditions.md` has the table."""

    LIVE = "live"
    PAUSED = "paused"
    BEHIND = "behind"
    HOLLOW = "hollow"
    BLOCKED = "blocked"
    UNCLAIMED = "unclaimed"
    WHOLE = "whole"
    REDUNDANT = "redundant"
    TRANSFER = "transfer"
    UNKNOWN = "unknown"


class Severity(enum.StrEnum):
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    @property
    def rank(self) -> int:
        """0 for info, 2 for error."""
        return list(Severity).index(self)


class Sizes(NamedTuple):
    """Three sizes that are never mixed up, in bytes."""

    apparent: int = 0
    allocated: int = 0
    freed: int = 0


class UseKind(enum.StrEnum):
    """What space is used for. A file with several names counts as what stands first here."""

    MODEL = "model"
    SHARED = "shared"  #: blobs that several models name
    OTHER_STORE = "other_store"  #: blobs that only another store in the same folder names
    PARTIAL = "partial"
    ORPHAN = "orphan"
    TEMPORARY = "temporary"
    FOREIGN = "foreign"
    QUARANTINE = "quarantine"
    OURS = "ours"  #: the rest of our own folder
    MANIFESTS = "manifests"
    FOLDERS = "folders"  #: the store's folder and ``blobs``: the room that their names take


class Use(NamedTuple):
    """Space of one use: of a model (`name`), of partials of a condition (`name`), and so on."""

    kind: UseKind
    name: str
    files: int
    sizes: Sizes  #: `freed`: what removing all of it together gives back


class Finding(NamedTuple):
    """What was found, the evidence, what Ollama alone would do, and what helps."""

    severity: Severity
    kind: str  #: ``<subject>_<word>``, such as ``blob_short``
    path: str  #: path below the store, or "" for the store itself
    message: str
    evidence: str = ""
    alone: str = ""
    command: str = ""  #: what helps, as a command that can be pasted; else, or besides, in words
    sizes: Sizes = Sizes()
    models: tuple[str, ...] = ()
    remedy: str = ""
    wrong: Ranges = ()  #: the bytes of a blob that are wrong, as far as that is known


class Diagnosed(NamedTuple):
    download: Download
    condition: Condition
    stale: bool
    because: str
    #: Seconds since its last progress, and since any of its entries changed; never negative.
    age: float
    quiet: float
    #: What another pull would fetch, by Ollama alone and after a repair; None where not known.
    cost_alone: int | None = None
    cost_repaired: int | None = None

    @property
    def digest(self) -> str:
        return self.download.digest


class Forecast(NamedTuple):
    """What the next start of the server does to the store, were it now."""

    #: Names that it deletes, and those that it would delete later, with when; oldest first.
    deletes: tuple[Located, ...] = ()
    later: tuple[tuple[float, Located], ...] = ()
    renames: tuple[Located, ...] = ()
    empty_folders: tuple[str, ...] = ()
    start_fails: bool = False
    pruning_off: bool = False
    blind: bool = False  #: the server may read manifests that we can't, and keep more blobs
    why: tuple[str, ...] = ()

    @property
    def freed(self) -> int:
        return sum(each.entry.freed for each in self.deletes)


class Diagnosis(NamedTuple):
    """All judgements on one scan; no forecast where only some digests were inspected."""

    diagnosed: tuple[Diagnosed, ...]
    findings: tuple[Finding, ...]
    forecast: Forecast | None = None


class ActionKind(enum.StrEnum):
    REMOVE_DOWNLOAD = "remove_download"
    REMOVE_SURPLUS = "remove_surplus"
    REMOVE_TRANSFER = "remove_transfer"
    GIVE_BACK = "give_back"
    TAKE_OVER = "take_over"
    REMOVE_ORPHAN = "remove_orphan"
    REMOVE_TEMPORARY = "remove_temporary"
    WRITE_SIDECARS = "write_sidecars"
    REFRESH = "refresh"
    HASH = "hash"
    ASK_REGISTRY = "ask_registry"
    PROVE = "prove"
    FETCH_CHUNKS = "fetch_chunks"
    QUARANTINE_BLOB = "quarantine_blob"
    RESTORE = "restore"
    PURGE = "purge"


_FETCHED_AGAIN = 16 * MIB  #: of one layer, where somebody has agreed to a number of bytes


class Action(NamedTuple):
    """One thing to do, but only while the disk still has what it `expects`."""

    kind: ActionKind
    subject: str
    because: str
    expects: tuple[Entry, ...]  #: the entries under ``blobs/`` that it was planned on
    frees: int = 0
    models: tuple[str, ...] = ()
    wait_seconds: float = 0.0  #: for a running server, which reads the sidecars first
    #: The parts whose sidecars are written, and those of `expects` that have to go for it.
    parts: tuple[Part, ...] = ()
    surplus: tuple[Entry, ...] = ()
    #: Bytes that a pull need not download again, and bytes that are not to be trusted later; where
    #: chunks are compared, those that are trusted until then.
    saves: int = 0
    doubts: Ranges = ()
    length: int = 0  #: of the layer whose chunks are compared
    relies_on: Entry | None = None  #: has to be whole on the disk before: what stays
    #: Bytes that are fetched from the registry at most, or, once it is done, that were; and those
    #: that the disk needs at most.
    fetches: int = 0
    needs: int = 0
    content: Entry | None = None  #: the file with the right bytes among which the wrong ones are

    @property
    def budget(self) -> int:
        """Bytes that are fetched in all: some may arrive damaged, and are fetched once more."""
        return self.fetches + min(self.fetches, _FETCHED_AGAIN)


class RefusalKind(enum.StrEnum):
    HELD = "held"
    LIVE = "live"
    NOT_QUIET = "not_quiet"
    SIGHT = "sight"
    SERVER_RUNS = "server_runs"
    SERVER_STARTS = "server_starts"
    MANIFESTS = "manifests"
    UNPROVEN = "unproven"
    LINKED = "linked"
    LENGTH = "length"
    REGISTRY = "registry"
    OWNER = "owner"
    CHANGED = "changed"
    UNKNOWN = "unknown"
    PERMISSION = "permission"
    ROOM = "room"
    OLD_NAMES = "old_names"
    STOPPED = "stopped"
    CLOCK = "clock"


class Refusal(NamedTuple):
    """What was not done, why, and what would make it possible."""

    kind: RefusalKind
    subject: str
    action: ActionKind
    why: str
    remedy: str
    seconds_left: float | None = None
    models: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()  #: names under ``blobs/``, of one refusal about many
    frees: int = 0
    command: str = ""  #: the command that makes it possible, where one does; made by `advice`


Planned: TypeAlias = Action | Refusal  #: a step of a plan, or what is refused of it


class Spared(NamedTuple):
    """A download, or an orphaned blob, that a clean-up leaves until it is `stale_after` old."""

    digest: str
    models: tuple[str, ...]
    age: float
    frees: int


class Due(NamedTuple):
    """When a digest is worth another scan."""

    at: float
    digest: str
    then: str = ""  #: what becomes of its download then, in words; "" where a scan only looks again


class Plan(NamedTuple):
    """What would be done, what is refused, and when to scan again. Printing it changes nothing."""

    actions: tuple[Action, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    due: tuple[Due, ...] = ()
    spared: tuple[Spared, ...] = ()
    free: int = 0

    def only(self, meant: Callable[[Iterable[str], Iterable[str]], bool]) -> Self:
        """The part of it whose models and subjects are meant."""
        return self._replace(
            actions=tuple(each for each in self.actions if meant(each.models, (each.subject,))),
            refusals=tuple(
                each for each in self.refusals if meant(each.models, (each.subject, *each.entries))
            ),
            spared=tuple(each for each in self.spared if meant(each.models, (each.digest,))),
        )

    def filtered(self, wanted: Callable[[Action], bool]) -> Self:
        return self._replace(actions=tuple(filter(wanted, self.actions)))

    @property
    def frees(self) -> int:
        return sum(action.frees for action in self.actions)

    @property
    def saves(self) -> int:
        """Bytes that need not be downloaded again thanks to all actions together."""
        return sum(action.saves for action in self.actions)

    @property
    def fetches(self) -> int:
        """Bytes that all actions together fetch, at most."""
        return sum(action.fetches for action in self.actions)


Approve: TypeAlias = Callable[[Plan], Plan]  #: hands back the part that may be done


class Result(enum.StrEnum):
    DONE = "done"
    REFUSED = "refused"
    FAILED = "failed"


class Outcome(NamedTuple):
    action: Action
    result: Result
    message: str
    freed: int = 0
    refusal: Refusal | None = None
    #: What was found out by hashing, or by asking the registry for a length.
    sha256: str | None = None
    length: int | None = None
    wrong: Ranges = ()  #: the bytes that hashing found wrong, as far as sums of chunks are known
    right: Ranges = ()  #: those whose chunks match their sums
    command: str = ""  #: what helps where it failed


class Mode(NamedTuple):
    """What one run may plan, hash and ask: `docs/architecture.md` and `decide.modes`."""

    repair: bool = False
    repair_stale: bool = False
    refresh: bool = False
    clean: bool = False
    give_back: bool = False
    take_over: bool = False
    restore: frozenset[str] = frozenset()
    purge: frozenset[str] = frozenset()
    purge_replaced: bool = False
    online: bool = False
    fetch: bool = False
    prove: bool = False
    hash: bool = False
    verify: bool = False
    survey: bool = False
    patient: bool = False
    sync_behind: bool = False  #: the caller syncs the data behind the claims
    read_limit_bytes: int | None = 1 << 30
    lock_seconds: float = 10.0
    announce: bool = False


class Rules(NamedTuple):
    settings: Settings = Settings()
    mode: Mode = Mode()


class Scope(NamedTuple):
    """What a run is about: some digests, or None for the whole store."""

    digests: frozenset[str] | None = None
    closed: frozenset[str] = frozenset()  #: digests, just closed after writing


ALL = Scope()  #: the whole store

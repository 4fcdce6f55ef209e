"""What has arrived of a layer, as it lies in ``.ollama-watch/transfers/<digest>/``.

    data      the bytes, each at its own place
    ledger    which ranges of it are *durable*: the data was synced before this was written
    arrived   a line for each MiB that has *arrived* and is not durable yet; its first line is the
              id of the machine's start, since after another one only what is durable counts
    lock      held by the one who fetches it

All of it is input, not truth: what is out of bounds is not believed.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass

import orjson

from watcher.model import MIB, Ranges
from watcher.ollama import names, ranges
from watcher.state import checks, fs, json_file, state_folder

FOLDER = "transfers"
DATA, LEDGER, ARRIVED, LOCK = "data", "ledger", "arrived", "lock"
#: In the order in which they go: without the first two nothing that a kill leaves is believed.
FILES = (ARRIVED, LEDGER, DATA, LOCK)
_IS_ASIDE = re.compile(rf"(?:{ARRIVED}|{LEDGER}|{DATA})\.damaged(?:-[0-9]+)?").fullmatch
SCHEMA = "ollama-watch/transfer/1"
LONGEST_LEDGER = 16 * MIB
LONGEST_LOG = 16 * MIB  #: a longer log is none of ours: it is made anew when it has half of this
#: A manifest until it has its place; a random number follows.
NEW_MANIFEST = "manifest-"
_IS_NEW_MANIFEST = re.compile(NEW_MANIFEST + r"[0-9]{1,10}").fullmatch


@dataclass(frozen=True, slots=True)
class Kept:
    """What the file ``ledger`` says."""

    #: The bytes of the layer; None where there is no ledger yet.
    total: int | None = checks.kept(checks.size, default=None)
    durable: Ranges = checks.kept(checks.byte_ranges, default=())
    #: Copied from a server's download, which is doubted first, and from mirrors, as well.
    taken: Ranges = checks.kept(checks.byte_ranges, default=())
    mirrored: Ranges = checks.kept(checks.byte_ranges, later=True, default=())
    is_wrong: bool = checks.kept(checks.flag, "wrong", default=False)  #: all of it, by its hash
    #: The data is a blob of the server's, which no hash has proven.
    finished: bool = checks.kept(checks.flag, later=True, default=False)
    #: As the sums of its chunks say.
    proven: Ranges = checks.kept(checks.byte_ranges, later=True, default=())

    @property
    def is_left(self) -> bool:
        """Whether the data is as a server has left it: no transfer of ours has gone on with it."""
        return self.finished and ranges.size(self.taken) == self.total


def kept(folder: int, digest: str, size: int) -> Kept:
    """What the ledger says of a data file of `size` bytes.

    Raises ValueError for a damaged one, and OSError for one that can't be read.
    """
    try:
        raw = fs.read_ours(LEDGER, folder, LONGEST_LEDGER)
    except FileNotFoundError:
        return Kept()
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EIO):
            raise
        raise ValueError(error.strerror) from None
    return parsed(raw, digest, size)


def parsed(raw: bytes, digest: str, size: int) -> Kept:
    """What such a ledger says. Raises ValueError."""
    try:
        found = json_file.document(raw, SCHEMA)
        told = checks.from_keys(Kept, found)
        about = checks.digest(found["digest"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if about != digest:
        raise ValueError("it is about another layer")
    if told.durable and told.durable[-1][1] > min(size, told.total or 0):
        raise ValueError("it claims bytes beyond the data's end")
    return told


def encoded(digest: str, told: Kept) -> bytes:
    return orjson.dumps({"schema": SCHEMA, "digest": digest, **checks.to_keys(told)})


def logged(folder: int, boot: str, size: int) -> Ranges:
    """What has arrived in this start of the machine, up to the first line that makes no sense."""
    try:
        raw = fs.read_ours(ARRIVED, folder, LONGEST_LOG)
    except OSError:
        return ()
    first, *lines = raw.split(b"\n")[:-1] or [b""]
    if not boot or first != boot.encode():
        return ()
    found: list[tuple[int, int]] = []
    for line in lines:
        start, _, end = line.partition(b" ")
        if not (start.isdigit() and end.isdigit() and len(line) < 64):
            break
        piece = int(start), int(end)
        if not piece[0] < piece[1] <= size:
            break
        found.append(piece)
    return ranges.normal(found)


def arrived(folder: int, digest: str, boot: str, size: int) -> Ranges:
    """All that counts of a data file of `size` bytes. Raises as `kept` does."""
    return ranges.union(kept(folder, digest, size).durable, logged(folder, boot, size))


def has_more(folder: int, digest: str, boot: str, trusted: Ranges) -> bool:
    """Whether it has bytes beside those, or some that no server's download has brought."""
    try:
        size = os.stat(DATA, dir_fd=folder, follow_symlinks=False).st_size
        told = kept(folder, digest, size)
    except (FileNotFoundError, ValueError):
        return False  # nothing of it is believed
    here = ranges.union(told.durable, logged(folder, boot, size))
    alike = ranges.intersection(told.taken, trusted)
    return bool(ranges.difference(here, alike))


@contextlib.contextmanager
def opened(ours: int, digest: str) -> Iterator[int]:
    """The folder of a layer. `ours`: the store's ``.ollama-watch``. Raises OSError."""
    with (
        state_folder.opened_in(FOLDER, ours) as above,
        state_folder.opened_in(digest, above) as folder,
    ):
        yield folder


def make(ours: int, digest: str) -> None:
    """Have the folder of a layer, on the disk. Raises OSError."""
    with state_folder.made_in(FOLDER, ours) as above:
        fs.ensure_folder(digest, above)


@contextlib.contextmanager
def held(ours: int, digest: str) -> Iterator[int]:
    """The same under its lock. Raises fs.BusyError where somebody has it, and OSError."""
    with opened(ours, digest) as folder, fs.locked(LOCK, folder):
        yield folder


def reserve(room: os.statvfs_result) -> int:
    """Bytes of a file system that have to stay free: less on a small one."""
    return min(512 * MIB, room.f_blocks * room.f_frsize // 50)


def is_low(ours: int) -> bool:
    """Whether no more than what has to stay free is left."""
    room = os.fstatvfs(ours)
    return room.f_bavail * room.f_frsize <= reserve(room)


def keep(ours: int, blobs: int, digest: str, boot: str) -> None:
    """Give a blob of the server's a second name: its bytes stay where the server removes the first.

    Nothing is done where there is data of that layer, or nobody could go on with the blob. Nothing
    is synced: after a power cut none of it is believed. Raises fs.BusyError where a process fetches
    the layer, FileNotFoundError where the blob has gone, and OSError.
    """
    name = names.blob(digest)
    found = os.stat(name, dir_fd=blobs, follow_symlinks=False)
    may = os.access(name, os.R_OK | os.W_OK, dir_fd=blobs, effective_ids=True)
    if not (stat.S_ISREG(found.st_mode) and may):
        return
    with state_folder.made_in(FOLDER, ours) as above:
        fs.ensure_folder(digest, above, durable=False)
    with held(ours, digest) as folder:
        with contextlib.suppress(FileNotFoundError):
            os.stat(DATA, dir_fd=folder, follow_symlinks=False)
            return
        try:
            everything = ((0, found.st_size),)
            told = encoded(digest, Kept(found.st_size, taken=everything, finished=True))
            # First, so that data without them is never one of these.
            fs.save(ARRIVED, folder, f"{boot}\n0 {found.st_size}\n".encode(), durable=False)
            fs.save(LEDGER, folder, told, durable=False)
            fs.second_name(name, blobs, DATA, folder)
        except OSError:
            remove(ours, digest)
            raise


def is_second_name(folder: int, digest: str, blobs: int) -> bool:
    """Whether the data is the blob of that name."""
    with contextlib.suppress(FileNotFoundError):
        data = os.stat(DATA, dir_fd=folder, follow_symlinks=False)
        blob = os.stat(names.blob(digest), dir_fd=blobs, follow_symlinks=False)
        return os.path.samestat(data, blob)
    return False


def remove(ours: int, digest: str, *, only_empty: bool = False) -> None:
    """Remove the folder of a layer, as far as that can be done, as `drop` does."""
    with contextlib.suppress(OSError):
        drop(ours, digest, only_empty=only_empty)


def drop(ours: int, digest: str, *, only_empty: bool = False) -> None:
    """Remove the folder of a layer that nobody goes on with; what is not ours in it stays.

    `only_empty`: only where there are no bytes in it. Raises OSError.
    """
    with contextlib.suppress(FileNotFoundError), state_folder.opened_in(FOLDER, ours) as above:
        with state_folder.opened_in(digest, above) as folder:
            if only_empty and _has_data(folder):
                return
            for name in (*FILES, *map(fs.between, FILES), *_aside(folder)):
                with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                    fs.remove(name, folder)
        with contextlib.suppress(OSError):
            fs.remove_folder(digest, above)


def lose(folder: int) -> None:
    """Believe nothing that was not durable: the disk has not taken it."""
    with contextlib.suppress(FileNotFoundError):
        fs.remove(ARRIVED, folder)


def _has_data(folder: int) -> bool:
    """Whether there are bytes in it, or something that is no file of ours."""
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(DATA, dir_fd=folder, follow_symlinks=False)
        if found.st_size > 0 or not stat.S_ISREG(found.st_mode):
            return True
    return aside(folder) != ""


def aside(folder: int) -> str:
    """The name of data that was set aside, since it could not be gone on with; "" for none."""
    for name in _aside(folder):
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if name.startswith(DATA) and stat.S_ISREG(found.st_mode) and found.st_size > 0:
                return name
    return ""


def _aside(folder: int) -> list[str]:
    return sorted(filter(_IS_ASIDE, os.listdir(folder)))


def digests(ours: int) -> list[str]:
    """The digests of which there is a folder, by name."""
    try:
        with state_folder.opened_in(FOLDER, ours) as above:
            return sorted(filter(checks.is_digest, os.listdir(above)))
    except FileNotFoundError:
        return []


def tidy(store: int, before: float) -> None:
    """Remove what has no bytes in it: folders of layers, and manifests of before a time."""
    with (
        contextlib.suppress(OSError),
        state_folder.opened(store) as ours,
        state_folder.opened_in(FOLDER, ours) as above,
    ):
        for digest in digests(ours):
            with contextlib.suppress(OSError, fs.BusyError), held(ours, digest):
                remove(ours, digest, only_empty=True)
        for name in filter(_IS_NEW_MANIFEST, os.listdir(above)):
            found = os.stat(name, dir_fd=above, follow_symlinks=False)
            if stat.S_ISREG(found.st_mode) and found.st_mtime < before:
                fs.remove(name, above)

"""Every call that changes a file: by directory descriptor, durable, never over an existing name.

Nothing else in the package may unlink, rename, replace, truncate or write a file (the linter and
``tests/test_layers.py`` hold that, and name the exceptions). Names are opened relative to
descriptors and no symlink is followed, so nothing outside the store can be reached by a name inside
it; what is written outside because somebody asks for it stands in promise 7 of ``docs/design.md``.
What root creates gets the owner of the folder it is created in, so that the server's user can go on
using it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import stat
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn, cast

from watcher.errors import WatchError

FILE_MODE = 0o644
FOLDER_MODE = 0o755
_NO_REPLACE = 1
#: So much is read at once to find where a half line begins.
_PIECE = 1 << 20
#: How soon a lock that somebody holds is tried again: seconds, doubled each time up to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05
#: Files that are made together; each is open meanwhile.
_AT_ONCE = 100
#: So many descriptors a process may have where nothing lists them.
_MANY_FILES = 65_536


# ---------------------------------------------------------------- looking, by descriptor


@contextlib.contextmanager
def opened_folder(name: str, parent: int | None = None, *, follow: bool = False) -> Iterator[int]:
    """A folder's descriptor. Below another folder (`parent`) a symlink is refused (ENOTDIR).

    `follow` is for ``blobs`` itself, which a store's owner may have linked to another disk.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY
    if parent is not None and not follow:
        flags |= os.O_NOFOLLOW
    fd = open_quietly(name, flags, parent)
    try:
        yield fd
    finally:
        os.close(fd)


def open_quietly(name: str, flags: int, parent: int | None) -> int:
    """A descriptor for reading. The time of last access stays, where the kernel lets us.

    (O_NOATIME is for the owner and for root.)
    """
    flags |= os.O_CLOEXEC
    try:
        return os.open(name, flags | getattr(os, "O_NOATIME", 0), dir_fd=parent)
    except PermissionError:
        return os.open(name, flags, dir_fd=parent)


def open_to_read(name: str, parent: int) -> int:
    """A regular file's descriptor: no symlink followed, no wait for a FIFO's writer."""
    fd = open_quietly(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, parent)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", name)
    return fd


def read_small(name: str, parent: int, limit: int) -> bytes:
    """The first `limit` bytes of a regular file. Raises OSError."""
    fd = open_to_read(name, parent)
    try:
        return read_open(fd, limit)
    finally:
        os.close(fd)


def read_open(fd: int, limit: int) -> bytes:
    """Up to `limit` bytes from an open file. Raises OSError."""
    pieces: list[bytes] = []
    while limit > 0 and (piece := os.read(fd, min(limit, 1 << 20))):
        pieces.append(piece)
        limit -= len(piece)
    return b"".join(pieces)


def born(name: str, folder: int) -> int:
    """Birth time of a file, ns since the epoch; 0 where the system or the file system has none."""
    if _statx is None:
        return 0
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if _statx(folder, os.fsencode(name), _NO_FOLLOW, _STATX_BTIME, buffer) != 0:
        return 0
    (mask,) = struct.unpack_from("=I", buffer, 0)
    seconds, nanoseconds = struct.unpack_from("=qI", buffer, _BTIME_OFFSET)
    return seconds * 1_000_000_000 + nanoseconds if mask & _STATX_BTIME else 0


# statx(2): flags, and where struct statx has stx_btime (linux/stat.h); Python's os.stat lacks it.
_NO_FOLLOW, _STATX_BTIME, _STATX_SIZE, _BTIME_OFFSET = 0x100, 0x800, 256, 80
_statx = getattr(ctypes.CDLL(None), "statx", None)


# ---------------------------------------------------------------- making


def ensure_folder(name: str, parent: int, *, durable: bool = True) -> None:
    """Make a folder of ours where there is none, with the owner and mode that it needs.

    One that a kill left half made is put right, too. Not `durable`: who calls syncs the parent.
    """
    made = True
    try:
        os.mkdir(name, FOLDER_MODE, dir_fd=parent)
    except FileExistsError:
        made = False
    with opened_folder(name, parent) as fd:
        status = os.fstat(fd)
        right = os.fstat(parent).st_uid == status.st_uid or os.geteuid() != 0
        # One with something in it is not ours half made: it may have been renamed to this.
        if not made and (right or os.listdir(fd)):
            return
        os.fchmod(fd, FOLDER_MODE)
        _own(fd, parent)
    if durable:
        sync(parent)


def create(
    name: str,
    parent: int,
    data: bytes,
    owner: tuple[int, int] | None = None,
    *,
    durable: bool = True,
) -> None:
    """Make a new file with `data`, on the disk when this returns. Raises FileExistsError.

    `owner`: user and group id that it gets where we are root; None for the folder's. Not `durable`:
    a power cut may lose what was written.
    """
    create_all({name: data}, parent, owner, durable=durable)


def create_all(
    contents: Mapping[str, bytes],
    parent: int,
    owner: tuple[int, int] | None = None,
    *,
    durable: bool = True,
) -> None:
    """Make new files, by name; the same for many of them, in far less time.

    On an error those stay that were on the disk before.
    """
    names = list(contents)
    for at in range(0, len(names), _AT_ONCE):
        some = {name: contents[name] for name in names[at : at + _AT_ONCE]}
        _create_some(some, parent, owner, durable=durable)


def _create_some(
    contents: Mapping[str, bytes], parent: int, owner: tuple[int, int] | None, *, durable: bool
) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    made: dict[str, int] = {}
    try:
        for name, data in contents.items():
            fd = made[name] = os.open(name, flags, FILE_MODE, dir_fd=parent)
            os.fchmod(fd, FILE_MODE)
            _own(fd, parent, owner)
            _write_all(fd, data)
            if durable and len(contents) > 1:
                # Linux begins to write what is not wanted in memory, so that the journal is
                # committed once for nearly all of them, and not once for each.
                with contextlib.suppress(OSError):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for fd in made.values() if durable else ():
            os.fsync(fd)
    except BaseException:
        for name in made:
            os.unlink(name, dir_fd=parent)
        raise
    finally:
        for fd in made.values():
            os.close(fd)


def reserve(name: str, parent: int, size: int) -> None:
    """Keep room on the disk in a file of ours, for a time when there is no other."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(name, dir_fd=parent, follow_symlinks=False).st_size == size:
            return
        os.unlink(name, dir_fd=parent)
    create(name, parent, os.urandom(size))  # nothing that a file system could do without storing


def save(name: str, parent: int, data: bytes, *, durable: bool = True) -> None:
    """Replace a file of ours by `data` in one step, on the disk when this returns.

    For files that only the holder of a lock writes: a kill leaves ``.<name>.new``, which the next
    save replaces. Not `durable`: whole after a kill all the same, but a power cut within half a
    minute may leave it empty where the file system does not write a file out before its renaming.
    """
    temporary = f".{name}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=parent)
    create(temporary, parent, data, durable=durable)
    os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    if durable:
        sync(parent)


def add(name: str, parent: int, data: bytes) -> None:
    """Make a new file in one step, on the disk when this returns. Raises FileExistsError.

    Unlike `create` it leaves no half file under that name after a kill, but ``.<name>.new``, which
    the next `add` or `save` replaces.
    """
    temporary = f".{name}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=parent)
    create(temporary, parent, data)
    try:
        move(temporary, parent, name, parent)
    except OSError:
        os.unlink(temporary, dir_fd=parent)
        raise
    sync(parent)


def append(name: str, parent: int, lines: bytes) -> int:
    """Add whole lines to a log and give back the log's size in bytes.

    A half line that a kill left behind is cut off first; where the disk is full what was added is
    taken back as a whole and OSError raised. Safe among processes (flock).
    """
    fd = _locked_log(name, parent)
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            _own(fd, parent)
        size = _cut_half_line(fd, size)
        try:
            _write_all(fd, lines)
        except OSError:
            os.ftruncate(fd, size)
            raise
        return size + len(lines)
    finally:
        os.close(fd)


def _locked_log(name: str, parent: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        fd = os.open(name, flags, FILE_MODE, dir_fd=parent)
        try:
            _only_ours(fd, name)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # it was removed for its age between the two calls


def _cut_half_line(fd: int, size: int) -> int:
    if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
        return size
    whole = size
    while whole:
        start = max(0, whole - _PIECE)
        end = os.pread(fd, whole - start, start).rfind(b"\n") + 1
        whole = start + end
        if end:
            break
    os.ftruncate(fd, whole)
    return whole


def remove_older(name: str, parent: int, before: float) -> None:
    """Unlink a log to which nothing was written since `before`, seconds since the epoch.

    Not while somebody appends to it, and nothing but a regular file. Raises OSError.
    """
    fd = open_to_read(name, parent)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened, named = os.fstat(fd), os.stat(name, dir_fd=parent, follow_symlinks=False)
        if os.path.samestat(opened, named) and opened.st_mtime < before:
            os.unlink(name, dir_fd=parent)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _own(fd: int, parent: int, owner: tuple[int, int] | None = None) -> None:
    if os.geteuid() == 0:
        folder = os.fstat(parent)
        os.fchown(fd, *(owner or (folder.st_uid, folder.st_gid)))


# ---------------------------------------------------------------- moving and removing


def move(name: str, parent: int, new_name: str, new_parent: int, *, private: bool = False) -> None:
    """Rename, never over an existing name (FileExistsError), in one step where the system can.

    `private`: the new folder is ours alone, so that nothing can be in the way there.
    """
    if private:
        os.rename(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent)
        return
    if _renameat2 is not None:
        if (
            _renameat2(parent, os.fsencode(name), new_parent, os.fsencode(new_name), _NO_REPLACE)
            == 0
        ):
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), name)
    # The file system has no such rename: a second name first (it fails where one exists), then
    # the old name goes.
    second_name(name, parent, new_name, new_parent)
    os.unlink(name, dir_fd=parent)


def replace(name: str, parent: int, new_name: str, new_parent: int) -> None:
    """Rename over an existing name: for what a repair or a guard puts in an old file's place."""
    os.rename(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent)


def set_aside(name: str, parent: int) -> None:
    """Keep a damaged file of ours beside its place, as ``<name>.damaged``, if it is still there."""
    with contextlib.suppress(FileNotFoundError):
        replace(name, parent, f"{name}.damaged", parent)


def second_name(name: str, parent: int, new_name: str, new_parent: int) -> None:
    """Give a file a second name (a hard link). Raises FileExistsError."""
    os.link(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent, follow_symlinks=False)


def remove(name: str, parent: int) -> None:
    """Unlink a file that was moved out of the store before, or that is ours."""
    os.unlink(name, dir_fd=parent)


def remove_folder(name: str, parent: int) -> None:
    """Remove an empty folder of ours."""
    os.rmdir(name, dir_fd=parent)


def touch(name: str, parent: int, at_ns: int) -> None:
    """Set both times of a regular file, never of what a symlink points to.

    Nor, as root, of a file that has another name: that may lie outside of the store.
    """
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    try:
        status = os.fstat(fd)
        alone = status.st_nlink == 1 or os.geteuid() != 0
        if stat.S_ISREG(status.st_mode) and alone:
            os.utime(fd, ns=(at_ns, at_ns))
    finally:
        os.close(fd)


def sync(folder: int) -> None:
    """Bring a folder's names to the disk (file systems that can't say so by EINVAL)."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def write_back(fd: int, start: int, end: int) -> None:
    """Have the data in ``[start, end)`` of a file written, and wait until it is. Raises OSError.

    What tells where it lies is not on the disk by that; `data_synced` is for the rest. A file
    system, or a libc, that can't do it leaves all of it to that.
    """
    if _sync_file_range is None or end <= start:
        return
    if _sync_file_range(fd, start, end - start, _WAIT_WRITE_WAIT) != 0:
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.ESPIPE):
            raise OSError(code, os.strerror(code))


def data_synced(fd: int) -> Callable[[], int | None]:
    """Begin to bring a file's data to the disk, in a child of ours that can be left behind.

    Gives back what tells how it ended: None while it goes on, 0, or the errno. A process that waits
    for a disk that has gone can't even be killed; so it is not this one.
    """
    with warnings.catch_warnings():
        # The child of a process with threads runs nothing that could wait for one of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _sync_and_exit(fd)
    ended: list[int] = []

    def result() -> int | None:
        if not ended:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                ended.append(code if code >= 0 else errno.EINTR)
        return ended[0] if ended else None

    return result


#: Bound here: the child has nothing open that anything in between could need.
_fdatasync = os.fdatasync


def _sync_and_exit(fd: int) -> NoReturn:
    """The child's life. Nothing of its parent's stays open in it: no lock, and nobody's pipe."""
    code = errno.EIO
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(fd, 0)
        _close_all_from(1)
        _fdatasync(0)
        code = 0
    except OSError as error:
        code = error.errno or errno.EIO
    finally:
        os._exit(code)


def _close_all_from(first: int) -> None:
    try:
        last = max(map(int, os.listdir("/proc/self/fd")))
    except OSError:
        last = min(os.sysconf("SC_OPEN_MAX"), _MANY_FILES)
    os.closerange(first, last + 1)


def drop_cache(fd: int) -> None:
    """Have later reads ask the disk: after a write error memory may hold what the disk has not."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if function is None:
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return cast("Callable[[int, int, int, int], int]", function)


_sync_file_range = _find_sync_file_range()
#: sync_file_range(2): wait for what is under way, write what is left, wait for that.
_WAIT_WRITE_WAIT = 1 | 2 | 4


def _find_renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return None
    name, folder = ctypes.c_char_p, ctypes.c_int
    function.argtypes = [folder, name, folder, name, ctypes.c_uint]
    return cast("Callable[[int, bytes, int, bytes, int], int]", function)


_renameat2 = _find_renameat2()


# ---------------------------------------------------------------- locks


class BusyError(WatchError):
    """Somebody else has the lock; `owner` is what they wrote into it."""

    def __init__(self, owner: str) -> None:
        super().__init__(f"the lock is held by {owner or 'another process'}")
        self.owner = owner


@contextlib.contextmanager
def locked(name: str, parent: int, owner: str, *, seconds: float = 0.0) -> Iterator[None]:
    """Hold a lock file (flock), `owner` written into it; wait so many seconds for who has it.

    It keeps the threads of one process apart, too. Raises BusyError where it stays held.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, FILE_MODE, dir_fd=parent)
    try:
        _only_ours(fd, name)
        _lock(fd, seconds)
        os.ftruncate(fd, 0)
        _own(fd, parent)
        # A full disk must not keep anyone from acting; the text is for people only.
        with contextlib.suppress(OSError):
            os.pwrite(fd, f"{owner}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def _only_ours(fd: int, name: str) -> None:
    """Raise OSError for a file of ours that has a second name: it may be somebody else's file."""
    if os.fstat(fd).st_nlink > 1:
        raise OSError(errno.EMLINK, "it has a second name", name)


def _lock(fd: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    pause = _FIRST_PAUSE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise BusyError(os.pread(fd, 200, 0).decode("utf-8", "replace").strip()) from None
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)

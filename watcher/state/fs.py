"""Every call that changes a file: by directory descriptor, durable, never over an existing name.

Nothing else in the package may do so (``tests/test_layers.py`` names the exceptions). No symlink is
followed, so no name in the store leads outside. What root creates gets the owner of the folder it
is created in, so that the server's user can use it.
"""

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import re
import signal
import stat
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn, TypeAlias

from watcher.errors import WatchError
from watcher.state.checks import LAST_DAY
from watcher.system import flocks, privileges, stopping

NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
FILE_MODE = 0o644  #: of what is made for ``blobs/``, as the server does
_PIECE = 1 << 20  #: so much is read at once to find where a half line begins
_LONGEST_LINE = 16 << 20  #: no line of a log is longer: where none ends in so much, it is no log
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05  #: seconds, doubled each time
_AT_ONCE = 100  #: files that are made together; each is open meanwhile
_MANY_FILES = 65_536  #: so many descriptors a process may have where nothing lists them
#: No symlink is followed, no FIFO's other end waited for, no terminal taken.
_CAREFULLY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
Ids: TypeAlias = tuple[int, int]  #: of a user and of a group


class NoLogError(OSError):
    """What is to be added to is no log, but of its name."""


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _closed_on_error(fd: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(fd)
        raise


@contextlib.contextmanager
def opened_folder(name: str, parent: int | None = None, *, follow: bool = False) -> Iterator[int]:
    """A folder's descriptor. In a `parent` a symlink is refused (ENOTDIR), unless to `follow`."""
    flags = os.O_RDONLY | os.O_DIRECTORY
    if parent is not None and not follow:
        flags |= os.O_NOFOLLOW
    with closing(open_quietly(name, flags, parent)) as fd:
        yield fd


def open_quietly(name: str, flags: int, parent: int | None) -> int:
    """A descriptor for reading that leaves the time of last access as it is, where it may."""
    flags |= os.O_CLOEXEC
    try:
        return os.open(name, flags | getattr(os, "O_NOATIME", 0), dir_fd=parent)
    except PermissionError:
        return os.open(name, flags, dir_fd=parent)


def open_to_read(name: str, parent: int, *, ours: bool = False) -> int:
    """A regular file's descriptor: no symlink followed; of `ours` none that is not trusted."""
    fd = open_quietly(name, os.O_RDONLY | _CAREFULLY, parent)
    with _closed_on_error(fd):
        _check(os.fstat(fd), name, os.fstat(parent) if ours else None)
    return fd


def open_behind(name: str, parent: int) -> int:
    """The descriptor of the regular file that a link leads to. Raises OSError for anything else."""
    # Inspected first, then that very file is opened: no device that takes its place meanwhile.
    with closing(os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=parent)) as seen:
        status = os.fstat(seen)
        _check(status, name)
        check_link(name, parent, status)
        return open_quietly(f"/proc/self/fd/{seen}", os.O_RDONLY | os.O_NOCTTY, None)


def open_followed(name: str, parent: int) -> int:
    """A regular file's descriptor; a link is followed, as the server does. Raises OSError."""
    try:
        return open_to_read(name, parent)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return open_behind(name, parent)


def check_link(name: str, parent: int, behind: os.stat_result) -> None:
    """Keep root, as the kernel keeps others, from following what may be somebody's symlink."""
    if os.geteuid() != 0:
        return
    link = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, behind.st_uid):
        why = f"a symlink of user id {link.st_uid} leads to what belongs to user id"
        raise PermissionError(errno.EACCES, f"{why} {behind.st_uid}", name)


def read_small(name: str, parent: int, limit: int) -> bytes:
    """The first `limit` bytes of a regular file. Raises OSError."""
    with closing(open_to_read(name, parent)) as fd:
        return read_open(fd, limit)


def read_ours(name: str, parent: int, limit: int) -> bytes:
    """All of a file in a folder of ours. Raises OSError: EINVAL where it is none, or too large."""
    with closing(open_to_read(name, parent, ours=True)) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise OSError(errno.EINVAL, f"{size:,} bytes is too much", name)
        return read_open(fd, limit)


def is_trusted(found: os.stat_result, folder: os.stat_result) -> bool:
    """Whether what lies in a folder of ours may be believed: who owns it may write there anyway."""
    if found.st_uid in (0, folder.st_uid, os.geteuid()) or folder.st_mode & 0o002:
        return True
    return bool(folder.st_mode & 0o020) and found.st_gid == folder.st_gid


def _check(
    found: os.stat_result, name: str, ours: os.stat_result | None = None, *, alone: bool = False
) -> None:
    """Raise OSError for no regular file, one not trusted in `ours`, or, `alone`, a second name."""
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", name)
    if ours is not None and not is_trusted(found, ours):
        raise OSError(errno.EINVAL, f"it belongs to user id {found.st_uid}", name)
    if alone and found.st_nlink > 1:
        raise OSError(errno.EMLINK, "it has a second name", name)


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


_libc = ctypes.CDLL(None, use_errno=True)
_statx = getattr(_libc, "statx", None)
_renameat2 = getattr(_libc, "renameat2", None)
_sync_file_range = getattr(_libc, "sync_file_range", None)
# statx(2): flags, and where struct statx has stx_btime (linux/stat.h); Python's os.stat lacks it.
_NO_FOLLOW, _STATX_BTIME, _STATX_SIZE, _BTIME_OFFSET = 0x100, 0x800, 256, 80
_NO_REPLACE = 1  #: renameat2(2): never over an existing name
_EXCHANGE = 2  #: renameat2(2): each gets the other's name
_WAIT_WRITE_WAIT = 1 | 2 | 4  #: sync_file_range(2): wait, write, wait


def file_mode(folder: os.stat_result) -> int:
    """The mode of a file of ours: who may read and write the folder may do so with the file."""
    return stat.S_IMODE(folder.st_mode) & 0o666 | 0o600


def lock_mode(folder: os.stat_result) -> int:
    """The mode of a lock: for nobody who may not write, since to read it is enough to hold it."""
    writers = stat.S_IMODE(folder.st_mode) & 0o022
    return 0o600 | writers | writers << 1


def ensure_folder(
    name: str, parent: int, *, durable: bool = True, owner: Ids | None = None
) -> bool:
    """Make a folder of ours where there is none, or a half made one right; whether it was made.

    It gets the mode of the folder that it lies in, and where a group may write, what is made in it
    belongs to that group. Not `durable`: who calls syncs the parent.
    """
    above = os.fstat(parent)
    mode = stat.S_IMODE(above.st_mode) & (0o777 | stat.S_ISGID) | 0o700
    if mode & 0o020:
        mode |= stat.S_ISGID
    made = True
    try:
        with _exact_modes():
            os.mkdir(name, mode & 0o777, dir_fd=parent)
    except FileExistsError:
        made = False
    with opened_folder(name, parent) as fd:
        if not made and not _is_half_made(fd, above, mode):
            return False
        try:
            _settle(fd, above, mode | (0 if made else stat.S_IMODE(os.fstat(fd).st_mode)), owner)
        except OSError:
            if made:
                os.rmdir(name, dir_fd=parent)
            raise
    if durable:
        sync(parent)
    return made


def _is_half_made(fd: int, above: os.stat_result, mode: int) -> bool:
    status, me = os.fstat(fd), os.geteuid()
    if me == 0 and status.st_uid != above.st_uid:
        # One with something in it is not ours half made: it may have been renamed to this.
        return not os.listdir(fd)
    lacks = mode & 0o2070 & ~stat.S_IMODE(status.st_mode) or status.st_gid != above.st_gid
    return bool(mode & 0o020 and lacks and me in (0, status.st_uid))


_umask = threading.Lock()


@contextlib.contextmanager
def _exact_modes() -> Iterator[None]:
    """Give modes as asked for, whatever the umask is: set later, a kill could lock others out."""
    with _umask:
        before = os.umask(0)
        try:
            yield
        finally:
            os.umask(before)


def _settle(fd: int, above: os.stat_result, mode: int, owner: Ids | None = None) -> None:
    made = os.fstat(fd)
    if os.geteuid() == 0:
        wanted = owner or (above.st_uid, above.st_gid)
        if (made.st_uid, made.st_gid) != wanted:
            os.fchown(fd, *wanted)
    elif mode & 0o020 and made.st_gid != above.st_gid:
        try:
            os.fchown(fd, -1, above.st_gid)
        except OSError:
            # It stays with a group of this user's, which gets no more than everybody.
            mode = mode & ~0o2070 | (mode & 0o007) << 3
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        with contextlib.suppress(PermissionError):  # where a mount sets the modes
            os.fchmod(fd, mode)


def _opened_or_made(name: str, parent: int, flags: int, mode: int) -> int:
    flags |= os.O_CLOEXEC | _CAREFULLY
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(name, flags, dir_fd=parent)
        with contextlib.suppress(FileExistsError):
            with _exact_modes():
                fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, mode, dir_fd=parent)
            try:
                _settle(fd, os.fstat(parent), mode)
            except BaseException:
                os.unlink(name, dir_fd=parent)
                os.close(fd)
                raise
            return fd


def open_output(name: str, parent: int) -> int:
    """A file that somebody asks for, such as a picture: what is in it stays until it is written."""
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | _CAREFULLY | os.O_CLOEXEC, 0o666, dir_fd=parent)
    with _closed_on_error(fd):
        # As root's, in a folder of somebody else's, it may be a file of root's from elsewhere.
        _check(os.fstat(fd), name, alone=os.geteuid() == 0)
    return fd


def write_output(fd: int, data: bytes) -> None:
    os.lseek(fd, 0, os.SEEK_SET)
    os.ftruncate(fd, 0)
    _write_all(fd, data)


def create(name: str, parent: int, data: bytes, owner: Ids | None = None) -> None:
    """Make a new file with `data`, as `create_all`. Raises FileExistsError."""
    create_all({name: data}, parent, owner)


def create_like(name: str, parent: int, data: bytes, owner: Ids, like: tuple[int, int]) -> None:
    """Make a copy of a small file of the store, with the mode and modification time of `like`."""
    create_all({name: data}, parent, owner, durable=False)
    with closing(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)) as fd:
        mode, at_ns = like
        os.fchmod(fd, mode)
        os.utime(fd, ns=(at_ns, at_ns))
        os.fsync(fd)


def create_all(
    contents: Mapping[str, bytes],
    parent: int,
    owner: Ids | None = None,
    *,
    durable: bool = True,
    mode: int = FILE_MODE,
) -> None:
    """Make new files, by name, on the disk when this returns. On an error the first may stay.

    `owner`: user and group id that they get where we are root; None for the folder's. Not
    `durable`: a power cut may lose what was written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    above, names = os.fstat(parent), list(contents)
    for at in range(0, len(names), _AT_ONCE):
        made: dict[str, int] = {}
        try:
            for name in names[at : at + _AT_ONCE]:
                fd = made[name] = os.open(name, flags, mode, dir_fd=parent)
                _settle(fd, above, mode, owner)
                _write_all(fd, contents[name])
                if durable and len(contents) > 1:
                    # Linux begins to write: the journal is committed once for nearly all of them.
                    drop_cache(fd)
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
    create_all({name: os.urandom(size)}, parent, mode=file_mode(os.fstat(parent)))


def save(name: str, parent: int, data: bytes, *, durable: bool = True) -> None:
    """Replace a file of ours by `data` in one step, as `save_all`."""
    save_all({name: data}, parent, durable=durable)


def save_all(contents: Mapping[str, bytes], parent: int, *, durable: bool = True) -> None:
    """Replace each file of ours in one step, on the disk when this returns.

    For files that only the holder of a lock writes: a kill leaves ``.<name>.new``. On an error the
    first files are replaced. Not `durable`: after a power cut it may be empty.
    """
    mode, names = file_mode(os.fstat(parent)), list(contents)
    for at in range(0, len(names), _AT_ONCE):
        some = {between(name): name for name in names[at : at + _AT_ONCE]}
        for new in some:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new, dir_fd=parent)
        # All of them or none: where the disk is full, no new one is left beside an old one.
        data = {new: contents[name] for new, name in some.items()}
        create_all(data, parent, durable=durable, mode=mode)
        for new, name in some.items():
            os.rename(new, name, src_dir_fd=parent, dst_dir_fd=parent)
    if durable:
        sync(parent)


def add(name: str, parent: int, data: bytes) -> None:
    """Make a new file in one step, as `save` does. Raises FileExistsError."""
    temporary = between(name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=parent)
    create_all({temporary: data}, parent, mode=file_mode(os.fstat(parent)))
    try:
        move(temporary, parent, name, parent)
    except OSError:
        os.unlink(temporary, dir_fd=parent)
        raise
    sync(parent)


def append(name: str, parent: int, lines: bytes) -> int:
    """Add whole lines to a log, under its lock; its size in bytes. On OSError nothing is added."""
    flags = os.O_RDWR | os.O_APPEND
    with closing(_opened_or_made(name, parent, flags, file_mode(os.fstat(parent)))) as fd:
        _check(os.fstat(fd), name, os.fstat(parent), alone=True)
        size = _cut_half_line(fd, os.fstat(fd).st_size)  # such as a kill left
        try:
            _write_all(fd, lines)
        except OSError:
            os.ftruncate(fd, size)
            raise
        return size + len(lines)


def _cut_half_line(fd: int, size: int) -> int:
    if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
        return size
    whole, end = size, 0
    while whole and not end:
        if size - whole > _LONGEST_LINE:
            raise NoLogError(errno.EINVAL, f"its last line is incomplete ({_LONGEST_LINE:,} bytes)")
        start = max(0, whole - _PIECE)
        end = os.pread(fd, whole - start, start).rfind(b"\n") + 1
        whole = start + end
    os.ftruncate(fd, whole)
    return whole


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _renamed(name: str, parent: int, new_name: str, new_parent: int, how: int) -> bool:
    """Rename in one of the kernel's ways; whether that can be done here. Raises OSError."""
    if _renameat2 is None:
        return False
    names = os.fsencode(name), os.fsencode(new_name)
    if _renameat2(parent, names[0], new_parent, names[1], how) == 0:
        return True
    code = ctypes.get_errno()
    if code not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(code, os.strerror(code), name)
    return False


def move(name: str, parent: int, new_name: str, new_parent: int, *, private: bool = False) -> None:
    """Rename, never over an existing name (FileExistsError), which `private` folders don't have."""
    if private:
        os.rename(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent)
        return
    if _renamed(name, parent, new_name, new_parent, _NO_REPLACE):
        return
    # No such rename here: a second name first (it fails where one exists), then the old one goes.
    try:
        second_name(name, parent, new_name, new_parent)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # There are no second names either: all that can be done is to look first.
        with contextlib.suppress(FileNotFoundError):
            os.stat(new_name, dir_fd=new_parent, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new_name) from None
        os.rename(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent)
    else:
        os.unlink(name, dir_fd=parent)


def replace(name: str, parent: int, new_name: str, new_parent: int) -> None:
    """Rename over an existing name: for what a repair or a guard puts in an old file's place."""
    os.rename(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent)


def exchange(name: str, parent: int, new_name: str, new_parent: int) -> None:
    """Exchange what two names stand for, at once; where that can't be, one after the other."""
    if _renamed(new_name, new_parent, name, parent, _EXCHANGE):
        return
    aside = between(name)
    os.rename(new_name, aside, src_dir_fd=new_parent, dst_dir_fd=parent)
    os.rename(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent)
    os.rename(aside, name, src_dir_fd=parent, dst_dir_fd=parent)


def between(name: str) -> str:
    """Where a kill leaves what is exchanged by one rename after the other, or written."""
    return f".{name}.new"


def set_aside(name: str, parent: int) -> None:
    """Keep a damaged file of ours as ``<name>.damaged``, with a number where that can't be."""
    for number in itertools.count():
        try:
            replace(name, parent, f"{name}.damaged{f'-{number}' if number else ''}", parent)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return


def second_name(name: str, parent: int, new_name: str, new_parent: int) -> None:
    """Give a file a second name (a hard link). Raises FileExistsError."""
    os.link(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent, follow_symlinks=False)


def remove(name: str, parent: int) -> None:
    """Unlink a file that was moved out of the store before, or that is ours."""
    os.unlink(name, dir_fd=parent)


def remove_folder(name: str, parent: int) -> None:
    os.rmdir(name, dir_fd=parent)


def touch(name: str, parent: int, at_ns: int, names: int = 1) -> None:
    """Set both times of a regular file; of root's none with more `names`, maybe elsewhere."""
    with closing(os.open(name, os.O_RDONLY | os.O_CLOEXEC | _CAREFULLY, dir_fd=parent)) as fd:
        status = os.fstat(fd)
        alone = status.st_nlink <= names or os.geteuid() != 0
        if stat.S_ISREG(status.st_mode) and alone:
            os.utime(fd, ns=(at_ns, at_ns))


def sync(folder: int) -> None:
    """Bring a folder's names to the disk (file systems that can't answer EINVAL)."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def write_back(fd: int, start: int, end: int) -> None:
    """Have the data in ``[start, end)`` written, if possible; the rest is left to `data_synced`."""
    if _sync_file_range is None or end <= start:
        return
    reach = ctypes.c_int64(start), ctypes.c_int64(end - start)
    if _sync_file_range(fd, *reach, _WAIT_WRITE_WAIT) != 0:
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.ESPIPE):
            raise OSError(code, os.strerror(code))


def data_synced(fds: Sequence[int]) -> Callable[[], int | None]:
    """Begin to bring the data of some files to the disk; returns what reports how that ended.

    None while it goes on, 0, or the errno. It happens in a child, which can be left behind: a
    process that waits for a disk that has gone can't even be killed.
    """
    with warnings.catch_warnings():
        # The child of a process with threads runs nothing that could wait for one of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            child = os.fork()
        except OSError:  # no process more is allowed: then this one waits
            here = _first_error(fds)
            return lambda: here
    if child == 0:
        _sync_and_exit(fds)
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


def _sync_and_exit(fds: Sequence[int]) -> NoReturn:
    # Nothing of its parent's stays open in the child: no lock, and nobody's pipe.
    code = errno.EIO
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        try:
            last = max(map(int, os.listdir("/proc/self/fd")))
        except OSError:
            last = min(os.sysconf("SC_OPEN_MAX"), _MANY_FILES)
        start = 0
        for fd in (*sorted(fds), last + 1):
            os.closerange(start, fd)
            start = fd + 1
        privileges.give_up()
        code = _first_error(fds)
    finally:
        os._exit(code)


def _first_error(fds: Sequence[int]) -> int:
    """The errno of the first sync that failed, after all; 0 where the file system can't do it."""
    first = 0
    for fd in fds:
        try:
            _fdatasync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:
                first = first or error.errno or errno.EIO
    return first


def drop_cache(fd: int) -> None:
    """Have later reads ask the disk: after a write error memory may hold what the disk has not."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


class BusyError(WatchError):
    """Somebody else has the lock; `owner` is what they wrote into it."""

    def __init__(self, owner: str) -> None:
        super().__init__(f"the lock is held by {owner or 'another process'}")
        self.owner = owner


_OWNER = re.compile(r"pid ([0-9]{1,9}) since (\S{1,40})")  #: what `locked` writes into a lock


@contextlib.contextmanager
def locked(name: str, parent: int, *, seconds: float = 0.0) -> Iterator[int]:
    """Hold a lock file (flock, so threads count, too); who holds it is written in.

    Nobody can open it who may not write to the folder. Raises OSError for what is no file of ours,
    and BusyError where it stays held for so long, or this process is asked to end meanwhile.
    """
    with closing(_take(name, parent, time.monotonic() + seconds)) as fd:
        owner = f"pid {os.getpid()} since {_rfc3339(time.time())}"
        # A full disk must not keep anyone from acting; the text is for people only.
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{owner}\n".encode(), 0)
        yield fd


def _take(name: str, parent: int, until: float) -> int:
    while True:
        fd = _opened_or_made(name, parent, os.O_RDWR, lock_mode(os.fstat(parent)))
        with _closed_on_error(fd):
            _check(os.fstat(fd), name, os.fstat(parent), alone=True)
            mode = lock_mode(os.fstat(parent))
            if stat.S_IMODE(os.fstat(fd).st_mode) & ~mode:
                # Somebody has opened it to users who may not write to the folder.
                with contextlib.suppress(OSError):
                    os.fchmod(fd, mode)
            _wait_for(fd, until)
            if is_named(fd, name, parent):
                return fd
        os.close(fd)


def is_named(fd: int, name: str, folder: int) -> bool:
    """Whether an open file still has its name in a folder: of a lock, else somebody may hold it."""
    try:
        named = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(fd), named)


def _wait_for(fd: int, until: float) -> None:
    """Wait for a lock. Raises BusyError."""
    pause = _FIRST_PAUSE
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() >= stopping.no_later(until):
            raise BusyError(_text(fd))
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def holder(name: str, parent: int) -> tuple[int | None, str] | None:
    """Who holds a lock of ours, if known, and since when (RFC 3339, or ""); None: nobody seen."""
    try:
        fd = open_to_read(name, parent)
    except PermissionError:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        pids = flocks.holders(status)
        return (pids[0], _rfc3339(status.st_mtime)) if pids else None
    with closing(fd):
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if written := _OWNER.match(_text(fd)):
                return int(written[1]), written[2]
            pids = flocks.holders(os.fstat(fd))
            return (pids[0], _rfc3339(os.fstat(fd).st_mtime)) if pids else (None, "")
    return None


def _text(fd: int) -> str:
    return os.pread(fd, 200, 0).decode("utf-8", "replace").strip()


def _rfc3339(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(max(0.0, min(at, LAST_DAY))))


#: What says that a file system, or a kernel, does not copy by itself.
_NO_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})


def open_data(name: str, parent: int) -> int:
    """A file of ours to be read and written anywhere; made if need be. OSError, as `_check`."""
    fd = _opened_or_made(name, parent, os.O_RDWR, file_mode(os.fstat(parent)))
    with _closed_on_error(fd):
        _check(os.fstat(fd), name, os.fstat(parent), alone=True)
    return fd


def write_at(fd: int, pieces: Sequence[bytes], at: int) -> None:
    """Write all of some pieces, one behind the other, to a place in such a file."""
    left = sum(map(len, pieces))
    while left:
        count = os.pwritev(fd, pieces, at)
        at, left = at + count, left - count
        if left:
            pieces = [b"".join(pieces)[count:]]


def cut(fd: int, size: int) -> None:
    """Give such a file a length; what lay behind it is gone."""
    os.ftruncate(fd, size)


def blank(fd: int, start: int, end: int) -> None:
    """Make zeros of the bytes ``[start, end)`` of such a file, as where nothing was written."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # a hole, or the end
        piece = os.pread(fd, min(_PIECE, max(0, end - start)), start)
        if not piece:
            return
        if any(piece):
            write_at(fd, [bytes(len(piece))], start)
        start += len(piece)


def copy(source: int, fd: int, start: int, end: int) -> None:
    """Copy bytes to the same place, shared if possible. Raises OSError: ENODATA at an early end."""
    while start < end:
        try:
            count = os.copy_file_range(source, fd, end - start, start, start)
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
            piece = os.pread(source, min(end - start, _PIECE), start)
            write_at(fd, [piece], start)
            count = len(piece)
        if count == 0:
            raise OSError(errno.ENODATA, "the file ended before")
        start += count


def sync_data(fd: int) -> None:
    """Bring a file's data to the disk. Raises OSError; then what was written may be lost."""
    if code := _first_error([fd]):
        raise OSError(code, os.strerror(code))


def make_blob(fd: int, blobs: int) -> None:
    """Give a file of ours the owner, the mode and the times of what a server has just fetched."""
    _settle(fd, os.fstat(blobs), FILE_MODE)
    os.utime(fd)
    os.fsync(fd)

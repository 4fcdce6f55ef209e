"""The one way to a store's folder, and the one to its ``blobs``: name by name, by descriptor.

A symlink on the way counts only if it belongs to root or to the owner of what it points to: nobody
else can lead us, root above all, into a folder that they couldn't change themselves. What lies
behind another symlink is *foreign*: it may be looked at and is never changed.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from watcher.model import ForeignLink
from watcher.ollama import names
from watcher.state import fs

#: To look at a name before it is opened: a descriptor of whatever it is, a symlink itself included.
_LOOK = getattr(os, "O_PATH", 0) | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY
#: To look into a folder by names that are known: it need not be listed for that.
UNLISTED = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_AT_FDCWD = -100  #: the working directory, in place of a descriptor (fcntl.h)
_MOST_LINKS = 40  #: MAXSYMLINKS of the kernel
#: What can be in a folder's place, by the error of opening it.
NO_FOLDER = {
    errno.ENOENT: "it is a dangling symlink",
    errno.ELOOP: "its links lead in a circle",
    errno.ENOTDIR: "it is not a folder",
}


def down_to(path: str) -> list[str]:
    """The folders on a whole path, from the root down to its own."""
    return [path[:at] or "/" for at, char in enumerate(f"{path}/") if char == "/"]


class _At(NamedTuple):
    fd: int
    path: str


class _Links:
    def __init__(self) -> None:
        self.foreign: ForeignLink | None = None
        self.count = 0

    def forbid(self) -> None:
        if self.foreign is not None:
            raise ForeignLinkError(self.foreign)


class ForeignLinkError(OSError):
    """A symlink belongs neither to root nor to the owner of what it points to."""

    def __init__(self, link: ForeignLink) -> None:
        super().__init__(errno.ELOOP, names.of_link(link), link.path)
        self.link = link


class NotRootsError(PermissionError):
    """A store belongs to somebody, and is not opened with root's rights."""

    def __init__(self, uid: int, path: str) -> None:
        why = f"it belongs to user id {uid}, and is opened only with that user's rights"
        super().__init__(errno.EACCES, why, path)
        self.uid = uid


class Way(NamedTuple):
    real: str  #: the same without symlinks
    is_store: bool  #: whether the folder holds ``blobs`` or ``manifests``
    foreign: ForeignLink | None  #: the first symlink on the way that does not count, if any


class Blobs(NamedTuple):
    """What is at the name ``blobs`` of a store."""

    linked: bool  #: whether it is a symlink
    status: os.stat_result | None  #: what is there, a symlink followed; None where nothing is
    foreign: ForeignLink | None = None


@contextlib.contextmanager
def opened_store(path: str) -> Iterator[int]:
    """A store's folder. Raises OSError: ForeignLinkError, and NotRootsError for root's rights."""
    with _reached(path) as (at, links):
        links.forbid()
        if os.geteuid() == 0 and (uid := _owner(at.fd).st_uid):
            raise NotRootsError(uid, path)
        try:
            fd = fs.open_quietly(".", _FOLDER, at.fd)
        except OSError as error:
            error.filename = path  # not "."
            raise
    with fs.closing(fd):
        yield fd


@contextlib.contextmanager
def opened_blobs(store: int, *, foreign_too: bool = False) -> Iterator[int]:
    """The folder that the blobs lie in. Raises OSError: ForeignLinkError unless `foreign_too`."""
    try:
        fd = fs.open_quietly("blobs", _FOLDER | os.O_NOFOLLOW, store)
    except NotADirectoryError:
        fd = _linked_blobs(store, foreign_too=foreign_too)
    with fs.closing(fd):
        yield fd


def way(path: str) -> Way:
    """Where a path to a folder leads, foreign or not. Raises OSError where it can't be seen."""
    with _reached(path) as (at, links):
        is_store = False
        for name in ("blobs", "manifests"):
            with contextlib.suppress(FileNotFoundError):
                os.stat(name, dir_fd=at.fd, follow_symlinks=False)
                is_store = True
        return Way(at.path, is_store, links.foreign)


def look(path: str) -> tuple[os.stat_result, Blobs]:
    """A store's folder, and what is at the name ``blobs`` in it. Raises OSError."""
    with _reached(path) as (at, _):
        return os.fstat(at.fd), look_at_blobs(at.fd)


@contextlib.contextmanager
def opened_output(path: str) -> Iterator[int]:
    """A file that somebody asks for, to be written later, when we may be another user. OSError."""
    folder, name = os.path.split(os.path.abspath(path))
    with _reached(folder) as (at, links):
        links.forbid()
        fd = fs.open_output(name, at.fd)
    with fs.closing(fd):
        yield fd


def owner(path: str) -> os.stat_result:
    """The folder whose owner a store belongs to: the one that the blobs lie in. Raises OSError.

    Where root owns that one, or there is none, it is the store's: whoever owns that can put another
    one in its place. Of a store that is not there yet it is the nearest folder above.
    """
    while True:
        with contextlib.suppress(FileNotFoundError), _reached(path) as (at, _):
            return _owner(at.fd)
        path = os.path.dirname(path)


def _owner(store: int) -> os.stat_result:
    blobs = look_at_blobs(store)
    there = blobs.status
    if there is None or blobs.foreign is not None or not stat.S_ISDIR(there.st_mode):
        return os.fstat(store)
    return there if there.st_uid else os.fstat(store)


def look_at_blobs(store: int) -> Blobs:
    """What is at the name ``blobs`` of a store, foreign or not."""
    try:
        status = os.stat("blobs", dir_fd=store, follow_symlinks=False)
    except OSError:
        return Blobs(False, None)
    if not stat.S_ISLNK(status.st_mode):
        return Blobs(False, status)
    with contextlib.suppress(OSError):
        try:
            with _reached("blobs", _At(store, "")) as (at, links):
                return Blobs(True, os.fstat(at.fd), links.foreign)
        except NotADirectoryError:
            return Blobs(True, os.stat("blobs", dir_fd=store))
    return Blobs(True, None)


def _linked_blobs(store: int, *, foreign_too: bool) -> int:
    try:
        with _reached("blobs", _At(store, "")) as (at, links):
            if not foreign_too:
                links.forbid()
            return fs.open_quietly(".", _FOLDER, at.fd)
    except ForeignLinkError:
        raise
    except OSError as error:
        why = NO_FOLDER.get(error.errno or 0)
        if why is None:
            raise
        # Not the FileNotFoundError of a store that has no blobs yet: something is there.
        raise NotADirectoryError(errno.ENOTDIR, why, "blobs") from error


#: Where the way to a store begins, by its path, for the owner who could not go all of it.
_begun: dict[str, tuple[_At, str]] = {}


class KeptWay:
    """The way to a store as root goes it, for the owner, who may not get there by themselves."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._steps: list[tuple[_At, str]] = []
        at, names = _At(os.open("/", _LOOK), "/"), _names(path)
        with contextlib.suppress(FileNotFoundError):
            for number, name in enumerate(names):
                self._steps.append((at, "/".join(names[number:])))
                at = _step(name, at, _Links())
            self._steps.append((at, "."))

    def begin(self) -> None:
        """Begin the way, from now on, where this user can go on: mostly at its start."""
        for at, rest in self._steps:
            may_go = True
            try:
                with _reached(rest, at):
                    pass
            except OSError as error:
                may_go = not isinstance(error, PermissionError)
            if self._path not in _begun and may_go:
                _begun[self._path] = at, rest
            else:
                os.close(at.fd)


def begins_further_on(path: str) -> bool:
    """Whether a store lies where we can't go from the root folder on."""
    return path in _begun and _begun[path][0].path != "/"


@contextlib.contextmanager
def _reached(path: str, start: _At | None = None) -> Iterator[tuple[_At, _Links]]:
    links = _Links()
    if start is None:
        start, path = _begun.get(path, (_At(_AT_FDCWD, ""), path))
    at = _along(path, start, links)
    with fs.closing(at.fd):
        yield at, links


def _along(path: str, start: _At, links: _Links) -> _At:
    top, real = ("/", "/") if path.startswith("/") else (".", start.path)
    at = _At(os.open(top, _LOOK, dir_fd=start.fd), real)
    for name in _names(path):
        with fs.closing(at.fd):
            at = _step(name, at, links)
    return at


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


def _step(name: str, at: _At, links: _Links) -> _At:
    inside = os.path.normpath(os.path.join(at.path, name))
    fd = os.open(name, _LOOK, dir_fd=at.fd)
    kind = os.fstat(fd).st_mode
    if stat.S_ISDIR(kind):
        return _At(fd, inside)
    with fs.closing(fd):
        if not stat.S_ISLNK(kind):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), inside)
        links.count += 1
        if links.count > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), inside)
        behind = _behind(fd, at, inside, links)
        uid, target = os.fstat(fd).st_uid, os.fstat(behind.fd).st_uid
        if uid not in (0, target, *_kernels(fd)) and links.foreign is None:
            links.foreign = ForeignLink(inside, uid, behind.path, target)
        return behind


def _kernels(link: int) -> tuple[int, ...]:
    """The kernel's own id, of a link in ``/proc``; in a user's namespace that is not 0."""
    with contextlib.suppress(OSError):
        own = os.lstat("/proc/self")
        if os.fstat(link).st_dev == own.st_dev:
            return (own.st_uid,)
    return ()


def _behind(link: int, at: _At, inside: str, links: _Links) -> _At:
    target = os.readlink("", dir_fd=link)
    if _kernels(link):
        # Such as /proc/<pid>/root: it does not lead where its text does, and nobody can make one.
        name = os.path.basename(inside)
        return _At(os.open(name, UNLISTED, dir_fd=at.fd), inside)
    return _along(target, at, links)

"""The one way to a store's folder, and the one to its ``blobs``: name by name, by descriptor.

Real folders are entered whoever owns the folder that they lie in. A symlink on the way counts only
if it belongs to root or to the owner of what it points to: nobody else can lead us, root above all,
into a folder that they couldn't change themselves. What lies behind another symlink is *foreign*:
it may be looked at and is never changed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from watcher import files

#: To look at a name before it is opened: a descriptor of whatever it is, a symlink itself included.
_LOOK = getattr(os, "O_PATH", 0) | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY
#: So many symlinks on one way, and they lead in a circle (MAXSYMLINKS of the kernel).
_MOST_LINKS = 40


class ForeignLinkError(OSError):
    """A symlink belongs neither to root nor to the owner of what it points to."""

    def __init__(self, link: str, link_uid: int, target: str, target_uid: int) -> None:
        why = f"a symlink of user id {link_uid} leads to a folder of user id {target_uid}"
        super().__init__(errno.ELOOP, why, link)
        self.link, self.link_uid = link, link_uid
        #: What it points to, its own symlinks resolved.
        self.target, self.target_uid = target, target_uid


class Way(NamedTuple):
    """Where a path leads."""

    #: The same without symlinks.
    real: str
    #: Whether the folder holds ``blobs`` or ``manifests``.
    is_store: bool
    #: The first symlink on the way that does not count, if any.
    foreign: ForeignLinkError | None


class Blobs(NamedTuple):
    """What is at the name ``blobs`` of a store."""

    #: Whether it is a symlink.
    linked: bool
    #: What is there, a symlink followed; None where nothing is.
    status: os.stat_result | None
    foreign: ForeignLinkError | None = None


@contextlib.contextmanager
def opened_store(path: str) -> Iterator[int]:
    """The descriptor of a store's folder. Raises OSError, ForeignLinkError among them."""
    with _reached(path) as (at, links):
        links.forbid()
        fd = files.open_quietly(".", _FOLDER, at.fd)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened_blobs(store: int, *, foreign_too: bool = False) -> Iterator[int]:
    """The descriptor of the folder that a store's blobs lie in. Raises OSError.

    `foreign_too`: also where it is foreign, for who only reads; else that raises ForeignLinkError.
    """
    fd = _blobs(store, foreign_too=foreign_too)
    try:
        yield fd
    finally:
        os.close(fd)


def way(path: str) -> Way:
    """Where a path to a folder leads, foreign or not. Raises OSError.

    PermissionError also where that folder can't be looked into.
    """
    with _reached(path) as (at, links):
        is_store = any(_is_there(name, at.fd) for name in ("blobs", "manifests"))
        return Way(at.path, is_store, links.foreign)


def look_at_blobs(store: int) -> Blobs:
    """What is at the name ``blobs`` of a store, foreign or not."""
    try:
        status = os.stat("blobs", dir_fd=store, follow_symlinks=False)
    except OSError:
        return Blobs(False, None)
    if not stat.S_ISLNK(status.st_mode):
        return Blobs(False, status)
    try:
        with _reached("blobs", store) as (at, links):
            return Blobs(True, os.fstat(at.fd), links.foreign)
    except NotADirectoryError:
        with contextlib.suppress(OSError):
            return Blobs(True, os.stat("blobs", dir_fd=store))
    except OSError:
        pass
    return Blobs(True, None)


def _is_there(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _blobs(store: int, *, foreign_too: bool) -> int:
    try:
        return files.open_quietly("blobs", _FOLDER | os.O_NOFOLLOW, store)
    except NotADirectoryError:
        pass  # a symlink, or no folder at all
    with _reached("blobs", store) as (at, links):
        if not foreign_too:
            links.forbid()
        return files.open_quietly(".", _FOLDER, at.fd)


# ---------------------------------------------------------------- the walk


class _At(NamedTuple):
    """A folder on the way: its descriptor, and its path without symlinks."""

    fd: int
    path: str


class _Links:
    """The symlinks that were met on one way."""

    def __init__(self) -> None:
        self.foreign: ForeignLinkError | None = None
        self._count = 0

    def forbid(self) -> None:
        """Raise what forbids to change anything at the end of the way."""
        if self.foreign is not None:
            raise self.foreign

    def meet(self, name: str) -> None:
        self._count += 1
        if self._count > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)

    def judge(self, link: str, owner: int, behind: _At) -> None:
        target = os.fstat(behind.fd).st_uid
        if owner not in (0, target) and self.foreign is None:
            self.foreign = ForeignLinkError(link, owner, behind.path, target)


@contextlib.contextmanager
def _reached(path: str, start: int | None = None) -> Iterator[tuple[_At, _Links]]:
    """The folder at the end of a path, which begins at the folder `start`, and the links met."""
    links = _Links()
    began = _At(os.open(".", _LOOK, dir_fd=start), "" if start is not None else ".")
    try:
        at = _along(path, began, links)
    finally:
        os.close(began.fd)
    try:
        yield at, links
    finally:
        os.close(at.fd)


def _along(path: str, start: _At, links: _Links) -> _At:
    """Walk a path name by name; the descriptor given back is a new one."""
    first = ("/", None) if path.startswith("/") else (".", start.fd)
    at = _At(os.open(first[0], _LOOK, dir_fd=first[1]), "/" if first[1] is None else start.path)
    for name in path.split("/"):
        if name not in ("", "."):
            try:
                beyond = _step(name, at, links)
            finally:
                os.close(at.fd)
            at = beyond
    return at


def _step(name: str, at: _At, links: _Links) -> _At:
    inside = os.path.normpath(os.path.join(at.path, name))
    fd = os.open(name, _LOOK, dir_fd=at.fd)
    kind = os.fstat(fd).st_mode
    if stat.S_ISDIR(kind):
        return _At(fd, inside)
    try:
        if not stat.S_ISLNK(kind):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), inside)
        links.meet(inside)
        behind = _behind(fd, at, inside, links)
        links.judge(inside, os.fstat(fd).st_uid, behind)
        return behind
    finally:
        os.close(fd)


def _behind(link: int, at: _At, inside: str, links: _Links) -> _At:
    """What a symlink points to."""
    target = os.readlink("", dir_fd=link)
    if _is_magic(link):
        # Such as /proc/<pid>/root: it does not lead where its text says, and nobody can make one.
        name = os.path.basename(inside)
        return _At(os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at.fd), inside)
    return _along(target, at, links)


def _is_magic(link: int) -> bool:
    try:
        return os.fstat(link).st_dev == os.stat("/proc/self").st_dev
    except OSError:
        return False

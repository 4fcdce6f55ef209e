"""``.ollama-watch/`` of a store: whose it is, and how it is opened and made.

It is input: what is written there has files of ``blobs/`` moved. So it counts only if it belongs to
the owner of the folder that the blobs lie in, to root, or to somebody who may write to that folder
anyway. Else nothing in it is believed, and nothing is done.
"""

import contextlib
import errno
import os
import pwd
import stat
from collections.abc import Iterator
from typing import NamedTuple

from watcher.errors import RefusedError
from watcher.ollama import names
from watcher.state import folders, fs
from watcher.system import advice

FOLDER = ".ollama-watch"
QUARANTINE = "quarantine"
#: The locks of whoever serves a store: a daemon, and who runs the queue.
DAEMON_LOCK = "daemon.lock"
QUEUE_LOCK = "queue.lock"


class ForeignError(PermissionError):
    """Our folder, or one in it, belongs to somebody who has no rights in the store."""

    def __init__(self, name: str, found: int, wanted: fs.Ids) -> None:
        why = f"it belongs to user id {found}, not to root or to {wanted[0]}, who owns the blobs"
        super().__init__(errno.EPERM, why, name)
        self.found = found
        self.wanted = wanted  #: whose it should be


@contextlib.contextmanager
def opened(store: int, inside: str = "") -> Iterator[int]:
    """Our folder of a store, or a folder `inside` it. Raises ForeignError, and OSError."""
    with fs.opened_folder(FOLDER, store) as fd:
        found, blobs, top = os.fstat(fd), _blobs(store), os.fstat(store)
        if found.st_uid not in (0, blobs.st_uid):
            # Whoever may write to blobs/ can do there himself what our folder could have us do.
            mode = 0 if blobs.st_mode & stat.S_ISVTX else blobs.st_mode
            alike = found.st_gid == blobs.st_gid == top.st_gid and not top.st_mode & stat.S_IWOTH
            if not (mode & stat.S_IWOTH or (mode & stat.S_IWGRP and alike)):
                raise ForeignError(FOLDER, found.st_uid, _owner(store))
        with opened_in(inside, fd) if inside else contextlib.nullcontext(fd) as folder:
            yield folder


@contextlib.contextmanager
def made(store: int, inside: str = "") -> Iterator[int]:
    """The same; it is made where there is none."""
    is_new = fs.ensure_folder(FOLDER, store, owner=_owner(store))
    odd = oddity(store) if is_new else None
    if odd is not None:
        # Left there, it would keep those out who own the blobs.
        fs.remove_folder(FOLDER, store)
        why = "the owner of the blobs is not in the store's group, and could not write there"
        if odd[2]:
            why = f"the blobs belong to user id {odd[1][0]}"
        raise PermissionError(errno.EACCES, why, FOLDER)
    with (
        opened(store) as fd,
        made_in(inside, fd) if inside else contextlib.nullcontext(fd) as folder,
    ):
        yield folder


@contextlib.contextmanager
def opened_in(name: str, ours: int) -> Iterator[int]:
    """A folder in ours. Raises OSError, with EINVAL where it is somebody else's."""
    with fs.opened_folder(name, ours) as fd:
        found, above = os.fstat(fd), os.fstat(ours)
        if not fs.is_trusted(found, above):
            raise OSError(errno.EINVAL, f"it belongs to user id {found.st_uid}", name)
        yield fd


@contextlib.contextmanager
def made_in(name: str, ours: int) -> Iterator[int]:
    """The same; it is made where there is none."""
    fs.ensure_folder(name, ours)
    with opened_in(name, ours) as fd:
        yield fd


class LongLock:
    """A lock held for long, maybe in a folder in ours: taken anew where either was removed."""

    def __init__(self, name: str, inside: str = "") -> None:
        self._name, self._inside = name, inside
        self._opened = contextlib.ExitStack()
        self._held: int | None = None

    def hold(self, store: int, seconds: float = 0.0) -> bool:
        """Hold it, or raise BusyError or OSError; returns whether it was not held just before."""
        with made(store, self._inside) as folder:
            if self._held is not None and fs.is_named(self._held, self._name, folder):
                return False
            self.release()
            lock = fs.locked(self._name, folder, seconds=seconds)
            self._held = self._opened.enter_context(lock)
            return True

    def release(self) -> None:
        self._held = None
        self._opened.close()


class Running(NamedTuple):
    """A process that serves a store: since when (RFC 3339), and whether it is the daemon."""

    pid: int | None
    since: str
    is_daemon: bool = True


def daemon(store: str) -> Running | None:
    """The daemon that watches a store; None where there is none, or that is unknown."""
    return _holder(store, DAEMON_LOCK)


def queue_runner(store: str) -> Running | None:
    """What runs the queue of a store, a daemon or ``queue run``; None where nothing is seen to."""
    found, watching = _holder(store, QUEUE_LOCK), daemon(store)
    return found and found._replace(is_daemon=watching is not None and watching.pid == found.pid)


def _holder(store: str, lock: str) -> Running | None:
    found = None
    with contextlib.suppress(OSError), folders.opened_store(store) as fd, opened(fd) as ours:
        found = fs.holder(lock, ours)
    return found and Running(*found)


def oddity(store: int) -> tuple[int, fs.Ids, bool] | None:
    """What is wrong with our folder of a store, as `Place.state_owner` has it; None for nothing."""
    try:
        with opened(store) as fd:
            found, owner = os.fstat(fd), _blobs(store)
    except ForeignError as error:
        return error.found, error.wanted, True
    except OSError:
        return None
    by_group = bool(found.st_mode & 0o020)
    with contextlib.suppress(KeyError):  # of a user who is not known that is unknown
        user = pwd.getpwuid(owner.st_uid)
        by_group = by_group and found.st_gid in os.getgrouplist(user.pw_name, user.pw_gid)
    if owner.st_uid in (0, found.st_uid) or by_group or found.st_mode & 0o002:
        return None
    return found.st_uid, _owner(store), False


def cure(store: str) -> str:
    """The command by which the owner of the blobs can write to our folder; "" where he can."""
    odd = None
    with contextlib.suppress(OSError), folders.opened_store(store) as fd:
        odd = oddity(fd)
    return _give_back(os.path.join(store, FOLDER), odd[1]) if odd else ""


def refusal(store: str, error: ForeignError) -> RefusedError:
    """The error for whoever wants to act where our folder is somebody else's."""
    path = os.path.join(store, FOLDER)
    why = f"{error.strerror}; its content is ignored, and nothing is changed"
    helps, command = "check its content; if it is yours:", _give_back(path, error.wanted)
    return RefusedError(f"{names.printable(path)}: {why}", helps, command)


def check(store: str) -> None:
    """Raise RefusedError where nothing may be done, since our folder is somebody else's."""
    with contextlib.suppress(OSError), folders.opened_store(store) as fd:
        try:
            with opened(fd):
                pass
        except ForeignError as error:
            raise refusal(store, error) from None


def _give_back(path: str, wanted: fs.Ids) -> str:
    return advice.as_root("chown", "-hR", f"{wanted[0]}:{wanted[1]}", path)


def _owner(store: int) -> fs.Ids:
    return _blobs(store).st_uid, os.fstat(store).st_gid


def _blobs(store: int) -> os.stat_result:
    return folders.look_at_blobs(store).status or os.fstat(store)

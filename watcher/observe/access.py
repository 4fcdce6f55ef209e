"""Who the server runs as, and what of a store that user can't use as a server has to."""

import contextlib
import os
import pwd
from collections.abc import Iterable

from watcher import model
from watcher.model import Barred, Entry, Kind, Located, Need, ServerUser, Subject
from watcher.observe import unit
from watcher.observe.host import Host
from watcher.state import state_folder
from watcher.system import flocks, privileges

_OVERRIDES = 1 << 1  # CAP_DAC_OVERRIDE of linux/capability.h
_RIGHTS = {Need.READ: 0o4, Need.WRITE: 0o6}
_RIGHTS_IN_FOLDERS = {Need.READ: 0o5, Need.WRITE: 0o3, Need.ENTER: 0o1}
_FIRST = 3  #: so many of the names that are barred alike are kept


def next_start(host: Host, store: int) -> model.NextStart:
    """What a start goes by besides the store (a descriptor): by the unit, if it is of this one."""
    found, server = unit.from_files(host.system), None
    with contextlib.suppress(OSError):
        if found and os.path.samestat(os.stat(found.store or ""), os.fstat(store)):
            server = found
    return model.NextStart(
        user=user_of(store, server),
        no_prune=server is not None and server.no_prune,
        prepared=server is not None and server.prepares(host.store),
        watched=state_folder.daemon(host.store) is not None,
    )


def user_of(store: int, server: unit.Unit | None) -> ServerUser:
    """Who a server of the store behind a descriptor would run as: by its unit, else its owner."""
    ids = None if server is None or server.idle else server.ids()
    if ids is not None:
        return ServerUser(*ids, by=f"the unit {unit.NAME}", unbarred=ids[0] == 0)
    status = os.fstat(store)
    for name in ("blobs", "manifests"):
        if status.st_uid != 0:
            break
        with contextlib.suppress(OSError):
            status = os.stat(name, dir_fd=store)
    uid, groups = status.st_uid, [status.st_gid]
    with contextlib.suppress(KeyError, OverflowError):
        found = pwd.getpwuid(uid)
        groups = os.getgrouplist(found.pw_name, found.pw_gid)
    return ServerUser(uid, frozenset(groups), unbarred=uid == 0)


def running(host: Host, servers: Iterable[model.Server]) -> ServerUser | None:
    """Who a running server of the store runs as; None where there is none, or that is unknown."""
    unknown = contextlib.suppress(OSError, ValueError, KeyError, IndexError)
    for server in (each for each in servers if each.ours):
        with unknown, privileges.visibility():
            status = flocks.facts(server.pid, host.proc)
            here = os.readlink(f"{host.proc}/self/ns/mnt")
            return ServerUser(
                # The last of four is the one that counts for files.
                int(status["Uid"][3]),
                frozenset(map(int, (status["Gid"][3], *status["Groups"]))),
                by=f"the running server, pid {server.pid}",
                unbarred=bool(int(status["CapEff"][0], 16) & _OVERRIDES),
                elsewhere=os.readlink(f"{host.proc}/{server.pid}/ns/mnt") != here,
            )
    return None


class Access:
    """What the server's user can't use of a store, gathered while that is walked through."""

    def __init__(self, user: ServerUser) -> None:
        self.user = user
        self.unlisted: list[str] = []  #: folders below the store that the user can't list
        self._barred: dict[tuple[Subject, Need, bool], Barred] = {}

    def folder(self, fd: int, status: os.stat_result, need: Need, name: str = ".") -> bool:
        """Whether the user may use an open folder so, or the one of this name in it."""
        return self._may(status, _RIGHTS_IN_FOLDERS[need]) or _has_rules(fd, name)

    def shut(self, path: str, entry: Entry, folder: int) -> None:
        """Keep in mind that the user can't list a folder below the store."""
        self.unlisted.append(path)
        subject = Subject.MANIFEST_FOLDER if path.startswith("manifests") else Subject.FOLDER
        self.bar(subject, Need.READ, path, entry, folder)

    def file(self, status: os.stat_result | Entry, need: Need) -> bool:
        """Whether the user may use a file so, by its owner and mode."""
        return self._may(status, _RIGHTS[need])

    def _may(self, of: os.stat_result | Entry, wanted: int) -> bool:
        if isinstance(of, Entry):
            return self.user.may(wanted, of.mode, of.uid, of.gid)
        return self.user.may(wanted, of.st_mode, of.st_uid, of.st_gid)

    def bar(self, subject: Subject, need: Need, path: str, entry: Entry, folder: int) -> None:
        """Keep in mind that the user can't use a name in an open folder so."""
        key = subject, need, entry.uid == self.user.uid
        *_, total, first = self._barred.get(key, Barred(*key, 0, ()))
        if len(first) < _FIRST:
            if entry.kind is Kind.FILE and _has_rules(folder, entry.name):
                return  # rules of its own (an access control list) may let the user in
            first = (*first, Located(path, entry))
        self._barred[key] = Barred(*key, total + 1, first)

    def result(self) -> tuple[Barred, ...]:
        return tuple(self._barred[key] for key in sorted(self._barred))


def _has_rules(folder: int, name: str = ".") -> bool:
    """Whether an access control list decides, which a mode does not show."""
    with contextlib.suppress(OSError):
        os.getxattr(f"/proc/self/fd/{folder}/{name}", "system.posix_acl_access")
        return True
    return False

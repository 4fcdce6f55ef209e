"""Which store, and what it stands on."""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from watcher.errors import NoPermissionError, NoStoreError, RefusedError
from watcher.model import ForeignLink, Place
from watcher.observe import processes, unit
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.ollama.environment import trimmed
from watcher.state import folders, state_folder, transfers
from watcher.system import advice

SERVICE_STORE = "/usr/share/ollama/.ollama/models"
OTHER_STORE = "/var/lib/ollama/models"

_BELOW = ("models", ".ollama/models", "ollama/models")  #: of a store in a folder taken for it
_NOT_THERE = frozenset({errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL})
#: In a path these make Go's filepath.Glob look elsewhere, so that the server finds nothing.
_GLOB_CHARACTERS = frozenset("[\\")
_LONGEST = 1 << 20  #: more is not read of a file of the kernel's, or of the system's
#: A class of Go's path patterns, or an escaped character; what else begins with [ or \ is an error.
_GLOB_ITEM = r"[^\[\\]|\\.|\[\^?(?:(?:\\.|[^\]\\-])(?:-(?:\\.|[^\]\\-]))?)+\]"


class Found(NamedTuple):
    path: str
    by: str
    foreign: ForeignLink | None = None  #: why nothing is changed; `path` is then the folder


def find(given: str | None, environment: Mapping[str, str], by: str = "--store") -> Found:
    """The store `given`, else the first in order. Raises NoStoreError, or NoPermissionError."""
    if given is not None:
        return _named_store(given, by)
    models = trimmed(environment.get("OLLAMA_MODELS", ""))
    if models:
        return _named_store(models, "OLLAMA_MODELS")
    looked: list[str] = []
    for path, by, needed in _candidates():
        shown = names.printable(path)
        why = "there is neither blobs/ nor manifests/ in it"
        try:
            way = folders.way(path)
            if way.is_store:
                return _found(path, by, way)
        except PermissionError:
            raise no_permission(path) from None
        except OSError as error:
            why = error.strerror or "it is not there"
        if needed:
            # No other store is taken for one that a unit names.
            why = f"{by} has its store in {shown} ({needed}): {why}"
            helps = "mount its disk if that is missing, or name another store with --store"
            raise NoStoreError(why, helps, _mount_command(path))
        looked.append(f"{shown} ({by})")
    why = "\n    ".join(("no model store found; looked at:", *looked))
    raise NoStoreError(why, "name it with --store DIR, or set OLLAMA_MODELS")


def _candidates() -> Iterator[tuple[str, str, str]]:
    """Where a store may be: its path, how it is found, and what requires it to be there, if so."""
    for path, pid in processes.served_stores("/proc"):
        yield path, f"the running server, pid {pid}", ""
    of_server = unit.find()
    if of_server is not None:
        if of_server.unread and not of_server.idle:
            shown = names.printable(of_server.unread)
            why = f"the unit {unit.NAME} may have its store's place in it"
            helps = "name the store, --store DIR, or run it as root"
            raise NoPermissionError(f"{shown} can't be read, and {why}", helps, advice.again(""))
        if of_server.store is not None:
            naming = [each for each in ("OLLAMA_MODELS", "HOME") if each in of_server.variables]
            needed = naming[0] if naming and not of_server.idle else ""
            yield of_server.store, f"the unit {unit.NAME}", needed
    yield SERVICE_STORE, "the place of Ollama's Linux service", ""
    yield OTHER_STORE, "the place of some distributions' service", ""
    home = os.path.expanduser("~")
    yield os.path.join(home, ".ollama", "models"), "the home folder", ""


def _mount_command(path: str) -> str:
    best = ""
    with contextlib.suppress(OSError), open("/etc/fstab", encoding="utf-8") as lines:
        for line in lines:
            fields = line.split()
            if len(fields) < 2 or fields[0].startswith("#"):
                continue
            point = unescaped(fields[1])
            above = f"{path}/".startswith(f"{point.rstrip('/')}/")
            if above and len(point) > len(best) and not os.path.ismount(point):
                best = point
    return advice.as_root("mount", best) if best else ""


def _named_store(path: str, by: str) -> Found:
    shown = names.printable(path)
    try:
        absolute = os.path.abspath(path)
    except FileNotFoundError:
        why = f"{shown} ({by}) is relative to the working directory, which is gone"
        raise NoStoreError(why, "go to another one, or name the whole path") from None
    try:
        way = folders.way(absolute)
    except PermissionError:
        raise no_permission(path) from None
    except NotADirectoryError:
        why = f"{shown} ({by}) is no folder"
        raise NoStoreError(why, "name the models folder itself") from None
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        why = f"there is no folder {shown} ({by}): {error.strerror}"
        raise NoStoreError(why, "name the models folder of the server") from None
    if not way.is_store:
        inside = (f"{path.rstrip('/')}/{each}" for each in _BELOW)
        below = next((each for each in inside if os.path.isdir(f"{each}/blobs")), "")
        why = f"{shown} ({by}) is not a model store: it has neither blobs/ nor manifests/"
        helps = "name the folder that holds them, such as ~/.ollama/models"
        raise NoStoreError(why, helps, advice.on(below, by, "audit") if below else "")
    return _found(path, by, way)


def _found(path: str, by: str, way: folders.Way) -> Found:
    if way.foreign is None:
        return Found(os.path.abspath(path), by)
    return Found(way.real, by, way.foreign)


@contextlib.contextmanager
def opened(store: str) -> Iterator[int]:
    """The descriptor of a store's folder. Raises NoPermissionError, NoStoreError, RefusedError."""
    gone = NoStoreError(f"there is no store at {names.printable(store)} any more", "name another")
    with contextlib.ExitStack() as held:
        try:
            fd = held.enter_context(folders.opened_store(store))
        except folders.NotRootsError as error:
            raise not_roots(store, error.uid) from None
        except folders.ForeignLinkError as error:
            why = f"{error.strerror}, so what lies there is somebody else's"
            helps = "name the folder itself, or let root own the symlink"
            raise RefusedError(why, helps) from None
        except PermissionError:
            raise no_permission(store) from None
        except (FileNotFoundError, NotADirectoryError):
            raise gone from None
        try:
            yield fd
        except (FileNotFoundError, NotADirectoryError):
            # It went while it was looked at; or else something else is missing.
            is_still = False
            with contextlib.suppress(OSError):
                is_still = os.path.samestat(os.stat(store), os.fstat(fd))
            if is_still:
                raise
            raise gone from None


def check_rights(store: str) -> None:
    """Raise NoPermissionError for root's process where a store, if it is there, is not root's."""
    with contextlib.suppress(OSError):
        owner = folders.owner(store).st_uid
        if os.geteuid() == 0 and owner != 0:
            raise not_roots(store, owner)


def not_roots(store: str, owner: int) -> NoPermissionError:
    why = "with root's rights nothing in it is opened, since its owner may put anything there"
    message = f"{names.printable(store)} belongs to user id {owner}: {why}"
    return NoPermissionError(message, f"run the program as user id {owner}")


def no_permission(path: str) -> NoPermissionError:
    """The error for a store that this user may not look into, with the command that may."""
    denied = f"{names.printable(path)}: permission denied"
    shut = _shut_folder(path) if advice.caller().uid == 0 and os.geteuid() != 0 else None
    if shut is None:
        return NoPermissionError(denied, advice.as_owner(path), advice.again(path))
    # Root acts with the rights of the owner of what is in the store, who is kept out of it.
    folder, status = shut
    who = "u" if status.st_uid == os.geteuid() else "g" if status.st_gid in os.getgroups() else "o"
    whose = f"of {status.st_uid}:{status.st_gid}, mode {stat.S_IMODE(status.st_mode):04o}"
    they = f"user id {os.geteuid()}, whose store it is, may not pass through"
    they = f"{they} {names.printable(folder)} ({whose}), and neither may a server of that user"
    command = advice.line("chmod", f"{who}+{'rx' if folder == path else 'x'}", folder)
    return NoPermissionError(f"{denied}: {they}", "let that user in", command)


def _shut_folder(path: str) -> tuple[str, os.stat_result] | None:
    for folder in folders.down_to(path):
        with contextlib.suppress(OSError):
            needed = os.R_OK | os.X_OK if folder == path else os.X_OK
            if not os.access(folder, needed, effective_ids=True):
                return folder, os.stat(folder)
    return None


def describe(host: Host, store: int) -> Place:
    status, room = os.fstat(store), os.fstatvfs(store)
    kind = _file_system(host.store, host.proc)
    blobs = folders.look_at_blobs(store)
    behind, link = blobs.status, blobs.foreign
    if link is not None:
        link = link._replace(path=os.path.join(host.store, link.path))
    return Place(
        path=host.store,
        found_by=host.found_by,
        file_system=kind,
        network=kind in processes.NETWORK,
        blobs=(0, 0) if behind is None else (behind.st_dev, behind.st_ino),
        owner=status.st_uid,
        blobs_linked=blobs.linked,
        state_owner=state_folder.oddity(store),
        foreign=host.foreign or link,
        blobs_elsewhere=behind is not None and behind.st_dev != status.st_dev,
        globbed=not _GLOB_CHARACTERS.isdisjoint(host.store),
        glob_fails=re.fullmatch(f"(?:{_GLOB_ITEM})*", host.store, re.DOTALL) is None,
        blobs_broken=blobs.linked if behind is None else not stat.S_ISDIR(behind.st_mode),
        blobs_target=os.readlink("blobs", dir_fd=store) if blobs.linked else "",
        free_bytes=room.f_bavail * room.f_frsize,
        reserve_bytes=transfers.reserve(room),
        free_inodes=room.f_favail,
        read_only=bool(room.f_flag & os.ST_RDONLY),
        writable=all(
            os.access(name, os.W_OK | os.X_OK, dir_fd=store)
            for name in (".", "blobs")
            if name == "." or os.access(name, os.F_OK, dir_fd=store)
        ),
    )


def silent(path: str, proc: str) -> str:
    """The type of a file system that brings no event of what others do on it; else ""."""
    kind = _file_system(path, proc)
    is_silent = kind in processes.NETWORK or kind == "fuse" or kind.startswith("fuse.")
    return kind if is_silent else ""


def _file_system(path: str, proc: str) -> str:
    real = os.path.realpath(path)
    best, kind = "", ""
    with (
        contextlib.suppress(OSError),
        open(f"{proc}/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts,
    ):
        for line in mounts:
            _, point, mounted, *_ = line.split(" ")
            point = unescaped(point).rstrip("/")
            if (real == point or real.startswith(f"{point}/")) and len(point) >= len(best):
                best, kind = point, mounted
    return kind


def unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda each: chr(int(each[1], 8)), field)


def boot(host: Host) -> str:
    """The id of the machine's start, another one at each; "" where that is unknown."""
    return _text(f"{host.proc}/sys/kernel/random/boot_id").strip()


def machine(host: Host) -> str:
    """The machine's id, as far as its system gives it one; "" where it does not."""
    found = _text(f"{host.system}/etc/machine-id").strip()
    return found if found.isalnum() and len(found) == 32 else ""


def started_at(host: Host) -> float:
    """When the machine started, seconds since the epoch; 0 where that is unknown."""
    found = re.search(r"^btime ([0-9]+)$", _text(f"{host.proc}/stat"), re.MULTILINE)
    return float(found[1]) if found else 0.0


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read(_LONGEST)
    except (OSError, ValueError):
        return ""

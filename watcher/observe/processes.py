"""Which processes have which entries open, which Ollama servers run, and how much could be seen.

Open files are matched by device and inode, since containers and renames change paths. A file of an
entry's name on another device counts only where identities are disguised (an overlay, a share).
"""

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from watcher.model import Blind, Entry, Holder, Server, ServerState, View, Visibility
from watcher.observe.host import Host
from watcher.ollama import environment, names
from watcher.state import folders
from watcher.system import flocks, privileges

_FIRST_PID_NAMESPACE = "pid:[4026531836]"  #: PROC_PID_INIT_INO of proc_ns.h
_KERNEL_THREAD = 0x00200000  #: PF_KTHREAD: no descriptors of interest
_GONE_STATES = frozenset({b"Z", b"X", b"x"})  #: zombies and what is dying hold nothing any more
_UNREACHABLE_AFTER = 300.0  #: a server that can't be reached counts as started after this
_ASKING_SECONDS = 3.0  #: so long all servers together are waited for
_SERVE_WORDS = frozenset({"serve", "start"})
_SHOWN_UNSEEN = 5
#: File systems on which other machines may write at the same time.
NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "ceph", "glusterfs", "lustre"}
    | {"afs", "beegfs", "gpfs", "vboxsf", "fuse.sshfs", "fuse.glusterfs", "fuse.cephfs"}
    | {"fuse.rclone", "fuse.s3fs"}
)
#: Those that show files of another one, or of another machine, with other devices and inodes.
_DISGUISING = NETWORK | {"overlay", "aufs", "unionfs", "ecryptfs", "shiftfs", "prl_fs"}
#: Options of Python's that take a value; behind -c and -m come the program's own.
_VALUED_OPTION = re.compile(r"-[a-zA-Z]*?([mcWX])(.*)", re.DOTALL)
_OF_UNIT = re.compile(r":/system\.slice/(?:[^/]+\.slice/)*([^/]+\.service)$")


class Process(NamedTuple):
    """One process, as far as everybody may see it."""

    pid: int
    name: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.pid})"

    @property
    def is_ollama(self) -> bool:
        """By its name or its command: a server, a client or a runner."""
        first = os.path.basename(self.arguments[0]) if self.arguments else ""
        # A binary may be called after its platform, too: ollama-linux-amd64.
        return self.name.startswith("ollama") or first.startswith("ollama")

    @property
    def is_ours(self) -> bool:
        """Another ollama-watch: it reads, and what it changes it changes under our lock."""
        return _program(self.arguments) in ("ollama-watch", "-m watcher")

    @property
    def is_server(self) -> bool:
        """``ollama serve`` (or its alias ``start``); runners and clients are none."""
        return self.is_ollama and not _SERVE_WORDS.isdisjoint(self.arguments[1:])


def _program(arguments: tuple[str, ...]) -> str:
    """What a command line runs: a program's or a script's name, or Python's ``-m`` and a module."""
    words = iter(arguments)
    name = os.path.basename(next(words, ""))
    if not name.startswith(("python", "pypy")):
        return name
    for word in words:
        if not word.startswith("-") or word == "-":
            return os.path.basename(word)
        # Options of one letter may stand together, the last one with its value: -Im watcher.
        option = _VALUED_OPTION.fullmatch(word)
        if option is not None:
            value = option[2] or next(words, "")
            if option[1] in "mc":
                return f"-{option[1]} {value}"
    return name


class Seen(NamedTuple):
    unread: list[Process]  #: whose open files can't be read
    holders: Mapping[str, tuple[Holder, ...]]
    servers: tuple[Server, ...]
    others: tuple[str, ...]
    strangers: tuple[Server, ...]  #: of users who can change nothing here


def see(host: Host, entries: Collection[Entry]) -> Seen:
    """Look at every process once; `holders` are by the names of those `entries` that are open."""
    with privileges.visibility():
        processes = _processes(host.proc, host.parent)
        holders, unread = _holders(host, processes, entries)
        is_strange = _strangers(host, entries)
        ollamas = [each for each in processes if each.is_ollama]
        found = [_server(host, each.pid) for each in ollamas if each.is_server]
        strange = {process.pid for process in ollamas if is_strange(process.pid)}
    servers = [server for server in found if server is not None]
    kept = (server for server in servers if server.pid not in strange)
    rest = (each for each in ollamas if each.pid not in strange and not each.is_server)
    # The kernel takes its memory, and so its arguments, first from what is ending.
    others = tuple(str(each) for each in rest if any(each.arguments))
    strangers = tuple(server for server in servers if server.pid in strange)
    return Seen(unread, holders, tuple(_asked(host, kept)), others, strangers)


def _strangers(host: Host, entries: Collection[Entry]) -> Callable[[int], bool]:
    """What identifies processes of users who can't change the store: anybody can have a "server".

    A container may show a folder with other owners, and an access control list is not looked into:
    then nobody is a stranger.
    """
    try:
        with (
            folders.opened_store(host.store) as store,
            folders.opened_blobs(store, foreign_too=True) as blobs,
        ):
            both = os.fstat(store), os.fstat(blobs)
            for fd in (store, blobs):
                with contextlib.suppress(OSError):  # a file system without attributes
                    if "system.posix_acl_access" in os.listxattr(fd):
                        return lambda _: False
        ours = _namespaces(host, "self")
    except OSError:
        return lambda _: False
    owners = {entry.uid for entry in entries} | {each.st_uid for each in both}

    def is_strange(pid: int) -> bool:
        try:
            may = int(flocks.facts(pid, host.proc)["CapPrm"][0], 16) != 0
            apart = may or _namespaces(host, pid) != ours
        except (OSError, ValueError, LookupError):
            return False
        return not apart and all(flocks.is_stranger(pid, each, host.proc, owners) for each in both)

    return is_strange


def _namespaces(host: Host, pid: int | str) -> tuple[str, ...]:
    return tuple(os.readlink(f"{host.proc}/{pid}/ns/{kind}") for kind in ("mnt", "user"))


def _asked(host: Host, servers: Iterable[Server]) -> Iterator[Server]:
    left = _ASKING_SECONDS
    for server in servers:
        began, version = time.monotonic(), None
        if left > 0 and server.ours is not False and server.url is not None:
            version = host.version(server.url)
        left -= time.monotonic() - began
        if version is not None:
            yield server._replace(state=ServerState.ANSWERING, version=version)
            continue
        with contextlib.suppress(OSError):
            if not any(_arguments(f"{host.proc}/{server.pid}/cmdline")):
                continue  # it was killed while it was looked at
            if host.clock() - server.since > _UNREACHABLE_AFTER:
                server = server._replace(state=ServerState.UNREACHABLE)
            yield server


def holders_of(host: Host, entries: Iterable[Entry]) -> tuple[Holder, ...]:
    """Who has any of these entries open, or mapped into memory, right now."""
    wanted = tuple(entries)
    with privileges.visibility():
        processes = _processes(host.proc, host.parent)
        found, _ = _holders(host, processes, wanted)
        held = [holder for each in found.values() for holder in each]
        return (*held, *_mapped(host, processes, wanted))


def _mapped(host: Host, processes: Iterable[Process], entries: Iterable[Entry]) -> Iterator[Holder]:
    wanted: dict[bytes, list[Entry]] = {}
    for entry in entries:
        wanted.setdefault(b"%d" % entry.inode, []).append(entry)
    for process in processes:
        found: dict[str, Holder] = {}
        with contextlib.suppress(OSError), open(f"{host.proc}/{process.pid}/maps", "rb") as lines:
            for line in lines:
                # address, mode, offset, device, inode, path
                fields = line.split(None, 5)
                alike = wanted.get(fields[4], ()) if len(fields) > 5 else ()
                for mapped in (each for each in alike if _is_mapped(each, fields[3], fields[5])):
                    shared = fields[1][1:2] == b"w" and fields[1][3:4] == b"s"
                    if shared or mapped.name not in found:
                        holder = Holder(process.pid, process.name, mapped.name, writes=shared)
                        found[mapped.name] = holder
        yield from found.values()


def _is_mapped(entry: Entry, device: bytes, path: bytes) -> bool:
    """Whether a mapped file with an entry's inode is that entry.

    A subvolume of btrfs has a device of its own, and here that of the whole file system is shown:
    then the name counts.
    """
    shown = path.rstrip(b"\n").removesuffix(b" (deleted)").rpartition(b"/")[2]
    same = device == b"%02x:%02x" % (os.major(entry.device), os.minor(entry.device))
    return same or shown == os.fsencode(entry.name)


def served_stores(proc: str) -> list[tuple[str, int]]:
    """Models folder and pid of each running server, where they are known and there for us, too."""
    found: list[tuple[str, int]] = []
    with privileges.visibility():
        for process in _processes(proc):
            variables = _variables(proc, process.pid) if process.is_server else None
            store = variables and environment.models_folder(variables)
            with contextlib.suppress(OSError):
                if here := store and _as_seen_here(proc, process.pid, store):
                    found.append((here, process.pid))
    return found


def _as_seen_here(proc: str, pid: int, store: str) -> str | None:
    """A server's models folder as a path of ours; None where that is surely another folder."""
    folder = os.readlink(f"{proc}/{pid}/cwd") if not os.path.isabs(store) else "/"
    path = os.path.normpath(os.path.join(folder, store))
    if folder.endswith(" (deleted)") and not os.path.isdir(folder):
        return None
    with contextlib.suppress(OSError):
        theirs = os.stat(f"{proc}/{pid}/root{path}")
        try:
            ours = os.stat(path)
        except FileNotFoundError:
            return None
        return path if theirs.st_ino == ours.st_ino else None
    return path


def _processes(proc: str, parent: int | None = None) -> list[Process]:
    """Every other process, not ours, or the children of one. psutil is ten times slower."""
    found: list[Process] = []
    there = os.listdir(proc)
    if proc == "/proc" and "self" not in there:
        # Nothing is mounted there: that nobody is seen does not mean that nobody runs.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/proc/self")
    for name in there:
        if not name.isdecimal():
            continue
        try:
            # The command's name in brackets may hold anything, so look for its end.
            before, _, after = _read(f"{proc}/{name}/stat").rpartition(b")")
            fields = after.split()
            if parent is not None and int(fields[1]) != parent:
                continue
            if fields[0] in _GONE_STATES or int(fields[6]) & _KERNEL_THREAD:
                continue
            command = names.printable(os.fsdecode(before.partition(b"(")[2]))
            process = Process(int(name), command, _arguments(f"{proc}/{name}/cmdline"))
        except OSError:
            continue  # gone meanwhile
        if process.pid != os.getpid() and not process.is_ours:
            found.append(process)
    return found


def _arguments(path: str) -> tuple[str, ...]:
    return tuple(map(os.fsdecode, _read(path).rstrip(b"\0").split(b"\0")))


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _fdinfo(host: Host, pid: int | str, number: int | str) -> dict[bytes, bytes]:
    lines = _read(f"{host.proc}/{pid}/fdinfo/{number}").splitlines()
    fields = (line.partition(b":") for line in lines)
    return {key: value.strip() for key, _, value in fields}


class _Sought:
    def __init__(self, host: Host, entries: Collection[Entry]) -> None:
        self.host = host
        self.by_identity = {entry.identity: entry.name for entry in entries}
        self.names = {entry.name for entry in entries}
        self.devices = {entry.device for entry in entries}

    def match(self, pid: int, number: str) -> tuple[str, bool] | None:
        """The entry that a descriptor is open on, and whether only its name shows it; or None."""
        link = f"{self.host.proc}/{pid}/fd/{number}"
        try:
            status = os.stat(link)
            name = self.by_identity.get((status.st_dev, status.st_ino))
            if name is not None:
                return name, False
            if not stat.S_ISREG(status.st_mode) or status.st_dev in self.devices:
                return None
            shown = os.path.basename(os.readlink(link))
        except PermissionError:
            raise
        except OSError:
            return None
        if shown in self.names and (self._ours_disguises or self._disguises(pid, number)):
            return shown, True
        return None

    @cached_property
    def _ours_disguises(self) -> bool:
        with (
            contextlib.suppress(OSError),
            folders.opened_store(self.host.store) as store,
            folders.opened_blobs(store, foreign_too=True) as blobs,
        ):
            return self._disguises("self", blobs)
        return True

    def _disguises(self, pid: int | str, number: int | str) -> bool:
        """Whether an open file lies where identities are disguised, or that can't be known."""
        with contextlib.suppress(OSError, LookupError):
            mount = _fdinfo(self.host, pid, number)[b"mnt_id"]
            for line in _read(f"{self.host.proc}/{pid}/mountinfo").splitlines():
                before, _, after = line.partition(b" - ")
                if before.split(None, 1)[0] == mount:
                    kind = os.fsdecode(after.split(None, 1)[0])
                    return kind in _DISGUISING or kind.startswith("fuse")
        return True


def _holders(
    host: Host, processes: Iterable[Process], entries: Collection[Entry]
) -> tuple[dict[str, tuple[Holder, ...]], list[Process]]:
    sought = _Sought(host, entries)
    found: dict[str, dict[int, Holder]] = {}
    unread: list[Process] = []
    for process in processes:
        try:
            descriptors = os.listdir(f"{host.proc}/{process.pid}/fd")
        except PermissionError:
            unread.append(process)
            continue
        except OSError:
            continue  # gone meanwhile
        # Where nothing is looked for, one shows for all of a process whether they can be read.
        for number in descriptors if entries else descriptors[:1]:
            try:
                match = sought.match(process.pid, number)
            except PermissionError:
                # Listing takes less than reading: what can't be read is not seen.
                unread.append(process)
                break
            if match is None:
                continue
            name, by_name = match
            writes = True  # as long as that is unknown
            with contextlib.suppress(OSError, ValueError, KeyError):
                flags = int(_fdinfo(host, process.pid, number)[b"flags"], 8)
                writes = flags & os.O_ACCMODE != os.O_RDONLY
            before = found.setdefault(name, {}).get(process.pid)
            if before is None or (writes and not before.writes):
                holder = Holder(process.pid, process.name, name, writes, by_name=by_name)
                found[name][process.pid] = holder
    return {name: tuple(each.values()) for name, each in found.items()}, unread


def view(host: Host, unread: list[Process], *, network: bool, writers_visible: bool) -> View:
    """How much could be seen; of a `network` file system's writers not those of other machines."""
    unseen = tuple(map(str, unread[:_SHOWN_UNSEEN]))
    if writers_visible:
        return View(Visibility.FULL, (), "writers_visible is set in the settings")
    others = "other machines may write to a network file system", Blind.NETWORK
    blind = others if network else _blind_spot(host)
    if blind:
        return View(Visibility.PARTIAL, unseen, *blind)
    if not unread:
        return View(Visibility.FULL)
    several = f"{len(unread)} processes of other users"
    whose = several if len(unread) > 1 else "a process of another user"
    why = f"the open files of {whose} can't be read"
    ollamas = [str(process) for process in unread if process.is_ollama]
    if ollamas:
        return View(Visibility.PARTIAL, unseen, f"{why}, {', '.join(ollamas)} among them")
    return View(Visibility.NAMED, unseen, why)


def _blind_spot(host: Host) -> tuple[str, Blind] | None:
    try:
        if os.readlink(f"{host.proc}/self/ns/pid") != _FIRST_PID_NAMESPACE:
            return "in a container, processes outside it can't be seen", Blind.CONTAINER
        with open(f"{host.proc}/self/mounts", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                _, point, kind, options, *_ = line.split(" ")
                if kind != "proc" or point != host.proc:
                    continue
                words = dict(word.partition("=")[::2] for word in options.split(","))
                some = words.get("hidepid", "0") not in ("0", "off")
                sees_all = ~privileges.capabilities().permitted & privileges.VISIBILITY == 0
                if words.get("subset") == "pid" or (some and not sees_all):
                    blind = Blind.PROC if "subset" in words else Blind.USERS
                    return f"{host.proc} is mounted with {options}: it hides processes", blind
    except OSError:
        return f"{host.proc} does not report which processes it hides", Blind.PROC
    return None


def _server(host: Host, pid: int) -> Server | None:
    """A server, not asked yet; None where it has ended."""
    import psutil  # only where a server runs: it takes as long as a look at a usual store

    psutil.PROCFS_PATH = host.proc
    try:
        handle = psutil.Process(pid)
        since, user, uid = handle.create_time(), handle.username(), handle.uids().real
    except psutil.Error:
        return None
    found = _variables(host.proc, pid)
    store = None if found is None else environment.models_folder(found)
    ours, elsewhere = (None, False) if store is None else _same_blobs(host, pid, store)
    address, connections = _sockets(handle)
    url = environment.server_url("")
    if address is not None:
        url = environment.at("http", *address)
    else:
        with contextlib.suppress(ValueError):  # such a server does not even start
            url = environment.server_url((found or {}).get("OLLAMA_HOST", ""))
    return Server(
        pid=pid,
        user=user,
        since=since,
        state=ServerState.STARTING,
        store=store,
        ours=ours,
        elsewhere=elsewhere,
        url=url,
        connections=connections,
        no_prune=None if found is None else environment.no_prune(found),
        uid=uid,
        unit=unit_of(host.proc, pid),
    )


def unit_of(proc: str, pid: int | str) -> str:
    """The unit of the system's that a process belongs to; "" for none."""
    with contextlib.suppress(OSError):
        lines = os.fsdecode(_read(f"{proc}/{pid}/cgroup")).splitlines()
        return next((each[1] for each in map(_OF_UNIT.search, lines) if each), "")
    return ""


def _variables(proc: str, pid: int) -> dict[str, str] | None:
    """A process's environment; None where it can't be read."""
    with contextlib.suppress(OSError):
        given = os.fsdecode(_read(f"{proc}/{pid}/environ")).split("\0")
        return dict(each.split("=", 1) for each in given if "=" in each)
    return None


def _same_blobs(host: Host, pid: int, store: str) -> tuple[bool | None, bool]:
    """Whether a server's blobs are ours (None: unknown), and its store another all the same."""
    root = f"{host.proc}/{pid}/root" if store.startswith("/") else f"{host.proc}/{pid}/cwd"
    there = f"{root}/{store.lstrip('/')}"
    try:
        here = os.readlink(f"{host.proc}/self/ns/mnt")
        same_mounts = os.readlink(f"{host.proc}/{pid}/ns/mnt") == here
        ours, before = folders.look(host.store)
        try:
            theirs = os.stat(there)
        except FileNotFoundError:
            # A server makes its folder with its first pull; ours is there, so it is another one.
            return (False if same_mounts and os.path.isdir(root) else None), False
        if (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino):
            return True, False
        other: os.stat_result | None = None
        with contextlib.suppress(OSError):
            other = os.stat(f"{there}/blobs")
        blobs = before.status
        if blobs is not None and other is not None and os.path.samestat(blobs, other):
            return True, True
        if same_mounts:
            return False, False
        # Another mount namespace may show the same files with other inodes (an overlay, a share),
        # and the same time of blobs/: it changes with each name.
        _, after = folders.look(host.store)
    except OSError:
        return None, False
    times = {each.status.st_mtime_ns for each in (before, after) if each.status is not None}
    alike = other is None or theirs.st_ino == ours.st_ino or other.st_mtime_ns in times
    return (None if alike else False), False


def _sockets(handle: Any) -> tuple[tuple[str, int] | None, int | None]:
    """Where it listens first, and how many are connected; None where that is unknown."""
    import psutil

    try:
        sockets = handle.net_connections(kind="tcp")
    except psutil.Error:
        return None, None
    listening = [each.laddr for each in sockets if each.status == psutil.CONN_LISTEN]
    if not listening:
        return None, None
    ports = {address.port for address in listening}
    connected = [each for each in sockets if each.status == psutil.CONN_ESTABLISHED]
    return listening[0], sum(each.laddr.port in ports for each in connected)

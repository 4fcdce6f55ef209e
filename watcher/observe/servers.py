"""One running server: its store, where it listens, and who is connected to it."""

import contextlib
import os
import re

import psutil

from watcher.model import Server, ServerState
from watcher.observe.host import Host
from watcher.ollama import environment
from watcher.state import folders

_OF_UNIT = re.compile(r":/system\.slice/(?:[^/]+\.slice/)*([^/]+\.service)$")


def look(host: Host, pid: int, *, ours_only: bool) -> Server | None:
    """A server, not asked yet; None: it ended, or surely has another store (`ours_only`)."""
    psutil.PROCFS_PATH = host.proc
    try:
        handle = psutil.Process(pid)
        since, user, uid = handle.create_time(), handle.username(), handle.uids().real
    except psutil.Error:
        return None  # ended meanwhile
    found = variables(host.proc, pid)
    store = None if found is None else environment.models_folder(found)
    ours, elsewhere = (None, False) if store is None else _same_blobs(host, pid, store)
    if ours is False and ours_only:
        return None
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
    with (
        contextlib.suppress(OSError, ValueError),
        open(f"{proc}/{pid}/cgroup", encoding="utf-8") as lines,
    ):
        matches = [_OF_UNIT.search(line.rstrip("\n")) for line in lines]
        return next((each[1] for each in matches if each), "")
    return ""


def variables(proc: str, pid: int) -> dict[str, str] | None:
    """A process's environment; None where it can't be read."""
    psutil.PROCFS_PATH = proc
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).environ()
    return None


def _same_blobs(host: Host, pid: int, store: str) -> tuple[bool | None, bool]:
    """Whether a server's blobs are ours, with that server's eyes; None where that can't be known.

    And whether its store is another one for all that, of which both or one has linked its blobs.
    """
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


def _sockets(handle: psutil.Process) -> tuple[tuple[str, int] | None, int | None]:
    """Where it listens first, and how many are connected; None where that is unknown."""
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

"""Who serves a store: a daemon, and who runs the queue, hold a lock meanwhile that says so."""

from __future__ import annotations

import fcntl
import os
import re
from typing import NamedTuple

from watcher import files, folders
from watcher.memory import FOLDER

#: The names of these locks, in our folder.
DAEMON_LOCK = "daemon.lock"
QUEUE_LOCK = "queue.lock"
_OWNER = re.compile(r"pid (\d+) since (\S+)")
_LONGEST = 200


class Running(NamedTuple):
    """A process, and since when it serves the store (RFC 3339); "" where that is not told."""

    pid: int | None
    since: str


def daemon(store: str) -> Running | None:
    """The daemon that watches a store; None where there is none, or that can't be told."""
    return _holder(store, DAEMON_LOCK)


class QueueRunner(NamedTuple):
    """Who runs the queue: its process id, where that is told, and whether it is the daemon."""

    pid: int | None
    is_daemon: bool


def queue_runner(store: str) -> QueueRunner | None:
    """Who runs the queue of a store, a daemon or ``queue run``; None where nobody is seen to."""
    found = _holder(store, QUEUE_LOCK)
    if found is None:
        return None
    watching = daemon(store)
    return QueueRunner(found.pid, watching is not None and watching.pid == found.pid)


def _holder(store: str, lock: str) -> Running | None:
    try:
        with folders.opened_store(store) as folder, files.opened_folder(FOLDER, folder) as ours:
            fd = files.open_to_read(lock, ours)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _OWNER.match(os.pread(fd, _LONGEST, 0).decode("utf-8", "replace"))
        return Running(int(owner[1]), owner[2]) if owner else Running(None, "")
    finally:
        os.close(fd)
    return None

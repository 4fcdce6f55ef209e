"""Who serves a store: a daemon, and who runs the queue, hold a lock meanwhile that says so."""

from __future__ import annotations

import re
from typing import NamedTuple

from watcher.state import folders, fs, state_folder
from watcher.state.event_log import rfc3339

#: The names of these locks, in our folder.
DAEMON_LOCK = "daemon.lock"
QUEUE_LOCK = "queue.lock"
_OWNER = re.compile(r"pid ([0-9]{1,9}) since (\S{1,40})")


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
    found, watching = _holder(store, QUEUE_LOCK), daemon(store)
    if found is None:
        return None
    return QueueRunner(found.pid, watching is not None and watching.pid == found.pid)


def _holder(store: str, lock: str) -> Running | None:
    try:
        with folders.opened_store(store) as folder, state_folder.opened(folder) as our_folder:
            found = fs.holder(lock, our_folder)
    except OSError:
        return None
    if found is None:
        return None
    written = _OWNER.match(found.text)
    if written is not None:
        return Running(int(written[1]), written[2])
    return Running(found.pid, rfc3339(found.since) if found.pid is not None else "")

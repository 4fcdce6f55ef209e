"""Who serves a store: a daemon, and who runs the queue, hold a lock meanwhile."""

from __future__ import annotations

import contextlib
import re
from typing import NamedTuple

from watcher.state import folders, fs, state_folder
from watcher.state.event_log import rfc3339

#: The names of these locks, in our folder.
DAEMON_LOCK = "daemon.lock"
QUEUE_LOCK = "queue.lock"
_OWNER = re.compile(r"pid ([0-9]{1,9}) since (\S{1,40})")


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
    is_daemon = found is not None and watching is not None and watching.pid == found.pid
    return found and found._replace(is_daemon=is_daemon)


def _holder(store: str, lock: str) -> Running | None:
    found = None
    with (
        contextlib.suppress(OSError),
        folders.opened_store(store) as folder,
        state_folder.opened(folder) as ours,
    ):
        found = fs.holder(lock, ours)
    if found is None:
        return None
    written = _OWNER.match(found.text)
    if written is not None:
        return Running(int(written[1]), written[2])
    return Running(found.pid, rfc3339(found.since) if found.pid is not None else "")

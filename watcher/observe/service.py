"""Whether a daemon watches a store: its lock is held for its life, and says who it is."""

from __future__ import annotations

import fcntl
import os
import re
from typing import NamedTuple

from watcher import files
from watcher.memory import FOLDER

#: The name of its lock, in our folder.
LOCK = "daemon.lock"
_OWNER = re.compile(r"pid (\d+) since (\S+)")
_LONGEST = 200


class Running(NamedTuple):
    """A daemon: its process id, and since when it watches (RFC 3339); "" where that is not told."""

    pid: int | None
    since: str


def daemon(store: str) -> Running | None:
    """The daemon that watches a store; None where there is none, or that can't be told."""
    try:
        with files.opened_folder(store) as folder, files.opened_folder(FOLDER, folder) as ours:
            fd = files.open_to_read(LOCK, ours)
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

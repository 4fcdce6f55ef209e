"""Which processes hold a lock on a file (flock), as the kernel lists them for everybody."""

import contextlib
import os
from collections.abc import Collection


def holders(status: os.stat_result) -> tuple[int, ...]:
    """Who is seen to lock a file: none of other PID namespaces, nor on btrfs."""
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        with open("/proc/locks", encoding="ascii") as lines:
            # 1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF; who waits has an arrow.
            locks = [fields for line in lines if len(fields := line.split()) > 5]
        return tuple(int(each[4]) for each in locks if (each[1], each[5]) == ("FLOCK", wanted))
    except (OSError, ValueError):
        return ()


def facts(pid: int, proc: str = "/proc") -> dict[str, list[str]]:
    """The words that the kernel shows for each key of a process's status. Raises OSError."""
    with open(f"{proc}/{pid}/status", encoding="utf-8", errors="replace") as lines:
        fields = (line.partition(":") for line in lines)
        return {key: value.split() for key, _, value in fields}


def is_stranger(
    pid: int, folder: os.stat_result, proc: str = "/proc", owners: Collection[int] = ()
) -> bool:
    """Whether a process is gone, or surely of nobody who may write there, as `owners` may."""
    if folder.st_mode & 0o002:
        return False
    try:
        known = facts(pid, proc)
    except OSError:
        # It is gone, or hidden from this user.
        with contextlib.suppress(PermissionError):
            try:
                os.kill(pid, 0)
            except (ProcessLookupError, OverflowError):
                return True
        return False
    users = set(map(int, known.get("Uid", "0")))
    groups = set(map(int, [*known.get("Gid", ()), *known.get("Groups", ())]))
    ours = {0, folder.st_uid, os.geteuid(), *owners}
    shared = bool(folder.st_mode & 0o020) and folder.st_gid in groups
    return users.isdisjoint(ours) and not shared

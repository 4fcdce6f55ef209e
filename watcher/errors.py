"""Each error with its message for people and its exit code; `cli` maps them to exits."""

from __future__ import annotations

import enum
import errno
import os

from watcher import redact


class Exit(enum.IntEnum):
    """Exit codes of the command line."""

    HEALTHY = 0
    FINDINGS = 1
    USAGE = 2
    REFUSED = 3
    FAILED = 4
    NO_STORE = 10
    LOCKED = 11
    INTERRUPTED = 130


class WatchError(Exception):
    """An error that names the thing, the reason and the next step."""

    exit_code = Exit.FAILED

    def __init__(self, message: str, next_step: str = "", command: str = "") -> None:
        message, next_step = redact.urls(message), redact.urls(next_step)
        super().__init__(message)
        self.message = message
        self.next_step = next_step
        #: The next step as a command that can be pasted, made by `advice`; "" where none helps.
        self.command = command

    def __str__(self) -> str:
        step = f"\n  {self.next_step}" if self.next_step else ""
        return self.message + step + (f"\n  -> {self.command}" if self.command else "")


class NoStoreError(WatchError):
    """There is no model store where one was looked for."""

    exit_code = Exit.NO_STORE


class SettingsError(WatchError):
    """A setting has an unknown key or a bad value."""

    exit_code = Exit.USAGE


class TargetError(WatchError):
    """A command names a model or a digest that no store has, or several."""

    exit_code = Exit.USAGE


class RecordError(WatchError):
    """A change of a download's record has an unknown key, a bad value or an illegal transition."""

    exit_code = Exit.USAGE


class ManifestError(WatchError):
    """What was given as a manifest is none."""


class DownloadError(WatchError):
    """A model has not arrived. `cause` is one of `pull.causes.Cause`."""

    def __init__(self, message: str, next_step: str, cause: str, command: str = "") -> None:
        super().__init__(message, next_step, command)
        self.cause = cause


class NoPermissionError(WatchError):
    """Something may not be read or changed by this user."""


class RefusedError(WatchError):
    """Something could be done, and would do harm, or not last."""

    exit_code = Exit.REFUSED


class LockedError(WatchError):
    """Another ollama-watch is at work on this store."""

    exit_code = Exit.LOCKED


class ListenError(WatchError):
    """An address that the settings name can't be listened at."""


class EndedError(Exception):
    """This process was asked to end, and nobody waits for what it was about to find out."""


class ChangedError(WatchError):
    """The store is not what it was when the act was planned; nothing was done."""


class OutputError(OSError):
    """What was to be printed could not be written."""


#: What the machine says, and what helps against it.
_STEPS = {
    errno.EMFILE: "let this process open more files: ulimit -n",
    errno.ENFILE: "let the machine open more files: sysctl fs.file-max",
    errno.ENOMEM: "free memory, or raise the limit of this process: ulimit -v, MemoryMax=",
    errno.EAGAIN: "raise the limit of processes and threads: ulimit -u, TasksMax=",
    errno.EIO: "the disk, or the way to it, is failing: see the kernel's log (dmesg)",
    errno.ESTALE: "the share has another folder there now: mount it anew",
    errno.ENOSPC: "make room on that file system",
    errno.EDQUOT: "make room, or have the quota raised",
    errno.EROFS: "mount that file system for writing",
    errno.EACCES: "see whose it is, and run it as that user or as root",
    errno.EPERM: "see whose it is, and run it as that user or as root",
    errno.ENOENT: "it went while it was looked at: run it again",
}

_LOADING = f"{_STEPS[errno.ENOMEM]}; or install it again"


def named(error: BaseException) -> WatchError | None:
    """What the machine has refused, as an error that says so; None for a fault of ours."""
    if isinstance(error, MemoryError):
        return WatchError("there is not enough memory", _STEPS[errno.ENOMEM])
    if isinstance(error, ImportError):
        return WatchError(f"it can't be loaded as a whole: {error}", _LOADING)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return WatchError("no thread can be started", _STEPS[errno.EAGAIN])
    if not isinstance(error, OSError) or error.errno is None:
        return None
    path = "" if error.filename is None else f"{_shown(error.filename)}: "
    told = f"{path}{error.strerror or os.strerror(error.errno)}"
    if path.startswith("/proc"):
        return WatchError(told, "nobody can be seen without it: mount -t proc proc /proc")
    return WatchError(told, _STEPS.get(error.errno, "see whether that path is as it should be"))


def _shown(path: object) -> str:
    if isinstance(path, int):
        return "a folder of the store"  # a descriptor, closed by now
    text = os.fsdecode(path) if isinstance(path, str | bytes) else str(path)
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)

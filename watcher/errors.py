"""Each error with its message for people and its exit code; `cli` maps them to exits."""

import enum
import errno
import os
import re
import resource

#: Who has started this process is root; its user may become the store's owner later.
_OF_ROOT = os.getuid() == 0


class Exit(enum.IntEnum):
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

    def __init_subclass__(cls, exit_code: Exit | None = None) -> None:
        if exit_code is not None:
            cls.exit_code = exit_code

    def __init__(self, message: str, next_step: str = "", command: str = "") -> None:
        self.message = without_credentials(message)
        super().__init__(self.message)
        self.next_step = without_credentials(next_step)
        self.command = command  #: a command that can be pasted; `advice` makes it

    def __str__(self) -> str:
        step = f"\n  {self.next_step}" if self.next_step else ""
        return self.message + step + (f"\n  -> {self.command}" if self.command else "")


class NoStoreError(WatchError, exit_code=Exit.NO_STORE):
    """There is no model store where one was looked for."""


class SettingsError(WatchError, exit_code=Exit.USAGE):
    """A setting has an unknown key or a bad value."""


class TargetError(WatchError, exit_code=Exit.USAGE):
    """A command names a model or a digest that no store has, or several."""


class RecordError(WatchError, exit_code=Exit.USAGE):
    """A change of a download's record has an unknown key, a bad value or an illegal transition."""


class ManifestError(WatchError):
    """What was given as a manifest is none."""


class DownloadError(WatchError):
    """A model has not arrived. `cause` is one of `pull.failures.Cause`."""

    def __init__(self, message: str, next_step: str, cause: str, command: str = "") -> None:
        super().__init__(message, next_step, command)
        self.cause = cause


class NoPermissionError(WatchError):
    """Something may not be read or changed by this user."""


class RefusedError(WatchError, exit_code=Exit.REFUSED):
    """Something could be done, and would do harm, or not last."""


class LockedError(WatchError, exit_code=Exit.LOCKED):
    """Another ollama-watch is at work on this store."""


class ListenError(WatchError):
    """An address that the settings name can't be listened at."""


class EndedError(Exception):
    """This process was asked to end, and nobody waits for what it was about to find out."""


class ChangedError(WatchError):
    """The store is not what it was when the act was planned; nothing was done."""


class OutputError(OSError):
    """What was to be printed could not be written."""


_ENOUGH_FILES = 65536
#: A file system without room says the same.
NO_INODES = "the file system has room, but no inode for another file: remove files, however small"
#: Root acts with the rights of whoever owns the store, and has tried it so.
_NOT_YOURS = (
    "check who owns it, and whether the store's owner may enter the folders above it"
    if _OF_ROOT
    else "check who owns it, and run this as that user or as root"
)
#: What helps, by the system's error number.
_STEPS = {
    errno.EMFILE: "let this process open more files (RLIMIT_NOFILE; of a unit, LimitNOFILE=)",
    errno.ENFILE: "let the machine open more files (the kernel's setting fs.file-max)",
    errno.ENOMEM: "free memory, or raise this process's limit (RLIMIT_AS; of a unit, MemoryMax=)",
    errno.EAGAIN: "raise the limit of processes and threads (RLIMIT_NPROC; of a unit, TasksMax=)",
    errno.EIO: "the disk, or the way to it, is failing; the kernel's log says why",
    errno.ESTALE: "mount the share again: its server has another folder there now",
    errno.ENOSPC: "free space on that file system",
    errno.EDQUOT: "free space, or have the quota raised",
    errno.EROFS: "mount that file system for writing",
    errno.EACCES: _NOT_YOURS,
    errno.EPERM: _NOT_YOURS,
    errno.EFBIG: "let this process write larger files (RLIMIT_FSIZE; of a unit, LimitFSIZE=)",
    errno.ENOTDIR: "mount what it leads to, or restore the folder",
    errno.ENOENT: "it was removed meanwhile: run this again",
}


def named(error: BaseException) -> WatchError | None:
    """What the machine has refused, as an error with the reason; None for a fault of ours."""
    if isinstance(error, MemoryError):
        return refused("there is not enough memory", errno.ENOMEM)
    if isinstance(error, ImportError):
        step = f"{_STEPS[errno.ENOMEM]}; or install it again"
        return WatchError(f"a part of ollama-watch can't be loaded: {error}", step)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return refused("no thread can be started", errno.EAGAIN)
    if not isinstance(error, OSError) or error.errno is None:
        return None
    path = "" if error.filename is None else f"{shown(error.filename)}: "
    text = f"{path}{error.strerror or os.strerror(error.errno)}"
    if path.startswith("/proc"):
        command = "mount -t proc proc /proc"
        return WatchError(text, "no process is visible without it: mount it", as_root(command))
    return refused(text, error.errno, error.filename)


def refused(text: str, number: int, where: str | bytes | int | None = None) -> WatchError:
    """The error for what the machine has refused, with what helps as a command where one does."""
    command = as_root("dmesg") if number == errno.EIO else ""
    if number == errno.EMFILE:
        # The limit is raised as far as this user may.
        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _ENOUGH_FILES if most == resource.RLIM_INFINITY else min(most, _ENOUGH_FILES)
        command = f"ulimit -Sn {most}" if now < most else ""
    step = _step(number, where) or "check that path, then run this again"
    return WatchError(text, step, command)


def with_step(told: str, number: int | None, where: str | bytes | int | None = None) -> str:
    """What the machine has refused `where` (a path or descriptor), with what helps against it."""
    step = _step(number or 0, where)
    return f"{told}; {step}" if step else told


def _step(number: int, where: str | bytes | int | None) -> str:
    if number == errno.ENOSPC and where is not None and lacks_inodes(where):
        return NO_INODES
    return _STEPS.get(number, "")


def lacks_inodes(where: str | bytes | int) -> bool:
    """Whether a file system has room, and no inode for one more file."""
    try:
        found = os.statvfs(where)
    except OSError:
        above = where if isinstance(where, int) else os.path.dirname(where)
        return above != where and lacks_inodes(above)
    return found.f_files > 0 and not found.f_favail and found.f_bavail > 0


def as_root(command: str) -> str:
    """A command that only root may run, for who has started this process."""
    return command if _OF_ROOT else f"sudo {command}"


def shown(path: object) -> str:
    """A path for people; a descriptor, closed by now, is one of a folder of the store."""
    if isinstance(path, int):
        return "a folder of the store"
    text = os.fsdecode(path) if isinstance(path, str | bytes) else str(path)
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


# No user, password, token or signature of a URL is shown, kept or logged. What a URL has before its
# last ``@`` is its credential: passwords that should have been escaped hold slashes, colons and
# blanks. Patterns are compiled at their first use, which `--help` never comes to.
_HIDDEN = "***@"
_SCHEME = "[A-Za-z][A-Za-z0-9+.-]*://"
_IN_WORD = rf"({_SCHEME})\S*@"  #: up to a word's last ``@``: passwords have some
_QUOTED = r'"((?:[^"\\]|\\.)*)"'
#: An address without a scheme, as a proxy's may be.
_BARE = r"(?<![^\s\"'(=])[^\s\"':@/]+:(?!//)[^\s\"']*@"
#: What Go and Python take for the port of such an address is a piece of its password.
_FRAGMENT = (
    r"((?:invalid port|invalid URL escape|integer value as|nonnumeric port:) ?)"
    r"""(?:"[^"]*"|'[^']*'|\S+)"""
)
#: What stands behind the ``?`` of a URL may be a signature that opens it.
_QUERY = rf"({_SCHEME}[^\s\"'?]*\?)[^\s\"']+"
#: Of a longer text nobody reads the rest, and the patterns would take minutes for it.
_LONGEST_TEXT = 4096


def without_credentials(text: str) -> str:
    """A text of ours, which may name URLs that people have given."""
    return re.sub(_IN_WORD, rf"\1{_HIDDEN}", text) if "@" in text else text


def without_secrets(text: str) -> str:
    """A text of a server or a registry, which may quote any of their addresses, and how."""
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT]
        text = text.rpartition(" ")[0] or text  # half a word may be half a secret
    text = re.sub(_FRAGMENT, r"\1...", text)
    if "@" in text:
        text = re.sub(_BARE, _HIDDEN, without_credentials(re.sub(_QUOTED, _inside, text)))
    return re.sub(_QUERY, r"\1...", text)


def _inside(quoted: re.Match[str]) -> str:
    """What is quoted is one address as a whole, blanks and all, where it has an ``@``."""
    text = quoted[1]
    if "@" not in text:
        return quoted[0]
    scheme = re.match(_SCHEME, text)
    return f'"{scheme[0] if scheme else ""}{_HIDDEN}{text.rpartition("@")[2]}"'

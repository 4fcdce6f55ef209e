"""Whose rights this process has: root becomes the owner of the store, for good.

Whoever owns a store may put anything into it. So nothing in it is opened with more rights than its
owner has. Of root's powers two stay within reach, those that show who has files open
(`VISIBILITY`), and they are raised only while the processes are inspected.
"""

import contextlib
import ctypes
import errno
import grp
import importlib
import os
import pwd
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from watcher.errors import NoPermissionError, without_secrets
from watcher.system import advice

#: What lets a process see the descriptors of other users' processes, as bits: the numbers 2
#: (CAP_DAC_READ_SEARCH) and 19 (CAP_SYS_PTRACE) of linux/capability.h.
VISIBILITY = 1 << 2 | 1 << 19
_VERSION_3, _WORDS = 0x20080522, 2  #: the layout of capget(2) and capset(2) for 64 capabilities
#: Numbers of linux/prctl.h.
_KEEPCAPS, _BOUNDING_READ, _BOUNDING_DROP, _NO_NEW_PRIVS = 8, 23, 24, 38
_AMBIENT, _AMBIENT_CLEAR_ALL = 47, 4
_NO_GROUP = 65534  #: a group without rights
#: What the standard library and ours load only where it is needed.
_LOADED_LATE = (
    *("_strptime", "certifi", "concurrent.futures.thread", "http.client", "linecache", "psutil"),
    *("cryptography.hazmat.primitives.asymmetric.ed25519", "encodings.ascii", "encodings.idna"),
    *("encodings.latin_1", "ssl", "stringprep", "subprocess", "traceback", "urllib.request"),
    "waitress.server",
)
#: Whose modules are loaded as a whole, and those of no use here; watchdog's prints at once what its
#: library logs.
_PACKAGES = ("watcher", "click", "rich", "watchdog", "prometheus_client")
_PROGRAMS = ("watcher.demo", "watchdog.watchmedo")
#: Of root's environment what a process of somebody else's needs.
_NEEDED = re.compile(
    "OLLAMA_WATCH_.*|OLLAMA_(HOST|MODELS|NOPRUNE|NO_CLOUD)|PATH|HOME|TZ|TERM|COLUMNS|NO_COLOR|LANG"
    "|LC_.*|LD_LIBRARY_PATH|PYTHON.*|SSL_CERT_(FILE|DIR)|(http|https|all|no)_proxy",
    re.IGNORECASE,
)

_libc = ctypes.CDLL(None, use_errno=True)


class Owner(NamedTuple):
    """The user whose rights a store is treated with."""

    uid: int
    gid: int


_taken: list[Owner] = []  #: the user whose rights root's process has taken
_loaded: list[Owner] = []  #: for whom everything was loaded, who could not load it again


class Capabilities(NamedTuple):
    """The capabilities of this thread, as bits."""

    effective: int
    permitted: int
    inheritable: int


def become(owner: Owner, what: str) -> None:
    """Take a user's rights in place of root's, for good; the two for visibility stay in reach.

    For a process that has one thread. `what`: whose they are, for people, such as the store.
    Raises NoPermissionError where this process may not become that user.
    """
    try:
        if owner.uid == 0:
            # Root keeps its own groups, and has that of its store.
            with contextlib.suppress(PermissionError):
                os.setgroups([*os.getgroups(), owner.gid])
            # What runs root's queue has to see root's server, which has more rights than none.
            give_on(VISIBILITY)
        else:
            groups = [owner.gid]
            with contextlib.suppress(KeyError):
                groups = os.getgrouplist(pwd.getpwuid(owner.uid).pw_name, owner.gid)
            os.setgroups(groups)
            _load_all(owner)
            give_on(0)
            _prctl(_KEEPCAPS, 1)
            _taken.append(owner)
            os.setresgid(owner.gid, owner.gid, owner.gid)
            os.setresuid(owner.uid, owner.uid, owner.uid)
        lower()
    except OSError as error:
        raise _refused(owner, what, error) from None


def give_on(most: int) -> None:
    """Let what this process starts as root have `most` as capabilities, and others have none."""
    # A program of root's gets its capabilities out of the bounding set.
    number = 0
    while _prctl(_BOUNDING_READ, number) >= 0:
        if not most >> number & 1:
            _prctl(_BOUNDING_DROP, number)
        number += 1
    # Where that may not be changed, at least nothing comes on top of what is kept here.
    _prctl(_NO_NEW_PRIVS, 1)


def handed_on() -> dict[str, str]:
    """The environment for what this process starts: root's own is not for the store's owner."""
    return {
        name: value
        for name, value in os.environ.items()
        if not _taken or (_NEEDED.fullmatch(name) and without_secrets(value) == value)
    }


def lower() -> None:
    """Give up every capability but those for visibility, and raise these only in `visibility`."""
    now = capabilities()
    if now.permitted or now.inheritable:
        _prctl(_AMBIENT, _AMBIENT_CLEAR_ALL)
        try:
            _set(Capabilities(0, now.permitted & VISIBILITY, 0))
        except OSError as error:
            why = f"this process can't drop its capabilities: {error.strerror}"
            step = "reinstall its unit, whose filter must allow capset:"
            command = advice.ours("service", "install", root=True)
            raise NoPermissionError(why, step, command) from None


def give_up() -> None:
    """Give up every capability, for a child that needs none. Nothing is raised."""
    with contextlib.suppress(OSError):
        _set(Capabilities(0, 0, 0))


@contextlib.contextmanager
def visibility() -> Iterator[None]:
    """See the processes of other users while this lasts, in this thread, as far as we may."""
    now = capabilities()
    if now.effective or not now.permitted & VISIBILITY:
        yield
        return
    _set(now._replace(effective=now.permitted & VISIBILITY))
    try:
        yield
    finally:
        _set(now)


def capabilities() -> Capabilities:
    """The capabilities of this thread; none where the system has no such thing."""
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    words = (ctypes.c_uint32 * (3 * _WORDS))()
    if not hasattr(_libc, "capget") or _libc.capget(header, words) != 0:
        return Capabilities(0, 0, 0)
    return Capabilities(*(words[each] | words[3 + each] << 32 for each in range(3)))


def _set(wanted: Capabilities) -> None:
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    words = (ctypes.c_uint32 * (3 * _WORDS))(
        *(each & 0xFFFFFFFF for each in wanted), *(each >> 32 for each in wanted)
    )
    if _libc.capset(header, words) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"the capabilities can't be set: {os.strerror(code)}")


def _prctl(option: int, first: int) -> int:
    return int(_libc.prctl(option, *(ctypes.c_ulong(each) for each in (first, 0, 0, 0))))


def owner_of(uid: int, folder_gid: int) -> Owner:
    """A user with the group that the system gives them; else that of a folder, if nobody has it."""
    with contextlib.suppress(KeyError):
        return Owner(uid, pwd.getpwuid(uid).pw_gid)
    with contextlib.suppress(KeyError):
        grp.getgrgid(folder_gid)
        return Owner(uid, _NO_GROUP if uid else folder_gid)
    return Owner(uid, folder_gid)


def _refused(owner: Owner, what: str, error: OSError) -> NoPermissionError:
    overflow = ""  # the user id that stands for all that have none in this user namespace
    with contextlib.suppress(OSError):
        overflow = Path("/proc/sys/kernel/overflowuid").read_text("ascii").strip()
    if str(owner.uid) == overflow and not _is_mapped("uid_map", owner.uid):
        return NoPermissionError(
            f"{what} belongs to a user for whom this user namespace has no mapping, shown as user"
            f" id {owner.uid}: root treats it with its owner's rights alone, and nobody here can"
            " become that user",
            "run it outside of this user namespace, or map the store's owner into it",
        )
    ids = ("user", "uid_map", owner.uid), ("group", "gid_map", owner.gid)
    unmapped = [f"{kind} id {each}" for kind, name, each in ids if not _is_mapped(name, each)]
    if unmapped:
        why = f"this user namespace has no mapping for {' and '.join(unmapped)}"
    elif error.errno == errno.EPERM:
        why = "it lacks CAP_SETUID or CAP_SETGID"
    else:
        why = str(error.strerror)
    only = "root works on it only with that user's rights, and this process can't become that user"
    helps = f"run it as user id {owner.uid} from the start, as a container's user or a unit's User="
    return NoPermissionError(f"{what} belongs to user id {owner.uid}: {only}: {why}", helps)


def _is_mapped(name: str, number: int) -> bool:
    try:
        lines = Path("/proc/self", name).read_text("ascii").splitlines()
    except OSError:
        return True  # such a thing is not here
    ranges = [tuple(map(int, line.split())) for line in lines]
    return any(first <= number < first + count for first, _, count in ranges)


def _load_all(owner: Owner) -> None:
    """Load what may be needed, where that user could not: the installation may be root's alone."""
    if not _can_load(owner):
        _loaded.append(owner)
        for name in (*_modules(), *_LOADED_LATE):
            # Some are for other systems, or for packages that are not here.
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def _modules() -> Iterator[str]:
    import pkgutil

    for package in _PACKAGES:
        found = importlib.import_module(package).__path__
        for module in pkgutil.walk_packages(found, f"{package}.", onerror=lambda _: None):
            if not module.name.startswith(_PROGRAMS) and "__main__" not in module.name:
                yield module.name


def was_root() -> bool:
    """Whether this process has taken a user's rights in place of root's."""
    return bool(_taken)


def can_start_anew() -> bool:
    """Whether this user can start this Python and load our package, as far as is known."""
    return not _loaded and os.access(sys.executable, os.X_OK)


def _can_load(owner: Owner) -> bool:
    """Whether a user, whose groups we have, may read what is loaded now: a file for each folder."""
    files = (getattr(module, "__file__", None) for module in [*sys.modules.values()])
    samples = {os.path.dirname(file): file for file in files if file}
    os.setegid(owner.gid)
    os.seteuid(owner.uid)
    try:
        return all(
            os.access(folder, os.R_OK | os.X_OK, effective_ids=True)
            and os.access(file, os.R_OK, effective_ids=True)
            for folder, file in samples.items()
        )
    finally:
        os.seteuid(0)
        os.setegid(0)

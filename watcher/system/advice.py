"""Commands that can be pasted as they are printed: quoted, on one line, for this store and user.

Whatever prints a command has it made here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import sys
from typing import TYPE_CHECKING

from watcher.errors import NO_INODES, NoPermissionError, WatchError, lacks_inodes, refused
from watcher.ollama import names

if TYPE_CHECKING:
    from watcher.model import Caller, Evidence, Place

PROGRAM = "ollama-watch"
#: Where `sudo` looks for programs, whatever the user's own path is.
_SUDO_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: How a bare call finds a store again, whatever this shell's environment is; see `observe.place`.
FOUND_AGAIN = frozenset({"the unit ollama.service", "the home folder"}) | {
    f"the place of {whose} service" for whose in ("Ollama's Linux", "some distributions'")
}
_SERVER_URL = "http://127.0.0.1:11434"

_introduced: list[Caller] = []  #: who was introduced last


def introduce(config_file: str | os.PathLike[str] | None = None) -> None:
    """Remember who calls, before anything changes the user or the working directory."""
    config = "" if config_file is None else os.fspath(config_file)
    with contextlib.suppress(FileNotFoundError):  # a working directory that is gone
        config = config and os.path.abspath(config)
    _introduced[:] = [_by_process()._replace(config=config)]


def caller() -> Caller:
    """Who has called this process, and by which name."""
    return _introduced[0] if _introduced else _by_process()


def _by_process() -> Caller:
    from watcher.model import Caller  # help does not load it

    started = sys.argv[0] if sys.argv else ""
    path = os.path.join(os.path.dirname(sys.executable), PROGRAM)
    if os.path.basename(started) == PROGRAM and os.path.isfile(started):
        path = os.path.abspath(started)
    if started.endswith("/watcher/__main__.py") or not os.path.isfile(path):
        words = (sys.executable, "-m", "watcher")
        return Caller(os.getuid(), words, words)
    mine = _name_of(path, os.environ.get("PATH", ""))
    return Caller(os.getuid(), (mine,), (_name_of(path, _SUDO_PATH),))


def _name_of(path: str, search: str) -> str:
    """The program's name where that finds it on a search path; else the path itself."""
    for folder in search.split(os.pathsep):
        found = os.path.join(folder, PROGRAM)
        if os.access(found, os.X_OK):
            return PROGRAM if os.path.realpath(found) == os.path.realpath(path) else path
    return path


def watch(seen: Evidence, *words: str, owner: int | None = None, root: bool = False) -> str:
    """A command of ours on the store that was looked at.

    `owner`: the user whose files it changes, where that is known. `root`: it takes root's view.
    "" where nothing in the store can be changed; the same goes for those below.
    """
    place, by = seen.place, seen.caller
    if is_fixed(place) and changes(words):
        return ""
    powerless = not (place.writable or place.read_only) or owner not in (None, by.uid)
    store = "" if place.found_by in FOUND_AGAIN and not (root or powerless) else place.path
    return ours(*words, store=store, by=by, root=root or (powerless and changes(words)))


def is_fixed(place: Place) -> bool:
    """Whether nothing in a store can be changed, or none of ours changes anything there."""
    return place.read_only or place.foreign is not None


def on(path: str, found_by: str, *words: str) -> str:
    """A command of ours on a store that was not looked at yet."""
    powerless = changes(words) and not os.access(path, os.W_OK | os.X_OK)
    return ours(*words, store="" if found_by in FOUND_AGAIN else path, root=powerless)


def again(store: str, *options: str, root: bool = True) -> str:
    """The command that was given, with more options before it; "" where nobody has given one.

    `store`: the one that is meant where it names none. `root`: by root, with `sudo`, so also ""
    where that is root already.
    """
    by, words = caller(), sys.argv[1:]
    if not _introduced or (root and by.uid == 0):
        return ""
    is_named = any(f"{word}=".startswith("--store=") for word in words)
    named = () if is_named or not store else ("--store", store)
    # Root does not get this user's variables.
    host = os.environ.get("OLLAMA_HOST", "") if root else ""
    pulls = "pull" in words or ("queue" in words and "run" in words)
    is_there = any(f"{word}=".startswith("--host=") for word in words)
    to = ("--host", host) if pulls and host and not is_there else ()
    program = ("sudo", *by.program_of_root) if root else by.program
    return line(*program, *options, *named, *words, *to)


def cant_write(text: str, error: OSError, store: str) -> WatchError:
    """The error for what could not be written in a store, with what helps against just that."""
    if error.errno == errno.EROFS:
        return NoPermissionError(text, "mount the file system writable")
    if error.errno in (errno.EACCES, errno.EPERM):
        return NoPermissionError(text, as_owner(store), again(store))
    if error.errno == errno.ENOSPC and lacks_inodes(store):
        return WatchError(text, NO_INODES, line("df", "-i", store))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WatchError(text, "free space on the disk", ours("df", store=store))
    return refused(text, error.errno or errno.EIO)


def path_of(folder: int) -> str:
    """The path of an open folder; "" where the kernel does not show it."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{folder}")
    return ""


def as_owner(store: str) -> str:
    """Who could do what this user may not, in words."""
    if caller().uid != 0:
        return "run it as root, or as the user who owns the store"
    owner = 0
    with contextlib.suppress(OSError):
        owner = os.stat(store).st_uid
    return f"run it as the store's owner, user id {owner}" if owner else "not even root can"


def changes(words: tuple[str, ...]) -> bool:
    """Whether a command of ours changes something in the store."""
    reads = {"", "audit", "df", "status", "log", "config", "demo", "web", "mirror"}
    reads |= {"quarantine ls", "queue ls"}
    return reads.isdisjoint((" ".join(words[:1]), " ".join(words[:2])))


def ours(*words: str, store: str = "", by: Caller | None = None, root: bool = False) -> str:
    """A command of ours; with `sudo` for `root`. `store`: "" where a bare call finds it."""
    by = by or caller()
    sudo = root and by.uid != 0
    config = ("--config", by.config) if by.config else ()
    named = ("--store", store) if store else ()
    program = by.program_of_root if sudo else by.program
    return line(*(("sudo",) if sudo else ()), *program, *config, *named, *words)


def shell(seen: Evidence, *words: str, owner: int | None = None) -> str:
    """Another program's command, which changes the store: for root and, if given, `owner`."""
    return "" if is_fixed(seen.place) else line(*_sudo(seen.caller, owner), *words)


def as_root(*words: str) -> str:
    """Another program's command, which only root may run, for who has called this process."""
    return line(*_sudo(caller(), None), *words)


def _sudo(by: Caller, owner: int | None) -> tuple[str, ...]:
    return () if by.uid == 0 or by.uid == owner else ("sudo",)


def pull(seen: Evidence, model: str, *, by_server: bool = False) -> str:
    """A pull of a model, ours or Ollama's own, at the server of the store that was looked at."""
    if is_fixed(seen.place):
        return ""
    url = server_of(seen)
    insecure = ("--insecure",) if is_on_loopback(model) else ()
    if by_server:
        where = (f"OLLAMA_HOST={quoted(url)}",) if url else ()
        return " ".join((*where, line("ollama", "pull", *insecure, model)))
    to = ("--host", url) if url else ()
    return watch(seen, "pull", *to, *insecure, model)


def server_of(seen: Evidence) -> str:
    """The address of the one server that is seen to have the store; "" for the usual one."""
    urls = {server.url for server in seen.servers if server.ours and server.url}
    url = urls.pop() if len(urls) == 1 else _SERVER_URL
    return "" if url == _SERVER_URL else url


def stop(seen: Evidence) -> str:
    """The command that ends the first server that runs, or its unit; "" for none."""
    if not seen.servers:
        return ""
    server = seen.servers[0]
    if server.unit:
        return line(*_sudo(seen.caller, None), "systemctl", "stop", server.unit)
    return line(*_sudo(seen.caller, server.uid), "kill", str(server.pid))


def is_on_loopback(model: str) -> bool:
    """Whether a model's registry is on this machine, and so asked over http."""
    parsed = names.parse_model(model)
    host = "" if parsed is None else parsed.host.rpartition(":")[0] or parsed.host
    return host == "localhost" or host.startswith("127.")


def line(*words: str) -> str:
    """Words as one line that a shell takes for just these words."""
    return " ".join(map(quoted, words))


def quoted(word: str) -> str:
    """A word as any shell needs it, on one line: what can't be printed is spelled by ``printf``."""
    if word.isprintable():
        return shlex.quote(word)
    # Three octal digits, since a hexadecimal escape would take the digits behind it, too.
    escaped = "".join(
        char
        if char.isprintable() and char not in "\\'%!"
        else "".join(f"\\{byte:03o}" for byte in os.fsencode(char))
        for char in word
    )
    if word.startswith("-"):
        escaped = f"\\055{escaped[1:]}"  # no option of printf's
    if word.endswith("\n"):
        # What a command prints loses the newlines at its end; bash, zsh and ksh can spell them.
        return f"$'{escaped}'"
    return f"\"$(printf '{escaped}')\""


def new_spellings(seen: Evidence) -> str:
    """The command that gives all names of older servers in ``blobs/`` the spelling of today."""
    find = ("find", f"{seen.place.path}/blobs/", "-maxdepth", "1", "-name", "sha256:*")
    rename = 'for each do mv -nT "$each" "${each%/*}/sha256-${each##*:}"; done'
    run = ("-exec", "sh", "-c", rename, "sh", "{}", "+")
    return shell(seen, *find, *run, owner=seen.place.owner)


def brought_up(seen: Evidence, folder: str) -> str:
    """The command that moves a folder's finished blobs to where the server looks."""
    top = folder.partition("/")[0]
    found = ("-mindepth", "1", "-maxdepth", "1", "!", "-name", "*-partial*", "!", "-name", "*.tmp")
    here, there = f"{seen.place.path}/{folder}/", f"{seen.place.path}/{top}/"
    run = ("-exec", "mv", "-nt", there, "{}", "+")
    return shell(seen, "find", here, *found, *run, owner=seen.place.owner)


def moved_up(seen: Evidence, folder: str, parts: list[str], *, finished: bool) -> str:
    """The command that moves parts of a store in the store to where the server looks."""
    here, there = f"{seen.place.path}/{folder}/", f"{seen.place.path}/"
    # The files of two unfinished downloads of one digest don't fit together.
    which = ("!", "-name", "*-partial*", "!", "-name", "*.tmp") if finished else ()
    move = 'to=$2${3#"$1"}; test -e "$to" || mv -nT "$3" "$to"; ! test -e "$3"'
    # With its links counted, find knows of what was moved that it is no folder.
    moving = ("-links", "+0", "-exec", "sh", "-c", move, "sh", here, there, "{}", ";", "-prune")
    paths = [f"{here}{part}" for part in parts]
    return shell(seen, "find", *paths, *which, *moving, owner=seen.place.owner)


def duration(seconds: float) -> str:
    """A duration as people read it, such as ``12 days``, ``3 h``, ``58 min``, ``22 s``."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        count = round(seconds / unit)
        if count >= (2 if unit == 86400 else 1) and seconds >= 0.97 * unit:
            return f"{count} {name}"
    return f"{max(0.0, seconds):.0f} s"

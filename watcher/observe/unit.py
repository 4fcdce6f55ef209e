"""What ``ollama.service`` sets for its server: asked of systemd, or read as systemd reads units.

See systemd.unit(5) and systemd.exec(5).
"""

from __future__ import annotations

import contextlib
import glob
import grp
import itertools
import os
import pwd
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import urlsplit

from watcher.ollama import environment
from watcher.system import privileges

NAME = "ollama.service"
#: Where units lie; an earlier folder's file comes before a later one's of the same name.
_FOLDERS = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
)
_PROPERTIES = (
    "LoadState,UnitFileState,ActiveState,User,Group,SupplementaryGroups,WorkingDirectory,"
    "Environment,EnvironmentFiles,ExecStartPre"
)
#: What ``%`` and a letter stand for in the unit of a system's service; others are left as they are.
_SPECIFIERS = {
    "%": "%", "n": NAME, "N": "ollama", "p": "ollama", "h": "/root", "u": "root", "U": "0",
    "S": "/var/lib", "C": "/var/cache", "L": "/var/log", "E": "/etc", "t": "/run",
}  # fmt: skip
_LONGEST = 1 << 20
#: Is there where systemd runs (sd_booted(3)).
_RUNS = "/run/systemd/system"
_MOST_LINKS = 40


class Unit(NamedTuple):
    """The unit's settings that decide what its server does to which store."""

    #: "" for root, which a system's service runs as where nothing else is set.
    user: str = ""
    group: str = ""
    groups: tuple[str, ...] = ()
    folder: str = ""
    #: As the unit and its files set them, the later ones counting.
    variables: Mapping[str, str] = MappingProxyType({})
    before: tuple[str, ...] = ()
    #: A file of variables that this user can't read, "" for none.
    unread: str = ""
    #: It is neither switched on nor running.
    idle: bool = False
    #: The root folder of the system that it belongs to; "" for this one.
    root: str = ""

    @property
    def home(self) -> str | None:
        """The home of its server's processes."""
        known = self.user_known if "HOME" not in self.variables and self.user else None
        return self.variables.get("HOME") if known is None else known.pw_dir

    @property
    def user_known(self) -> pwd.struct_passwd | None:
        """Its user as the system has it; None where it has none of that name."""
        name = self.user or "0"
        if not self.root:
            with contextlib.suppress(KeyError, OverflowError):
                return pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
            return None
        for fields in _fields("/etc/passwd", self.root):
            if len(fields) > 5 and name in (fields[0], fields[2]):
                with contextlib.suppress(ValueError):
                    ids = int(fields[2]), int(fields[3])
                    return pwd.struct_passwd((fields[0], "x", *ids, "", fields[5], ""))
        return None

    @property
    def store(self) -> str | None:
        """Its server's models folder; None where nothing names it, so that no server starts."""
        home = {} if self.home is None else {"HOME": self.home}
        models = environment.models_folder({**home, **self.variables})
        if models is None or os.path.isabs(models):
            return models
        folder = (self.home or "/") if self.folder == "~" else self.folder or "/"
        return os.path.normpath(os.path.join(folder, models))

    @property
    def names_store(self) -> bool:
        """Whether the unit itself names the store, and not just its user's home."""
        return bool({"OLLAMA_MODELS", "HOME"} & self.variables.keys()) and self.store is not None

    def prepares(self, store: str) -> bool:
        """Whether ``ollama-watch prepare`` is run for a store before each start of its server."""
        for each in self.before:
            words = _words(each)
            named = dict(itertools.pairwise(words)).get("--store", store)
            ours = any(word.endswith("ollama-watch") for word in words) and "prepare" in words
            if ours and os.path.realpath(named) == os.path.realpath(store):
                return True
        return False

    @property
    def no_prune(self) -> bool:
        """Whether its server's start deletes nothing."""
        return environment.no_prune(self.variables)

    def ids(self) -> tuple[int, frozenset[int]] | None:
        """Its user's id, and those of all its groups; None where there is no such user."""
        found = self.user_known
        if found is None:
            return None
        group = _group(self.group, self.root) if self.group else found.pw_gid
        more = [_group(each, self.root) for each in self.groups]
        listed = [] if self.root else os.getgrouplist(found.pw_name, found.pw_gid)
        return found.pw_uid, frozenset(each for each in (group, *more, *listed) if each is not None)


def find(root: str = "") -> Unit | None:
    """The unit as systemd has it, or, where none runs or below `root`, as its files have it."""
    return (None if root else _asked()) or from_files(root)


def serves(url: str) -> bool:
    """Whether systemd runs here, and the unit's server is the one at an address ("": the usual)."""
    found = find() if os.path.isdir(_RUNS) else None
    if found is None:
        return False
    with contextlib.suppress(ValueError):
        at = environment.server_url(found.variables.get("OLLAMA_HOST", ""))
        return urlsplit(at).port == urlsplit(url or environment.server_url("")).port
    return False


def from_files(root: str = "") -> Unit | None:
    """The unit as its files and drop-ins have it; None where there is none."""
    whole = next(filter(None, (_text(f"{folder}/{NAME}", root) for folder in _FOLDERS)), None)
    if whole is None:
        return None  # not there, or masked
    # Drop-ins count by name, those of an earlier folder before those of a later one.
    found: dict[str, str] = {}
    for kind in ("service.d", f"{NAME}.d"):
        for folder in reversed(_FOLDERS):
            with contextlib.suppress(OSError):
                for name in os.listdir(_resolved(f"{folder}/{kind}", root)):
                    if name.endswith(".conf"):
                        found[name] = f"{folder}/{kind}/{name}"
    texts = (whole, *(_text(found[name], root) or "" for name in sorted(found)))
    return _made([each for text in texts for each in _settings(text)], root)


def _made(settings: Iterable[tuple[str, str]], root: str = "", *, idle: bool = False) -> Unit:
    given: dict[str, list[str]] = {}
    for key, value in settings:
        if value:
            given.setdefault(key, []).append(value)
        else:
            given.pop(key, None)
    words = (word for each in given.get("Environment", ()) for word in _words(each))
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    unread = ""
    for each in given.get("EnvironmentFile", ()):
        try:
            for path in sorted(glob.glob(root + each.removeprefix("-"))):
                with open(path, encoding="utf-8", errors="replace") as file:
                    variables.update(_of_file(file.read(_LONGEST)))
        except OSError:
            unread = each.removeprefix("-")
    user = given.get("User", [""])[-1]
    return Unit(
        user="" if user in ("root", "0") else user,
        group=given.get("Group", [""])[-1],
        groups=tuple(
            name for each in given.get("SupplementaryGroups", ()) for name in each.split()
        ),
        folder=given.get("WorkingDirectory", [""])[-1].removeprefix("-"),
        variables=variables,
        before=tuple(given.get("ExecStartPre", ())),
        unread=unread,
        idle=idle,
        root=root,
    )


def _asked() -> Unit | None:
    try:
        answer = subprocess.run(
            ["systemctl", "show", NAME, f"--property={_PROPERTIES}"],
            env=privileges.handed_on(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # Properties as systemctl shows them, turned into what a unit has.
    found: list[tuple[str, str]] = []
    for line in answer.stdout.splitlines():
        key, _, value = line.partition("=")
        if key == "EnvironmentFiles":
            key, value = "EnvironmentFile", re.sub(r" \(ignore_errors=\w+\)$", "", value)
        elif key == "ExecStartPre" and (argv := re.search(r"argv\[\]=(.*?) ;", value)):
            value = argv[1]
        found.append((key, value))
    state = dict(found)
    if answer.returncode or state.get("LoadState", "loaded") != "loaded":
        return None
    off = state.get("UnitFileState") in ("disabled", "masked", "masked-runtime")
    return _made(found, idle=off and state.get("ActiveState") == "inactive")


def _text(path: str, root: str) -> str | None:
    try:
        with open(_resolved(path, root), encoding="utf-8", errors="replace") as file:
            return file.read(_LONGEST)
    except OSError:
        return None


def _resolved(path: str, root: str) -> str:
    """A path of a system as it is reached here: what its links point to lies below its root."""
    for _ in range(_MOST_LINKS if root else 0):
        try:
            target = os.readlink(root + path)
        except OSError:
            break
        path = os.path.normpath(os.path.join(os.path.dirname(path), target))
    return root + path


def _settings(text: str) -> Iterator[tuple[str, str]]:
    section, begun = "", ""
    for line in text.splitlines():
        if line.lstrip()[:1] in ("#", ";"):
            continue
        if line.endswith("\\"):
            begun += line[:-1] + " "
            continue
        whole, begun = (begun + line).strip(), ""
        if whole.startswith("["):
            section = whole
        elif section == "[Service]" and "=" in whole:
            key, _, value = whole.partition("=")
            expanded = re.sub("%(.)", lambda each: _SPECIFIERS.get(each[1], each[0]), value.strip())
            yield key.strip(), expanded


def _words(value: str) -> list[str]:
    with contextlib.suppress(ValueError):
        return shlex.split(value)
    return []


def _of_file(text: str) -> Iterator[tuple[str, str]]:
    for line in text.replace("\\\n", "").splitlines():
        name, named, value = line.strip().partition("=")
        if named and name[:1] not in ("#", ";"):
            yield name.strip(), " ".join(_words(value)) if value else ""


def _fields(path: str, root: str) -> list[list[str]]:
    return [line.split(":") for line in (_text(path, root) or "").splitlines()]


def _group(name: str, root: str) -> int | None:
    if name.isdecimal():
        return int(name)
    if root:
        groups = [each for each in _fields("/etc/group", root) if len(each) > 2]
        found = next((each[2] for each in groups if each[0] == name), "")
        return int(found) if found.isdecimal() else None
    with contextlib.suppress(KeyError):
        return grp.getgrnam(name).gr_gid
    return None

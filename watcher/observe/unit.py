"""What ``ollama.service`` sets for its server, read as systemd reads units.

See systemd.unit(5) and systemd.exec(5).
"""

import contextlib
import glob
import grp
import itertools
import os
import pwd
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import urlsplit

from watcher.ollama import environment
from watcher.system import privileges

NAME = "ollama.service"
#: Where units lie; an earlier folder's file comes before a later one's of the same name.
_FOLDERS = tuple(
    f"{top}/systemd/system" for top in ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib")
)
#: By the state of its file, a unit that no start of the system starts.
_OFF = frozenset({"disabled", "masked", "masked-runtime"})
#: What ``%`` and a letter stand for in the unit of a system's service; others are left as they are.
_SPECIFIERS = {
    "%": "%", "n": NAME, "N": "ollama", "p": "ollama", "h": "/root", "u": "root", "U": "0",
    "S": "/var/lib", "C": "/var/cache", "L": "/var/log", "E": "/etc", "t": "/run",
}  # fmt: skip
_LONGEST = 1 << 20
_RUNS = "/run/systemd/system"  #: sd_booted(3)
_MOST_LINKS = 40


class Unit(NamedTuple):
    """The unit's settings that decide what its server does to which store."""

    user: str = ""  #: "" for root, which a system's service runs as where nothing else is set
    group: str = ""
    groups: tuple[str, ...] = ()
    folder: str = ""
    variables: Mapping[str, str] = MappingProxyType({})  #: as the unit and its files set them
    before: tuple[str, ...] = ()
    unread: str = ""  #: a file of variables that this user can't read, "" for none
    idle: bool = False  #: it is neither switched on nor running
    root: str = ""  #: the root folder of the system that it belongs to; "" for this one

    @property
    def home(self) -> str | None:
        if "HOME" not in self.variables and self.user and self.user_known is not None:
            return self.user_known.pw_dir
        return self.variables.get("HOME")

    @property
    def user_known(self) -> pwd.struct_passwd | None:
        """Its user as the system has it; None where it has none of that name."""
        name = self.user or "0"
        if not self.root:
            with contextlib.suppress(KeyError, OverflowError):
                return pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
            return None
        for fields in rows("/etc/passwd", self.root):
            with contextlib.suppress(ValueError, IndexError):
                ids = int(fields[2]), int(fields[3])
                if name in (fields[0], fields[2]):
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


def find() -> Unit | None:
    """The unit of this system, and whether systemd, where it runs, has it off."""
    found = from_files()
    return found and found._replace(idle=_is_off())


def serves(url: str) -> bool:
    """Whether systemd runs here, and the unit's server is the one at an address ("": the usual)."""
    found = find() if os.path.isdir(_RUNS) else None
    with contextlib.suppress(ValueError):
        at = environment.server_url(found.variables.get("OLLAMA_HOST", "") if found else "")
        same = urlsplit(at).port == urlsplit(url or environment.server_url("")).port
        return found is not None and same
    return False


def from_files(root: str = "") -> Unit | None:
    """The unit as its files and drop-ins have it; None where there is none."""
    whole = next(filter(None, (_text(f"{folder}/{NAME}", root) for folder in _FOLDERS)), None)
    if whole is None:
        return None  # not there, or masked
    # Drop-ins count by name, those of an earlier folder before those of a later one.
    found: dict[str, str] = {}
    for kind, folder in itertools.product(("service.d", f"{NAME}.d"), reversed(_FOLDERS)):
        with contextlib.suppress(OSError):
            listed = os.listdir(_resolved(f"{folder}/{kind}", root))
            found |= {each: f"{folder}/{kind}/{each}" for each in listed if each.endswith(".conf")}
    texts = (whole, *(_text(found[name], root) or "" for name in sorted(found)))
    return _made((each for text in texts for each in _settings(text)), root)


def _made(settings: Iterable[tuple[str, str]], root: str) -> Unit:
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
    user, group, folder = (
        given.get(key, [""])[-1] for key in ("User", "Group", "WorkingDirectory")
    )
    return Unit(
        user="" if user in ("root", "0") else user,
        group=group,
        groups=tuple(" ".join(given.get("SupplementaryGroups", ())).split()),
        folder=folder.removeprefix("-"),
        variables=variables,
        before=tuple(given.get("ExecStartPre", ())),
        unread=unread,
        root=root,
    )


def _is_off() -> bool:
    import subprocess  # loaded only where systemd may answer

    try:
        answer = subprocess.run(
            ["systemctl", "show", NAME, "--property=UnitFileState,ActiveState"],
            env=privileges.handed_on(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    state = dict(line.split("=", 1) for line in answer.stdout.splitlines() if "=" in line)
    return state.get("UnitFileState") in _OFF and state.get("ActiveState") == "inactive"


def _text(path: str, root: str) -> str | None:
    try:
        with open(_resolved(path, root), encoding="utf-8", errors="replace") as file:
            return file.read(_LONGEST)
    except OSError:
        return None


def _resolved(path: str, root: str) -> str:
    """A path of a system as it is reached here: what its links point to lies below its root."""
    with contextlib.suppress(OSError):
        for _ in range(_MOST_LINKS if root else 0):
            target = os.readlink(root + path)
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


def rows(path: str, root: str) -> list[list[str]]:
    """The rows of a file such as ``passwd``, by their fields; none where it can't be read."""
    return [line.split(":") for line in (_text(path, root) or "").splitlines()]


def _group(name: str, root: str) -> int | None:
    if name.isdecimal():
        return int(name)
    with contextlib.suppress(KeyError, IndexError, ValueError):
        if not root:
            return grp.getgrnam(name).gr_gid
        return next((int(each[2]) for each in rows("/etc/group", root) if each[0] == name), None)
    return None

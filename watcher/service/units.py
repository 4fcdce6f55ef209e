"""The files that install the service, as text: systemd's units, a drop-in, and lines for cron.

Their templates are in `templates/`, under the names that they get. Each file begins with a stamp, a
comment that identifies a file of ours, and shows whether it was edited. What they say of this
installation, its program, and the store with its owner, is found here, too.
"""

import contextlib
import enum
import hashlib
import os
import re
import shlex
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from watcher.errors import NoPermissionError, RefusedError
from watcher.model import ServerUser
from watcher.observe import place, unit
from watcher.ollama import names
from watcher.state import folders

SERVICE = "ollama-watch.service"
CLEAN_SERVICE = "ollama-watch-clean.service"
CLEAN_TIMER = "ollama-watch-clean.timer"
DROP_IN = "ollama.service.d/ollama-watch.conf"
#: Every name that may be ours in a folder of units, and in one of cron's.
UNITS = (SERVICE, CLEAN_SERVICE, CLEAN_TIMER, DROP_IN)
CRON = ("ollama-watch",)  # cron passes over names with a dot

#: How often a clean-up may run, in systemd's words, to the fields of a crontab.
RHYTHMS = {"daily": "17 4 * * *", "weekly": "17 4 * * 0", "monthly": "17 4 1 * *"}

_HOMES = ("/home", "/root", "/run/user")  #: what ``ProtectHome=`` is about
#: What a restart, or someone's tidying, clears; a unit has ``/tmp`` for itself, too.
_PASSING = ("/tmp", "/var/tmp", "/dev/shm", "/run")  # noqa: S108


class Installation(NamedTuple):
    """What the units have to know. All paths are absolute."""

    program: str = "/usr/bin/ollama-watch"
    store: str = "/usr/share/ollama/.ollama/models"
    #: Owner of the store: names, or numbers where there are none.
    user: str = "ollama"
    group: str = "ollama"
    writable: tuple[str, ...] = ("/usr/share/ollama/.ollama",)  #: what it has to write
    config: str | None = None  #: the settings file, where it is not the system's
    metrics: str | None = None  #: the folder of the settings' textfile of metrics
    personal: bool = False  #: one user's systemd, which confines nothing
    python: str = "/usr/bin/python3"  #: the interpreter that the program names

    def paths(self) -> list[str]:
        return [self.store, *self.writable, *filter(None, (self.config, self.metrics))]

    def command(self, *words: str) -> list[str]:
        """The words of a command of ours on the store.

        The program is isolated (-I), because a home's usercustomize.py, or a variable, would have
        other code run with our rights; but not a user's own, which may be in their home.
        """
        program = (self.program,) if self.personal else (self.python, "-I", self.program)
        config = () if self.config is None else ("--config", self.config)
        return [*program, *config, "--store", self.store, *words]


class Kind(enum.StrEnum):
    """What becomes of a file, by what is there and what is wanted."""

    WRITE = "write"
    REPLACE = "replace"
    REMOVE = "remove"
    SAME = "same"
    EDITED = "edited"  #: kept, as the next is: somebody has changed it
    FOREIGN = "foreign"


def change(found: str | None, body: str | None, missing: int) -> tuple[Kind, str]:
    """What becomes of a file, and its text then: what is `found`, and the `body` that is wanted.

    Either is None where there is nothing, not both. `missing`: folders above it that are not there.
    """
    if found is None:
        return Kind.WRITE, stamped(body or "", missing)
    ours = stamp(found)
    if ours is None:
        return Kind.FOREIGN, found
    made, is_untouched = ours
    if not is_untouched:
        return Kind.EDITED, found
    if body is None:
        return Kind.REMOVE, found
    text = stamped(body, made)
    return (Kind.SAME if text == found else Kind.REPLACE), text


def stamped(body: str, made: int = 0) -> str:
    """The whole text of a file; `made` folders above it were made for it."""
    return f"# ollama-watch service install: sha256={_hash(body, made)} folders={made}\n{body}"


def stamp(text: str) -> tuple[int, bool] | None:
    """How many folders were made for a file of ours, and whether it is as written; else None."""
    match = re.match(
        r"# ollama-watch service install: sha256=([0-9a-f]{16}) folders=(\d{1,3})\n", text
    )
    if match is None:
        return None
    made = int(match[2])
    return made, _hash(text[match.end() :], made) == match[1]


def _hash(body: str, made: int) -> str:
    return hashlib.sha256(f"{made}\n{body}".encode()).hexdigest()[:16]


def unwritable(path: str) -> str | None:
    """Why a path can't be written into a unit and a crontab alike; None where it can."""
    if not path.isprintable():
        return "it has characters that can't be printed"
    if any(char in path for char in '"\\$'):
        return 'it has one of the characters " \\ $'
    return None


def passing(program: str, *, personal: bool) -> str | None:
    """Why a program would not be there, or not to be trusted, at the next start; or None."""
    if _below(program, _PASSING) or "/.cache/" in program:
        return "this location is temporary"
    if not personal and _below(program, _HOMES):
        return "a system service can't see homes, and must not run files that a user can change"
    return None


def _below(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def units(where: Installation, clean: str | None = None) -> dict[str, str]:
    """Names below the folder of units to their text, without stamp. `clean`: one of RHYTHMS."""
    commands = {SERVICE: ("daemon",), DROP_IN: ("-q", "prepare")}
    if clean is not None:
        commands |= {CLEAN_SERVICE: ("-q", "clean", "--yes"), CLEAN_TIMER: ()}
    return {
        name: _template(name).format(
            command=" ".join(map(_quoted, where.command(*words))),
            target="default.target" if where.personal else "multi-user.target",
            confined=_confined(where, "online" if name == SERVICE else "offline"),
            service=SERVICE,
            rhythm=clean,
        )
        for name, words in commands.items()
    }


def _template(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _quoted(word: str) -> str:
    """A word as units have it: ``%`` is systemd's own there (`unwritable` has the rest)."""
    escaped = word.replace("%", "%%")
    return escaped if re.fullmatch(r"[\w%@+=:,./-]+", escaped, re.ASCII) else f'"{escaped}"'


def _confined(where: Installation, network: str) -> str:
    if where.personal:
        return _template("confined-personal.part") + _template("confined.part")
    at_home = any(_below(path, _HOMES) for path in where.paths())
    # A store that is not there keeps a service from starting, until it is; metrics don't.
    writable = [*where.writable, *([f"-{where.metrics}"] if where.metrics else ())]
    system = _template("confined-system.part").format(
        user=where.user,
        group=where.group,
        writable=" ".join(map(_quoted, writable)),
        home="read-only" if at_home else "yes",
        network=_template(f"{network}.part"),
    )
    return system + _template("confined.part")


def cron(where: Installation, clean: str | None = None) -> dict[str, str]:
    """The same for ``/etc/cron.d``: `prepare` runs every ten minutes, not at a server's start."""
    commands = {"*/10 * * * *": where.command("-q", "prepare")}
    if clean is not None:
        commands[RHYTHMS[clean]] = where.command("-q", "clean", "--yes")
    text = _template(CRON[0])
    for rhythm, words in commands.items():
        # cron ends a line at ``%``.
        command = shlex.join(words).replace("%", "\\%")
        text += f"{rhythm} root {command}\n"
    return {CRON[0]: text}


def describe(
    store: str | None, config: str | None, metrics: str, root: str = "", *, personal: bool = False
) -> Installation:
    """This installation, for a system service, or one of the user's own (`personal`).

    `store` and `config` (a settings file) are those that were named, `metrics` is the file of the
    settings, "" for none. `root` is the folder of a system that is not running: the store is as it
    is there, or as Ollama's installer makes it.
    Raises RefusedError where a service can't rely on what was found.
    """
    where = _found(_program(root), store, config and os.path.abspath(config), root, personal)
    python = _interpreter(f"{root}{where.program}", root)
    where = where._replace(python=python, metrics=os.path.dirname(metrics) or None)
    for path in (where.program, where.python, *where.paths()):
        if why := unwritable(path):
            bad = f"{names.printable(path)}: {why}, which units and crontabs interpret"
            raise RefusedError(bad, "rename it, or use a link with another name")
    if why := passing(where.program, personal=personal):
        alone = "" if passing(where.program, personal=True) else ", or use --user"
        step = f"install it elsewhere, such as in a virtual environment in /opt{alone}"
        raise RefusedError(f"{where.program}: {why}", step)
    return where


def _found(
    program: str, named: str | None, config: str | None, root: str, personal: bool
) -> Installation:
    if root:
        usual = _by_the_unit(Installation(program, config=config), root)
        store = usual.store if named is None else os.path.abspath(named)
        if not os.path.isdir(root + store):
            return usual if store == usual.store else usual._replace(store=store, writable=(store,))
    else:
        found = place.find(named, os.environ)
        link = found.foreign or folders.look(found.path)[1].foreign
        if link is not None:
            why = f"{names.of_link(link)}: a service does not follow it"
            raise RefusedError(why, names.TRUST_LINK)
        store = found.path
    here = root + store
    if personal and not os.access(here, os.W_OK):
        step = "install it as root, without --user; it then runs as the store's owner"
        why = f"{names.printable(store)}: a service of your own can't write there"
        raise NoPermissionError(why, step)
    status = folders.owner(here)
    user = _name("/etc/passwd", root, status.st_uid)
    group = _name("/etc/group", root, status.st_gid)
    writable = tuple(_writable(here, root))
    return Installation(program, store, user, group, writable, config, personal=personal)


def _by_the_unit(usual: Installation, root: str) -> Installation:
    server = unit.from_files(root)
    if server is None or server.store is None:
        return usual
    user, group = server.user or "root", server.group
    if not group:
        # The group that the user has, or one of the same name where that is not known.
        known = server.user_known
        group = user if known is None else _name("/etc/group", root, known.pw_gid)
    if server.store == usual.store:
        return usual._replace(user=user, group=group)
    return usual._replace(store=server.store, user=user, group=group, writable=(server.store,))


def _program(root: str) -> str:
    """The script of this installation, links resolved; below `root` as it is called there."""
    script = sys.argv[0]
    if os.path.basename(script) != "ollama-watch":
        script = os.path.join(os.path.dirname(sys.executable), "ollama-watch")
    path = os.path.realpath(script)
    if not os.access(path, os.X_OK):
        why = f"{names.printable(path)} does not exist, so a service can't start it"
        step = "install the package (pip install, pipx install) and run its ollama-watch"
        raise RefusedError(why, step)
    return _inside(path, root)


def _interpreter(script: str, root: str) -> str:
    """The interpreter that a script names in its first line; else ours."""
    with contextlib.suppress(OSError), open(script, "rb") as lines:
        words = os.fsdecode(lines.readline(1 << 12)).removeprefix("#!").split()
        if len(words) == 1 and os.path.basename(words[0]).startswith(("python", "pypy")):
            return words[0]
    return _inside(sys.executable, root)


def unreachable(where: Installation, *, cron: bool) -> str:
    """Why the service's user can't run the program, its Python or the package; "" where it can."""
    named = unit.Unit(user=where.user, group=where.group)
    # An owner without a name is a number.
    numbers = [int(each) if each.isdecimal() else -1 for each in (where.user, where.group)]
    uid, groups = named.ids() or (numbers[0], frozenset(numbers[1:]))
    user = ServerUser(uid, groups, unbarred=uid == 0)
    python = _interpreter(where.program, "")
    needed = [where.program, python]
    if os.path.realpath(python) == os.path.realpath(sys.executable):
        needed += [os.__file__, os.path.abspath(names.__file__)]
    for path in needed:
        for step in _way(path):
            shown, at = names.printable(path), names.printable(step)
            if not cron and _below(step, _HOMES):
                return f"{shown} is in a home ({at}), which a system service can't see"
            try:
                found = os.stat(step)
            except OSError as error:
                return f"{shown} can't be reached: {at}: {error.strerror}"
            runs = stat.S_ISDIR(found.st_mode) or found.st_mode & 0o111
            if not user.may(0o1 if runs else 0o4, found.st_mode, found.st_uid, found.st_gid):
                mode = f"{stat.S_IMODE(found.st_mode):04o}"
                return f"the service's user {where.user} can't reach {shown}: {at} is {mode}"
    return ""


def _way(path: str) -> Iterator[str]:
    """Every folder that leads to a file, over links as well, and the file itself."""
    at = "/"
    for part in path.split("/"):
        yield at
        at = os.path.join(at, part)
        if os.path.islink(at):
            yield from _way(os.path.normpath(os.path.join(os.path.dirname(at), os.readlink(at))))
            at = os.path.realpath(at)
    yield at


def _inside(path: str, root: str) -> str:
    """A path as it is called below `root`; one that is not there, unchanged."""
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _name(file: str, root: str, number: int) -> str:
    """The name that ``passwd`` or ``group`` has for a number; the number where it has none."""
    named = (each[0] for each in unit.rows(file, root) if each[2:3] == [str(number)])
    return next(named, str(number))


def _writable(here: str, root: str) -> Iterator[str]:
    """The store, or the folder around it where that has its owner, and what ``blobs`` links to."""
    store = os.path.realpath(here)
    around, owner = os.path.dirname(store), os.stat(store).st_uid
    own = owner != 0 and os.stat(around).st_uid == owner
    inside = _inside(around, root)
    is_home = inside in _HOMES or os.path.dirname(inside) in _HOMES
    whole = around if own and not is_home else store
    yield _inside(whole, root)
    blobs = os.path.realpath(f"{store}/blobs")
    if not blobs.startswith(f"{whole}/"):
        yield _inside(blobs, root)

"""This installation for a service: its program, and the store with its owner."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator

from watcher.errors import NoPermissionError, RefusedError
from watcher.model import ServerUser
from watcher.observe import place, unit
from watcher.ollama import names
from watcher.service import units
from watcher.service.units import Installation
from watcher.state import folders


def describe(
    store: str | None,
    config: str | None,
    metrics_file: str,
    root: str = "",
    *,
    personal: bool = False,
) -> Installation:
    """This installation, for a system service, or one of the user's own (`personal`).

    `store` and `config` (a settings file) are those that were named, `metrics_file` is that of the
    settings, "" for none. `root` is the folder of a system that is not running: the store is as it
    is there, or as Ollama's installer makes it.
    Raises RefusedError where a service can't rely on what was found.
    """
    where = _found(_program(root), store, config and os.path.abspath(config), root, personal)
    python = _interpreter(f"{root}{where.program}", root)
    where = where._replace(python=python, metrics=os.path.dirname(metrics_file) or None)
    for path in (where.program, where.python, *where.paths()):
        if why := units.unwritable(path):
            raise RefusedError(
                f"{names.printable(path)}: {why}, which units and crontabs interpret",
                "rename it, or use a link with another name",
            )
    if why := units.passing(where.program, personal=personal):
        alone = "" if units.passing(where.program, personal=True) else ", or use --user"
        raise RefusedError(
            f"{where.program}: {why}",
            f"install it elsewhere, such as in a virtual environment in /opt{alone}",
        )
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
            raise RefusedError(
                f"{names.of_link(link)}: a service does not follow it", names.TRUST_LINK
            )
        store = found.path
    here = root + store
    if personal and not os.access(here, os.W_OK):
        raise NoPermissionError(
            f"{names.printable(store)}: a service of your own can't write there",
            "install it as root, without --user; it then runs as the store's owner",
        )
    status = folders.owner(here)
    user = _name(f"{root}/etc/passwd", status.st_uid)
    group = _name(f"{root}/etc/group", status.st_gid)
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
        group = user if known is None else _name(f"{root}/etc/group", known.pw_gid)
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
        raise RefusedError(
            f"{names.printable(path)} does not exist, so a service can't start it",
            "install the package (pip install, pipx install) and run its ollama-watch",
        )
    return _inside(path, root)


def _interpreter(script: str, root: str) -> str:
    """The interpreter that a script names in its first line; else ours."""
    with contextlib.suppress(OSError), open(script, "rb") as lines:
        words = os.fsdecode(lines.readline(1 << 12)).removeprefix("#!").split()
        if len(words) == 1 and os.path.basename(words[0]).startswith(("python", "pypy")):
            return words[0]
    return _inside(sys.executable, root)


def unreachable(where: Installation, *, cron: bool) -> str:
    """Why the service's user can't run this installation; "" where it can.

    The program's Python, its libraries and the package may be in other places than the program.
    """
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
            if not cron and units.in_a_home(step):
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


def _name(file: str, number: int) -> str:
    """The name that ``passwd`` or ``group`` has for a number; the number where it has none."""
    with contextlib.suppress(OSError), open(file, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            fields = line.split(":")
            if len(fields) > 2 and fields[2] == str(number):
                return fields[0]
    return str(number)


def _writable(here: str, root: str) -> Iterator[str]:
    """What the service has to write: the store, and what its ``blobs`` links to.

    The folder around the store, if it has the same owner: a recreated store is another folder, and
    a service sees the folders of its start. But never a whole home, nor a folder of the system.
    """
    store = os.path.realpath(here)
    around, owner = os.path.dirname(store), os.stat(store).st_uid
    own = owner != 0 and os.stat(around).st_uid == owner
    whole = around if own and not units.is_home(_inside(around, root)) else store
    yield _inside(whole, root)
    blobs = os.path.realpath(f"{store}/blobs")
    if not blobs.startswith(f"{whole}/"):
        yield _inside(blobs, root)

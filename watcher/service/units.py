"""The files that install the service, as text: systemd's units, a drop-in, and lines for cron.

Their templates are in `templates/`, under the names that they get. Each file begins with a stamp, a
comment that identifies a file of ours, and shows whether it was edited.
"""

from __future__ import annotations

import enum
import hashlib
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

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
    #: What the service has to be able to write.
    writable: tuple[str, ...] = ("/usr/share/ollama/.ollama",)
    config: str | None = None  #: the settings file, where it is not the system's
    #: The folder of the textfile of metrics, where the settings name one.
    metrics: str | None = None
    #: For one user's own systemd, which can neither give capabilities nor hide anything.
    personal: bool = False
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
    #: Kept, whatever is wanted: somebody has changed it, or somebody else has written it.
    EDITED = "edited"
    FOREIGN = "foreign"


def change(found: str | None, body: str | None, missing: int) -> tuple[Kind, str]:
    """What becomes of a file, and its new text (that which is there, where it stays or goes).

    `found`: its text now, None where there is none. `body`: what is wanted, None for nothing; not
    both are None. `missing`: folders above it that are not there.
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
    """How many folders were made for a file of ours, and whether the rest is as we wrote it.

    The folders go with it, where they are empty by then. None for no file of ours.
    """
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


def in_a_home(path: str) -> bool:
    return _below(path, _HOMES)


def is_home(folder: str) -> bool:
    return folder in _HOMES or os.path.dirname(folder) in _HOMES


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
    """The same for a machine without systemd: a file for ``/etc/cron.d``, without stamp.

    What `prepare` does before a server's start is done every ten minutes.
    """
    commands = {"*/10 * * * *": where.command("-q", "prepare")}
    if clean is not None:
        commands[RHYTHMS[clean]] = where.command("-q", "clean", "--yes")
    text = _template(CRON[0])
    for rhythm, words in commands.items():
        # cron ends a line at ``%``.
        command = shlex.join(words).replace("%", "\\%")
        text += f"{rhythm} root {command}\n"
    return {CRON[0]: text}

"""The files that install the service, as text: systemd's units, a drop-in, and lines for cron.

Each begins with a stamp, a comment that tells a file of ours from anyone else's, and one that was
edited from one that was not.
"""

from __future__ import annotations

import enum
import hashlib
import os
import re
import shlex
from typing import NamedTuple

SERVICE = "ollama-watch.service"
CLEAN_SERVICE = "ollama-watch-clean.service"
CLEAN_TIMER = "ollama-watch-clean.timer"
DROP_IN = "ollama.service.d/ollama-watch.conf"
#: Every name that may be ours in a folder of units, and in one of cron's.
UNITS = (SERVICE, CLEAN_SERVICE, CLEAN_TIMER, DROP_IN)
CRON = ("ollama-watch",)  # cron passes over names with a dot

#: How often a clean-up may run, as systemd says it, to the fields of a crontab.
RHYTHMS = {"daily": "17 4 * * *", "weekly": "17 4 * * 0", "monthly": "17 4 1 * *"}

#: What ``ProtectHome=`` is about.
_HOMES = ("/home", "/root", "/run/user")
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
    #: The settings file, where it is not the system's.
    config: str | None = None
    #: The folder of the textfile of metrics, where the settings name one.
    metrics: str | None = None
    #: For one user's own systemd, which can neither give capabilities nor hide anything.
    personal: bool = False
    #: The interpreter that the program names.
    python: str = "/usr/bin/python3"

    def paths(self) -> list[str]:
        """All paths but the program's and its interpreter's."""
        return [self.store, *self.writable, *filter(None, (self.config, self.metrics))]

    def command(self, *words: str) -> list[str]:
        """The words of a command of ours on the store."""
        config = () if self.config is None else ("--config", self.config)
        return [*self._program(), *config, "--store", self.store, *words]

    def _program(self) -> tuple[str, ...]:
        """What runs the program: isolated (-I), but for a user's own, which may be in their home.

        Else a home's usercustomize.py, or a variable, would have other code run with our rights.
        """
        return (self.program,) if self.personal else (self.python, "-I", self.program)


class Stamp(NamedTuple):
    """What the first line of a file of ours says."""

    #: Folders that were made for the file: they go with it, where they are empty by then.
    made: int
    #: The rest is as we wrote it.
    untouched: bool


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
    if not ours.untouched:
        return Kind.EDITED, found
    if body is None:
        return Kind.REMOVE, found
    text = stamped(body, ours.made)
    return (Kind.SAME if text == found else Kind.REPLACE), text


def stamped(body: str, made: int = 0) -> str:
    """The whole text of a file; `made` folders above it were made for it."""
    return f"# ollama-watch service install: sha256={_hash(body, made)} folders={made}\n{body}"


def stamp(text: str) -> Stamp | None:
    """The stamp of a file, or None where it is none of ours."""
    match = re.match(
        r"# ollama-watch service install: sha256=([0-9a-f]{16}) folders=(\d{1,3})\n", text
    )
    if match is None:
        return None
    made = int(match[2])
    return Stamp(made, _hash(text[match.end() :], made) == match[1])


def _hash(body: str, made: int) -> str:
    return hashlib.sha256(f"{made}\n{body}".encode()).hexdigest()[:16]


# ---------------------------------------------------------------- what can't be installed


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
    """Whether a path is where a system service sees nothing."""
    return _below(path, _HOMES)


def is_home(folder: str) -> bool:
    """Whether a folder is somebody's home, or holds homes."""
    return folder in _HOMES or os.path.dirname(folder) in _HOMES


def _below(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


# ---------------------------------------------------------------- systemd


def units(where: Installation, clean: str | None = None) -> dict[str, str]:
    """Names below the folder of units to their text, without stamp. `clean`: one of RHYTHMS."""
    texts = {SERVICE: _service(where), DROP_IN: _drop_in(where)}
    if clean is not None:
        texts[CLEAN_SERVICE] = _clean_service(where)
        texts[CLEAN_TIMER] = _CLEAN_TIMER.format(rhythm=clean)
    return texts


def _exec(words: list[str]) -> str:
    """A command line as units have it: ``%`` is systemd's own there (`unwritable` has the rest)."""
    return " ".join(_quoted(word) for word in words)


def _quoted(word: str) -> str:
    escaped = word.replace("%", "%%")
    return escaped if re.fullmatch(r"[\w%@+=:,./-]+", escaped, re.ASCII) else f'"{escaped}"'


def _service(where: Installation) -> str:
    return _SERVICE.format(
        command=_exec(where.command("daemon")),
        target="default.target" if where.personal else "multi-user.target",
        confined=_confined(where, _ONLINE),
    )


def _clean_service(where: Installation) -> str:
    return _CLEAN_SERVICE.format(
        command=_exec(where.command("-q", "clean", "--yes")), confined=_confined(where, _OFFLINE)
    )


def _drop_in(where: Installation) -> str:
    return _DROP_IN.format(service=SERVICE, command=_exec(where.command("-q", "prepare")))


def _confined(where: Installation, network: str) -> str:
    """The user that a service runs as, and its restrictions."""
    if where.personal:
        return _PERSONAL + _EVERYWHERE
    at_home = any(_below(path, _HOMES) for path in where.paths())
    # A store that is not there keeps a service from starting, until it is; metrics don't.
    writable = [*where.writable, *([f"-{where.metrics}"] if where.metrics else ())]
    return (
        _OWNER.format(user=where.user, group=where.group)
        + _SYSTEM.format(
            writable=" ".join(map(_quoted, writable)),
            home="read-only" if at_home else "yes",
            network=network,
        )
        + _EVERYWHERE
    )


_SERVICE = """\
# Watches an Ollama store, logs what happens to its downloads, and repairs
# interrupted ones (unless the settings say `repair = false`).
#
#   journalctl -u ollama-watch -o cat -f     follows what it does
#   systemctl reload ollama-watch            reads the settings again
#   systemctl edit ollama-watch              is for your own changes

[Unit]
Description=Watch and repair the downloads in an Ollama model store
# Not Requires=, and not PartOf=: it must be running when the server dies.
After=local-fs.target

[Service]
Type=notify
ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
RestartSec=10s
# 2: a wrong setting, which no restart corrects.
RestartPreventExitStatus=2
# It scans the whole store every ten minutes and reports each scan to systemd.
WatchdogSec=30min
# With `queue = true` it makes running pulls resumable: 75 seconds at most.
TimeoutStopSec=90s
# It must not slow the machine down.
Nice=5
IOSchedulingClass=idle
MemoryMax=512M

{confined}
[Install]
WantedBy={target}
"""

_CLEAN_SERVICE = """\
# Cleans the store once; ollama-watch-clean.timer starts it.
#
# It removes and refuses the same things as `ollama-watch clean` by hand. It
# removes orphaned blobs only while no server runs: to clean them, too, stop
# ollama.service first.
#
# Age comes from modification times: stop the timer while you copy a store with
# cp -a or rsync -a.

[Unit]
Description=Remove stale downloads and orphans from an Ollama model store
After=local-fs.target

[Service]
Type=oneshot
ExecStart={command}
# 3: it refused something for safety, mostly because the server runs; see the
# journal. 10: there is no store yet.
SuccessExitStatus=3 10
# It is never urgent.
Nice=10
IOSchedulingClass=idle
MemoryMax=512M
TimeoutStartSec=1h

{confined}"""

_CLEAN_TIMER = """\
# Cleans the store regularly.

[Unit]
Description=Clean an Ollama model store regularly

[Timer]
OnCalendar={rhythm}
RandomizedDelaySec=2h
# If the machine was off at that time, it runs at the next start.
Persistent=yes

[Install]
WantedBy=timers.target
"""

_DROP_IN = """\
# Just before the server starts, as its user: protects downloads from being
# pruned by that start, and repairs those that broke while nothing watched.
# Takes 20 seconds at most. The "-" lets the server start whatever happens.
#
# A drop-in, because Ollama's installer overwrites its unit at each update.

[Unit]
# If both start, the watcher is first. If both stop, the server is first, so
# that the watcher sees what it left. Neither requires the other.
After={service}

[Service]
ExecStartPre=-{command}
"""

_OWNER = """\
# The store's owner, so that the server can use what it writes and vice versa.
User={user}
Group={group}
# A download is in use while a process has its files open: /proc/<pid>/fd. For
# another user's process the kernel shows that only with CAP_SYS_PTRACE, and the
# folder itself, mode 0500, only with CAP_DAC_READ_SEARCH. Both are raised only
# for that, and nothing in the store is opened with them. Without them the
# service waits an hour instead of 90 seconds, and refuses more.
AmbientCapabilities=CAP_SYS_PTRACE CAP_DAC_READ_SEARCH
CapabilityBoundingSet=CAP_SYS_PTRACE CAP_DAC_READ_SEARCH

"""

_SYSTEM = """\
# It writes to the store and to the metrics file of the settings, nowhere else.
ProtectSystem=strict
ReadWritePaths={writable}
ProtectHome={home}
PrivateTmp=yes
PrivateDevices=yes
PrivateMounts=yes
{network}# Open by design: it sees all processes and /proc/stat (no ProtectProc=,
# ProcSubset=, PrivateUsers=), and other users can read its logs.
UMask=0022
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
KeyringMode=private
RemoveIPC=yes
"""

_ONLINE = """\
# The network stays open: before a damaged blob moves to quarantine, its
# registry must confirm that it can be downloaded again; with `queue = true` it
# also asks registries for manifests. With IPAddressDeny=any and
# IPAddressAllow=localhost it asks the server only; then a damaged blob is
# reported and stays.
"""

_OFFLINE = """\
# It asks only the server on this machine, for its version. A process that may
# read every file gets no way to send one away. For a server that listens on one
# other address: IPAddressAllow=<that address>
IPAddressDeny=any
IPAddressAllow=localhost
"""

_PERSONAL = """\
# A user's own systemd gives no capabilities, so other users' processes are
# invisible and it waits an hour instead of 90 seconds. If the server runs as
# the same user, that user's processes are enough. It runs while the user is
# logged in; with `loginctl enable-linger` it always runs.
"""

_EVERYWHERE = """\
NoNewPrivileges=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
# systemd's own socket, the server, and a registry.
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
# It drops the capabilities above except while it needs them.
SystemCallFilter=capset
SystemCallErrorNumber=EPERM
"""


# ---------------------------------------------------------------- cron


def cron(where: Installation, clean: str | None = None) -> dict[str, str]:
    """The same for a machine without systemd: a file for ``/etc/cron.d``, without stamp.

    What `prepare` does before a server's start is done every ten minutes.
    """
    lines = [f"*/10 * * * * root {_cron_command(where.command('-q', 'prepare'))}"]
    if clean is not None:
        lines.append(
            f"{RHYTHMS[clean]} root {_cron_command(where.command('-q', 'clean', '--yes'))}"
        )
    return {CRON[0]: _CRON + "".join(f"{line}\n" for line in lines)}


def _cron_command(words: list[str]) -> str:
    """A shell's command line in which ``%``, which ends a line of cron's, is escaped."""
    return shlex.join(words).replace("%", "\\%")


_CRON = """\
# Repairs interrupted downloads in an Ollama store, and protects downloads from
# pruning at the server's start. It starts as root, because the kernel shows
# open files to root only; for everything else it becomes the store's owner.
"""

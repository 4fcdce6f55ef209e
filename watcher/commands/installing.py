"""The files of the service: shown, written, and removed again."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from watcher.commands.context import Context, complain
from watcher.errors import Exit, NoPermissionError, RefusedError, WatchError
from watcher.ollama import names
from watcher.service import installation, units
from watcher.service.units import Installation, Kind
from watcher.state import fs
from watcher.system import advice

_LONGEST_FILE = 1 << 16
_CHANGING = (Kind.WRITE, Kind.REPLACE, Kind.REMOVE)
#: What is started, in the order in which it is.
_STARTED = (units.SERVICE, units.CLEAN_TIMER)


_ELSEWHERE = "reinstall it, such as in /opt, with a Python that every user can run"


class Target(NamedTuple):
    """Where an installation's files go."""

    #: The root folder of a system that does not run, such as an image; "" for this machine.
    root: str = ""
    #: One user's own systemd.
    personal: bool = False

    def paths(self) -> dict[str, str]:
        """Each name that may be ours to its path."""
        if self.personal:
            configs = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
            return {name: f"{configs}/systemd/user/{name}" for name in units.UNITS}
        of_systemd = {name: f"{self.root}/etc/systemd/system/{name}" for name in units.UNITS}
        of_cron = {name: f"{self.root}/etc/cron.d/{name}" for name in units.CRON}
        return of_systemd | of_cron


class InstallOptions(NamedTuple):
    """What is to be installed."""

    #: How often to clean, one of `units.RHYTHMS`; None for never.
    clean: str | None = None
    #: For cron in place of systemd.
    cron: bool = False
    #: The settings file that was named.
    config: str | None = None


class Step(NamedTuple):
    """What becomes of one file."""

    name: str
    path: str
    kind: Kind
    #: Its text now ("" where there is none), and then.
    before: str
    text: str


def show(context: Context, target: Target, options: InstallOptions) -> Exit:
    """Print the files that `install` writes, as they would be."""
    wanted = _wanted(context, target, options)
    paths = target.paths()
    if context.json:
        found = [{"path": paths[name], "text": units.stamped(wanted[name])} for name in wanted]
        context.document({"schema": "ollama-watch/service/1", "files": found})
    else:
        texts = (
            f"# {names.printable(paths[name])}\n{units.stamped(wanted[name])}" for name in wanted
        )
        sys.stdout.write("\n".join(texts))
    return Exit.HEALTHY


def install(context: Context, target: Target, options: InstallOptions, *, yes: bool) -> Exit:
    """Write the files, and start what they describe. Done twice, it changes nothing.

    Where the service's user could not run this installation, that is told first of all.
    """
    where = _where(context, target, options)
    if not (target.root or target.personal):
        why = installation.unreachable(where, cron=options.cron)
        if why:
            complain(f"ollama-watch: the service will not start: {why}\n  {_ELSEWHERE}")
    return _carry_out(context, target, _texts(where, options), yes=yes)


def uninstall(context: Context, target: Target, *, yes: bool) -> Exit:
    """Stop it, and remove what `install` has written."""
    return _carry_out(context, target, {}, yes=yes)


# ---------------------------------------------------------------- what is wanted


def _wanted(context: Context, target: Target, options: InstallOptions) -> dict[str, str]:
    """The name of each file that is wanted to its text, without stamp."""
    return _texts(_where(context, target, options), options)


def _texts(where: Installation, options: InstallOptions) -> dict[str, str]:
    return units.cron(where, options.clean) if options.cron else units.units(where, options.clean)


def _where(context: Context, target: Target, options: InstallOptions) -> Installation:
    return installation.describe(
        context.only_store("a service has one"),
        options.config,
        context.settings.metrics_file,
        target.root,
        personal=target.personal,
    )


# ---------------------------------------------------------------- doing it


def _carry_out(context: Context, target: Target, wanted: Mapping[str, str], *, yes: bool) -> Exit:
    """Bring the target to have just what is wanted: show, ask, do."""
    steps = list(_steps(target, wanted))
    changing = [step for step in steps if step.kind in _CHANGING]
    commands = _Commands(target, steps, wanted)
    kept = [step for step in steps if step.kind in (Kind.EDITED, Kind.FOREIGN)]
    code = Exit.REFUSED if kept else Exit.HEALTHY
    for step in kept:
        complain(_why_kept(step))
    if not changing and not commands.needed():
        if context.json:
            context.document(_document(steps))
        elif not context.quiet and not kept:
            sys.stdout.write("nothing to do: the service is installed\n")
        return code
    _check_permission(changing)
    if not yes:
        if context.json:
            context.document(_document(steps))
        elif context.can_ask():
            sys.stdout.write("".join(map(_shown, changing)) + commands.shown())
        if answer := context.ask("Do it?"):
            return answer
    commands.before()
    _change(changing)
    if context.json:
        context.document(_document(steps))
    elif not context.quiet:
        sys.stdout.writelines(f"{step.kind:<8} {names.printable(step.path)}\n" for step in changing)
    commands.after()
    if not context.quiet and not context.json:
        sys.stdout.write(commands.advice())
    return code


def _steps(target: Target, wanted: Mapping[str, str]) -> Iterator[Step]:
    found_at = {path: _found(path) for path in target.paths().values()}
    made = {folder for path, text in found_at.items() for folder in _made_for(path, text)}
    for name, path in target.paths().items():
        folder = os.path.dirname(path)
        if target.root and not f"{os.path.realpath(folder)}/".startswith(f"{target.root}/"):
            raise RefusedError(
                f"{names.printable(folder)} leads outside of {names.printable(target.root)}",
                "replace the link with a relative one",
            )
        found, body = found_at[path], wanted.get(name)
        if found is None and body is None:
            continue
        kind, text = units.change(found, body, _missing(folder, made))
        if kind is Kind.FOREIGN and wanted and body is None:
            continue  # somebody's own, of which nothing is wanted
        yield Step(name, path, kind, found or "", text)


def _found(path: str) -> str | None:
    """A file's text, None where there is none. What can't be read, or is a link, is not ours."""
    folder, name = os.path.split(path)
    try:
        with fs.opened_folder(folder) as fd:
            return fs.read_small(name, fd, _LONGEST_FILE).decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except OSError:
        return ""


def _made_for(path: str, text: str | None) -> Iterator[str]:
    """The folders that were made for a file of ours."""
    stamp = units.stamp(text or "")
    for _ in range(stamp.made if stamp else 0):
        path = os.path.dirname(path)
        yield path


def _missing(folder: str, made: set[str]) -> int:
    """How many folders are, or were, to be made for one to be there."""
    if os.path.lexists(folder) and folder not in made:
        return 0
    return 1 + _missing(os.path.dirname(folder), made)


def _check_permission(steps: Iterable[Step]) -> None:
    """Raise NoPermissionError before anybody is asked."""
    for step in steps:
        folder = os.path.dirname(step.path)
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        if not os.access(folder, os.W_OK):
            raise NoPermissionError(
                f"{names.printable(step.path)}: no permission to {step.kind} it",
                "mount the file system for writing"
                if advice.caller().uid == 0
                else "run it as root, or with --user for a service of your own",
                advice.again(""),
            )


def _change(steps: Iterable[Step]) -> None:
    for step in steps:
        folder, name = os.path.split(step.path)
        try:
            _make_folder(folder)
            with fs.opened_folder(folder) as fd:
                if step.kind is Kind.REMOVE:
                    fs.remove(name, fd)
                else:
                    put = fs.add if step.kind is Kind.WRITE else fs.save
                    put(name, fd, step.text.encode())
        except OSError as error:
            raise WatchError(
                f"{names.printable(step.path)}: can't {step.kind} it: {error.strerror}",
                "fix that and run it again; completed steps are kept",
            ) from None
    for step in steps:
        if step.kind is Kind.REMOVE:
            _remove_empty(_made_for(step.path, step.text))


def _make_folder(path: str) -> None:
    if not os.path.isdir(path):
        parent, name = os.path.split(path)
        _make_folder(parent)
        with fs.opened_folder(parent) as fd:
            fs.ensure_folder(name, fd)


def _remove_empty(folders: Iterable[str]) -> None:
    """Remove folders, the innermost first, up to the first that is in use."""
    for folder in folders:
        parent, name = os.path.split(folder)
        try:
            with fs.opened_folder(parent) as fd:
                fs.remove_folder(name, fd)
        except FileNotFoundError:
            continue  # gone already, with what was below it
        except OSError:
            return


# ---------------------------------------------------------------- systemd


def _systemd_runs(target: Target) -> bool:
    """Whether the systemd that the files are for can be told of them (sd_booted(3))."""
    if target.personal:
        return os.path.exists(f"{os.environ.get('XDG_RUNTIME_DIR')}/systemd/private")
    return not target.root and os.path.isdir("/run/systemd/system")


class _Commands:
    """What systemd is told, before and after the files change."""

    def __init__(self, target: Target, steps: Iterable[Step], wanted: Mapping[str, str]) -> None:
        self._target = target
        self._ours = ours = {
            step.name: step.kind for step in steps if step.kind is not Kind.FOREIGN
        }
        self._runs = _systemd_runs(target)
        self._start = [name for name in _STARTED if name in wanted and name in ours]
        self._stop = [name for name in _STARTED if name in ours and name not in wanted]
        self._again = [name for name in self._start if ours[name] is Kind.REPLACE]
        self._user = ["--user"] if target.personal else []

    def needed(self) -> bool:
        """Whether there is something to start or to stop, though no file changes."""
        return self._runs and (
            any(not self._is_enabled(name) for name in self._start)
            or any(self._is_enabled(name) for name in self._stop)
        )

    def before(self) -> None:
        """Stop what goes."""
        for words in self._words_before() if self._runs else ():
            self._tell(*words)

    def after(self) -> None:
        """Read the files again, start what is new, and start again what has changed."""
        for words in self._words_after() if self._runs else ():
            self._tell(*words)

    def _words_before(self) -> Iterator[list[str]]:
        if self._stop:
            yield ["disable", "--quiet", "--now", *self._stop]
        if self._ours.get(units.CLEAN_TIMER) is Kind.REMOVE:
            yield ["clean", "--what=state", units.CLEAN_TIMER]  # when it last ran

    def _words_after(self) -> Iterator[list[str]]:
        yield ["daemon-reload"]
        if self._start:
            yield ["enable", "--quiet", "--now", *self._start]
        if self._again:
            yield ["try-restart", *self._again]

    def shown(self) -> str:
        """The commands, for who is asked."""
        if not self._runs:
            return ""
        every = (*self._words_before(), *self._words_after())
        return "".join(f"run      {self._line(*words)}\n" for words in every)

    def advice(self) -> str:
        """What is left to do by hand."""
        if not self._start:
            return ""
        if self._runs:
            journal = " ".join(["journalctl", *self._user, "-fu", "ollama-watch"])
            return f"it is running; follow it with: {journal}\n"
        where = [f"--root={self._target.root}"] if self._target.root else ["--now"]
        enable = self._line("enable", *where, *self._start)
        return f"not started{self._why_not_started()}; to enable it:\n  {enable}\n"

    def _why_not_started(self) -> str:
        if self._target.root:
            return ""
        if self._target.personal:
            return " because your systemd is not running"
        return " because systemd is not running here (use --cron)"

    def _is_enabled(self, name: str) -> bool:
        return self._call("is-enabled", "--quiet", name).returncode == 0

    def _tell(self, *words: str) -> None:
        done = self._call(*words)
        if done.returncode:
            raise WatchError(
                f"systemd refused: {names.printable(' '.join(done.stderr.split()))}",
                "fix that and run it again; systemd ran:",
                self._line(*words),
            )

    def _command(self, *words: str) -> list[str]:
        return ["systemctl", *self._user, *words]

    def _line(self, *words: str) -> str:
        return advice.line(*self._command(*words))

    def _call(self, *words: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                self._command(*words), capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise WatchError(
                f"systemctl can't be run: {error.strerror}", "see whether systemd is installed"
            ) from None


# ---------------------------------------------------------------- telling


def _shown(step: Step) -> str:
    """A change, for who is asked: a new file as it is, a changed one by its differences."""
    head = f"{step.kind:<8} {names.printable(step.path)}\n"
    if step.kind is Kind.REMOVE:
        return head
    lines = step.text.splitlines()
    if step.kind is Kind.REPLACE:
        lines = list(difflib.unified_diff(step.before.splitlines(), lines, lineterm="", n=1))[2:]
    return head + "".join(f"    {line}\n" if line else "\n" for line in lines) + "\n"


def _why_kept(step: Step) -> str:
    if step.kind is Kind.EDITED:
        why = "it was edited after installation"
    else:
        why = "ollama-watch service install did not write it"
    mine = os.access(os.path.dirname(step.path), os.W_OK)
    remove = advice.line("rm", step.path) if mine else advice.as_root("rm", step.path)
    return (
        f"kept {names.printable(step.path)}: {why}\n  to have it replaced or gone:\n  -> {remove}"
    )


def _document(steps: Iterable[Step]) -> dict[str, object]:
    found = [
        {"path": names.exact(each.path), "change": each.kind.value, "text": each.text}
        for each in steps
    ]
    return {"schema": "ollama-watch/service/1", "files": found}

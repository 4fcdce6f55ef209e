"""The files of the service: shown, written, and removed again."""

import difflib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import click

from watcher.commands.context import Context, complain
from watcher.errors import Exit, NoPermissionError, RefusedError, WatchError
from watcher.ollama import names
from watcher.service import units
from watcher.service.units import Installation, Kind
from watcher.state import fs
from watcher.system import advice

_LONGEST_FILE = 1 << 16
_CHANGING = (Kind.WRITE, Kind.REPLACE, Kind.REMOVE)
_STARTED = (units.SERVICE, units.CLEAN_TIMER)  #: what is started, in the order in which it is
_CLEAN = "clean"  #: the one command of systemctl that nothing depends on


class Step(NamedTuple):
    name: str
    path: str
    kind: Kind
    #: Its text now ("" where there is none), and then.
    before: str
    text: str


class Target:
    """Where an installation's files go: this machine, a user's systemd, or a system in `root`."""

    def __init__(self, context: Context, root: str | None, user: bool, cron: bool = False) -> None:
        if user and (root is not None or cron):
            raise click.UsageError("--user can't be combined with --root or --cron")
        if root == "/":
            raise click.UsageError("--root is for another system: leave it out for this one")
        self._context, self._cron = context, cron
        self.root, self.personal = root or "", user
        folder = f"{self.root}/etc/systemd/system"
        if user:
            configs = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
            folder = f"{configs}/systemd/user"
        #: Each name that may be ours, and its path.
        self.paths = {name: f"{folder}/{name}" for name in units.UNITS}
        if not user:
            self.paths |= {name: f"{self.root}/etc/cron.d/{name}" for name in units.CRON}

    def show(self, clean: str | None) -> Exit:
        wanted = self._wanted(self._described(), clean)
        files = {self.paths[name]: units.stamped(text) for name, text in wanted.items()}
        if self._context.json:
            found = [{"path": path, "text": text} for path, text in files.items()]
            self._context.document({"schema": "ollama-watch/service/1", "files": found})
        else:
            texts = (f"# {names.printable(path)}\n{text}" for path, text in files.items())
            sys.stdout.write("\n".join(texts))
        return Exit.HEALTHY

    def install(self, clean: str | None, *, yes: bool) -> Exit:
        """Write the files, and start what they describe; `clean`: one of `units.RHYTHMS`."""
        where = self._described()
        ours = not (self.root or self.personal)
        if ours and (why := units.unreachable(where, cron=self._cron)):
            helps = "reinstall it, such as in /opt, with a Python that every user can run"
            complain(f"ollama-watch: the service will not start: {why}\n  {helps}")
        return self.bring(self._wanted(where, clean), yes=yes)

    def _described(self) -> Installation:
        context = self._context
        config = None if context.config_file is None else str(context.config_file)
        store = context.only_store("a service has one")
        metrics = context.settings.metrics_file
        return units.describe(store, config, metrics, self.root, personal=self.personal)

    def _wanted(self, where: Installation, clean: str | None) -> dict[str, str]:
        return units.cron(where, clean) if self._cron else units.units(where, clean)

    def bring(self, wanted: Mapping[str, str], *, yes: bool) -> Exit:
        """Have it hold the files that are wanted, and no others of ours: show, ask, do."""
        context = self._context
        steps = list(self._steps(wanted))
        changing = [step for step in steps if step.kind in _CHANGING]
        kept = [step for step in steps if step.kind in (Kind.EDITED, Kind.FOREIGN)]
        systemd = _Systemd(self, steps, wanted)
        for step in kept:
            complain(_why_kept(step))
        if not changing and not systemd.is_needed():
            if context.json:
                context.document(_document(steps))
            elif not kept:
                context.note("nothing to do: the service is installed")
            return Exit.REFUSED if kept else Exit.HEALTHY
        _check_permission(changing)
        if not yes:
            if context.json:
                context.document(_document(steps))
            elif context.can_ask():
                sys.stdout.write("".join(map(_shown, changing)) + systemd.shown())
            if answer := context.ask("Do it?"):
                return answer
        systemd.run(systemd.before)
        _change(changing)
        if context.json:
            context.document(_document(steps))
        for step in changing:
            context.note(f"{step.kind:<8} {names.printable(step.path)}")
        systemd.run(systemd.after)
        if helps := systemd.advice():
            context.note(helps)
        return Exit.REFUSED if kept else Exit.HEALTHY

    def _steps(self, wanted: Mapping[str, str]) -> Iterator[Step]:
        found_at = {path: _found(path) for path in self.paths.values()}
        made = {folder for path, text in found_at.items() for folder in _made_for(path, text)}
        for name, path in self.paths.items():
            folder = os.path.dirname(path)
            if self.root and not f"{os.path.realpath(folder)}/".startswith(f"{self.root}/"):
                why = f"{names.printable(folder)} leads outside of {names.printable(self.root)}"
                raise RefusedError(why, "replace the link with a relative one")
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
    """The folders that were made for a file of ours, the innermost first."""
    made, _ = units.stamp(text or "") or (0, True)
    for _ in range(made):
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
            why = f"{names.printable(step.path)}: no permission to {step.kind} it"
            by_root = "run it as root, or with --user for a service of your own"
            helps = by_root if advice.caller().uid else "mount the file system for writing"
            raise NoPermissionError(why, helps, advice.again(""))


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
            why = f"{names.printable(step.path)}: can't {step.kind} it: {error.strerror}"
            helps = "fix that and run it again; completed steps are kept"
            raise WatchError(why, helps) from None
    for step in steps:
        for made in _made_for(step.path, step.text) if step.kind is Kind.REMOVE else ():
            parent, name = os.path.split(made)
            try:
                with fs.opened_folder(parent) as fd:
                    fs.remove_folder(name, fd)
            except FileNotFoundError:
                continue  # gone already, with what was below it
            except OSError:
                break  # in use, and so are those above it


def _make_folder(path: str) -> None:
    if not os.path.isdir(path):
        parent, name = os.path.split(path)
        _make_folder(parent)
        with fs.opened_folder(parent) as fd:
            fs.ensure_folder(name, fd)


class _Systemd:
    """What systemd does before and after the files change; nothing where it does not run."""

    def __init__(self, target: Target, steps: Iterable[Step], wanted: Mapping[str, str]) -> None:
        self._target = target
        self._user = ["--user"] if target.personal else []
        if target.personal:
            self._runs = os.path.exists(f"{os.environ.get('XDG_RUNTIME_DIR')}/systemd/private")
        else:
            self._runs = not target.root and os.path.isdir("/run/systemd/system")  # sd_booted(3)
        ours = {step.name: step.kind for step in steps if step.kind is not Kind.FOREIGN}
        self._start = [name for name in _STARTED if name in wanted and name in ours]
        self._stop = [name for name in _STARTED if name in ours and name not in wanted]
        again = [name for name in self._start if ours[name] is Kind.REPLACE]
        self.before: list[list[str]] = []
        self.after: list[list[str]] = []
        if not self._runs:
            return
        if self._stop:
            self.before.append(["disable", "--quiet", "--now", *self._stop])
        if ours.get(units.CLEAN_TIMER) is Kind.REMOVE:
            # When it last ran. Only a system that has D-Bus can forget that.
            self.before.append([_CLEAN, "--what=state", units.CLEAN_TIMER])
        self.after.append(["daemon-reload"])
        if self._start:
            self.after.append(["enable", "--quiet", "--now", *self._start])
        if again:
            self.after.append(["try-restart", *again])

    def is_needed(self) -> bool:
        """Whether there is something to start or to stop, though no file changes."""
        wanted = {name: name in self._start for name in (*self._start, *self._stop)}
        return self._runs and any(self._is_enabled(name) is not on for name, on in wanted.items())

    def run(self, commands: Iterable[list[str]]) -> None:
        for words in commands:
            done = self._call(*words)
            if done.returncode and words[0] != _CLEAN:
                why = f"systemd refused: {names.printable(' '.join(done.stderr.split()))}"
                step = "fix that and run it again; systemd ran:"
                raise WatchError(why, step, self._line(*words))

    def shown(self) -> str:
        every = (*self.before, *self.after)
        return "".join(f"run      {self._line(*words)}\n" for words in every)

    def advice(self) -> str:
        if not self._start:
            return ""
        if self._runs:
            journal = " ".join(["journalctl", *self._user, "-fu", "ollama-watch"])
            return f"it is running; follow it with: {journal}"
        why, where = " because systemd is not running here (use --cron)", "--now"
        if self._target.root:
            why, where = "", f"--root={self._target.root}"
        elif self._target.personal:
            why = " because your systemd is not running"
        return f"not started{why}; to enable it:\n  {self._line('enable', where, *self._start)}"

    def _is_enabled(self, name: str) -> bool:
        return self._call("is-enabled", "--quiet", name).returncode == 0

    def _line(self, *words: str) -> str:
        return advice.line("systemctl", *self._user, *words)

    def _call(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["systemctl", *self._user, *words]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            why = f"systemctl can't be run: {error.strerror}"
            raise WatchError(why, "check that systemd is installed") from None


def _shown(step: Step) -> str:
    head = f"{step.kind:<8} {names.printable(step.path)}\n"
    if step.kind is Kind.REMOVE:
        return head
    lines = step.text.splitlines()
    if step.kind is Kind.REPLACE:
        lines = list(difflib.unified_diff(step.before.splitlines(), lines, lineterm="", n=1))[2:]
    return head + "".join(f"    {line}\n" if line else "\n" for line in lines) + "\n"


def _why_kept(step: Step) -> str:
    foreign = "ollama-watch service install did not write it"
    why = "it was edited after installation" if step.kind is Kind.EDITED else foreign
    mine = os.access(os.path.dirname(step.path), os.W_OK)
    remove = advice.line("rm", step.path) if mine else advice.as_root("rm", step.path)
    kept = f"kept {names.printable(step.path)}: {why}"
    return f"{kept}\n  to have it replaced or removed, run:\n  -> {remove}"


def _document(steps: Iterable[Step]) -> dict[str, object]:
    exact = names.exact
    files = [{"path": exact(each.path), "change": each.kind, "text": each.text} for each in steps]
    return {"schema": "ollama-watch/service/1", "files": files}

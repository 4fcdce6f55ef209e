"""What every command needs: the settings, the stores, and where its words go.

It loads what works on a store only when that is needed, so that help is quick.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from watcher import config
from watcher.commands import rights
from watcher.config import Settings
from watcher.errors import Exit, RefusedError, SettingsError
from watcher.ollama import names
from watcher.system import advice

if TYPE_CHECKING:
    from watcher.commands.rights import Knows
    from watcher.model import Known, Mode
    from watcher.observe import place
    from watcher.observe.host import Host
    from watcher.reconcile import Report
    from watcher.show.text import Part

_PATIENCE_SECONDS = 1.0


@dataclass
class Context:
    """One call of the command line: what stands on it for every command, and the settings."""

    settings: Settings = field(default_factory=Settings)
    #: Stores named by options or the settings; empty: find one. And what has named them.
    stores: tuple[str, ...] = ()
    stores_by: str = "--store"
    config_file: Path | None = None  #: None: the system's
    verbose: bool = False
    quiet: bool = False
    json: bool = False
    no_color: bool = False
    own: bool = False  #: this process runs one command and nothing else, so it may change its user
    staged: bool = False  #: only what our parent has started writes to it: the demo's
    elsewhere: list[Known] = field(default_factory=list)  #: by stores that others treat
    turn: int | None = None  #: the number of this process's store among them

    @property
    def words(self) -> list[str]:
        """The options that name the same store and settings again."""
        file = [] if self.config_file is None else ["--config", str(self.config_file)]
        return [*file, *(word for store in self.stores for word in ("--store", store))]

    def begin(self) -> None:
        """Give up what no command needs. Before anything is read."""
        if self.verbose and self.quiet:
            raise click.UsageError("use either -v or -q")
        if self.own and os.geteuid() != 0:
            from watcher.system import privileges

            privileges.lower()

    def load(self) -> None:
        advice.introduce(self.config_file)
        self.settings = config.load(self.config_file, os.environ)
        if not self.stores:
            self.stores, self.stores_by = self.settings.stores, self.settings.stores_by

    def places(
        self, *, changes: bool = False, knows: Knows | None = None, again: float | None = None
    ) -> list[place.Found]:
        """The stores to treat; `changes`: and to change. Raises what `place.find` raises.

        Root's process becomes their owner. Stores of several owners are treated in a child each:
        `knows` gives what the others' can be asked for, `again` when each has another child.
        """
        found = [self._find(store, changes=changes) for store in self.stores or (None,)]
        paths = [each.path for each in found]
        if self.own and rights.several_owners(paths):
            known = [rights.known_to(path, knows) for path in paths] if knows else []
            mine = self.turn = rights.in_children(paths, again)
            found, self.stores = [found[mine]], (paths[mine],)
            self.elsewhere = known[:mine] + known[mine + 1 :]
        self.settle(found[0].path)
        return found

    def known(self, look: Knows) -> list[Known]:
        """What `look` finds in each store with its owner's rights, in a child for each."""
        found = (self._find(store, changes=False) for store in self.stores or (None,))
        return [rights.known_to(each.path, look) for each in found]

    def _find(self, store: str | None, *, changes: bool) -> place.Found:
        from watcher.observe import place

        found = place.find(store, os.environ, self.stores_by)
        if changes and found.foreign:
            link = names.of_link(found.foreign)
            raise RefusedError(f"{link}: it is inspected only", "name the folder itself")
        return found

    def only_store(self, why: str) -> str | None:
        """The one that is named, if any. Raises SettingsError, saying `why`, where several are."""
        if len(self.stores) > 1:
            message = f"{len(self.stores)} stores were given, but {why}"
            raise SettingsError(message, "name one of them: --store DIR")
        return self.stores[0] if self.stores else None

    def only_place(self, why: str) -> place.Found:
        """The one store that is meant, to be changed. Raises as `only_store` and `places` do."""
        found = self._find(self.only_store(why), changes=True)
        self.settle(found.path)
        return found

    def settle(self, store: str = "/") -> None:
        """Have root's process go on as the owner of a store; without one it only drops powers."""
        if self.own:
            rights.settle(store)

    def hosts(self, **how: Any) -> list[Host]:
        return [self.host(each) for each in self.places(**how)]

    def host(self, found: place.Found) -> Host:
        from watcher.observe.host import Host
        from watcher.transfer import questions

        parent = os.getppid() if self.staged else None
        return questions.asking(Host(found.path, found.by, found.foreign, parent=parent))

    def scans(self, mode: Mode) -> Iterator[Report]:
        """A scan of each store; nothing is changed."""
        from watcher.reconcile import Reconciler

        for host in self.hosts():
            with patience(f"scanning {names.printable(host.store)}"):
                report = Reconciler(host, self.settings).inspect(mode)
            yield report

    def colored(self) -> bool:
        """Whether stdout gets colors: a terminal or FORCE_COLOR, no NO_COLOR, no --no-color."""
        if self.no_color or os.environ.get("NO_COLOR"):
            return False
        return sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))

    def can_ask(self) -> bool:
        """Whether somebody at a terminal sees what is printed, and can answer."""
        return not self.json and sys.stdin.isatty() and sys.stdout.isatty()

    def ask(self, question: str, otherwise: str = "add --yes to do it") -> Exit:
        """HEALTHY for a yes, FINDINGS for a no, and USAGE where nobody can be asked."""
        if not self.can_ask():
            complain(f"nothing was changed: there is no terminal to ask on; {otherwise}")
            return Exit.USAGE
        return Exit.HEALTHY if click.confirm(question, default=False) else Exit.FINDINGS

    def ask_of_part(self, question: str, without: str) -> Exit | None:
        """The same on a terminal; None where it is to be done `without` something."""
        words = click.Choice(["y", "yes", "n", "no", "w"], case_sensitive=False)
        asked = f"{question} [y/N, or w: {without}]"
        answer = click.prompt(asked, "n", type=words, show_choices=False, show_default=False)
        return {"y": Exit.HEALTHY, "n": Exit.FINDINGS}.get(answer[0])

    def note(self, line: str) -> None:
        """Print a line for people to stdout."""
        if not (self.quiet or self.json):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    def show(self, parts: Iterable[Part]) -> None:
        from watcher.show import text

        sys.stdout.write(text.render(parts, color=self.colored()))
        sys.stdout.flush()

    def document(self, document: dict[str, Any]) -> None:
        from watcher.state import json_file

        sys.stdout.buffer.write(json_file.line(document))
        sys.stdout.buffer.flush()


@contextlib.contextmanager
def patience(what: str) -> Iterator[None]:
    """Say on a terminal's stderr that something takes its time, once it takes over a second."""
    if not sys.stderr.isatty():
        yield
        return
    waiting = threading.Timer(_PATIENCE_SECONDS, transient, [f"{what} ..."])
    waiting.daemon = True
    waiting.start()
    try:
        yield
    finally:
        waiting.cancel()
        waiting.join()
        transient("")


def transient(text: str) -> None:
    """Show a text on a terminal's stderr until the next one; "" takes it away."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def complain(text: str) -> None:
    """A message for people on stderr, whatever goes to stdout."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()

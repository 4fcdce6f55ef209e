"""What every command needs: the settings, the stores, and where its words go."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import click

from watcher.commands import rights
from watcher.commands.declare import Given
from watcher.config import Settings
from watcher.errors import Exit, RefusedError, SettingsError
from watcher.model import Known, Mode
from watcher.observe import place
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.reconcile import Reconciler, Report
from watcher.show import documents, text
from watcher.show.text import Part

_PATIENCE_SECONDS = 1.0


@dataclass
class Context(Given):
    """One call of the command line, and the settings as they are then."""

    settings: Settings
    #: Which flag or setting has named the stores.
    stores_by: str = "--store"
    #: What other stores can be asked for, that are treated by other processes.
    elsewhere: list[Known] = field(default_factory=list)

    def places(
        self, *, changes: bool = False, knows: rights.Knows | None = None
    ) -> list[place.Found]:
        """The stores to treat; `changes`: and to change. Raises what `place.find` raises.

        Of root's process this is the owner's then; where stores have several owners, each is
        treated in a child, and the process that was called ends here. `knows` then says what the
        stores of the others can be asked for.
        """
        found = [self._find(store, changes=changes) for store in self.stores or (None,)]
        paths = [each.path for each in found]
        if self.own and rights.several_owners(paths):
            known = [] if knows is None else rights.known_to(paths, knows)
            mine = rights.in_children(paths)
            found, self.stores = [found[mine]], (paths[mine],)
            self.elsewhere = known[:mine] + known[mine + 1 :]
        self.settle(found[0].path)
        return found

    def look_in_turns(self, pause: float) -> bool:
        """Where stores have several owners: go on in a child, and in another one after each pause.

        `places` then starts one for each store, which ends; so nothing can watch them all from
        within. True in such a child. The process that was called ends here.
        """
        if not self.own or not rights.several_owners(self._paths()):
            return False
        rights.in_turns(pause)
        return True

    def known(self, look: rights.Knows) -> list[Known]:
        """What `look` finds in each store with its owner's rights, in a child for each."""
        return rights.known_to(self._paths(), look)

    def _paths(self) -> list[str]:
        return [self._find(store, changes=False).path for store in self.stores or (None,)]

    def _find(self, store: str | None, *, changes: bool) -> place.Found:
        found = place.find(store, os.environ, self.stores_by)
        if changes and found.foreign:
            raise RefusedError(
                f"{names.of_link(found.foreign)}: it is inspected only",
                "name the folder itself",
            )
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
        """Have root's process go on as the owner of a store, which need not be there yet.

        Without one it stays root's, and has no more powers than that user has.
        """
        if self.own:
            rights.settle(store)

    def hosts(self, *, changes: bool, knows: rights.Knows | None = None) -> list[Host]:
        """A host for each store. `changes`: to change it; `knows` is that of `places`."""
        return [self.host(each) for each in self.places(changes=changes, knows=knows)]

    def host(self, found: place.Found) -> Host:
        """A store and the machine around it."""
        parent = os.getppid() if self.staged else None
        return Host(found.path, found.by, found.foreign, parent=parent)

    def scans(self, mode: Mode) -> Iterator[Report]:
        """A scan of each store; nothing is changed."""
        for host in self.hosts(changes=False):
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

    def say(self, line: str) -> None:
        """Print a line for people to stdout."""
        if not (self.quiet or self.json):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    def show(self, parts: Iterable[Part]) -> None:
        """Print text to stdout."""
        sys.stdout.write(text.render(parts, color=self.colored()))
        sys.stdout.flush()

    def document(self, document: dict[str, Any]) -> None:
        """Print a JSON document as one line."""
        sys.stdout.buffer.write(documents.line(document))
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

"""What every command needs: the settings, the stores, and where its words go."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from watcher import config
from watcher.commands import rights
from watcher.config import Settings
from watcher.errors import RefusedError, SettingsError
from watcher.model import Known
from watcher.observe import place
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.show import documents, text
from watcher.show.text import Part

_PATIENCE_SECONDS = 1.0


@dataclass(slots=True)
class Context:
    """One call of the command line."""

    settings: Settings
    #: The settings file that was named; None for the system's.
    config_file: Path | None = None
    #: Stores named by flags or settings; empty: find one.
    stores: tuple[str, ...] = ()
    #: Which flag or setting has named them.
    stores_by: str = "--store"
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    color: bool | None = None
    #: This process is ours alone, so that root's becomes the owner of the store.
    settles: bool = False
    #: Nothing writes to the store but what our parent has started, as the demo does.
    staged: bool = False
    #: What other stores can be asked for, that are treated by other processes.
    elsewhere: list[Known] = field(default_factory=list)

    def read_settings(self) -> Settings:
        """The settings as they are now. Raises SettingsError."""
        return config.load(self.config_file, os.environ)

    def places(
        self, *, changes: bool = False, knows: rights.Knows | None = None
    ) -> list[place.Found]:
        """The stores to treat; `changes`: and to change. Raises what `find` raises.

        Of root's process this is the owner's then; where stores have several owners, each is
        treated in a child, and the process that was called ends here. `knows` then says what the
        stores of the others can be asked for.
        """
        found = self._found(changes=changes)
        paths = [each.path for each in found]
        if self.settles and rights.several_owners(paths):
            known = [] if knows is None else rights.known_to(paths, knows)
            mine = rights.in_children(paths)
            found, self.stores = [found[mine]], (paths[mine],)
            self.elsewhere = known[:mine] + known[mine + 1 :]
        self.settle(found[0].path)
        return found

    def _found(self, *, changes: bool) -> list[place.Found]:
        return [self._find(store, changes=changes) for store in self.stores or (None,)]

    def look_in_turns(self, pause: float) -> bool:
        """Where stores have several owners: go on in a child, and in another one after each pause.

        `places` then starts one for each store, which ends; so nothing can watch them all from
        within. True in such a child. The process that was called ends here.
        """
        if not self.settles:
            return False
        split = rights.several_owners([each.path for each in self._found(changes=False)])
        if split:
            rights.in_turns(pause)
        return split

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
        if self.settles:
            rights.settle(store)

    def _find(self, store: str | None, *, changes: bool) -> place.Found:
        found = place.find(store, os.environ, self.stores_by)
        if changes and found.foreign:
            raise RefusedError(
                f"{names.of_link(found.foreign)}: it is inspected only",
                "name the folder itself",
            )
        return found

    def known(self, look: rights.Knows) -> list[Known]:
        """What `look` finds in each store with its owner's rights, in a child for each."""
        return rights.known_to([each.path for each in self._found(changes=False)], look)

    def hosts(self, *, changes: bool, knows: rights.Knows | None = None) -> list[Host]:
        """A host for each store. `changes`: to change it; `knows` is that of `places`."""
        return [self.host(each) for each in self.places(changes=changes, knows=knows)]

    def host(self, found: place.Found) -> Host:
        """A store and the machine around it."""
        parent = os.getppid() if self.staged else None
        return Host(found.path, found.by, found.foreign, parent=parent)

    def colored(self) -> bool:
        """Whether stdout gets colors: a terminal or FORCE_COLOR, no NO_COLOR, no --no-color."""
        if self.color is not None:
            return self.color
        if os.environ.get("NO_COLOR"):
            return False
        return sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))

    def can_ask(self) -> bool:
        """Whether somebody at a terminal sees what is printed, and can answer."""
        return not self.json and sys.stdin.isatty() and sys.stdout.isatty()

    def agreed(self, question: str, otherwise: str = "add --yes to do it") -> bool | None:
        """Whether somebody says yes; None where nobody can be asked, which is told."""
        if not self.can_ask():
            complain(f"nothing was changed: there is no terminal to ask on; {otherwise}")
            return None
        import click

        return click.confirm(question, default=False)

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
    """Tell on a terminal's stderr that something takes its time, once it takes over a second."""
    if not sys.stderr.isatty():
        yield
        return
    told = threading.Event()

    def tell() -> None:
        told.set()
        transient(f"{what} ...")

    waiting = threading.Timer(_PATIENCE_SECONDS, tell)
    waiting.daemon = True
    waiting.start()
    try:
        yield
    finally:
        waiting.cancel()
        waiting.join()
        if told.is_set():
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

"""Every name below a store with its sizes, as ``du`` walks it, and who names which digest."""

import contextlib
import os
import stat
from collections.abc import Iterable

from watcher.model import Kind, Located, Space, Tally
from watcher.observe import scan
from watcher.ollama import names
from watcher.state import fs

#: What a store's owner may have put elsewhere by a link; no other link is followed.
_MAY_BE_LINKS = ("blobs", "manifests")


def survey(store: int, found: scan.Scan) -> Space:
    """Walk once through each folder of a store whose ``blobs/`` was scanned for a survey."""
    walk = _Walk(store, found)
    walk.all()
    named = found.named
    digests = {_digest(each.path) for each in walk.entries} & named.digests.keys()
    return Space(
        entries=tuple(walk.entries),
        blobs=found.listing[0] if found.listing is not None else {},
        manifests=walk.manifests,
        models={digest: _models(named, [digest]) for digest in digests},
        every_model=frozenset(_models(named, named.digests)),
        unlisted=tuple(sorted({*walk.unlisted, *named.unlisted})),
        linked=tuple(sorted(walk.linked)),
    )


def _models(named: scan.Named, digests: Iterable[str]) -> tuple[str, ...]:
    indexes = {index for digest in digests for index in named.digests[digest][2:]}
    return named.shown(index for index in indexes if index < named.count)


def _digest(path: str) -> str:
    top, _, inside = path.partition("/")
    name = names.new_spelling(inside.partition("/")[0])
    return names.parse_blob(name).digest if top == "blobs" else ""


class _Walk:
    def __init__(self, store: int, found: scan.Scan) -> None:
        self._store, self._blobs = store, found.listing and found.listing[1]
        named = found.named
        #: What manifests take; None where that has to be found by a walk.
        self._scanned = None if named.unlisted or named.unseen else named.space
        self._waiting: list[str] = []
        self._met: set[tuple[int, int]] = set()
        self.entries: list[Located] = []
        self.manifests = Tally()  #: those that are plain files
        self.unlisted: list[str] = []
        self.linked: list[str] = []

    def all(self) -> None:
        self._note("", os.fstat(self._store))
        # No descriptor is kept on the way down, so no depth of folders is too deep for it.
        while self._waiting:
            path = self._waiting.pop()
            try:
                self._list(path)
            except FileNotFoundError:
                continue
            except OSError:
                self.unlisted.append(path)

    def _list(self, path: str) -> None:
        # Where one is a link, it may lead into the other.
        if path == "manifests" and self._scanned is not None and not self.linked:
            self.manifests = self._scanned
            return
        if path == "blobs" and self._blobs is not None:
            for each in self._blobs:
                self._keep(Located(f"blobs/{each.name}", each))
            return
        linked = path in self.linked
        with (
            fs.opened_folder(path or ".", self._store, follow=linked) as folder,
            os.scandir(folder) as listing,
        ):
            # Those first: a folder here that one leads to is met as what it stands for.
            for item in sorted(listing, key=lambda item: item.name not in _MAY_BE_LINKS):
                inside = f"{path}/{item.name}" if path else item.name
                try:
                    self._note(inside, item.stat(follow_symlinks=False))
                except FileNotFoundError:
                    continue
                if inside in _MAY_BE_LINKS and item.is_symlink():
                    with contextlib.suppress(OSError):
                        status = item.stat()
                        if stat.S_ISDIR(status.st_mode):
                            self.linked.append(inside)
                            self._note(inside, status)

    def _note(self, path: str, status: os.stat_result) -> None:
        plain = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
        if plain and path.startswith("manifests/"):
            self.manifests = self.manifests.plus(status.st_size, status.st_blocks)
        else:
            self._keep(Located(path, scan.entry(os.path.basename(path), status)))

    def _keep(self, found: Located) -> None:
        if found.entry.kind is Kind.FOLDER:
            if found.entry.identity in self._met:
                return
            self._met.add(found.entry.identity)
            self._waiting.append(found.path)
        self.entries.append(found)

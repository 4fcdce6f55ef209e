"""Every name below a store with its sizes, as ``du`` walks it, and who names which digest."""

from __future__ import annotations

import contextlib
import os
import stat

from watcher.model import Kind, Located, Space
from watcher.observe import place, scan
from watcher.observe.host import Host
from watcher.state import fs

#: What a store's owner may have put elsewhere by a link; no other link is followed.
_MAY_BE_LINKS = ("blobs", "manifests")


def survey(host: Host) -> Space:
    """Walk through the whole store, each folder once, other file systems below it included.

    Raises NoPermissionError where the store's folder can't be entered, NoStoreError where it is
    gone.
    """
    with place.opened(host.store) as store:
        named = scan.scan_manifests(store)
        walk = _Walk(store)
        walk.all()
        return Space(
            entries=tuple(walk.entries),
            models={digest: named.models_of(digest) for digest in named.digests},
            unlisted=tuple(sorted(walk.unlisted)),
            linked=tuple(sorted(walk.linked)),
        )


class _Walk:
    def __init__(self, store: int) -> None:
        self._store = store
        self._waiting: list[str] = []
        self._met: set[tuple[int, int]] = set()
        self.entries: list[Located] = []
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
                    self._note_behind(item, inside)

    def _note_behind(self, item: os.DirEntry[str], path: str) -> None:
        """The folder that a link leads to; one that leads nowhere is only a link."""
        with contextlib.suppress(OSError):
            status = item.stat()
            if stat.S_ISDIR(status.st_mode):
                self.linked.append(path)
                self._note(path, status)

    def _note(self, path: str, status: os.stat_result) -> None:
        found = scan.entry(os.path.basename(path), status)
        if found.kind is Kind.FOLDER:
            if found.identity in self._met:
                return
            self._met.add(found.identity)
            self._waiting.append(path)
        self.entries.append(Located(path, found))

"""Setting the times of wanted files, so that no start of the server deletes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from watcher.model import Action
from watcher.observe import scan
from watcher.state import folders, fs
from watcher.state.memory import Touched


def own_times(blobs: int, actions: Iterable[Action], now: float) -> dict[str, Touched]:
    """The files that would get a later time, by name: their inode, that time, and their own one.

    Times are never set back: what has changed since it was looked at keeps what it has. Another
    file of that name is left alone; so is all of another ``blobs``.
    """
    at_ns = int(now * 1e9)
    found: dict[str, Touched] = {}
    for action in actions:
        for entry in action.expects:
            there = scan.look(entry.name, blobs)
            if there is None or there.identity != entry.identity or there.mtime_ns >= at_ns:
                continue
            known = entry.own_mtime_ns if there.mtime_ns == entry.mtime_ns else None
            own = there.mtime_ns if known is None else known
            found[entry.name] = Touched(there.inode, at_ns, own)
    return found


def set_times(blobs: int, touching: Mapping[str, Touched]) -> None:
    """Set the times. What has gone meanwhile, or is another file now, is left alone."""
    for name, touched in touching.items():
        there = scan.look(name, blobs)
        if there is not None and there.inode == touched.inode:
            with contextlib.suppress(FileNotFoundError):
                fs.touch(name, blobs, touched.set_ns)


def set_times_now(store: str, actions: Iterable[Action], now: float) -> None:
    """The same at once, with nothing remembered: for who can't wait for the lock."""
    with (
        folders.opened_store(store) as folder,
        folders.opened_blobs(folder) as blobs,
    ):
        set_times(blobs, own_times(blobs, actions, now))

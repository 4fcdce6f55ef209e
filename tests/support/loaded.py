"""Loads all of the package: for a process that can't or need not do it later."""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil

#: What only some looks load.
_OTHERS = ("rich.console", "rich.table", "pwd", "grp", "http.client", "concurrent.futures.thread")
_OTHERS += ("encodings.ascii", "encodings.idna")


@functools.cache
def load_all() -> None:
    """Load every module of the package but the demo."""
    import watcher

    names = [found.name for found in pkgutil.walk_packages(watcher.__path__, "watcher.")]
    for name in (*names, *_OTHERS):
        if not name.startswith(("watcher.__main__", "watcher.demo")):
            importlib.import_module(name)


@functools.cache
def load_packages() -> None:
    """Load also what root's commands load before they become another user: all of each package."""
    from watcher.system import privileges

    for name in privileges._modules():
        with contextlib.suppress(Exception):  # some are for other systems
            importlib.import_module(name)

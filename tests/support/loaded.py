"""Loads all of the package: for a process that can't or need not do it later."""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
from typing import Any

#: What only some looks load.
_OTHERS = (
    *("rich.console", "rich.table", "pwd", "grp", "http.client", "concurrent.futures.thread"),
    *("encodings.ascii", "encodings.idna", "psutil"),
)


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
    """Load also what root's commands load before they become another user: all of each package.

    Nothing is left to look for then; that they load it has a test in a process of its own.
    """
    from watcher.system import privileges

    for name in (*privileges._modules(), *privileges._LOADED_LATE):
        with contextlib.suppress(Exception):  # some are for other systems
            importlib.import_module(name)
    module: Any = privileges
    module._modules = lambda: iter(())

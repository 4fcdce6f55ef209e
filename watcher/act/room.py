"""Room on the disk that is set aside: a full disk is when cleaning is asked for."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import TypeVar

from watcher import files, ours
from watcher.act import moves

RESERVE = "reserve"
#: Enough for an intent, its folders and a saved memory of a usual store.
_SIZE = 128 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)

_T = TypeVar("_T")


def with_room(store: int, act: Callable[[], _T]) -> _T:
    """Do an act; where the disk is full, once more in the room that was set aside before."""
    with ours.opened(store) as folder:
        try:
            return act()
        except OSError as error:
            again = error.errno in _FULL and not isinstance(error, moves.CutShortError)
            if not again or not _give(folder):
                raise
            return act()
        finally:
            _set_aside(folder)


def set_aside(store: int) -> None:
    """Set the room aside, where there is any yet."""
    with contextlib.suppress(OSError), ours.made(store) as folder:
        _set_aside(folder)


def give(store: int) -> bool:
    """Give back what was set aside, for what has to be kept before an act; False: there is none."""
    try:
        with ours.opened(store) as folder:
            return _give(folder)
    except OSError:
        return False


def _set_aside(folder: int) -> None:
    with contextlib.suppress(OSError):
        files.reserve(RESERVE, folder, _SIZE)


def _give(folder: int) -> bool:
    try:
        files.remove(RESERVE, folder)
    except FileNotFoundError:
        return False
    return True

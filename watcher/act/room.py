"""Room on the disk that is set aside: a full disk is when cleaning is asked for."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import TypeVar

from watcher import files
from watcher.act import moves
from watcher.memory import FOLDER

RESERVE = "reserve"
#: Enough for an intent, its folders and a saved memory of a usual store.
_SIZE = 128 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)

_T = TypeVar("_T")


def with_room(store: int, act: Callable[[], _T]) -> _T:
    """Do an act; where the disk is full, once more in the room that was set aside before."""
    with files.opened_folder(FOLDER, store) as ours:
        try:
            return act()
        except OSError as error:
            again = error.errno in _FULL and not isinstance(error, moves.CutShortError)
            if not again or not _give(ours):
                raise
            return act()
        finally:
            _set_aside(ours)


def set_aside(store: int) -> None:
    """Set the room aside, where there is any yet."""
    with contextlib.suppress(OSError):
        files.ensure_folder(FOLDER, store)
        with files.opened_folder(FOLDER, store) as ours:
            _set_aside(ours)


def give(store: int) -> bool:
    """Give back what was set aside, for what has to be kept before an act; False: there is none."""
    try:
        with files.opened_folder(FOLDER, store) as ours:
            return _give(ours)
    except OSError:
        return False


def _set_aside(ours: int) -> None:
    with contextlib.suppress(OSError):
        files.reserve(RESERVE, ours, _SIZE)


def _give(ours: int) -> bool:
    try:
        files.remove(RESERVE, ours)
    except FileNotFoundError:
        return False
    return True

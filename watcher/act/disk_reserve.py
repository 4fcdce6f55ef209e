"""Room on the disk that is set aside: a full disk is when cleaning is asked for."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Sequence
from typing import TypeVar

from watcher.act import transaction
from watcher.state import fs, state_folder

RESERVE = "reserve"
#: Enough for an intent, its folders and a saved memory of a usual store.
_SIZE = 128 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)

_T = TypeVar("_T")


def with_room(
    store: int, changes: Sequence[_T], act: Callable[[Sequence[_T]], Sequence[transaction.Answer]]
) -> list[transaction.Answer]:
    """Do changes; those for which the disk was full once more, in the room that was set aside.

    Each that is done makes room for others, so it goes on as long as one is.
    """
    answers = list(act(changes))
    full = _full(answers)
    if full and give(store):
        while full:
            again = act([changes[at] for at in full])
            for at, answer in zip(full, again, strict=True):
                answers[at] = answer
            still = _full(answers)
            full = still if len(still) < len(full) else []
    set_aside(store)
    return answers


def _full(answers: Sequence[transaction.Answer]) -> list[int]:
    """The numbers of those for which the disk was full."""
    return [
        at
        for at, answer in enumerate(answers)
        if isinstance(answer, OSError)
        and answer.errno in _FULL
        and not isinstance(answer, transaction.CutShortError)
    ]


def set_aside(store: int) -> None:
    """Set the room aside, where there is any yet."""
    with contextlib.suppress(OSError), state_folder.made(store) as folder:
        _set_aside(folder)


def give(store: int) -> bool:
    """Give back what was set aside, for what has to be kept before an act; False: there is none."""
    try:
        with state_folder.opened(store) as folder:
            return _give(folder)
    except OSError:
        return False


def _set_aside(folder: int) -> None:
    with contextlib.suppress(OSError):
        fs.reserve(RESERVE, folder, _SIZE)


def _give(folder: int) -> bool:
    try:
        fs.remove(RESERVE, folder)
    except FileNotFoundError:
        return False
    return True

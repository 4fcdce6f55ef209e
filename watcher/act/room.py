"""Room on the disk that is set aside: a full disk is when cleaning is asked for."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from watcher import files
from watcher.memory import FOLDER

RESERVE = "reserve"
#: Enough for an intent, its folders and a saved memory of a usual store.
_SIZE = 512 * 1024


@contextlib.contextmanager
def made(store: int) -> Iterator[None]:
    """Give the room free where the disk is full, and set it aside again afterwards."""
    files.ensure_folder(FOLDER, store)
    with files.opened_folder(FOLDER, store) as ours:
        try:
            _set_aside(ours)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            with contextlib.suppress(FileNotFoundError):
                files.remove(RESERVE, ours)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                _set_aside(ours)


def _set_aside(ours: int) -> None:
    files.reserve(RESERVE, ours, _SIZE)

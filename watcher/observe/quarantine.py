"""What lies in quarantine, and whether something good has taken its place since."""

from __future__ import annotations

import contextlib
import os

from watcher import folders, names, ours
from watcher.memory import Memory
from watcher.model import Kept
from watcher.observe import scan
from watcher.observe.blobs import remembered

QUARANTINE = "quarantine"
_NO_FILE = frozenset({"", ".", ".."})


def kept(store: int, memory: Memory) -> tuple[Kept, ...]:
    """Everything in quarantine, the oldest first. Its file names are ``<number>-<own name>``."""
    found: list[Kept] = []
    with (
        contextlib.suppress(OSError),  # none, or something else in its place
        ours.opened(store) as our_folder,
        ours.opened_in(QUARANTINE, our_folder) as folder,
        folders.opened_blobs(store, foreign_too=True) as blobs,
    ):
        for label in sorted(os.listdir(folder)):
            entry = scan.look(label, folder)
            number, dash, name = label.partition("-")
            if not (number.isascii() and number.isdecimal() and dash) or name in _NO_FILE:
                continue
            if entry is None:
                continue
            there = scan.look(name, blobs)
            read = scan.content(name, blobs)
            sha256 = None if read is None else remembered(read, memory).sha256
            good = sha256 is not None and sha256 == names.parse_blob(name).digest.lower()
            found.append(Kept(label, name, entry, there is not None, good, there))
    return tuple(found)

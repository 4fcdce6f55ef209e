"""What lies in quarantine, and whether something good has taken its place since."""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

from watcher.model import Entry, Kept, Unseen
from watcher.observe import scan
from watcher.observe.blobs import remembered
from watcher.ollama import names
from watcher.state import folders, state_folder
from watcher.state.memory import Memory

QUARANTINE = "quarantine"
_NO_FILE = frozenset({"", ".", ".."})


class Quarantine(NamedTuple):
    """What lies in quarantine, and why that could not be listed, if so."""

    kept: tuple[Kept, ...] = ()
    unseen: Unseen | None = None


def look(store: int, memory: Memory) -> Quarantine:
    """Everything in quarantine, the oldest first. Its file names are ``<number>-<own name>``."""
    path = state_folder.FOLDER
    try:
        with state_folder.opened(store) as our_folder:
            path = f"{state_folder.FOLDER}/{QUARANTINE}"
            with state_folder.opened_in(QUARANTINE, our_folder) as folder:
                labels = sorted(os.listdir(folder))
                entries = [(label, scan.look(label, folder)) for label in labels]
    except FileNotFoundError:
        return Quarantine()
    except OSError as error:
        return Quarantine(
            unseen=Unseen(path, str(error.strerror), isinstance(error, PermissionError))
        )
    with contextlib.ExitStack() as opened:
        blobs, is_seen = None, True
        try:
            blobs = opened.enter_context(folders.opened_blobs(store, foreign_too=True))
        except FileNotFoundError:
            pass
        except OSError:
            is_seen = False
        found = (
            _kept(label, entry, blobs, memory)
            for label, entry in entries
            if entry is not None and _own_name(label)
        )
        return Quarantine(tuple(found if is_seen else (_unseen(each) for each in found)))


def _unseen(kept: Kept) -> Kept:
    return kept._replace(place_seen=False)


def _own_name(label: str) -> str:
    """The name that a file had in ``blobs/``; "" where the label is none of ours."""
    number, dash, name = label.partition("-")
    is_ours = number.isascii() and number.isdecimal() and dash and name not in _NO_FILE
    return name if is_ours else ""


def _kept(label: str, entry: Entry, blobs: int | None, memory: Memory) -> Kept:
    name = _own_name(label)
    kept = Kept(label, name, entry, in_its_place=False, replaced=False)
    if blobs is None:
        return kept
    try:
        there, read = scan.look(name, blobs), scan.content(name, blobs)
    except OSError:
        return _unseen(kept)
    sha256 = None if read is None else remembered(read, memory).sha256
    good = sha256 is not None and sha256 == names.parse_blob(name).digest.lower()
    return kept._replace(in_its_place=there is not None, replaced=good, there=there)

"""The transfers of ours that lie in a store, and which of them a process goes on with.

Nothing in there is followed or waited for, and what makes no sense counts for nothing.
"""

import contextlib
from datetime import datetime
from typing import NamedTuple

from watcher.model import Entry, Holder, Kind, Ranges, Unseen
from watcher.observe import scan
from watcher.ollama import ranges
from watcher.state import fs, state_folder, transfers
from watcher.state.transfers import Kept

_TRIES = 3  #: a ledger may be replaced while it is read


class Found(NamedTuple):
    digest: str
    data: Entry | None = None  #: by its path below the store
    kept: Kept = Kept()
    arrived: Ranges = ()
    #: Why the ledger is not believed, and why not even that can be read; "" where it is.
    fault: str = ""
    unreadable: str = ""
    holder: Holder | None = None
    born_ns: int = 0


def look_at_transfers(
    store: int, boot: str, scope: frozenset[str] | None
) -> tuple[list[Found], Unseen | None]:
    """Those of some digests, or all; a folder without any bytes is none. Or why none is seen."""
    every: list[Found] = []
    with contextlib.ExitStack() as held:
        try:
            ours = held.enter_context(state_folder.opened(store))
        except OSError as error:
            scan.raise_own(error)
            return [], None  # what keeps us from all of our folder is reported with the quarantine
        try:
            here = transfers.digests(ours)
        except OSError as error:
            scan.raise_own(error)
            unseen = Unseen(f"{state_folder.FOLDER}/{transfers.FOLDER}", error.strerror or "")
            return [], unseen
        for digest in here if scope is None else sorted(scope.intersection(here)):
            found = None
            try:
                with transfers.opened(ours, digest) as folder:
                    found = _read(folder, digest, boot)
            except FileNotFoundError:
                continue
            except OSError as error:
                scan.raise_own(error)
                found = Found(digest, unreadable=error.strerror or type(error).__name__)
            if found is not None:
                every.append(found)
    return every, None


def _read(folder: int, digest: str, boot: str) -> Found | None:
    path = f"{state_folder.FOLDER}/{transfers.FOLDER}/{digest}"
    holder = _holder(folder, path)
    kept, arrived, fault = Kept(), Ranges(), ""
    for _ in range(_TRIES):
        data = scan.look(transfers.DATA, folder)
        is_empty = data is None or (data.kind is Kind.FILE and data.size == 0)
        if is_empty and not holder:
            data = scan.look(transfers.aside(folder), folder)
            return data and Found(digest, data._replace(name=f"{path}/{data.name}"))
        if data is None:
            return None
        data = data._replace(name=f"{path}/{transfers.DATA}")
        if data.kind is not Kind.FILE:
            return Found(digest, data, holder=holder)
        # The log first: what is no longer in it is in the ledger.
        arrived = transfers.logged(folder, boot, data.size)
        try:
            kept, fault = transfers.kept(folder, digest, data.size), ""
            break
        except ValueError as error:
            fault = str(error)
    if fault:
        arrived = ()
    born_ns = fs.born(transfers.DATA, folder)
    arrived = ranges.union(kept.durable, arrived)
    return Found(digest, data, kept, arrived, fault, holder=holder, born_ns=born_ns)


def _holder(folder: int, path: str) -> Holder | None:
    """The process that goes on with it: it has the lock."""
    found = None
    with contextlib.suppress(FileNotFoundError):
        found = fs.holder(transfers.LOCK, folder)
    if found is None:
        return None
    (pid, text), since = found, None
    with contextlib.suppress(ValueError):
        since = datetime.fromisoformat(text).timestamp()
    entry = f"{path}/{transfers.LOCK}"
    return Holder(pid or 0, "ollama-watch", entry, writes=True, since=since)

"""Second names in our folder for blobs that a server may yet remove, made and let go."""

import contextlib
import errno
from collections.abc import Iterable
from dataclasses import replace

from watcher.act import answering
from watcher.act.journal import Journal
from watcher.decide import safety, second_names
from watcher.model import Evidence
from watcher.observe import place, scan
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.state import folders, fs, state_folder, transfers
from watcher.state.memory import Memory

_EXACT_SECONDS = 1.0  #: as exactly it is known when a process began
_NEVER = fs.NO_LINKS | {errno.EXDEV}


def keep(host: Host, digests: Iterable[str]) -> str:
    """Give blobs of the server's a second name; why that can't be in this store, if so.

    No lock is needed: no name of the store changes.
    """
    try:
        with (
            folders.opened_store(host.store) as store,
            folders.opened_blobs(store) as blobs,
            state_folder.made(store) as ours,
        ):
            where = place.describe(host, store)
            if safety.is_loose(where):
                return f"{where.file_system} has no reliable hard links"
            for digest in () if transfers.is_low(ours) else digests:
                with contextlib.suppress(FileNotFoundError, fs.BusyError):
                    transfers.keep(ours, blobs, digest, place.boot(host))
    except OSError as error:
        return f"a hard link fails: {error.strerror}" if error.errno in _NEVER else ""
    return ""


def judge(host: Host, digest: str) -> bool:
    """Hash what a server has removed: it stays if it is wrong, and is said to be so.

    Right bytes were removed for another reason, such as `ollama rm`, and go. Returns whether that
    was found out. Raises OSError.
    """
    with (
        contextlib.suppress(FileNotFoundError),  # it has gone meanwhile
        folders.opened_store(host.store) as store,
        state_folder.opened(store) as ours,
        transfers.opened(ours, digest) as folder,
    ):
        before = _state(folder)
        with fs.closing(fs.open_to_read(transfers.DATA, folder, ours=True)) as fd:
            found = answering.hash_of(fd, 0 if before is None else before[2], host)
        with contextlib.suppress(ValueError, fs.BusyError), fs.locked(transfers.LOCK, folder):
            if found is None or before is None or _state(folder) != before:
                return False
            kept = transfers.kept(folder, digest, before[2])
            if kept.is_left and found == digest.lower():
                transfers.drop(ours, digest)
            elif kept.is_left:
                told = transfers.encoded(digest, replace(kept, is_wrong=True))
                fs.save(transfers.LEDGER, folder, told)
            return kept.is_left
    return False


def _state(folder: int) -> tuple[int, int, int, int] | None:
    """Which file the data is, and what changes with its content."""
    found = scan.look(transfers.DATA, folder)
    return found and (*found.identity, found.size, found.ctime_ns)


def let_go(journal: Journal, known: Memory, seen: Evidence, *, clean: bool) -> Memory:
    """Remove those that are needless, and, where the disk is as full as it may be, all of them.

    The blobs lose a name of ours, so what was found out by hashing them still holds. Returns the
    memory with those that have to be hashed, since the server that should have done it has ended.
    """
    gone = second_names.needless(seen, clean=clean)
    named = second_names.named(seen)
    begun = max((each.since for each in seen.servers), default=0.0)
    orphaned: set[str] = set()
    with contextlib.suppress(OSError), state_folder.opened(journal.store) as ours:
        is_low = transfers.is_low(ours)
        if is_low:
            # A pull of ours keeps its file so, too, while a server downloads the layer.
            gone |= {digest for digest in transfers.digests(ours) if _is_servers(ours, digest)}
        orphaned = {digest for digest in gone & named if _made_before(begun, ours, digest)}
        if gone:
            with folders.opened_blobs(journal.store) as blobs:
                found = (scan.look(names.blob(digest), blobs) for digest in gone)
                times = {each.name: each.mtime_ns for each in found if each is not None}
                with journal.same_content(blobs, times):
                    for digest in sorted(gone):
                        _drop(ours, digest, blobs)
    if orphaned - known.unproven:
        known = replace(known, unproven=known.unproven | orphaned)
        journal.save(replace(journal.recall(), unproven=known.unproven))
    return known


def _made_before(begun: float, ours: int, digest: str) -> bool:
    """Whether no server that runs now has finished the layer: its pull found it there, unhashed."""
    with contextlib.suppress(OSError), transfers.opened(ours, digest) as folder:
        made = scan.look(transfers.LEDGER, folder)
        return made is not None and made.mtime < begun + _EXACT_SECONDS
    return False


def _drop(ours: int, digest: str, blobs: int) -> None:
    with (
        contextlib.suppress(OSError, fs.BusyError),
        transfers.held(ours, digest) as folder,
    ):
        if transfers.is_second_name(folder, digest, blobs) or _is_kept(folder, digest):
            transfers.drop(ours, digest)


def _is_servers(ours: int, digest: str) -> bool:
    with contextlib.suppress(OSError), transfers.opened(ours, digest) as folder:
        return _is_kept(folder, digest)
    return False


def _is_kept(folder: int, digest: str) -> bool:
    """Whether the data is a server's, with or without the blob, and nobody has gone on with it."""
    data = scan.look(transfers.DATA, folder)
    with contextlib.suppress(ValueError):
        return data is not None and transfers.kept(folder, digest, data.size).is_left
    return False

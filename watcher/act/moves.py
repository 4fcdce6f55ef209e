"""Taking names out of ``blobs/``: a kill at any call, or a pull at any instant, loses nothing.

Nothing is unlinked where it lies. Under an intent on the disk each file is renamed into a folder
of ours, its holders are looked up again by inode, and only then it is removed; if somebody has it,
it is put back, never over an existing name. The files of a download move under a guard: an empty
file in place of ``…-partial-0``, on which a pull that begins meanwhile fails once with EOF before
it opens the data (seen on a real server).

An intent is a folder ``.ollama-watch/intents/<id>/``:

``intent.json``
    what is to be done, on the disk before anything moves
``guard``
    the guard, until it is put in place
``out/``
    what was moved, under its own name
``moved``
    appears once everything has moved and nobody held it; from here on it is finished, not undone
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import orjson

from watcher import files, names
from watcher.errors import ChangedError
from watcher.memory import FOLDER
from watcher.model import Entry, Holder
from watcher.names import Role
from watcher.observe import holders, scan
from watcher.world import World

INTENTS = "intents"
QUARANTINE = "quarantine"
_INTENT = "intent.json"
_GUARD = "guard"
_OUT = "out"
_MOVED = "moved"
_SCHEMA = "ollama-watch/intent/1"
_READ_LIMIT = 16 * 1024 * 1024


class HeldError(ChangedError):
    """Somebody has a file open that was about to go; everything is back in its place."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(
            f"{holder.process} ({holder.pid}) has opened {names.printable(holder.entry)} meanwhile",
            "try again when it has ended",
        )


@dataclass(frozen=True, slots=True)
class Removal:
    """What is to be taken away of ``blobs/``: all or none of it where `digest` is set."""

    verb: str
    entries: tuple[Entry, ...]
    #: The download that they belong to: they move under a guard.
    digest: str = ""
    wait_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Work:
    """The descriptors of one intent's folders."""

    intents: int
    name: str
    here: int
    out: int
    blobs: int


@dataclass(frozen=True, slots=True)
class Removed:
    """What has gone and what is still there because somebody holds it."""

    freed: int
    kept: tuple[Entry, ...]


# ---------------------------------------------------------------- doing


def take_away(world: World, store: int, removal: Removal) -> Removed:
    """Remove the entries, safely. Raises ChangedError, with everything back in its place.

    Of a removal without a digest, entries that changed or that somebody holds are kept, and named.
    """
    with _begun(store, removal) as work:
        try:
            if removal.digest:
                kept = _move_download(world, work, removal)
            else:
                kept = _move_each(world, work, removal)
            files.sync(work.blobs)
            files.sync(work.out)
            files.create(_MOVED, work.here, b"")
            files.sync(work.here)
        except BaseException:
            _undo(work)
            raise
        return Removed(_finish(work), kept)


def _move_download(world: World, work: _Work, removal: Removal) -> tuple[Entry, ...]:
    guard = names.sidecar(removal.digest, 0)
    _put_guard(work, guard, removal)
    if removal.wait_seconds:
        world.sleep(removal.wait_seconds)
    rest = [entry for entry in removal.entries if entry.name != guard]
    _check_unchanged(work, removal, rest)
    _check_unheld(world, removal.entries)
    # The data first: without it no server can take up what is left of the sidecars.
    for entry in sorted(rest, key=lambda entry: entry.name != names.data(removal.digest)):
        files.move(entry.name, work.blobs, entry.name, work.out)
        _check_moved(work, entry)
    _check_guard(work)
    _check_unheld(world, removal.entries)
    return ()


def _put_guard(work: _Work, guard: str, removal: Removal) -> None:
    """Put the guard in the place of part 0's sidecar, whose file stays as it is in ``out/``."""
    expected = next((entry for entry in removal.entries if entry.name == guard), None)
    if expected is None:
        files.move(_GUARD, work.here, guard, work.blobs)
        return
    if not _same(scan.look(guard, work.blobs), expected):
        raise _changed(guard)
    files.second_name(guard, work.blobs, guard, work.out)
    _check_moved(work, expected)
    files.replace(_GUARD, work.here, guard, work.blobs)


def _check_unchanged(work: _Work, removal: Removal, rest: Iterable[Entry]) -> None:
    """Compare what was planned on with what is there; further files of the download count too."""
    expected = {entry.name for entry in removal.entries}
    for name in os.listdir(work.blobs):
        parsed = names.parse_blob(name)
        ours = parsed.digest == removal.digest and parsed.role in (Role.DATA, Role.SIDECAR)
        if ours and name not in expected and name != names.sidecar(removal.digest, 0):
            raise _changed(name)
    _check_guard(work)
    for entry in rest:
        if not _same(scan.look(entry.name, work.blobs), entry):
            raise _changed(entry.name)


def _check_guard(work: _Work) -> None:
    """A server that had seen no sidecars at all writes its own into the guard."""
    guard = _guard_of(work)
    if guard is not None and not _is_guard(scan.look(guard[0], work.blobs), guard[1]):
        raise _changed(guard[0])


def _is_guard(found: Entry | None, identity: tuple[int, int]) -> bool:
    return found is not None and found.identity == identity and found.size == 0


def _check_unheld(world: World, entries: Iterable[Entry]) -> None:
    held = holders.holders_of(world, entries)
    if held:
        raise HeldError(held[0])


def _check_moved(work: _Work, expected: Entry) -> None:
    """What arrived in ``out/`` must be the very file that was meant."""
    found = scan.look(expected.name, work.out)
    if found is None or found.identity != expected.identity:
        raise _changed(expected.name)


def _move_each(world: World, work: _Work, removal: Removal) -> tuple[Entry, ...]:
    moved: dict[str, Entry] = {}
    kept: list[Entry] = []
    for entry in removal.entries:
        if not _same(scan.look(entry.name, work.blobs), entry):
            kept.append(entry)
            continue
        files.move(entry.name, work.blobs, entry.name, work.out)
        found = scan.look(entry.name, work.out)
        if found is None or found.identity != entry.identity:
            _put_back(work, entry.name)
            kept.append(entry)
        else:
            moved[entry.name] = entry
    for holder in holders.holders_of(world, moved.values()):
        if holder.entry in moved:
            _put_back(work, holder.entry)
            kept.append(moved.pop(holder.entry))
    return tuple(kept)


def _same(found: Entry | None, expected: Entry) -> bool:
    """Whether an entry is still the one planned on. A second name of ours changes only ctime."""
    return found is not None and (
        (found.identity, found.kind, found.size, found.mtime_ns)
        == (expected.identity, expected.kind, expected.size, expected.mtime_ns)
    )


def _changed(name: str) -> ChangedError:
    return ChangedError(
        f"{names.printable(name)} has changed since it was looked at", "look again, then try again"
    )


# ---------------------------------------------------------------- intents


@contextlib.contextmanager
def _begun(store: int, removal: Removal) -> Iterator[_Work]:
    """An intent on the disk, before anything is changed."""
    files.ensure_folder(FOLDER, store)
    with (
        files.opened_folder(FOLDER, store) as ours,
        files.opened_folder("blobs", store, follow=True) as blobs,
    ):
        files.ensure_folder(INTENTS, ours)
        with files.opened_folder(INTENTS, ours) as intents:
            name = _free_name(intents)
            files.ensure_folder(name, intents)
            with _opened(intents, name, blobs) as work:
                if removal.digest:
                    files.create(_GUARD, work.here, b"")
                files.create(_INTENT, work.here, _encode(removal, work))
                files.sync(work.here)
                yield work


@contextlib.contextmanager
def _opened(intents: int, name: str, blobs: int) -> Iterator[_Work]:
    with files.opened_folder(name, intents) as here:
        files.ensure_folder(_OUT, here)
        with files.opened_folder(_OUT, here) as out:
            yield _Work(intents, name, here, out, blobs)


def _free_name(intents: int) -> str:
    taken = [int(name) for name in os.listdir(intents) if name.isdecimal()]
    return f"{max(taken, default=0) + 1:08}"


def _encode(removal: Removal, work: _Work) -> bytes:
    guard = scan.look(_GUARD, work.here)
    document = {
        "schema": _SCHEMA,
        "verb": removal.verb,
        "digest": removal.digest,
        "guard": None if guard is None else {"device": guard.device, "inode": guard.inode},
        "entries": [
            {
                "name": names.printable(entry.name),
                "size_bytes": entry.size,
                "device": entry.device,
                "inode": entry.inode,
            }
            for entry in removal.entries
        ],
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _guard_of(work: _Work) -> tuple[str, tuple[int, int]] | None:
    """The guard's name under ``blobs/`` and its device and inode, as the intent says; or None."""
    try:
        document = orjson.loads(files.read_small(_INTENT, work.here, _READ_LIMIT))
        identity = document["guard"]["device"], document["guard"]["inode"]
        return names.sidecar(document["digest"], 0), identity
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _undo(work: _Work) -> None:
    """Put everything back and forget the intent."""
    guard = _guard_of(work)
    for name in os.listdir(work.out):
        if guard is None or name != guard[0]:
            _put_back(work, name)
    if guard is not None:
        _take_guard_off(work, *guard)
    files.sync(work.blobs)
    _forget(work)


def _take_guard_off(work: _Work, name: str, identity: tuple[int, int]) -> None:
    """Put part 0's own sidecar over the guard, or remove the guard where it had none."""
    in_place = scan.look(name, work.blobs)
    is_guard = _is_guard(in_place, identity)
    original = scan.look(name, work.out)
    if original is None:
        if is_guard:
            files.move(name, work.blobs, _GUARD, work.here)
    elif is_guard:
        files.replace(name, work.out, name, work.blobs)
    elif in_place is not None and in_place.identity == original.identity:
        files.remove(name, work.out)  # the second name only; the guard was not in place yet
    else:
        _put_back(work, name)


def _put_back(work: _Work, name: str) -> None:
    try:
        files.move(name, work.out, name, work.blobs)
    except FileExistsError:
        # A new file has the name now. Neither is lost: the old one goes to quarantine.
        with files.opened_folder("..", work.intents, follow=True) as ours:
            files.ensure_folder(QUARANTINE, ours)
            with files.opened_folder(QUARANTINE, ours) as quarantine:
                files.move(name, work.out, f"{work.name}-{name}", quarantine)


def _finish(work: _Work) -> int:
    """Remove what was moved. Gives back the bytes that this freed."""
    guard = _guard_of(work)
    if guard is not None and _is_guard(scan.look(guard[0], work.blobs), guard[1]):
        files.move(guard[0], work.blobs, _GUARD, work.here)
        files.sync(work.blobs)
    freed = 0
    for name in os.listdir(work.out):
        found = scan.look(name, work.out)
        freed += found.freed if found is not None else 0
        files.remove(name, work.out)
    _forget(work)
    return freed


def _forget(work: _Work) -> None:
    """Remove an intent with nothing left in ``out/``; the note of what was done goes last."""
    files.remove_folder(_OUT, work.here)
    for name in (_GUARD, _INTENT, _MOVED):
        with contextlib.suppress(FileNotFoundError):
            files.remove(name, work.here)
    files.remove_folder(work.name, work.intents)
    files.sync(work.intents)


# ---------------------------------------------------------------- after a kill


def recover(store: int) -> tuple[str, ...]:
    """Finish or undo every intent that a kill has left. Gives back what was done, for people."""
    told: list[str] = []
    try:
        with (
            files.opened_folder(FOLDER, store) as ours,
            files.opened_folder(INTENTS, ours) as intents,
            files.opened_folder("blobs", store, follow=True) as blobs,
        ):
            for name in sorted(os.listdir(intents)):
                with _opened(intents, name, blobs) as work:
                    if scan.look(_MOVED, work.here) is not None:
                        freed = _finish(work)
                        told.append(f"finished the removal {name}: {freed} bytes freed")
                    else:
                        _undo(work)
                        told.append(f"undid the removal {name}: everything is back in its place")
    except FileNotFoundError:
        pass
    return tuple(told)

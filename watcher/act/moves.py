"""Changing a store's files: a kill at any call, or a pull at any instant, loses nothing.

Nothing is unlinked where it lies. Under an intent on the disk each file that is to go is renamed
into a folder of ours and its holders are looked up again by inode; if somebody has it, it is put
back, never over an existing name. The files of a download change under a guard: an empty file in
place of ``…-partial-0``, on which a pull that begins meanwhile fails once with EOF before it opens
the data (seen on a real server). New sidecars lie ready beside the intent and are renamed over the
old ones; part 0's goes last, over the guard.

An intent is a folder ``.ollama-watch/intents/<id>/``:

``intent.json``
    what is to be done, on the disk before anything changes
``new/``
    the sidecars to put in place, whole and on the disk
``guard``
    the guard, until it is put in place
``out/``
    what was taken away, under its own name
``decided``
    appears once everything that goes is out and nobody held it: from here on it is finished,
    before it everything is undone
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import orjson

from watcher import files, folders, names
from watcher.decide import safety
from watcher.errors import ChangedError
from watcher.memory import FOLDER
from watcher.model import Entry, Holder
from watcher.names import Role
from watcher.observe import holders, scan
from watcher.observe.quarantine import QUARANTINE
from watcher.world import World

INTENTS = "intents"
_INTENT = "intent.json"
_NEW = "new"
_GUARD = "guard"
_OUT = "out"
_DECIDED = "decided"
_SCHEMA = "ollama-watch/intent/1"
_READ_LIMIT = 16 * 1024 * 1024


class HeldError(ChangedError):
    """Somebody has a file open that was about to go; everything is back in its place."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(
            f"{holder.process} ({holder.pid}) has opened {names.printable(holder.entry)} meanwhile"
            f"{holder.doubt}",
            "try again when it has ended",
        )


class CutShortError(OSError):
    """It is decided, and an error came before its end: the next run finishes it."""


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be done to names under ``blobs/``."""

    verb: str
    #: The entries that it was planned on; the disk must still have them just so.
    expects: tuple[Entry, ...]
    #: Those of them that go.
    takes: tuple[Entry, ...] = ()
    #: Names to the bytes that are put in their place.
    writes: Mapping[str, bytes] = field(default_factory=dict)
    #: The download that they belong to: all or nothing of it is done, under a guard.
    digest: str = ""
    wait_seconds: float = 0.0
    #: What goes is kept, in quarantine.
    keeps: bool = False
    #: User and group id that written files get, where we may give them.
    owner: tuple[int, int] | None = None
    #: Device and inode of the ``blobs`` that was looked at; what is put in its place is not it.
    blobs: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Changed:
    """What has gone, and what is still there and why, by name."""

    freed: int
    kept: Mapping[str, ChangedError] = field(default_factory=dict)


#: Asked before anything is final (of a download under its guard, of single files once they are
#: out): which of them must stay after all, and why.
Confirm: TypeAlias = Callable[[Collection[Entry]], Mapping[str, ChangedError]]


@dataclass(frozen=True, slots=True)
class _Work:
    """The descriptors of one intent's folders."""

    ours: int
    intents: int
    name: str
    here: int
    new: int
    out: int
    blobs: int


# ---------------------------------------------------------------- doing


def carry_out(world: World, store: int, change: Change, confirm: Confirm) -> Changed:
    """Do it, safely. Raises ChangedError, or OSError, with everything back in its place.

    Of the OSErrors CutShortError is the one that leaves the rest to the next run.
    Of a change without a digest, entries that must stay are kept, and named with the reason.
    """
    with _begun(store, change) as work:
        kept: Mapping[str, ChangedError] = {}
        try:
            if change.digest:
                _take_of_download(world, work, change, confirm)
            else:
                kept = _take_each(world, work, change.takes, confirm)
            files.sync(work.blobs)
            files.sync(work.out)
            files.create(_DECIDED, work.here, b"")
            files.sync(work.here)
        except BaseException:
            _undo(work)
            raise
        try:
            return Changed(_finish(work), kept)
        except OSError as error:
            why = f"{error.strerror}; the next run finishes it"
            raise CutShortError(error.errno, why, error.filename) from error


def _take_of_download(world: World, work: _Work, change: Change, confirm: Confirm) -> None:
    guard = names.sidecar(change.digest, 0)
    _put_guard(work, guard, change)
    if change.wait_seconds:
        world.sleep(change.wait_seconds)
    _check_unchanged(work, change, guard)
    _check_unheld(world, change)
    for error in confirm(change.takes).values():
        raise error
    # The data first: without it no server can take up what is left of the sidecars.
    data = names.data(change.digest)
    out = False
    for entry in sorted(change.takes, key=lambda entry: entry.name != data):
        if entry.name == guard:
            continue
        try:
            _take(work, entry)
        except ChangedError:
            # Once the data is out, a start of the server may delete old sidecars before we do.
            if not out or scan.look(entry.name, work.blobs) or scan.look(entry.name, work.out):
                raise
        out = out or entry.name == data
    _check_guard(work)
    _check_unheld(world, change)


def _put_guard(work: _Work, guard: str, change: Change) -> None:
    """Put the guard in the place of part 0's sidecar, whose file stays as it is in ``out/``."""
    expected = next((entry for entry in change.expects if entry.name == guard), None)
    if expected is None:
        try:
            files.move(_GUARD, work.here, guard, work.blobs)
        except FileExistsError:
            raise _changed(guard) from None
        return
    if not _same(scan.look(guard, work.blobs), expected):
        raise _changed(guard)
    try:
        files.second_name(guard, work.blobs, guard, work.out)
    except FileNotFoundError:
        raise _changed(guard) from None
    _check_moved(work, expected)
    files.replace(_GUARD, work.here, guard, work.blobs)


def _check_unchanged(work: _Work, change: Change, guard: str) -> None:
    """Compare what was planned on with what is there; further files of the download count too."""
    expected = {entry.name: entry for entry in change.expects}
    for name in os.listdir(work.blobs):
        parsed = names.parse_blob(name)
        ours = parsed.digest == change.digest and parsed.role in (Role.DATA, Role.SIDECAR)
        if ours and name not in expected and name != guard:
            raise _changed(name)
    _check_guard(work)
    for name, entry in expected.items():
        if name != guard and not _same(scan.look(name, work.blobs), entry):
            raise _changed(name)


def _check_guard(work: _Work) -> None:
    """A server that had seen no sidecars at all writes its own into the guard."""
    guard = _guard_of(work)
    if guard is not None and not _is_guard(scan.look(guard[0], work.blobs), guard[1]):
        raise _changed(guard[0])


def _is_guard(found: Entry | None, inode: int) -> bool:
    """Told by its inode: the device's number may be another one after a restart."""
    return found is not None and found.inode == inode and found.size == 0


def _check_unheld(world: World, change: Change) -> None:
    """Nobody may have a file open that goes; who only reads keeps no sidecar from being written."""
    held = holders.holders_of(world, change.expects)
    if not change.takes:
        held = tuple(filter(safety.minds_sidecars, held))
    if held:
        raise HeldError(held[0])


def _take(work: _Work, entry: Entry) -> None:
    """Move an entry out; raises ChangedError where it is not, or no longer, what was meant."""
    try:
        files.move(entry.name, work.blobs, entry.name, work.out, private=True)
    except FileNotFoundError:
        raise _changed(entry.name) from None
    _check_moved(work, entry)


def _check_moved(work: _Work, expected: Entry) -> None:
    """What arrived in ``out/`` must be the very file that was meant, as it was."""
    if not _same(scan.look(expected.name, work.out), expected):
        raise _changed(expected.name)


def _take_each(
    world: World, work: _Work, takes: Iterable[Entry], confirm: Confirm
) -> Mapping[str, ChangedError]:
    moved: dict[str, Entry] = {}
    kept: dict[str, ChangedError] = {}
    for entry in takes:
        try:
            if not _same(scan.look(entry.name, work.blobs), entry):
                raise _changed(entry.name)
            _take(work, entry)
        except ChangedError as error:
            kept[entry.name] = error
            if scan.look(entry.name, work.out) is not None:
                _put_back(work, entry.name)
        else:
            moved[entry.name] = entry
    for holder in holders.holders_of(world, moved.values()):
        kept[holder.entry] = HeldError(holder)
    kept.update(confirm(moved.values()))
    for name in kept.keys() & moved.keys():
        _put_back(work, name)
    return kept


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
def _begun(store: int, change: Change) -> Iterator[_Work]:
    """An intent on the disk, before anything is changed."""
    files.ensure_folder(FOLDER, store)
    with (
        files.opened_folder(FOLDER, store) as ours,
        folders.opened_blobs(store) as blobs,
    ):
        if _identity(blobs) != change.blobs:
            raise _changed("blobs")
        files.ensure_folder(INTENTS, ours)
        with files.opened_folder(INTENTS, ours) as intents:
            name = _free_name(ours, intents)
            files.ensure_folder(name, intents)
            with _opened(ours, intents, name, blobs) as work:
                try:
                    _prepare(work, change)
                except BaseException:
                    _forget(work)
                    raise
                yield work


def _prepare(work: _Work, change: Change) -> None:
    if change.digest:
        files.create(_GUARD, work.here, b"", change.owner)
    files.create_all(change.writes, work.new, change.owner)
    files.sync(work.new)
    files.create(_INTENT, work.here, _encode(change, work))
    files.sync(work.here)


@contextlib.contextmanager
def _opened(ours: int, intents: int, name: str, blobs: int) -> Iterator[_Work]:
    with files.opened_folder(name, intents) as here:
        # On the disk with the intent beside them; before that there is nothing to finish or undo.
        files.ensure_folder(_NEW, here, durable=False)
        files.ensure_folder(_OUT, here, durable=False)
        with files.opened_folder(_NEW, here) as new, files.opened_folder(_OUT, here) as out:
            yield _Work(ours, intents, name, here, new, out, blobs)


def _identity(folder: int) -> tuple[int, int]:
    status = os.fstat(folder)
    return status.st_dev, status.st_ino


def _free_name(ours: int, intents: int) -> str:
    """A number that no intent has, nor anything in quarantine, whose names begin with it."""
    taken = [int(name) for name in os.listdir(intents) if name.isdecimal()]
    with contextlib.suppress(OSError), files.opened_folder(QUARANTINE, ours) as quarantine:
        numbers = (name.partition("-")[0] for name in os.listdir(quarantine))
        taken.extend(int(number) for number in numbers if number.isdecimal())
    return f"{max(taken, default=0) + 1:08}"


def _encode(change: Change, work: _Work) -> bytes:
    guard = scan.look(_GUARD, work.here)
    document = {
        "schema": _SCHEMA,
        "verb": change.verb,
        "digest": change.digest,
        "keeps": change.keeps,
        "blobs_inode": change.blobs[1],
        "guard": None if guard is None else {"inode": guard.inode},
        "takes": [_described(entry) for entry in change.takes],
        # Files on their own are told by what lies in out/; a download is compared.
        "expects": [_described(entry) for entry in change.expects] if change.digest else [],
        "writes": {name: content.decode() for name, content in change.writes.items()},
    }
    return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)


def _described(entry: Entry) -> dict[str, object]:
    return {
        "name": names.printable(entry.name),
        "size_bytes": entry.size,
        "device": entry.device,
        "inode": entry.inode,
    }


def _document(work: _Work) -> dict[str, object]:
    """The intent as it was written; empty where a kill left none, or half of one."""
    try:
        document = orjson.loads(files.read_small(_INTENT, work.here, _READ_LIMIT))
    except (OSError, orjson.JSONDecodeError):
        return {}
    return document if isinstance(document, dict) else {}


def _guard_of(work: _Work) -> tuple[str, int] | None:
    """The guard's name under ``blobs/`` and its inode, as the intent says; or None."""
    document = _document(work)
    guard, digest = document.get("guard"), document.get("digest")
    if not isinstance(guard, dict) or not isinstance(digest, str):
        return None
    return names.sidecar(digest, 0), int(guard["inode"])


# ---------------------------------------------------------------- undoing and finishing


def _undo(work: _Work) -> None:
    """Put everything back and forget the intent."""
    with contextlib.suppress(FileNotFoundError):
        # It could not be brought to the disk: a kill in here must not find it.
        files.remove(_DECIDED, work.here)
    guard = _guard_of(work)
    for name in os.listdir(work.out):
        if guard is None or name != guard[0]:
            _put_back(work, name)
    if guard is not None:
        _take_guard_off(work, *guard)
    files.sync(work.blobs)
    _forget(work)


def _take_guard_off(work: _Work, name: str, inode: int) -> None:
    """Put part 0's own sidecar over the guard, or remove the guard where it had none."""
    _drop_orphaned(work, name)
    in_place = scan.look(name, work.blobs)
    original = scan.look(name, work.out)
    if original is None:
        if _is_guard(in_place, inode):
            _remove_guard(work, name)
    elif _is_guard(in_place, inode):
        files.replace(name, work.out, name, work.blobs)
    else:
        _put_back(work, name)


def _drop_orphaned(work: _Work, name: str) -> None:
    """Let part 0's sidecar go where its data has gone: a server that ended or deleted the download
    just before the guard came did so to the sidecar, too. Beside other data it would be false."""
    data = name.removesuffix("-0")
    expected = _expected(work, data)
    in_place = scan.look(data, work.blobs)
    if expected is None or scan.look(name, work.out) is None:
        return
    if in_place is None:
        files.remove(name, work.out)
    elif in_place.inode != expected["inode"]:
        _to_quarantine(work, name)


def _expected(work: _Work, name: str) -> Mapping[str, Any] | None:
    """What the intent says of a file that it was planned on."""
    expects = _document(work).get("expects")
    found = (
        (each for each in expects if each.get("name") == name) if isinstance(expects, list) else ()
    )
    return next(iter(found), None)


def _remove_guard(work: _Work, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        files.remove(_GUARD, work.here)  # a second name, where a rename is a link first
    files.move(name, work.blobs, _GUARD, work.here)


def _put_back(work: _Work, name: str) -> None:
    try:
        files.move(name, work.out, name, work.blobs)
    except FileExistsError:
        in_place, original = scan.look(name, work.blobs), scan.look(name, work.out)
        if in_place and original and in_place.identity == original.identity:
            files.remove(name, work.out)  # where a rename is a link first, both names may be left
        else:
            # A new file has the name now. Neither is lost: the old one goes to quarantine.
            _to_quarantine(work, name)


def _to_quarantine(work: _Work, name: str) -> None:
    files.ensure_folder(QUARANTINE, work.ours)
    with files.opened_folder(QUARANTINE, work.ours) as quarantine:
        files.move(name, work.out, f"{work.name}-{name}", quarantine)
        files.sync(quarantine)


def _finish(work: _Work) -> int:
    """Put the new files in place and let go what was taken. Gives back the bytes that it freed."""
    guard = _guard_of(work)
    _put_new(work, guard)
    if guard is not None and _is_guard(scan.look(guard[0], work.blobs), guard[1]):
        _remove_guard(work, guard[0])
    files.sync(work.blobs)
    keeps = bool(_document(work).get("keeps"))
    freed = 0
    for name in os.listdir(work.out):
        found = scan.look(name, work.out)
        # Part 0's sidecar, which the guard has displaced, is nothing that anybody would want.
        if keeps and (guard is None or name != guard[0]):
            _to_quarantine(work, name)
        else:
            freed += found.freed if found is not None else 0
            files.remove(name, work.out)
    _forget(work)
    return freed


def _put_new(work: _Work, guard: tuple[str, int] | None) -> None:
    """Rename the new sidecars over the old ones, part 0's last: until then no pull gets through."""
    last = guard[0] if guard is not None else ""
    for name in sorted(os.listdir(work.new), key=lambda name: (name == last, name)):
        if name == last:
            files.sync(work.blobs)
        files.replace(name, work.new, name, work.blobs)


def _still_ours(world: World, work: _Work) -> bool:
    """Whether a download is still as it was decided on: under our guard, and in nobody's hands.

    With the guard in its place nobody can have gone on with it; without it anything may have
    happened, and sidecars made for other data must not be put beside it.
    """
    guard = _guard_of(work)
    if guard is None or not os.listdir(work.new):
        return True
    if not _is_guard(scan.look(guard[0], work.blobs), guard[1]):
        return False
    data = guard[0].removesuffix("-0")
    expected, there = _expected(work, data), scan.look(data, work.blobs)
    if expected is not None and (
        there is None or (there.inode, there.size) != (expected["inode"], expected["size_bytes"])
    ):
        return False
    return there is None or not holders.holders_of(world, [there])


def _forget(work: _Work) -> None:
    """Remove an intent with nothing left in ``out/``; the note of what was done goes last."""
    for name in os.listdir(work.new):
        files.remove(name, work.new)
    files.remove_folder(_NEW, work.here)
    files.remove_folder(_OUT, work.here)
    for name in (_GUARD, _INTENT, _DECIDED):
        with contextlib.suppress(FileNotFoundError):
            files.remove(name, work.here)
    files.remove_folder(work.name, work.intents)
    files.sync(work.intents)


def leave_quarantine(store: int, entry: Entry, back_into: tuple[int, int] | None) -> None:
    """Move a kept file back to its place under ``blobs/``, or remove it for good.

    `back_into`: device and inode of the ``blobs`` that it was planned on; None to remove it.
    Raises FileExistsError where its place is taken, ChangedError where it is not the file meant.
    """
    with (
        files.opened_folder(FOLDER, store) as ours,
        files.opened_folder(QUARANTINE, ours) as quarantine,
    ):
        if not _same(scan.look(entry.name, quarantine), entry):
            raise _changed(entry.name)
        if back_into is None:
            files.remove(entry.name, quarantine)
            return
        with folders.opened_blobs(store) as blobs:
            if _identity(blobs) != back_into:
                raise _changed("blobs")
            files.move(entry.name, quarantine, entry.name.partition("-")[2], blobs)
            files.sync(blobs)


# ---------------------------------------------------------------- after a kill


def unfinished(store: int) -> bool:
    """Whether a kill has left an intent; where somebody is at work, theirs is one, too."""
    try:
        with (
            files.opened_folder(FOLDER, store) as ours,
            files.opened_folder(INTENTS, ours) as intents,
        ):
            return any(map(str.isdecimal, os.listdir(intents)))
    except OSError:
        return False


def recover(world: World, store: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Finish or undo every intent that a kill has left. The store's lock is held.

    Gives back, for people, what was done, and what could not be: then nothing else may be changed.
    """
    done: list[str] = []
    stuck: list[str] = []
    try:
        with (
            files.opened_folder(FOLDER, store) as ours,
            files.opened_folder(INTENTS, ours) as intents,
            folders.opened_blobs(store) as blobs,
        ):
            for name in sorted(filter(str.isdecimal, os.listdir(intents))):
                try:
                    with _opened(ours, intents, name, blobs) as work:
                        done.append(_recover(world, work))
                except (OSError, ChangedError) as error:
                    stuck.append(f"what was begun as {FOLDER}/{INTENTS}/{name} is stuck: {error}")
    except FileNotFoundError:
        pass
    except folders.ForeignLinkError as error:
        stuck.append(f"what was begun is left as it is: {error.strerror}")
    return tuple(done), tuple(stuck)


def _recover(world: World, work: _Work) -> str:
    document = _document(work)
    verb = str(document.get("verb") or "change").replace("_", " ")
    if document and document.get("blobs_inode") != _identity(work.blobs)[1]:
        raise ChangedError("blobs/ is another folder now")
    if scan.look(_DECIDED, work.here) is None:
        _undo(work)
        return f"undid what was begun: {verb}; all is back in its place"
    if not _still_ours(world, work):
        for name in os.listdir(work.new):
            files.remove(name, work.new)
        _finish(work)
        return f"dropped what was begun: {verb}; its download has changed since"
    freed = _finish(work)
    return f"finished what was begun: {verb}, {freed} bytes freed"

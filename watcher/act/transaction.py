"""Changing a store's files: a kill at any call, or a pull at any instant, loses nothing.

``docs/safety.md`` (How files are changed) has the steps, the files of an intent, and what becomes
of one after a kill. Several downloads go through each step together, up to *commit*, one by one.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

from rich.filesize import decimal

from watcher.decide import actions, safety
from watcher.errors import ChangedError
from watcher.model import OURS, ActionKind, Entry, Holder, RefusalKind
from watcher.observe import intents, place, processes, scan
from watcher.observe.blobs import QUARANTINE
from watcher.observe.host import Host
from watcher.observe.intents import WRITING, Folder, ForeignError, Intent
from watcher.ollama import names, sidecars
from watcher.ollama.names import Role
from watcher.state import folders, fs, state_folder, transfers
from watcher.state.memory import Memory
from watcher.system import advice


class UndoneError(ChangedError):
    """A change can't be done now, for a reason of its own kind; everything is in its place."""

    def __init__(self, kind: RefusalKind, message: str, next_step: str) -> None:
        super().__init__(message, next_step)
        self.kind = kind


class CutShortError(OSError):
    """It is decided, and an error came before its end: the next run finishes it."""


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be done to names under ``blobs/``."""

    kind: ActionKind
    expects: tuple[Entry, ...]  #: the disk must still have them just so
    takes: tuple[Entry, ...] = ()  #: those of them that go
    writes: Mapping[str, bytes] = field(default_factory=dict)  #: what is put there, by name
    digest: str = ""  #: the download, done as a whole, under a guard; "" for single files
    wait_seconds: float = 0.0
    blobs: tuple[int, int] = (0, 0)  #: device and inode of those that were looked at
    alone: bool = False  #: no process of Ollama's runs, and none can be unseen
    loose: bool = False  #: the file system gives a file that is moved, or read again, another inode
    unsure: bool = False  #: it does, and somebody else may put other files there


class Changed(NamedTuple):
    """What has gone, and what is still there and why, by name."""

    freed: int
    kept: Mapping[str, ChangedError]


#: What came of one change. With an error, but a CutShortError, everything is back in its place.
Answer: TypeAlias = Changed | ChangedError | OSError

#: Asked before anything is final: which of these must stay after all, and why.
Confirm: TypeAlias = Callable[[Collection[Entry]], Mapping[str, ChangedError]]


class _Store(NamedTuple):
    ours: int
    intents: int
    blobs: int
    folder: Folder


class _Work(NamedTuple):
    """The descriptors of one intent's folders, and its content; None where it has none."""

    store: _Store
    blobs: int
    name: str
    here: int
    new: int
    out: int
    intent: Intent | None


def stopped() -> UndoneError:
    why = "it was stopped before its turn came; nothing was changed"
    return UndoneError(RefusalKind.STOPPED, why, "run it again")


def commit_all(host: Host, store: int, changes: Sequence[Change], confirm: Confirm) -> list[Answer]:
    """Do changes, safely: one of single files, or any number of downloads; an answer for each.

    When `host.stops`, no further download is begun. What is raised leaves everything in its place.
    """
    with state_folder.made(store, intents.INTENTS), _store(host, store) as base:
        try:
            _check_meant(base.blobs, changes[0])
        except ChangedError as error:
            return [error] * len(changes)
        batch = _Batch(host, base, changes)
        try:
            batch.stage()
            if changes[0].digest:
                batch.of_downloads(confirm)
            else:
                batch.each(lambda work, change: batch.take_each(work, change, confirm))
            batch.commit()
        except BaseException:
            batch.give_up_all(stopped())
            raise
        return [batch.answers[number] for number in range(len(changes))]


class _Batch:
    """Changes on their way: those that are staged, by number, and the answers of the others."""

    def __init__(self, host: Host, base: _Store, changes: Sequence[Change]) -> None:
        self._host, self._base, self._changes = host, base, changes
        self._staged: dict[int, tuple[str, Intent]] = {}
        self._kept: Mapping[str, ChangedError] = {}
        self.answers: dict[int, Answer] = {}

    def stage(self) -> None:
        """Have the intents on the disk, and the guards in their places."""
        free = _free_numbers(self._base)
        for number, change in enumerate(self._changes):
            if self._host.stops():
                self.answers[number] = stopped()
                continue
            try:
                self._staged[number] = _begun(self._base, f"{next(free):08}", change)
            except (ChangedError, OSError) as error:
                self.answers[number] = error
        if self._changes[0].digest:
            self.each(_put_guard)

    def of_downloads(self, confirm: Confirm) -> None:
        seconds = max((self._changes[each].wait_seconds for each in self._staged), default=0.0)
        if seconds and not self._host.stops():
            self._host.sleep(seconds)
        if self._host.stops():
            self.give_up_all(stopped())
        if not self._staged:
            return
        there: dict[str, list[str]] = {}
        for name in os.listdir(self._base.blobs):
            parsed = names.parse_blob(name) if "-partial" in name else None
            if parsed and parsed.role in (Role.DATA, Role.SIDECAR):
                there.setdefault(parsed.digest, []).append(name)
        self.each(lambda work, change: _check_unchanged(work, change, there))
        self._check_unheld()
        if self._staged:
            going = [entry for each in self._staged for entry in self._changes[each].takes]
            for error in list(confirm(going).values())[:1]:
                self.give_up_all(error)
        self.each(_take_of_download)
        self.each(lambda work, _: _check_guard(work))
        self._check_unheld()

    def take_each(self, work: _Work, change: Change, confirm: Confirm) -> None:
        """Take each single file that goes, and put those back that must stay."""
        moved: dict[str, Entry] = {}
        kept: dict[str, ChangedError] = {}
        for entry in change.takes:
            try:
                _check_same(scan.look(entry.name, work.blobs), entry, change)
                _take(work, entry, change)
            except ChangedError as error:
                kept[entry.name] = error
                if scan.look(entry.name, work.out) is not None:
                    _put_back(work, entry.name)
            else:
                moved[entry.name] = entry
        for holder in processes.holders_of(self._host, moved.values()):
            kept[holder.entry] = _held(holder)
        kept.update(confirm(moved.values()))
        for name in kept.keys() & moved.keys():
            _put_back(work, name)
        self._kept = kept

    def commit(self) -> None:
        if self._staged:
            fs.sync(self._base.blobs)
        self.each(_decide)
        for number, (name, intent) in list(self._staged.items()):
            del self._staged[number]
            try:
                with _opened(self._base, name, intent) as work:
                    self.answers[number] = Changed(_finish(work), self._kept)
            except OSError as error:
                why = f"{error.strerror}; the next run finishes it"
                self.answers[number] = CutShortError(error.errno, why, error.filename)

    def each(self, do: Callable[[_Work, Change], None]) -> None:
        for number, (name, intent) in list(self._staged.items()):
            try:
                with _opened(self._base, name, intent) as work:
                    do(work, self._changes[number])
            except (ChangedError, OSError) as error:
                self._give_up(number, error)

    def _give_up(self, number: int, error: ChangedError | OSError) -> None:
        name, intent = self._staged.pop(number)
        self.answers[number] = error
        try:
            with _opened(self._base, name, intent) as work:
                _undo(work)
        except OSError as worse:
            self.answers[number] = worse

    def give_up_all(self, error: ChangedError) -> None:
        for number in list(self._staged):
            self._give_up(number, error)

    def _check_unheld(self) -> None:
        if not self._staged:
            return
        held: dict[str, list[Holder]] = {}
        every = [entry for each in self._staged for entry in self._changes[each].expects]
        for holder in processes.holders_of(self._host, every):
            held.setdefault(holder.entry, []).append(holder)
        for number in list(self._staged):
            change = self._changes[number]
            mine = [each for entry in change.expects for each in held.get(entry.name, ())]
            if not change.takes:
                # A process that only reads keeps no sidecar from being written.
                mine = list(filter(safety.minds_sidecars, mine))
            if mine:
                self._give_up(number, _held(mine[0]))


def _put_guard(work: _Work, change: Change) -> None:
    guard = names.sidecar(change.digest, 0)
    expected = next((entry for entry in change.expects if entry.name == guard), None)
    if expected is None:
        try:
            fs.move(intents.GUARD, work.here, guard, work.blobs)
        except FileExistsError:
            raise changed(guard) from None
        return
    _check_same(scan.look(guard, work.blobs), expected, change)
    _keep_displaced(work, expected, alone=change.alone)
    fs.replace(intents.GUARD, work.here, guard, work.blobs)


def _keep_displaced(work: _Work, expected: Entry, *, alone: bool) -> None:
    name = expected.name
    try:
        fs.second_name(name, work.blobs, name, work.out)
    except FileNotFoundError:
        raise changed(name) from None
    except OSError as error:
        if error.errno not in fs.NO_LINKS:
            raise
        why = "there are no hard links here"
    else:
        found = scan.look(name, work.out)
        if _same(found, expected, loose=False):
            return
        # An overlay gives a file of a lower layer a new inode as soon as it gets a second name.
        fs.remove(name, work.out)
        if not _same(found, expected, loose=True):
            raise changed(name)
        why = "a file gets another inode here when it is moved"
    if not alone:
        raise _loose(why)
    raw = fs.read_small(name, work.blobs, sidecars.READ_LIMIT + 1)
    if len(raw) > sidecars.READ_LIMIT:
        raise _loose(f"{names.printable(name)} is too large to be copied")
    owner = expected.uid, expected.gid
    fs.create_like(intents.COPY, work.here, raw, owner, (expected.mode, expected.mtime_ns))
    intact = _same(scan.look(name, work.blobs), expected, loose=True)
    if not intact or fs.read_small(name, work.blobs, sidecars.READ_LIMIT + 1) != raw:
        raise changed(name)
    fs.move(intents.COPY, work.here, name, work.out, private=True)
    fs.sync(work.out)


def _check_unchanged(work: _Work, change: Change, there: Mapping[str, list[str]]) -> None:
    guard = names.sidecar(change.digest, 0)
    expected = {entry.name: entry for entry in change.expects}
    is_given = change.kind is ActionKind.GIVE_BACK  # its data is held, and lies elsewhere still
    for name in there.get(change.digest, ()):
        if (is_given or name not in expected) and name != guard:
            raise changed(name)
    if is_given and scan.look(names.blob(change.digest), work.blobs) is not None:
        raise changed(names.blob(change.digest))
    _check_guard(work)
    for name, entry in {} if is_given else expected.items():
        if name != guard:
            _check_same(scan.look(name, work.blobs), entry, change)


def _check_guard(work: _Work) -> None:
    # A server that had seen no sidecars at all writes its own into the guard.
    intent = work.intent
    if intent is not None and not intent.is_guard(scan.look(intent.guard_name, work.blobs)):
        raise changed(intent.guard_name)


def _take_of_download(work: _Work, change: Change) -> None:
    # The data first: without it no server can take up what is left of the sidecars.
    guard, data = names.sidecar(change.digest, 0), names.data(change.digest)
    takes = (entry for entry in change.takes if entry.name != guard)
    out = False
    for entry in sorted(takes, key=lambda entry: entry.name != data):
        try:
            _take(work, entry, change)
        except ChangedError:
            # Once the data is out, a start of the server may delete old sidecars before we do.
            if not out or scan.look(entry.name, work.blobs) or scan.look(entry.name, work.out):
                raise
        out = out or entry.name == data


def _take(work: _Work, entry: Entry, change: Change) -> None:
    try:
        fs.move(entry.name, work.blobs, entry.name, work.out, private=True)
    except FileNotFoundError:
        raise changed(entry.name) from None
    _check_same(scan.look(entry.name, work.out), entry, change)


def _check_same(found: Entry | None, expected: Entry, change: Change) -> None:
    """Raise ChangedError where a file is not, or can't be known to be, the one planned on."""
    if _same(found, expected, loose=change.loose):
        return
    if change.unsure and _same(found, expected, loose=True):
        raise _loose("a file gets another inode here when it is read again")
    raise changed(expected.name)


def _check_meant(blobs: int, change: Change) -> None:
    """The same of the folder that the files are in."""
    if _is_meant(blobs, change.blobs, loose=change.loose):
        return
    if change.unsure and _is_meant(blobs, change.blobs, loose=True):
        raise _loose("a folder gets another inode here when it is read again")
    raise changed("blobs")


def _same(found: Entry | None, expected: Entry, *, loose: bool) -> bool:
    """Whether an entry is still the one planned on. A second name of ours changes only ctime."""
    if found is None or not (loose or found.identity == expected.identity):
        return False
    kept = expected.kind, expected.size, expected.mtime_ns
    return (found.kind, found.size, found.mtime_ns) == kept


def _is_meant(blobs: int, meant: tuple[int, int], *, loose: bool) -> bool:
    """Whether ``blobs`` is the folder that was looked at: a device and an inode."""
    status = os.fstat(blobs)
    return status.st_dev == meant[0] and (loose or status.st_ino == meant[1])


def changed(name: str) -> ChangedError:
    why = f"{names.printable(name)} has changed since it was looked at"
    return ChangedError(why, "look again, then try again")


def check_same(name: str, folder: int, expected: Entry, *, loose: bool) -> None:
    """Raise ChangedError where a file is not the one planned on any more."""
    if not _same(scan.look(name, folder), expected, loose=loose):
        raise changed(expected.name)


def busy(error: fs.BusyError) -> UndoneError:
    """The answer where a process fetches what is to be changed."""
    return UndoneError(RefusalKind.HELD, error.message, "wait until it ends, or stop it")


def _held(holder: Holder) -> UndoneError:
    who, what = f"{holder.process} ({holder.pid})", names.printable(holder.entry)
    why = f"{who} has opened {what} meanwhile{holder.doubt}"
    return UndoneError(RefusalKind.HELD, why, "try again when it has ended")


def _loose(why: str) -> UndoneError:
    only = "only while no process of Ollama's runs and every process can be seen"
    why = f"{why}: on this file system files are changed {only}"
    helps = "stop the server" + (", and run it as root" if advice.caller().uid else "")
    return UndoneError(RefusalKind.SERVER_RUNS, why, helps)


@contextlib.contextmanager
def _store(host: Host, store: int) -> Iterator[_Store]:
    with (
        state_folder.opened(store) as folder,
        state_folder.opened_in(intents.INTENTS, folder) as all_of_them,
        folders.opened_blobs(store) as blobs,
    ):
        yield _Store(folder, all_of_them, blobs, intents.folder_of(blobs, place.boot(host)))


@contextlib.contextmanager
def _opened(base: _Store, name: str, intent: Intent | None) -> Iterator[_Work]:
    with fs.opened_folder(name, base.intents) as here:
        # On the disk with the intent beside them; before that there is nothing to finish or undo.
        fs.ensure_folder(intents.NEW, here, durable=False)
        fs.ensure_folder(intents.OUT, here, durable=False)
        with fs.opened_folder(intents.NEW, here) as new, fs.opened_folder(intents.OUT, here) as out:
            yield _Work(base, base.blobs, name, here, new, out, intent)


def _begun(base: _Store, name: str, change: Change) -> tuple[str, Intent]:
    if len(change.expects) > intents.MOST_FILES:
        why = f"{len(change.expects)} files are too many for one act"
        raise ChangedError(why, "stop the server, and remove them by hand")
    fs.ensure_folder(name, base.intents)
    with _opened(base, name, None) as work:
        try:
            # What is written gets the owner of the download's files, where we may give it.
            owner = change.expects[0].uid, change.expects[0].gid
            if change.digest:
                fs.create(intents.GUARD, work.here, b"", owner)
            fs.create_all(change.writes, work.new, owner)
            fs.sync(work.new)
            guard = scan.look(intents.GUARD, work.here)
            taken = {entry.name for entry in change.takes}
            expects = {entry.name: entry for entry in change.expects}
            displaced, guarded = "", names.sidecar(change.digest, 0)
            if guarded in expects:
                with contextlib.suppress(OSError):
                    displaced = intents.hash_of(guarded, work.blobs)
            intent = Intent(
                change.kind,
                change.digest,
                base.folder,
                None if guard is None else guard.inode,
                {name: intents.File.of(each, name in taken) for name, each in expects.items()},
                change.writes,
                displaced,
                change.loose,
            )
            fs.create(intents.NOTE, work.here, intents.encode(intent))
            fs.sync(work.here)
        except BaseException:
            _forget(work)
            raise
    return name, intent


def _free_numbers(base: _Store) -> Iterator[int]:
    """Numbers that no intent has, nor anything in quarantine, whose names begin with one."""
    taken = {int(name) for name in intents.numbers(base.intents)}
    with contextlib.suppress(OSError), fs.opened_folder(QUARANTINE, base.ours) as quarantine:
        for label in os.listdir(quarantine):
            begin, dash, _ = label.partition("-")
            if dash and intents.is_number(begin):
                taken.add(int(begin))
    number = max(taken, default=0) + 1
    number = number if intents.is_number(f"{number + intents.MOST_FILES:08}") else 1
    yield from (each for each in itertools.count(number) if each not in taken)


def _undo(work: _Work) -> None:
    intent = work.intent
    assert intent is not None
    with contextlib.suppress(FileNotFoundError):
        fs.remove(intents.DECIDED, work.here)
    for name in _data_first(os.listdir(work.out)):
        displaced = intent.guard is not None and name == intent.guard_name
        if not displaced and not _drop_orphaned(work, intent, name):
            _put_back(work, name)
    if intent.guard is not None:
        _take_guard_off(work, intent)
    fs.sync(work.blobs)
    _forget(work)


def _data_first(listed: Iterable[str]) -> list[str]:
    return sorted(listed, key=lambda name: (names.parse_blob(name).role is not Role.DATA, name))


def _take_guard_off(work: _Work, intent: Intent) -> None:
    name = intent.guard_name
    if scan.look(name, work.out) is not None:
        _drop_orphaned(work, intent, name)
    in_place = scan.look(name, work.blobs)
    if scan.look(name, work.out) is None:
        if intent.is_guard(in_place):
            _remove_guard(work, name)
    elif intent.is_guard(in_place):
        fs.replace(name, work.out, name, work.blobs)
    elif intent.is_file(in_place, name):
        fs.remove(name, work.out)  # it was never displaced
    else:
        _put_back(work, name)


def _drop_orphaned(work: _Work, intent: Intent, name: str) -> bool:
    """Let a sidecar go whose data a server took away just before the guard came."""
    if intent.data is None or names.parse_blob(name).role is not Role.SIDECAR:
        return False
    in_place = scan.look(intent.data.name, work.blobs)
    if in_place is None:
        fs.remove(name, work.out)
    elif not intent.is_file(in_place, in_place.name):
        _to_quarantine(work, [name])
    else:
        return False
    return True


def _remove_guard(work: _Work, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        fs.remove(intents.GUARD, work.here)
    fs.move(name, work.blobs, intents.GUARD, work.here)


def _put_back(work: _Work, name: str) -> None:
    try:
        fs.move(name, work.out, name, work.blobs)
    except FileExistsError:
        in_place, original = scan.look(name, work.blobs), scan.look(name, work.out)
        if in_place and original and in_place.identity == original.identity:
            fs.remove(name, work.out)  # where a rename is a link first, both names may be left
        else:
            # A new file has the name now. Neither is lost: the old one goes to quarantine.
            _to_quarantine(work, [name])


def _to_quarantine(work: _Work, taken: Iterable[str]) -> None:
    with state_folder.made_in(QUARANTINE, work.store.ours) as quarantine:
        for name in taken:
            try:
                fs.move(name, work.out, f"{work.name}-{name}", quarantine)
            except FileExistsError:
                other = next(_free_numbers(work.store))
                fs.move(name, work.out, f"{other:08}-{name}", quarantine)
        fs.sync(quarantine)


def _decide(work: _Work, _: Change) -> None:
    fs.sync(work.out)
    fs.create(intents.DECIDED, work.here, b"")
    fs.sync(work.here)


def _finish(work: _Work, *, has_lock: bool = True) -> int:
    """Put the new files in place, let go what was taken; the bytes that it freed."""
    intent = work.intent
    assert intent is not None
    guard = intent.guard_name if intent.guard is not None else ""
    if intent.kind is ActionKind.GIVE_BACK:
        _give(work, intent)
    if intent.kind is ActionKind.TAKE_OVER:
        _keep(work, intent)
    else:
        _put_new(work, guard)
    if guard and intent.is_guard(scan.look(guard, work.blobs)):
        _remove_guard(work, guard)
    fs.sync(work.blobs)
    freed = 0
    if intent.kind is ActionKind.QUARANTINE_BLOB:
        _to_quarantine(work, os.listdir(work.out))
    for name in _data_first(os.listdir(work.out)):
        found = scan.look(name, work.out)
        freed += found.freed if found is not None else 0
        fs.remove(name, work.out)
    if intent.kind is ActionKind.GIVE_BACK and has_lock:
        transfers.drop(work.store.ours, intent.digest, only_empty=True)
    _forget(work)
    return freed


def _lock_given(work: _Work, intent: Intent, held: contextlib.ExitStack) -> bool:
    """Take the lock of the transfer that is given back, if nobody else has it."""
    if intent.kind is ActionKind.GIVE_BACK:
        with contextlib.suppress(OSError, fs.BusyError):
            held.enter_context(transfers.held(work.store.ours, intent.digest))
            return True
    return False


def _give(work: _Work, intent: Intent) -> None:
    """Give the data of a transfer of ours the name of a server's, on the disk before its claims."""
    name = names.data(intent.digest)
    with (
        contextlib.suppress(FileNotFoundError),
        transfers.opened(work.store.ours, intent.digest) as folder,
    ):
        if intent.is_file(scan.look(transfers.DATA, folder), name):
            fs.move(transfers.DATA, folder, name, work.blobs)
            fs.sync(work.blobs)


def _keep(work: _Work, intent: Intent) -> None:
    """Make the data that was taken that of a transfer of ours, on the disk before its ledger."""
    name = names.data(intent.digest)
    transfers.make(work.store.ours, intent.digest)
    with (
        contextlib.suppress(FileNotFoundError),
        transfers.opened(work.store.ours, intent.digest) as folder,
    ):
        if scan.look(name, work.out) is not None:
            fs.replace(name, work.out, transfers.DATA, folder)
            fs.sync(folder)
        if intent.is_file(scan.look(transfers.DATA, folder), name):
            # What had arrived beside a ledger that nobody believes was in another file.
            with contextlib.suppress(FileNotFoundError):
                fs.remove(transfers.ARRIVED, folder)
            fs.replace(transfers.LEDGER, work.new, transfers.LEDGER, folder)
            fs.sync(folder)


def _put_new(work: _Work, guard: str) -> None:
    """Rename the new sidecars over the old ones, part 0's last: until then no pull gets through."""
    for name in sorted(os.listdir(work.new), key=lambda name: (name == guard, name)):
        if name == guard:
            fs.sync(work.blobs)
        fs.replace(name, work.new, name, work.blobs)


def _forget(work: _Work) -> None:
    """Remove an intent with nothing left in ``out/``; the note of what was done goes last."""
    for name in os.listdir(work.new):
        fs.remove(name, work.new)
    fs.remove_folder(intents.NEW, work.here)
    fs.remove_folder(intents.OUT, work.here)
    last = [intents.NOTE, intents.DECIDED]
    for name in (*(each for each in os.listdir(work.here) if each not in last), *last):
        with contextlib.suppress(FileNotFoundError):
            fs.remove(name, work.here)
    fs.remove_folder(work.name, work.store.intents)
    fs.sync(work.store.intents)


def put_in_place(host: Host, store: int, folder: int, change: Change, confirm: Confirm) -> None:
    """Give the data of a transfer, in its `folder`, the name of a damaged or a missing blob.

    At any moment the name is that of one of the two. The damaged one goes to quarantine, or, if the
    change takes it, stays for the caller to remove. What is raised leaves all in its place.
    """
    name = names.blob(change.digest)
    with state_folder.made(store, intents.INTENTS), _store(host, store) as base:
        _check_meant(base.blobs, change)
        for error in confirm(change.expects).values():
            raise error
        if not change.expects:
            with _changed_if(FileExistsError, name):
                fs.move(transfers.DATA, folder, name, base.blobs)
            fs.sync(base.blobs)
            return
        (entry,) = change.expects
        _check_same(scan.look(name, base.blobs), entry, change)
        _check_free(host, entry)
        if change.takes:
            _exchange(host, base.blobs, folder, change)
            return
        # After a kill in between the next run puts the damaged one aside.
        noted = _begun(
            base, f"{next(_free_numbers(base)):08}", replace(change, digest="", takes=(entry,))
        )
        with _opened(base, *noted) as work:
            try:
                _exchange(host, base.blobs, folder, change)
            except ChangedError:
                _forget(work)
                raise
            _set_aside(work, folder)


def _exchange(host: Host, blobs: int, folder: int, change: Change) -> None:
    name, (entry,) = names.blob(change.digest), change.expects
    with _changed_if(FileNotFoundError, name):
        fs.exchange(transfers.DATA, folder, name, blobs)
    try:
        _check_same(scan.look(transfers.DATA, folder), entry, change)
        _check_free(host, entry)
    except ChangedError:
        fs.exchange(transfers.DATA, folder, name, blobs)
        raise
    fs.sync(blobs)


def _set_aside(work: _Work, folder: int) -> bool:
    """Put the damaged blob of an exchange aside, if that has come about; whether it ever has.

    `folder`: of the transfer that it was exchanged with. Where names can't be exchanged at once, a
    kill can leave it under a name of its own, and its place empty: there it gets its place again.
    """
    assert work.intent is not None
    (name,) = work.intent.files
    for left in (transfers.DATA, fs.between(transfers.DATA)):
        if work.intent.is_file(scan.look(left, folder), name):
            if scan.look(name, work.blobs) is None:
                fs.move(left, folder, name, work.blobs)
            else:
                fs.move(left, folder, name, work.out, private=True)
    _to_quarantine(work, os.listdir(work.out))
    there = scan.look(name, work.blobs)
    is_done = there is not None and not work.intent.is_file(there, name)
    _forget(work)
    return is_done


def _check_free(host: Host, entry: Entry) -> None:
    for holder in processes.holders_of(host, [entry]):
        raise _held(holder)


@contextlib.contextmanager
def _changed_if(error: type[OSError], name: str) -> Iterator[None]:
    try:
        yield
    except error:
        raise changed(name) from None


def leave_quarantine(
    store: int, entry: Entry, back_into: tuple[int, int] | None, *, loose: bool
) -> None:
    """Move a kept file `back_into` its ``blobs``, or remove it (None). ChangedError, OSError."""
    with state_folder.opened(store, QUARANTINE) as quarantine:
        check_same(entry.name, quarantine, entry, loose=loose)
        if back_into is None:
            fs.remove(entry.name, quarantine)
            return
        with folders.opened_blobs(store) as blobs:
            if not _is_meant(blobs, back_into, loose=loose):
                raise changed("blobs")
            fs.move(entry.name, quarantine, entry.name.partition("-")[2], blobs)
            fs.sync(blobs)


def unfinished(host: Host, store: int) -> bool:
    """Whether an intent is there that is to be believed: a kill's, or that of another process."""
    with contextlib.suppress(OSError), _store(host, store) as base:
        return any(True for _ in _believed(base))
    return False


def _believed(base: _Store) -> Iterator[tuple[str, Intent | None]]:
    for name in intents.numbers(base.intents):
        with contextlib.suppress(ForeignError, FileNotFoundError):
            yield name, intents.read(name, base.intents, base.folder)


def recover(host: Host, store: int, memory: Memory) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Put back, or finish, what a kill has left; in words what was done, and what could not be."""
    done: list[str] = []
    stuck: list[str] = []
    try:
        with _store(host, store) as base:
            for name, intent in _believed(base):
                try:
                    with _opened(base, name, intent) as work:
                        done.extend(_recover(host, work, memory))
                except ForeignError:
                    continue  # `observe` reports it
                except (OSError, ChangedError) as error:
                    where = f"{state_folder.FOLDER}/{intents.INTENTS}/{name}"
                    stuck.append(f"the interrupted change in {where} can't be finished: {error}")
    except FileNotFoundError:
        pass
    except folders.ForeignLinkError as error:
        stuck.append(f"interrupted changes are left as they are: {error.strerror}")
    return tuple(done), tuple(stuck)


def _recover(host: Host, work: _Work, memory: Memory) -> Iterator[str]:
    """Put it back, if that can be done; the store's rules then decide whether it is done anew."""
    intent = work.intent
    if intent is None:
        _forget(work)
        return
    first, *others = sorted(intent.files) or [""]
    subject = names.short(intent.digest) if intent.digest else names.printable(first[:19])
    more = f" and {len(others):,} more" if others and not intent.digest else ""
    what = actions.row(intent.kind).does.format(f"{subject}{more}")
    if intent.kind is ActionKind.FETCH_CHUNKS:
        yield _exchanged(work, names.parse_blob(first).digest, what)
        return
    if scan.look(intents.DECIDED, work.here) is not None and _goes_on(work, intent, memory):
        looked = [scan.look(name, work.out) for name in os.listdir(work.out)]
        if intent.kind in WRITING and os.listdir(work.new):
            looked.append(scan.look(names.data(intent.digest), work.blobs))
        held = processes.holders_of(host, [entry for entry in looked if entry is not None])
        if intent.kind in WRITING:
            held = tuple(filter(safety.minds_sidecars, held))
        if held:
            raise _held(held[0])
        with contextlib.ExitStack() as locked:
            freed = _finish(work, has_lock=_lock_given(work, intent, locked))
        yield f"finished an interrupted change: {what}, {decimal(freed)} freed"
        return
    replaced = len(os.listdir(work.new)) < len(intent.writes)
    for name in os.listdir(work.new):
        fs.remove(name, work.new)
    data = names.data(intent.digest)
    if replaced and intent.kind in WRITING and intent.is_file(scan.look(data, work.blobs), data):
        # Somebody has taken our guard off: old sidecars beside new ones would be false.
        _finish(work, has_lock=False)
        yield f"dropped an interrupted change: {what}; the download has changed since"
        return
    _undo(work)
    yield f"undid an interrupted change: {what}; every file is back in its place"


def _exchanged(work: _Work, digest: str, what: str) -> str:
    """Finish the exchange of a damaged blob, if it has come about; in words, which of both."""
    transfers.make(work.store.ours, digest)
    try:
        with transfers.held(work.store.ours, digest) as folder:
            is_done = _set_aside(work, folder)
            transfers.drop(work.store.ours, digest, only_empty=True)
    except fs.BusyError as error:
        raise busy(error) from None
    if is_done:
        return f"finished an interrupted change: {what}; the damaged file is in quarantine"
    return f"undid an interrupted change: {what}; every file is back in its place"


def _goes_on(work: _Work, intent: Intent, memory: Memory) -> bool:
    """Whether it is finished: new sidecars that we foresaw, or what can't be put back any more."""
    data = names.data(intent.digest)
    is_given = intent.kind is ActionKind.GIVE_BACK
    if is_given and not intent.is_file(scan.look(data, work.blobs), data):
        return False  # it has its old name still
    if intent.kind is ActionKind.TAKE_OVER:  # until its data is ours, it can be put back
        is_there = intent.is_file(scan.look(data, work.blobs), data)
        return not is_there and scan.look(data, work.out) is None
    # A removal can be put back while its data is there, or all that it took.
    if intent.kind not in WRITING:
        if intent.guard is None or scan.look(data, work.blobs) or scan.look(data, work.out):
            return False
        taken = {name for name, each in intent.files.items() if each.taken}
        return not taken <= set(os.listdir(work.out))
    left = os.listdir(work.new)
    if left:
        # Without the guard anything may have happened: a pull may have gone on with other data.
        if not intent.is_guard(scan.look(intent.guard_name, work.blobs)):
            return False
        known = intent.data
        there = scan.look(known.name, work.blobs) if known else None
        same = known and there and there.size == known.size and intent.is_file(there, known.name)
        if known and not same:
            return False
    if not _is_foreseen(work, intent, memory) and len(left) < len(intent.writes):
        raise ForeignError("state.json has no such repair")
    return _is_foreseen(work, intent, memory)


def _is_foreseen(work: _Work, intent: Intent, memory: Memory) -> bool:
    """Whether the memory has the parts that are written: it had them before the act began."""
    own = intent.kind is ActionKind.GIVE_BACK and memory.downloads.get(f"{intent.digest}{OURS}")
    record = own or memory.downloads.get(intent.digest)
    if record is None:
        # Where all are in place and the data has gone, as a finished blob has, none are needed.
        there = scan.look(names.data(intent.digest), work.blobs)
        return there is None and not os.listdir(work.new)
    remembered = sorted((part.offset, part.size) for part in record.partition)
    return remembered == [(part.offset, part.size) for part in intent.parts]

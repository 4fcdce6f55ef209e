"""A plan that was agreed to, carried out: each act announced, done, and its outcome logged."""

import contextlib
import errno
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import NamedTuple, Protocol

from rich.filesize import decimal

from watcher.act import transaction
from watcher.act.journal import Journal, hold_reserve, release_reserve
from watcher.act.transaction import Answer, Change, Changed
from watcher.decide import cleaning, events, safety
from watcher.errors import ChangedError, EndedError, with_step
from watcher.model import (
    Action,
    ActionKind,
    BlobFault,
    Entry,
    Evidence,
    Outcome,
    Plan,
    Refusal,
    RefusalKind,
    Result,
)
from watcher.observe import scan
from watcher.observe.blobs import remembered
from watcher.observe.host import Host
from watcher.observe.intents import IN_PARTS, WRITING
from watcher.ollama import names, ranges, sidecars
from watcher.state import folders, fs, state_folder, transfers
from watcher.state.hashes import Hashed
from watcher.state.memory import Memory, Touched
from watcher.system import advice

_MOST_NAMED = 100
ROOM_BY_HAND = "or make room by hand, while no server runs:"


class Looks(Protocol):
    """Looks at the store while it is changed."""

    def fresh(self, *, anew: bool) -> tuple[Evidence, Plan]:
        """A plan as the store is now; `anew`: made just now."""

    def glance(self, digests: frozenset[str] | None) -> Evidence:
        """Only look: at the downloads of some digests, or, for None, at the whole store."""


#: What goes together (``docs/safety.md``): on a full disk the first intents fit into the reserve,
#: and each batch makes room for the next; a stop waits until downloads are put back.
FIRST_BATCH, BATCH = 100, 10_000
FIRST_DOWNLOADS, DOWNLOADS = 10, 100

_REMOVALS = frozenset({ActionKind.REMOVE_ORPHAN, ActionKind.REMOVE_TEMPORARY})
_FILES = _REMOVALS | {ActionKind.REFRESH, ActionKind.QUARANTINE_BLOB}
#: On transfers of ours, each under its own lock.
_OURS = frozenset(
    {
        ActionKind.REMOVE_TRANSFER,
        ActionKind.GIVE_BACK,
        ActionKind.TAKE_OVER,
        ActionKind.FETCH_CHUNKS,
    }
)


def apply(host: Host, agreed: Plan, looks: Looks, journal: Journal) -> tuple[Outcome, ...]:
    """Do, under the lock, what was approved and a new plan still has on the very same files."""
    outcomes: list[Outcome] = []
    for batch in _batches(agreed.actions):
        if host.stops():
            break  # what was not begun has no outcome
        if batch[0].kind is ActionKind.REFRESH:
            outcomes.extend(refresh_all(host, batch, journal))
            continue
        try:
            seen, planned = looks.fresh(anew=batch[0].kind not in IN_PARTS)
        except EndedError:
            break
        essence = partial(_essence, loose=safety.is_loose(seen.place))
        fresh = {essence(action): action for action in planned.actions}
        # The fresh one is done: it knows whether the guard has to wait for a server.
        still = [
            found._replace(relies_on=action.relies_on, fetches=action.fetches)
            for action in batch
            if (found := fresh.get(essence(action))) is not None
        ]
        gone = [action for action in batch if essence(action) not in fresh]
        undone = list(_no_longer(gone, planned))
        journal(*(events.begun(action, host.clock()) for action in still))
        ended = _Batch(host, journal, seen, looks).do(still)
        # What somebody else has done meanwhile was not begun here, and is logged by who did it.
        changed = RefusalKind.CHANGED
        logged = [each for each in undone if each.refusal and each.refusal.kind is not changed]
        journal(*(events.ended(outcome, host.clock()) for outcome in (*logged, *ended)))
        outcomes.extend((*undone, *ended))
    return tuple(outcomes)


def _batches(actions: Sequence[Action]) -> Iterator[list[Action]]:
    for key, alike in groupby(actions, key=lambda action: (action.kind, _is_transfer(action))):
        kind, is_transfer = key
        size = most = 1
        if kind in _FILES:
            size, most = FIRST_BATCH, BATCH
        elif kind in IN_PARTS and not is_transfer:
            size, most = FIRST_DOWNLOADS, DOWNLOADS
        rest = list(alike)
        while rest:
            yield rest[:size]
            rest = rest[size:]
            size = min(size * 10, most)


def _is_transfer(action: Action) -> bool:
    return any(each.name == names.transfer(action.subject) for each in action.expects[:1])


def _essence(action: Action, *, loose: bool) -> tuple[object, ...]:
    """What two plans must agree in; the reasons' words hold times, which go on."""
    files = tuple(
        (each.name, () if loose else each.identity, each.size, each.mtime_ns)
        for each in action.expects
    )
    # What was to be kept is not dropped unsaid, since its room is taken by now.
    dropped = tuple(each.name for each in action.surplus)
    return action.kind, action.subject, files, action.parts, dropped


class _Batch(NamedTuple):
    host: Host
    journal: Journal
    seen: Evidence
    looks: Looks

    @property
    def store(self) -> int:
        return self.journal.store

    def do(self, batch: list[Action]) -> list[Outcome]:
        if not batch:
            return []
        kind = batch[0].kind
        if kind in (ActionKind.RESTORE, ActionKind.PURGE):
            return [self._leave_quarantine(action) for action in batch]
        if kind in _OURS:
            return [self._of_transfer(action) for action in batch]
        together = [batch] if kind in _FILES else [[action] for action in batch]
        changes = [_change(actions, self.seen) for actions in together]
        try:
            answers = self._commit_all(changes)
        except EndedError:
            answers = [transaction.stopped()] * len(changes)
        except OSError as error:
            answers = [error] * len(changes)
        ended = [
            _outcome(each, answer, actions, self.store)
            for actions, answer in zip(together, answers, strict=True)
            for each in actions
        ]
        if _full(answers) and (helps := by_hand(batch, self.seen.place.path)):
            message = f"{ended[0].message}, {ROOM_BY_HAND}"
            ended[0] = ended[0]._replace(message=message, command=helps)
        return ended

    def _leave_quarantine(self, action: Action) -> Outcome:
        back_into = self.seen.place.blobs if action.kind is ActionKind.RESTORE else None
        try:
            loose = safety.is_loose(self.seen.place)
            transaction.leave_quarantine(self.store, action.expects[0], back_into, loose=loose)
        except (ChangedError, OSError) as error:
            return _not_done(action, error)
        return Outcome(action, Result.DONE, _done_message(action), action.frees)

    def _of_transfer(self, action: Action) -> Outcome:
        """Remove, give back or begin a transfer of ours, while nobody else can go on with it."""
        digest = action.subject
        try:
            with contextlib.ExitStack() as held:
                ours = held.enter_context(state_folder.opened(self.store))
                if action.kind is ActionKind.TAKE_OVER:
                    transfers.make(ours, digest)
                folder = held.enter_context(transfers.held(ours, digest))
                answer = self._of_held(ours, folder, action)
                if not isinstance(answer, Changed):
                    return _not_done(action, answer)
        except fs.BusyError as error:
            return _not_done(action, transaction.busy(error))
        except EndedError:
            return _not_done(action, transaction.stopped())
        except (ChangedError, OSError) as error:
            return _not_done(action, error)
        return Outcome(action, Result.DONE, _done_message(action), action.frees)

    def _of_held(self, ours: int, folder: int, action: Action) -> Answer:
        if action.kind is ActionKind.TAKE_OVER:
            return self._commit_all([self._taken(folder, action)])[0]
        if action.kind is ActionKind.FETCH_CHUNKS:
            self._put_in_place(folder, action)
            transfers.drop(ours, action.subject)
            return Changed(0, {})
        data, loose = os.path.basename(action.expects[0].name), safety.is_loose(self.seen.place)
        transaction.check_same(data, folder, action.expects[0], loose=loose)
        if action.kind is ActionKind.GIVE_BACK:
            return self._commit_all([_change([self._given(folder, action)], self.seen)])[0]
        transfers.drop(ours, action.subject)
        return Changed(action.frees, {})

    def _taken(self, folder: int, action: Action) -> Change:
        """What makes a server's data that of a transfer, with what is trusted in its ledger."""
        digest, name = action.subject, names.data(action.subject)
        its = [each for each in self.seen.downloads if each.data and each.data.name == name]
        trusted, total = its[0].trust.trusted, its[0].total
        if transfers.has_more(folder, digest, self.seen.boot, trusted):
            raise transaction.changed(transfers.DATA)
        told = transfers.encoded(digest, transfers.Kept(total, trusted, trusted))
        return replace(_change([action], self.seen), writes={transfers.LEDGER: told})

    def _put_in_place(self, folder: int, action: Action) -> None:
        """Have what was fetched, and was right, take the name of its blob."""
        meant = action.relies_on
        if meant is None:
            raise transaction.changed(transfers.DATA)
        transaction.check_same(transfers.DATA, folder, meant, loose=False)
        with folders.opened_blobs(self.store) as blobs:
            fd = fs.open_data(transfers.DATA, folder)
            with fs.closing(fd):
                _make_blob(fd, folder, blobs)
            # What a kill leaves there once it is done is the damaged one: to be doubted.
            everything = ((0, meant.size),)
            told = transfers.encoded(
                action.subject, transfers.Kept(meant.size, everything, everything)
            )
            fs.save(transfers.LEDGER, folder, told)
            change = _change([action], self.seen)
            change = replace(change, digest=action.subject, takes=action.surplus)
            confirm = partial(self._must_stay, action.kind)
            transaction.put_in_place(self.host, self.store, folder, change, confirm)
            found = scan.look(names.blob(action.subject), blobs)
        if found is not None and found.inode == meant.inode:
            known, boot = self.journal.recall(), self.seen.boot
            right = Hashed(found.inode, found.size, found.ctime_ns, action.subject.lower(), boot)
            hashes = known.hashes.plus({found.name: right})
            unproven = known.unproven - {action.subject}
            self.journal.save(replace(known, hashes=hashes, unproven=unproven))

    def _given(self, folder: int, action: Action) -> Action:
        """The action on data that is as a server's own, and on the disk."""
        fd = fs.open_data(transfers.DATA, folder)
        with fs.closing(fd), folders.opened_blobs(self.store) as blobs:
            size, boot = os.fstat(fd).st_size, self.seen.boot
            arrived = transfers.arrived(folder, action.subject, boot, size)
            if ranges.difference(sidecars.claims(action.parts), arrived):
                raise transaction.changed(transfers.DATA)
            # Where there are no holes, a repair would take what lies behind lost bytes for the end.
            for lost in ranges.complement(arrived, size):
                fs.blank(fd, *lost)
            fs.cut(fd, max(part.end for part in action.parts))
            _make_blob(fd, folder, blobs)
            name = names.data(action.subject)
            return action._replace(expects=(scan.entry(name, os.fstat(fd)),))

    def _commit_all(self, changes: list[Change]) -> list[Answer]:
        """Do changes; again those for which the disk was full, while each try frees more room."""
        confirm = partial(self._must_stay, changes[0].kind)
        commit = partial(transaction.commit_all, self.host, self.store, confirm=confirm)
        answers = commit(changes)
        full = _full(answers)
        if full and release_reserve(self.store):
            while full:
                again = commit([changes[at] for at in full])
                for at, answer in zip(full, again, strict=True):
                    answers[at] = answer
                still = _full(answers)
                full = still if len(still) < len(full) else []
        hold_reserve(self.store)
        return answers

    def _must_stay(self, kind: ActionKind, moved: Collection[Entry]) -> dict[str, ChangedError]:
        if not moved and kind not in WRITING:
            return {}
        # Servers and place forbid a download's change, whatever its data: that is not read again.
        seen = self.looks.glance(None if kind in _REMOVALS else frozenset())
        if kind is ActionKind.REMOVE_ORPHAN:
            why = cleaning.orphans_forbidden(seen)
        elif kind is ActionKind.REMOVE_TEMPORARY:
            why = safety.idle_forbids(seen)
        else:
            why = safety.store_forbids(seen)
        if why is not None:
            error = ChangedError(why.reason, why.remedy, why.command)
            return {entry.name: error for entry in moved} or {"": error}
        if kind is not ActionKind.REMOVE_ORPHAN:
            return {}
        missing = (odd.digest for odd in seen.census.odd if odd.fault is BlobFault.MISSING)
        named = set(map(names.blob, missing))
        error = ChangedError("a manifest names it now")
        return {entry.name: error for entry in moved if entry.name in named}


def _make_blob(fd: int, folder: int, blobs: int) -> None:
    """Give the data of a transfer, in its `folder`, what a server's has, on the disk."""
    try:
        fs.make_blob(fd, blobs)
    except OSError:
        transfers.lose(folder)
        fs.drop_cache(fd)
        raise


def _full(answers: Sequence[Answer]) -> list[int]:
    return [
        at
        for at, answer in enumerate(answers)
        if isinstance(answer, OSError)
        and answer.errno in (errno.ENOSPC, errno.EDQUOT)
        and not isinstance(answer, transaction.CutShortError)
    ]


def _outcome(action: Action, answer: Answer, together: Sequence[Action], store: int) -> Outcome:
    if not isinstance(answer, Changed):
        return _not_done(action, answer, store)
    for each in action.expects:
        if each.name in answer.kept:
            return _not_done(action, answer.kept[each.name])
    freed = answer.freed if len(together) == 1 else action.frees
    # Replaced sidecars give back a block each, which is not what anybody asked for.
    mended = action.kind in (*WRITING, ActionKind.QUARANTINE_BLOB)
    return Outcome(action, Result.DONE, _done_message(action), 0 if mended else freed)


def _change(batch: list[Action], seen: Evidence) -> Change:
    first = batch[0]
    entries = tuple(entry for action in batch for entry in action.expects)
    in_parts = first.kind in IN_PARTS and not _is_transfer(first)
    alone, is_loose = safety.alone(seen), safety.is_loose(seen.place)
    return Change(
        kind=first.kind,
        expects=entries,
        takes=first.surplus if first.kind in WRITING else entries,
        writes={
            names.sidecar(first.subject, part.number): sidecars.write(part) for part in first.parts
        },
        digest=first.subject if in_parts else "",
        wait_seconds=first.wait_seconds,
        blobs=seen.place.blobs,
        alone=alone,
        loose=alone and is_loose,
        unsure=is_loose and not alone,
    )


def _done_message(action: Action) -> str:
    who = names.known_as(action.models, action.subject.removeprefix("sha256-"))
    match action.kind:
        case ActionKind.GIVE_BACK:
            return f"Gave the partial download of {who} back to the server"
        case ActionKind.TAKE_OVER:
            return f"Took over {decimal(action.saves)} of the server's download of {who}"
        case ActionKind.REMOVE_DOWNLOAD | ActionKind.REMOVE_SURPLUS | ActionKind.REMOVE_TRANSFER:
            return f"Cleaned up partial download for: {who}"
        case ActionKind.WRITE_SIDECARS:
            saves = f": {decimal(action.saves)} less to download" if action.saves else ""
            return f"Repaired the partial download of {who}{saves}"
        case ActionKind.FETCH_CHUNKS:
            kept = action.expects and not action.surplus
            aside = "; the damaged file is in quarantine" if kept else ""
            return f"The blob of {who} is right, {decimal(action.fetches)} fetched{aside}"
        case ActionKind.QUARANTINE_BLOB:
            return f"{action.subject[:19]} is in quarantine; {action.because.partition(': ')[2]}"
        case ActionKind.RESTORE:
            return f"restored {names.printable(action.subject)}"
        case ActionKind.REFRESH:
            return f"protected {who} from pruning"
        case _:
            return f"removed {names.printable(action.subject)}"


def _no_longer(gone: list[Action], planned: Plan) -> Iterator[Outcome]:
    why: dict[tuple[ActionKind, str], Refusal] = {}
    for refusal in planned.refusals:
        for about in (refusal.subject, *refusal.entries):
            why.setdefault((refusal.action, about), refusal)
    error = ChangedError("the store has changed since the plan was made", "plan again")
    for action in gone:
        known = why.get((action.kind, action.subject))
        outcome = _not_done(action, error)
        yield outcome._replace(message=known.why, refusal=known) if known else outcome


def by_hand(actions: Iterable[Action], store: str) -> str:
    """The removal that frees most, as a command for where no change can be noted; "" for none."""
    kinds = _REMOVALS | {ActionKind.REMOVE_DOWNLOAD}
    able = [each for each in actions if each.kind in kinds and len(each.expects) <= _MOST_NAMED]
    if not able:
        return ""
    best = max(able, key=lambda each: (each.kind in _FILES, each.frees))
    data = names.data(best.subject)
    files = sorted(best.expects, key=lambda each: (each.name != data, each.name))
    return advice.line("rm", *(os.path.join(store, "blobs", each.name) for each in files))


def _not_done(action: Action, error: ChangedError | OSError, where: int | None = None) -> Outcome:
    if isinstance(error, OSError):
        file = f"{names.printable(os.fsdecode(error.filename))}: " if error.filename else ""
        why = with_step(f"{file}{error.strerror}", error.errno, where)
        return Outcome(action, Result.FAILED, why)
    kind = error.kind if isinstance(error, transaction.UndoneError) else RefusalKind.CHANGED
    refusal = Refusal(kind, action.subject, action.kind, error.message, error.next_step)
    refusal = refusal._replace(models=action.models, command=error.command)
    return Outcome(action, Result.REFUSED, error.message, refusal=refusal)


def refresh_all(host: Host, batch: list[Action], journal: Journal) -> list[Outcome]:
    """Set the times of wanted things to now, once their own ones are on the disk elsewhere."""
    try:
        with folders.opened_blobs(journal.store) as blobs:
            touching = _own_times(blobs, batch, host.clock(), journal.recall())
            if journal.remember(touching):
                times = {name: each.set_ns for name, each in touching.items()}
                with journal.same_content(blobs, times):
                    _set_times(journal.store, blobs, touching)
                ended = [Outcome(action, Result.DONE, _done_message(action)) for action in batch]
            else:
                why = "the own times of its files can't be remembered, so they are left alone"
                ended = [Outcome(action, Result.FAILED, why) for action in batch]
    except OSError as error:
        ended = [_not_done(action, error) for action in batch]
    journal(events.refreshed(ended, host.clock()))
    return ended


def set_times_now(host: Host, actions: Iterable[Action], known: Memory) -> dict[str, Touched]:
    """The same at once, for a caller that can't wait for the lock; what is to be remembered."""
    with folders.opened_store(host.store) as store, folders.opened_blobs(store) as blobs:
        touching = _own_times(blobs, actions, host.clock(), known)
        _set_times(store, blobs, touching)
    return touching


def _own_times(
    blobs: int, actions: Iterable[Action], now: float, known: Memory
) -> dict[str, Touched]:
    """The files that would get a later time, by name: times are never set back.

    Another file of that name is left alone; so is all of another ``blobs``. Another process of ours
    may have set times since the plan was made: the memory knows which are the files' own.
    """
    at_ns = int(now * 1e9)
    found: dict[str, Touched] = {}
    for entry in (entry for action in actions for entry in action.expects):
        there = scan.look(entry.name, blobs)
        if there is None or there.identity != entry.identity or there.mtime_ns >= at_ns:
            continue
        before = remembered(there, known).own_mtime_ns
        own = there.mtime_ns if before is None else before
        found[entry.name] = Touched(there.inode, at_ns, own)
    return found


def _set_times(store: int, blobs: int, touching: Mapping[str, Touched]) -> None:
    for name, touched in touching.items():
        there = scan.look(name, blobs)
        if there is not None and there.inode == touched.inode:
            with contextlib.suppress(FileNotFoundError):
                names_of_it = 1 + _has_second_name(store, blobs, name)
                fs.touch(name, blobs, touched.set_ns, names_of_it)


def _has_second_name(store: int, blobs: int, name: str) -> bool:
    digest = names.parse_blob(name).digest
    with (
        contextlib.suppress(OSError),
        state_folder.opened(store) as ours,
        transfers.opened(ours, digest) as folder,
    ):
        return names.is_blob(name) and transfers.is_second_name(folder, digest, blobs)
    return False

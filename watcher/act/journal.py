"""What is written down: the lock for acting, the events, the memory, and the room for them."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from functools import partial

from watcher.config import Settings
from watcher.decide import events, following, remaining, transitions
from watcher.decide.transitions import USUAL, Occasion
from watcher.errors import LockedError, WatchError, with_step
from watcher.model import Diagnosis, Evidence, Outcome, digest_of
from watcher.observe import place, scan
from watcher.observe.blobs import remembered
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.state import event_log, folders, fs, memory, records, state_folder
from watcher.state.event_log import Event, EventType
from watcher.state.hashes import Hashed
from watcher.state.memory import Memory, Touched

ACTING_LOCK = "lock"
RESERVE = "reserve"
_RESERVE_BYTES = 128 * 1024  #: enough for an intent and a usual memory


class Journal:
    """Writes events and the memory; what can't be written is kept as a trouble, not raised."""

    def __init__(self, store: int, settings: Settings, host: Host) -> None:
        self.store, self._settings, self._host = store, settings, host
        self.events: tuple[Event, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self._memory: Memory | None = None
        self._followed = 0  #: so many of the events are in the records of their models

    def __call__(self, *logged: Event) -> None:
        self.events += logged
        for event in logged:
            self._host.report(event)
        with self._trying("the event log"):
            event_log.write(self.store, logged, self._settings)

    def log_hashed(self, answers: Iterable[Outcome]) -> None:
        """Log which blobs were hashed and don't match their names, or can't be read."""
        logged = [events.hashed(outcome, self._host.clock()) for outcome in answers]
        self(*(event for event in logged if event is not None))

    def learn(
        self, past: Memory, seen: Evidence, diagnosis: Diagnosis, occasion: Occasion = USUAL
    ) -> Memory:
        """Log what has happened since `past`, and remember it; the memory as it is now."""
        if past.lost:
            lost = f"{past.lost}; it was renamed to {memory.NAME}.damaged"
            self(Event(self._host.clock(), EventType.ERROR, lost))
        # What a kill, or a full disk, has kept from the log since it was remembered.
        kept = filter(None, map(event_log.parse, self.recall().untold))
        # As lines of ours: what they were kept as may be spelled otherwise, or have no end.
        untold = [replace(each, raw=b"") for each in kept]
        if untold:
            with self._trying("the event log"):
                event_log.write_missing(self.store, untold)
                self._all_logged()
        finished = _finished(self.store, past, seen)
        now, happened = transitions.learn(past, seen, diagnosis, finished, occasion)
        if happened or now != self.recall() or past.lost:
            # Before they are logged: after a kill in between the next scan logs them.
            self.save(replace(now, untold=tuple(event.line for event in happened)))
        self(*happened)
        self._all_logged()
        whole = seen.scope is None and not any(remaining.out_of_sight(seen))
        self._follow(now, transitions.damaged(diagnosis.findings), whole=whole)
        if seen.scope is None:
            # Nothing goes by a clock that may be ahead.
            certain = seen.now if seen.clock is None else seen.clock.at_most
            with self._trying("an old event log"):
                event_log.expire(self.store, certain, self._settings)
        return replace(now, lost="")

    def _follow(self, now: Memory, damaged: Set[str], *, whole: bool) -> None:
        """Keep the records of the models true to the store, and to what was logged since."""
        logged, self._followed = self.events[self._followed :], len(self.events)
        if not (logged or whole):
            return
        seen = list(following.from_events(logged, now, damaged))
        unfinished = tuple((each.models, each.condition) for each in now.downloads.values())
        written = now.models.keys() if whole and now.models is not None else None
        standing = following.Standing(unfinished, written, damaged if whole else frozenset())
        restated = partial(following.restated, standing=standing)
        try:
            if seen or any(restated(records.read(self.store))):
                records.follow(self.store, seen, restated, self._host.clock())
        except WatchError as error:
            self._warn(error.message)

    def _all_logged(self) -> None:
        if self._memory is not None and not self.warnings:
            self._memory = replace(self._memory, untold=())

    def recall(self) -> Memory:
        """What is remembered on the disk: read once, since nobody else writes while we lock."""
        if self._memory is None:
            self._memory = memory.load(self.store)
        return self._memory

    def remember(self, touching: Mapping[str, Touched]) -> bool:
        """Keep the own times of files whose times we set; False where that can't be done."""
        known = self.recall()
        return self.save(replace(known, touched={**known.touched, **touching}))

    @contextlib.contextmanager
    def same_content(self, blobs: int, times: Mapping[str, int]) -> Iterator[None]:
        """Bind the hashes of files anew, of which a block changes names and times alone.

        `times`: when each was modified (ns), as the file says it after the block.
        """
        known = memory.load(self.store)
        known = replace(known, hashes=known.hashes.of_disk(self.store, place.boot(self._host)))
        proved: dict[str, Hashed] = {}
        for name in filter(names.is_blob, times):
            there, hashed = scan.look(name, blobs), known.hashes.get(name)
            if hashed is not None and there is not None and remembered(there, known).sha256:
                proved[name] = hashed
        yield
        kept: dict[str, Hashed] = {}
        for name, hashed in proved.items():
            there = scan.look(name, blobs)
            if there is None or (there.inode, there.size) != (hashed.inode, hashed.size):
                continue
            if there.mtime_ns == times[name]:
                kept[name] = hashed._replace(changed_ns=there.ctime_ns)
        if kept:
            known = self.recall()
            self.save(replace(known, hashes=known.hashes.plus(kept)))

    def save(self, now: Memory) -> bool:
        """Keep the memory on the disk; False where that can't be done."""
        if now.unreadable:
            # What can't be read may be whole all the same: it is not written over.
            self._warn(now.unreadable)
            return False
        self._memory = None
        with self._trying(memory.NAME):
            self._memory = memory.save(self.store, now)
        return self._memory is not None

    @contextlib.contextmanager
    def _trying(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = f"{what} can't be written: {error.strerror}"
            self._warn(with_step(why, error.errno, self.store))

    def _warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings += (message,)


def announce(host: Host, settings: Settings, event: Event) -> None:
    """Tell an event of the service itself, and write it down where that can be done."""
    host.report(event)
    with contextlib.suppress(OSError), folders.opened_store(host.store) as store:
        event_log.write(store, [event], settings)


def _finished(store: int, past: Memory, seen: Evidence) -> dict[str, int]:
    """Of remembered downloads that are not there any more: those that have become a blob."""
    gone = set(past.downloads) - {download.key for download in seen.downloads}
    found: dict[str, int] = {}
    with (
        contextlib.suppress(OSError),  # what can't be seen is not known to have become one
        folders.opened_blobs(store, foreign_too=True) as blobs,
    ):
        for digest in set(map(digest_of, gone)):
            blob = scan.look(names.blob(digest), blobs)
            if blob is not None:
                found[digest] = blob.size
    return found


@contextlib.contextmanager
def locked(store: int, seconds: float) -> Iterator[None]:
    """Hold the store's lock for acting; wait so long for who has it. Raises LockedError."""
    with state_folder.made(store) as folder, contextlib.ExitStack() as held:
        try:
            held.enter_context(fs.locked(ACTING_LOCK, folder, seconds=seconds))
        except fs.BusyError as busy:
            why = f"another ollama-watch acts on this store: {busy.owner}"
            raise LockedError(why, "try again when it has ended") from None
        yield


def hold_reserve(store: int) -> None:
    """Reserve some room, if there is any yet: a full disk is when cleaning is asked for."""
    with contextlib.suppress(OSError), state_folder.made(store) as folder:
        fs.reserve(RESERVE, folder, _RESERVE_BYTES)


def release_reserve(store: int) -> bool:
    """Give back what was reserved, for what has to be kept before an act; False: nothing was."""
    with contextlib.suppress(OSError), state_folder.opened(store) as folder:
        fs.remove(RESERVE, folder)
        return True
    return False

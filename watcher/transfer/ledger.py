"""What has arrived of a layer, kept on the disk by whoever fetches it (`state.transfers`).

Only the hash of the whole says that the bytes are right.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from watcher.model import MIB, Ranges
from watcher.ollama import ranges
from watcher.state import fs, state_folder, transfers
from watcher.state.transfers import ARRIVED, DATA, FOLDER, LEDGER, LOCK, Kept
from watcher.transfer.values import Layer

#: So much is copied between two marks.
COPY = 16 * MIB


class LostError(OSError):
    """The disk has not taken what was written: what was not durable may be lost."""


class Identity(NamedTuple):
    """Which file, with which content, by what the kernel says of it."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def identity(status: os.stat_result) -> Identity:
    """Of the file with that status."""
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@contextlib.contextmanager
def opened(ours: int, layer: Layer, boot: str) -> Iterator[Ledger]:
    """The ledger of a layer, for who fetches it. `ours`: the store's ``.ollama-watch``.

    Raises fs.BusyError where another one does, and OSError.
    """
    with contextlib.ExitStack() as held:
        with _named_from_the_store(""):
            above = held.enter_context(state_folder.made_in(FOLDER, ours))
        with _named_from_the_store(FOLDER):
            # It is on the disk with the first ledger.
            fs.ensure_folder(layer.digest, above, durable=False)
            folder = held.enter_context(state_folder.opened_in(layer.digest, above))
        with _named_from_the_store(FOLDER, layer.digest):
            held.enter_context(fs.locked(LOCK, folder))
            ledger = Ledger(folder, layer, boot)
        ledger.above = above
        held.callback(ledger.close)
        yield ledger


@contextlib.contextmanager
def held(ours: int, layer: Layer) -> Iterator[tuple[int, int]]:
    """A layer's folder and its data, under its lock. Raises as `opened`, or FileNotFoundError."""
    with _named_from_the_store(FOLDER, layer.digest), contextlib.ExitStack() as opened:
        folder = opened.enter_context(transfers.held(ours, layer.digest))
        os.stat(DATA, dir_fd=folder, follow_symlinks=False)  # it is not made here
        yield folder, opened.enter_context(fs.closing(fs.open_data(DATA, folder)))


def peek(ours: int, layer: Layer, boot: str) -> int:
    """How many bytes have arrived with whoever fetches a layer."""
    try:
        with transfers.opened(ours, layer.digest) as folder:
            return ranges.size(transfers.arrived(folder, layer.digest, boot, layer.size))
    except (OSError, ValueError):
        return 0


class Ledger:
    """One layer's bytes and marks. All but `make_durable` is called from one thread."""

    def __init__(self, folder: int, layer: Layer, boot: str) -> None:
        """Raises OSError."""
        self.folder, self.layer = folder, layer
        #: The folder that the folder is in; None once that is on the disk.
        self.above: int | None = None
        self._boot = boot
        #: Why earlier bytes do not count; "" where they do, or there are none.
        self.lost = ""
        self._log = -1
        #: Lines that the log does not have yet, and where they go.
        self._unwritten, self._log_end = b"", 0
        self.durable, self.taken, self.arrived = Ranges(), Ranges(), Ranges()
        #: What mirrors have sent, and what they perhaps send yet.
        self.mirrored, self._expected = Ranges(), Ranges()
        self.data = _opened(DATA, folder)
        try:
            self._load()
            self._begin_log()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close its files."""
        for fd in (self._log, self.data):
            if fd >= 0:
                os.close(fd)

    def _load(self) -> None:
        size = os.fstat(self.data).st_size
        try:
            kept = _kept(self.folder, self.layer, size)
        except ValueError as error:
            self.lost = f"the ledger is damaged ({error}), and was renamed to {LEDGER}.damaged"
            fs.set_aside(LEDGER, self.folder)
            kept = Kept()
        logged = () if self.lost else transfers.logged(self.folder, self._boot, size)
        arrived = ranges.union(kept.durable, logged)
        whole = (arrived, kept.durable, kept.taken, kept.mirrored)
        # A layer may have had another size by an earlier manifest.
        within = (ranges.within(each, 0, self.layer.size) for each in whole)
        self.arrived, self.durable, self.taken, self.mirrored = within
        # Without data it was to be a second name, and never became one.
        self._is_finished = kept.finished and size > 0
        #: As the sums of their chunks say, for whoever looks: nothing rests on it.
        self.proven = ranges.intersection(kept.proven, self.arrived)
        if self.lost:
            self._save()
        if size > self.layer.size:
            fs.cut(self.data, self.layer.size)

    @property
    def identity(self) -> Identity:
        """Of the data, as it is now."""
        return identity(os.fstat(self.data))

    # ------------------------------------------------------------ arrived

    def mark(self, start: int, end: int, *, mirrored: bool = False) -> None:
        """The bytes ``[start, end)`` are in the file: a kill does not lose them from now on.

        A full disk ends nothing: they are written down with the next ones.
        """
        change = ranges.union if mirrored else ranges.difference
        self.mirrored = change(self.mirrored, ((start, end),))  # before `_save` can miss them
        self.arrived = ranges.union(self.arrived, ((start, end),))
        self._unwritten += b"%d %d\n" % (start, end)
        with contextlib.suppress(OSError):
            fs.write_at(self._log, [self._unwritten], self._log_end)
            self._log_end += len(self._unwritten)
            self._unwritten = b""

    def prove(self, start: int, end: int) -> None:
        """The bytes ``[start, end)`` are as their sum says: written down with the next ones."""
        self.proven = ranges.union(self.proven, ((start, end),))

    def _begin_log(self) -> None:
        """Begin the log anew with what is not durable. A kill leaves the old one, or this one."""
        rest = ranges.difference(self.arrived, self.durable)
        lines = b"".join(b"%d %d\n" % each for each in rest)
        self._unwritten, self._log_end = f"{self._boot}\n".encode() + lines, 0
        with contextlib.suppress(OSError):
            fs.save(ARRIVED, self.folder, self._unwritten, durable=False)
            self._unwritten, self._log_end = b"", len(self._unwritten)
        if self._log >= 0:
            os.close(self._log)
        self._log = _opened(ARRIVED, self.folder)
        if self._unwritten:  # no room: what the old one says may be wrong by now
            fs.cut(self._log, 0)

    # ------------------------------------------------------------ durable

    def make_durable(self, snapshot: Ranges) -> None:
        """Bring to the disk what had arrived at a moment, then say so. May be called in a thread.

        Raises LostError where the disk refuses data (call `lose`), and OSError where only the
        ledger can't be written.
        """
        try:
            fs.sync_data(self.data)
        except OSError as error:
            raise LostError(error.errno, error.strerror) from None
        self._save(snapshot)
        if self.above is not None:
            fs.sync(self.above)
            self.above = None
        self.durable = snapshot

    def shorten(self) -> None:
        """Make a long log short: what is durable needs no line."""
        if self._log_end > transfers.LONGEST_LOG // 2:
            self._begin_log()

    def lose(self) -> None:
        """Believe nothing that was not durable, also after a kill."""
        fs.drop_cache(self.data)
        self.arrived = self.durable
        self.proven = ranges.intersection(self.proven, self.arrived)
        self._begin_log()

    def expect_mirror(self) -> None:
        """A mirror is asked for what is missing. After a kill all of it counts as the mirror's."""
        self._expected = ranges.complement(self.arrived, self.layer.size)
        self._save()

    def forget(self, doubted: Ranges) -> None:
        """Fetch these bytes anew."""
        self.arrived = ranges.difference(self.arrived, doubted)
        self.durable = ranges.difference(self.durable, doubted)
        self.taken = ranges.difference(self.taken, doubted)
        self.proven = ranges.difference(self.proven, doubted)
        self.mirrored, self._expected = ranges.difference(self.mirrored, doubted), ()
        self._save()
        self._begin_log()

    def compared(self, right: Ranges, wrong: Ranges) -> None:
        """What a server has left was compared with sums: nothing of it is doubted any more."""
        self.arrived = ranges.union(ranges.difference(self.arrived, wrong), right)
        self.durable = ranges.difference(self.durable, wrong)
        self.proven = ranges.union(ranges.difference(self.proven, wrong), right)
        self.taken = ()
        self._save()
        self._begin_log()

    def believe(self) -> None:
        """All is there, and its hash is right: nothing of it is doubted, nor anybody's but ours."""
        before, self.taken = self.taken, ()
        try:
            self._save()
        except OSError:
            self.taken = before
            raise

    def note_wrong(self) -> None:
        """All is there, came from the registry, and its hash is wrong: it stays as it is."""
        self._save(is_wrong=True)

    def take(self, source: int, wanted: Ranges) -> Iterator[int]:
        """Copy ranges of a server's download. Gives back the bytes copied, piece by piece."""
        wanted = ranges.difference(ranges.within(wanted, 0, self.layer.size), self.arrived)
        self.taken = ranges.union(self.taken, wanted)
        # First: what a kill leaves of it must be known as taken.
        self._save()
        for low, high in wanted:
            for start in range(low, high, COPY):
                end = min(start + COPY, high)
                try:
                    fs.copy(source, self.data, start, end)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    continue  # what the disk can't give back is fetched
                self.mark(start, end)
                yield end - start

    def _save(self, durable: Ranges | None = None, *, is_wrong: bool = False) -> None:
        rest = ranges.difference(self._expected, self.arrived)
        mirrored = ranges.union(rest, self.mirrored)
        durable = self.durable if durable is None else durable
        rest_of_it = (is_wrong, self._is_finished, self.proven)
        told = Kept(self.layer.size, durable, self.taken, mirrored, *rest_of_it)
        with _named_from_the_store(FOLDER, self.layer.digest):
            fs.save(LEDGER, self.folder, transfers.encoded(self.layer.digest, told))


# ---------------------------------------------------------------- reading


def _opened(name: str, folder: int) -> int:
    """A file; one that is not ours, or has a second name, is left under another name."""
    try:
        return fs.open_data(name, folder)
    except OSError:
        fs.set_aside(name, folder)
        return fs.open_data(name, folder)


@contextlib.contextmanager
def _named_from_the_store(*folders: str) -> Iterator[None]:
    """Errors name what they are about by its path from the store's folder."""
    try:
        yield
    except OSError as error:
        path = os.path.join(state_folder.FOLDER, *folders, str(error.filename or ""))
        raise OSError(error.errno, error.strerror, path) from None


def _kept(folder: int, layer: Layer, size: int) -> Kept:
    """What the ledger of a layer says. Raises ValueError for a damaged one."""
    try:
        kept = transfers.kept(folder, layer.digest, size)
    except OSError as error:
        raise ValueError(error.strerror) from None
    if kept.total not in (None, layer.size):
        raise ValueError("it is about another layer")
    return kept

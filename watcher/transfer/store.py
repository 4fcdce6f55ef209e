"""A store as transfers use it: where a layer is kept while it arrives, and how it gets its name.

Names come last: a layer once its hash is right, the manifest once all of its layers have theirs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from watcher.observe import parts
from watcher.observe.blobs import QUARANTINE
from watcher.ollama import names, ranges
from watcher.ollama.manifests import READ_LIMIT
from watcher.ollama.names import ModelName
from watcher.state import folders, fs, state_folder, sums, transfers
from watcher.state.sums import Chunks
from watcher.transfer import ledger
from watcher.transfer.ledger import Identity, Ledger
from watcher.transfer.values import Cause, Layer, Partial, TransferError

#: A server that removes empty folders may be quicker, so often.
_TRIES = 3


class Verified(NamedTuple):
    """A layer that is all there, with its right hash; which file that is."""

    layer: Layer
    identity: Identity


class Published(NamedTuple):
    """What came of giving names."""

    #: Layers that have their names; which file of ours that is.
    named: list[Verified]
    #: Layers whose file has changed since it was hashed.
    changed: list[Verified]


class Store:
    """The folders of one store."""

    def __init__(self, path: str, store: int, blobs: int, ours: int) -> None:
        self.path = path
        self._store, self._blobs, self._ours = store, blobs, ours
        #: Blobs that count as not there: device and inode by digest.
        self.damaged: Mapping[str, tuple[int, int]] = {}

    def check(self) -> None:
        """Raise FileNotFoundError where the store has gone."""
        if os.fstat(self._ours).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "the store has gone", self.path)

    def free(self) -> int:
        """Bytes that this user may still write there."""
        status = os.fstatvfs(self._ours)
        return status.f_bavail * status.f_frsize

    def why_full(self) -> str:
        """Why nothing more can be written, where the system says that the disk is full."""
        status = os.fstatvfs(self._ours)
        has_no_inodes = status.f_files > 0 and status.f_favail == 0
        return "the disk has no inodes left" if has_no_inodes else "the disk is full"

    def has(self, layer: Layer) -> bool:
        """Whether a layer has its name. Raises TransferError where that is another one's."""
        name = names.blob(layer.digest)
        try:
            found = os.stat(name, dir_fd=self._blobs)
        except FileNotFoundError:
            return False
        if self.damaged.get(layer.digest) == (found.st_dev, found.st_ino):
            return False
        if not stat.S_ISREG(found.st_mode) or found.st_size != layer.size:
            has, wanted = ranges.in_words(found.st_size, layer.size)
            raise TransferError(
                f"{names.short(layer.digest)}: the blob is damaged: it has {has},"
                f" and the manifest says {wanted}",
                "repair the store, then run this again",
                Cause.DAMAGED_BLOB,
            )
        return True

    @contextlib.contextmanager
    def ledger(self, layer: Layer, boot: str) -> Iterator[Ledger]:
        """The ledger of a layer that has no name yet, for who fetches it.

        Raises fs.BusyError where another process does, and OSError.
        """
        with ledger.opened(self._ours, layer, boot) as found:
            yield found

    def tidy(self, layer: Layer) -> None:
        """Remove what is left of a transfer once its layer has its name.

        Bytes are left to `clean`, since the name may be of damaged ones.
        """
        transfers.remove(self._ours, layer.digest, only_empty=True)

    def peek(self, layer: Layer, boot: str) -> int:
        """How many bytes of a layer have arrived with another process."""
        return ledger.peek(self._ours, layer, boot)

    def has_more(self, partial: Partial, boot: str) -> bool:
        """Whether we have bytes of a layer that are lost where a server's download stands in."""
        try:
            with transfers.opened(self._ours, partial.digest) as folder:
                return transfers.has_more(folder, partial.digest, boot, partial.trusted)
        except FileNotFoundError:
            return False

    def sums(self, layer: Layer) -> Chunks:
        """What the chunks of a layer hash to, as far as that is known; () for nothing."""
        return sums.kept(self._ours, layer.digest.lower(), layer.size)

    def keep_sums(self, layer: Layer, raw: bytes) -> None:
        """Keep what the chunks of a layer hash to; b"": nothing any more."""
        sums.keep(self._ours, layer.digest.lower(), raw)

    def running(self) -> int:
        """How many layers are fetched into this store, by whomever."""
        return sum(map(self._is_fetched, transfers.digests(self._ours)))

    def _is_fetched(self, digest: str) -> bool:
        with contextlib.suppress(OSError), transfers.opened(self._ours, digest) as folder:
            return fs.holder(transfers.LOCK, folder) is not None
        return False

    def take(self, found: Ledger, partial: Partial, *, all_of_it: bool) -> Iterator[int]:
        """Copy what is trusted of a server's download, or a damaged blob; gives back bytes copied.

        `all_of_it`: all that was written, since each chunk is compared. Nothing where that is
        another file by now. Raises OSError.
        """
        name = names.blob(partial.digest) if partial.is_blob else names.data(partial.digest)
        try:
            if partial.label:
                with state_folder.opened_in(QUARANTINE, self._ours) as quarantine:
                    fd = fs.open_to_read(partial.label, quarantine)
            else:  # of a blob what the server reads
                fd = (fs.open_followed if partial.is_blob else fs.open_to_read)(name, self._blobs)
        except OSError:
            return
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) == (partial.device, partial.inode):
                wanted = parts.segments(fd, status.st_size) if all_of_it else partial.trusted
                yield from found.take(fd, ranges.within(wanted, 0, status.st_size))
        finally:
            os.close(fd)

    # ------------------------------------------------------------ names

    def publish(
        self, verified: Sequence[Verified], go_on: Callable[[], object] = object
    ) -> Published:
        """Give layers their names in ``blobs/``.

        The caller knows that names may be added there now (``docs/safety.md``), places the manifest
        next, and then settles. A layer that got its name otherwise meanwhile keeps that file.
        `go_on` is called before each layer; what it raises ends this.
        Raises fs.BusyError where another process has one, and OSError.
        """
        published = Published([], [])
        for each in verified:
            go_on()
            named = self._name(each)
            (published.changed if named is None else published.named).append(named or each)
        fs.sync(self._blobs)
        for each in published.named:
            go_on()
            self.tidy(each.layer)
        return published

    def _name(self, verified: Verified) -> Verified | None:
        layer = verified.layer
        if self.has(layer):
            return verified
        try:
            with ledger.held(self._ours, layer) as (folder, data):
                if ledger.identity(os.fstat(data)) != verified.identity:
                    return None
                try:
                    fs.make_blob(data, self._blobs)
                except OSError:
                    fs.drop_cache(data)  # the disk has not taken it
                    transfers.lose(folder)
                    raise
                with contextlib.suppress(FileExistsError):
                    self._give_name(layer, folder, keep=self._is_pulled(layer))
                return Verified(layer, ledger.identity(os.fstat(data)))
        except FileNotFoundError:  # another pull has just given it, and its folder went
            return verified if self.has(layer) else None

    def _give_name(self, layer: Layer, folder: int, *, keep: bool) -> None:
        """Name the data; `keep`: it keeps its own name, too, where a file may have two."""
        name = names.blob(layer.digest)
        with _naming("blobs", name):
            if keep:
                try:
                    fs.second_name(transfers.DATA, folder, name, self._blobs)
                except OSError as error:
                    if error.errno not in fs.NO_LINKS:
                        raise
                else:
                    return
            fs.move(transfers.DATA, folder, name, self._blobs)

    def _is_pulled(self, layer: Layer) -> bool:
        """Whether a server's own download of it lies there: it may replace the name, or remove it.

        It renames its file over the name, hashes it then, and removes the name if it is wrong.
        """
        try:
            os.stat(names.data(layer.digest), dir_fd=self._blobs, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def settle(
        self, published: Sequence[Verified], quiet: frozenset[str] = frozenset()
    ) -> list[Verified]:
        """Look again at published layers; gives back those that a server is still pulling.

        Our file of such a layer is kept, and gets the name again where the server has removed it.
        `quiet`: digests that nobody pulls, whatever was left of them. Raises OSError.
        """
        return [each for each in published if not self._is_settled(each, quiet)]

    def _is_settled(self, published: Verified, quiet: frozenset[str]) -> bool:
        layer = published.layer
        if not self.has(layer):
            self._put_back(published)
        if layer.digest not in quiet and self._is_pulled(layer):
            return False
        transfers.remove(self._ours, layer.digest)
        return True

    def _put_back(self, published: Verified) -> None:
        digest, meant = published.layer.digest, published.identity
        with (
            contextlib.suppress(FileNotFoundError),
            transfers.opened(self._ours, digest) as folder,
        ):
            found = os.stat(transfers.DATA, dir_fd=folder, follow_symlinks=False)
            # Another file is a new transfer, of which nobody knows whether it is right.
            if ledger.identity(found) == meant:
                self._give_name(published.layer, folder, keep=True)
                fs.sync(self._blobs)

    # ------------------------------------------------------------ the manifest

    def place_manifest(self, model: ModelName, raw: bytes) -> None:
        """Put a manifest, byte for byte, in its place, over an older one. Raises OSError.

        It is written outside of ``manifests/``, where a half-written file would turn the server's
        clean-up off.
        """
        with state_folder.made_in(transfers.FOLDER, self._ours) as folder:
            # By no process's id: threads share it, and so do containers that share a store.
            name = f"{transfers.NEW_MANIFEST}{secrets.randbelow(10**10)}"
            fs.create(name, folder, raw, _owner(self._blobs))
            try:
                for left in reversed(range(_TRIES)):
                    try:
                        self._put(model, name, folder)
                        break
                    except FileNotFoundError:
                        if not left:
                            raise
            except OSError:
                fs.remove(name, folder)
                raise

    def _put(self, model: ModelName, name: str, folder: int) -> None:
        with contextlib.ExitStack() as held:
            ways, path = [self._store], list[str]()
            fresh: list[int] = []
            for part in ("manifests", *model[:-1]):
                path.append(_spelled(part, ways[-1]))
                with _naming(*path):
                    if fs.ensure_folder(path[-1], ways[-1], durable=False):
                        fresh.append(ways[-1])
                    ways.append(held.enter_context(fs.opened_folder(path[-1], ways[-1])))
            path.append(_spelled(model.tag, ways[-1]))
            with _naming(*path):
                fs.replace(name, folder, path[-1], ways[-1])
            for at in (ways[-1], *reversed(fresh)):
                fs.sync(at)


@contextlib.contextmanager
def opened(path: str) -> Iterator[Store]:
    """A store's folders. Raises TransferError where its blobs lie elsewhere, and OSError."""
    with contextlib.ExitStack() as held:
        store = held.enter_context(folders.opened_store(path))
        if folders.look_at_blobs(store).status is None:
            fs.ensure_folder("blobs", store)
        blobs = held.enter_context(folders.opened_blobs(store))
        ours = held.enter_context(state_folder.made(store))
        if os.fstat(blobs).st_dev != os.fstat(ours).st_dev:
            raise TransferError(
                f"{names.printable(path)}: blobs/ is on another file system than the store",
                "let the server download it",
                Cause.OTHER_DISK,
            )
        yield Store(path, store, blobs, ours)


def manifest(store: int, model: ModelName) -> bytes:
    """The manifest that a store has of a model, byte for byte. Raises OSError."""
    with contextlib.ExitStack() as held:
        at = store
        for part in ("manifests", *model[:-1]):
            part, above = _spelled(part, at), at
            at = held.enter_context(fs.opened_folder(part, above, follow=True))
            fs.check_link(part, above, os.fstat(at))
        with fs.closing(fs.open_behind(_spelled(model.tag, at), at)) as fd:
            return fs.read_open(fd, READ_LIMIT + 1)


@contextlib.contextmanager
def _naming(*path: str) -> Iterator[None]:
    """Errors name what has that path from the store's folder."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.path.join(*path)) from None


def _owner(folder: int) -> tuple[int, int]:
    found = os.fstat(folder)
    return found.st_uid, found.st_gid


def _spelled(name: str, folder: int) -> str:
    """A name as it is there: the server does not regard case, and takes one of two by chance."""
    lower = name.lower()
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return next((each for each in os.listdir(folder) if each.lower() == lower), name)
    return name

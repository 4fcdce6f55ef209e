"""One pass over ``blobs/`` and ``manifests/``: the healthy are counted, the oddities kept.

Names are listed and looked at relative to directory descriptors. Below ``blobs/`` no symlink is
followed; under ``manifests/`` they are, as the server does, since what lies behind one protects
blobs as well; depth is bounded, so a loop ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from watcher.model import (
    BlobCensus,
    BlobFault,
    Entry,
    Kind,
    Located,
    ManifestFault,
    Need,
    Nested,
    OddBlob,
    OddManifest,
    Subject,
    Tally,
    Temporary,
    TemporaryKind,
    Unseen,
)
from watcher.observe import nested
from watcher.observe.access import Access, user_of
from watcher.ollama import manifests, names
from watcher.ollama.names import Role
from watcher.state import folders, fs

_PARTIAL, _TMP = "-partial", ".tmp"
_UNFINISHED = frozenset({Role.DATA, Role.SIDECAR, Role.TRANSFER})
_TYPE_BITS = 0o170000
_TAG_DEPTH = 4
#: So many numbers in a row without a sidecar, and there are no more of them.
_SIDECARS_APART = 64
#: What lies deeper than this is of no use to the server, nor to us.
_DEEPEST = 6


@dataclass(slots=True)
class Pieces:
    """The entries of one unfinished download, as listed."""

    data: Entry | None = None
    transfer: Entry | None = None
    sidecars: list[tuple[int | None, Entry]] = field(default_factory=list)
    finished: Entry | None = None
    #: A name of it that could not be looked at, and why.
    unseen: str = ""


@dataclass(slots=True)
class Named:
    """What all manifests together name."""

    #: Digits to (size, whether it is protected, index of a model that names it, more indexes …).
    digests: dict[str, tuple[int, ...]] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    #: The same with what tells their manifests apart.
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)
    odd: list[OddManifest] = field(default_factory=list)
    #: The first path of each that differs from others by more than case.
    paths: dict[str, str] = field(default_factory=dict)
    #: Digests to which manifests give several sizes: each size, and the indexes of its models.
    disputed: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    unlisted: list[str] = field(default_factory=list)
    #: Of these the ones that no right of anybody's opens, and why.
    failing: list[Unseen] = field(default_factory=list)
    #: Folders that a symlink of neither root's nor their owner's leads to.
    foreign: list[str] = field(default_factory=list)
    unseen: list[Unseen] = field(default_factory=list)
    empty_folders: list[str] = field(default_factory=list)
    #: Those that are empty once the start has removed the empty ones in them, and that it can't.
    stuck_folders: list[str] = field(default_factory=list)
    count: int = 0
    #: What the files and folders take, where that was asked for and each is a plain one.
    space: Tally | None = None
    #: Whether any digest is named and yet not protected.
    loose: bool = False

    def add(self, digest: str, size: int, models: Sequence[str]) -> None:
        """Name a digest that no manifest of the store names: it protects nothing."""
        if digest not in self.digests:
            first = len(self.models)
            self.models.extend(models)
            self.digests[digest] = (size, False, *range(first, len(self.models)))

    def unlist(self, path: str, error: OSError) -> None:
        """Note a folder below the store that could not be listed."""
        self.unlisted.append(path)
        if error.errno not in (errno.EACCES, errno.EPERM):
            why = folders.NO_FOLDER.get(error.errno or 0) or os.strerror(error.errno or 0)
            self.failing.append(Unseen(path, why))

    def follow(self, name: str, parent: int, path: str, folder: int) -> None:
        """Note a folder that was entered, where somebody else's symlink has led to it."""
        with contextlib.suppress(OSError):
            link = look(name, parent)
            if link is None or link.kind is not Kind.SYMLINK:
                return
            if link.uid not in (0, os.fstat(folder).st_uid):
                self.foreign.append(path)

    def take(self, found: os.stat_result) -> None:
        """Count what a file or folder takes; the length of a folder says nothing."""
        if self.space is not None:
            size = found.st_size if stat.S_ISREG(found.st_mode) else 0
            self.space = self.space.plus(size, found.st_blocks)

    def models_of(self, digest: str) -> tuple[str, ...]:
        """The models that name a digest, by name."""
        _, _, *indexes = self.digests.get(digest, (0, 0))
        return tuple(sorted({self.models[index] for index in indexes}))

    def size_of(self, digest: str) -> int | None:
        """The size that a manifest gives a digest, in bytes."""
        found = self.digests.get(digest)
        return found[0] if found else None

    def gives(self, digest: str, size: int) -> bool:
        """Whether a manifest gives a digest this size."""
        return size == self.size_of(digest) or size in self.disputed.get(digest, ())

    def models_by_size(self, digest: str) -> dict[int, tuple[str, ...]]:
        """The sizes that manifests give a digest, and the models by which they do."""
        found = self.disputed.get(digest)
        if found is None:
            size = self.size_of(digest)
            return {} if size is None else {size: self.models_of(digest)}
        return {
            size: tuple(sorted({self.models[index] for index in indexes}))
            for size, indexes in found.items()
        }


class Keep(NamedTuple):
    """What a pass keeps of the valid blobs, besides their number."""

    #: Each with the models that name it.
    named: bool = False
    #: What they take, by the models that name them.
    space: bool = False


class Listing(NamedTuple):
    """All of ``blobs/``, where it was asked for: valid blobs summed up, and the other names."""

    sums: dict[tuple[str, ...], Tally]
    entries: list[Entry]


class Scan(NamedTuple):
    """What one pass has found."""

    census: BlobCensus
    downloads: dict[str, Pieces]
    named: Named
    listing: Listing | None = None


def entry(name: str, found: os.stat_result) -> Entry:
    """An `Entry` of an ``lstat``."""
    mode = found.st_mode
    if stat.S_ISREG(mode):
        kind = Kind.FILE
    elif stat.S_ISDIR(mode):
        kind = Kind.FOLDER
    elif stat.S_ISLNK(mode):
        kind = Kind.SYMLINK
    else:
        kind = Kind.OTHER
    return Entry(
        name,
        kind,
        found.st_size,
        found.st_blocks * 512,
        found.st_dev,
        found.st_ino,
        found.st_nlink,
        found.st_mtime_ns,
        found.st_ctime_ns,
        found.st_uid,
        found.st_gid,
        stat.S_IMODE(mode),
    )


def look(name: str, folder: int) -> Entry | None:
    """One name in a folder as it is now, or None where it is gone."""
    try:
        return entry(name, os.stat(name, dir_fd=folder, follow_symlinks=False))
    except FileNotFoundError:
        return None


def content(name: str, folder: int) -> Entry | None:
    """What is read under a name, links followed as the server does; None where that is nothing.

    Raises OSError where it can't be told.
    """
    try:
        return entry(name, os.stat(name, dir_fd=folder))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise


def present(store: int, wanted: Mapping[str, int]) -> frozenset[str]:
    """Of digests with their bytes those whose blob is in the store, and as long."""
    with contextlib.ExitStack() as opened:
        try:
            blobs = opened.enter_context(folders.opened_blobs(store, foreign_too=True))
        except OSError:
            return frozenset()
        found: dict[str, Entry | None] = {}
        for digest in wanted:
            with contextlib.suppress(OSError):
                found[digest] = content(names.blob(digest), blobs)
    return frozenset(
        digest
        for digest, blob in found.items()
        if blob is not None and blob.kind is Kind.FILE and blob.size == wanted[digest]
    )


def begun(store: int, digests: Iterable[str]) -> int:
    """Bytes on the disk of the data files of unfinished layers."""
    with contextlib.ExitStack() as opened:
        try:
            blobs = opened.enter_context(folders.opened_blobs(store, foreign_too=True))
        except OSError:
            return 0
        found = [look(names.data(digest), blobs) for digest in digests]
    return sum(data.allocated for data in found if data is not None)


def unfinished(store: int) -> frozenset[str]:
    """The digests of which there is an unfinished layer, or a sidecar of one."""
    with contextlib.ExitStack() as opened:
        try:
            blobs = opened.enter_context(folders.opened_blobs(store, foreign_too=True))
            listed = os.listdir(blobs)
        except OSError:
            return frozenset()
    # Most are finished blobs: those are told apart by less.
    parsed = (names.parse_blob(name) for name in listed if name.endswith(_TMP) or _PARTIAL in name)
    return frozenset(each.digest for each in parsed if each.role in _UNFINISHED)


# ---------------------------------------------------------------- manifests


def scan_manifests(store: int, access: Access | None = None, *, space: bool = False) -> Named:
    """Read every manifest of the store, as the server finds them: exactly four names deep.

    `space`: count what they take, too.
    """
    named = Named(space=Tally() if space else None)
    access = access or Access(user_of(store, None))
    with _folder("manifests", store, named, access, follow=True) as top:
        if top is not None:
            named.follow("manifests", store, "manifests", top)
            removable = access.folder(store, Need.WRITE)
            _Walk(named, access).folder(top, (), hidden=False, removable=removable)
    return named


class _Walk:
    """A walk through ``manifests/``; `access` is for the user that the server runs as.

    What it can't list it does not see: manifests below are read here, and protect nothing there.
    """

    def __init__(self, named: Named, access: Access) -> None:
        self.named, self.access = named, access

    def folder(self, folder: int, parts: tuple[str, ...], *, hidden: bool, removable: bool) -> bool:
        """Read a folder; whether the server's start leaves nothing in it.

        `hidden`: the server can't see it. `removable`: the server can remove it once it is empty.
        """
        path = "/".join(("manifests", *parts))
        if parts:  # its own folder is a name of the store
            self.named.take(os.fstat(folder))
        writable = self.access.folder(folder, Need.WRITE)
        if not self.access.folder(folder, Need.READ):
            hidden = True
            self.access.shut(path, entry(path, os.fstat(folder)), folder)
        elif not writable:
            itself = entry(path, os.fstat(folder))
            self.access.bar(Subject.MANIFEST_FOLDER, Need.WRITE, path, itself, folder)
        try:
            with os.scandir(folder) as listing:
                # By name, as the server's glob gives them.
                items = sorted(listing, key=lambda item: item.name)
        except OSError as error:
            self.named.unlist(path, error)
            return False
        if not items:
            self.named.empty_folders.append(path)
        left = False
        for item in items:
            goes = self._item(item, folder, (*parts, item.name), hidden=hidden, removable=writable)
            left = left or not goes
        if not left and not removable:
            self.named.stuck_folders.append(path)
        return not left

    def _item(
        self,
        item: os.DirEntry[str],
        folder: int,
        parts: tuple[str, ...],
        *,
        hidden: bool,
        removable: bool,
    ) -> bool:
        """Read what is at a name; whether it is a folder in which the start leaves nothing."""
        depth, path = len(parts), "/".join(("manifests", *parts))
        above_tags = depth < _TAG_DEPTH
        if item.is_symlink():
            self.named.space = None
        try:
            is_folder = item.is_dir(follow_symlinks=above_tags)
        except OSError as error:
            is_folder = False
            if above_tags and error.errno != errno.ELOOP:
                self.named.unseen.append(Unseen(path, os.strerror(error.errno or 0)))
                return False
        if is_folder:
            if depth == _TAG_DEPTH:
                self._misplaced(path, "a folder in a tag's place")
            if depth <= _DEEPEST:
                with _folder(path, folder, self.named, self.access, follow=above_tags) as fd:
                    if fd is not None:
                        if item.is_symlink():
                            self.named.follow(item.name, folder, path, fd)
                        goes = self.folder(fd, parts, hidden=hidden, removable=removable)
                        return goes and not item.is_symlink()
        elif depth == _TAG_DEPTH:
            self._manifest(folder, parts, hidden=hidden)
        else:
            self._misplaced(path, f"a file {depth} deep; manifests lie {_TAG_DEPTH} deep")
        return False

    def _misplaced(self, path: str, why: str) -> None:
        self.named.space = None
        self.named.odd.append(OddManifest(path, ManifestFault.MISPLACED, why))

    def _manifest(self, folder: int, parts: tuple[str, ...], *, hidden: bool) -> None:
        path = "/".join(("manifests", *parts))
        model = names.model_from_path(parts)
        if model is None:
            self.named.space = None
            why = "no valid model name"
            self.named.odd.append(OddManifest(path, ManifestFault.BAD_NAME, why, changed_at=0.0))
            return
        try:
            # Followed, as the server does: a manifest behind a symlink protects its blobs as well.
            fd = fs.open_behind(parts[-1], folder)
        except OSError as error:
            if not isinstance(error, FileNotFoundError) or look(parts[-1], folder) is not None:
                self.named.space = None
                self._unopened(error, folder, path, model.shown)
            return  # or removed since it was listed
        odd = OddManifest(path, ManifestFault.CORRUPT, "", model.shown)
        try:
            status = os.fstat(fd)
            if status.st_nlink > 1 or not stat.S_ISREG(status.st_mode):
                self.named.space = None
            self.named.take(status)
            odd = odd._replace(changed_at=status.st_mtime)
            manifest = _parse_open(fd, status)
        except ValueError as error:
            self.named.odd.append(odd._replace(why=str(error)))
        except OSError as error:
            why = os.strerror(error.errno or 0)
            self.named.odd.append(odd._replace(fault=ManifestFault.UNREADABLE, why=why))
        else:
            self.named.models.append(model.shown)
            self.named.seen[model.shown] = (status.st_ino, status.st_mtime_ns)
            self._count(odd, status, folder)
            self._name(manifest, odd, hidden=hidden)
        finally:
            os.close(fd)

    def _unopened(self, error: OSError, folder: int, path: str, model: str) -> None:
        name = os.path.basename(path)
        fault, forbidden = _fault_of(error, name, folder), isinstance(error, PermissionError)
        barred = forbidden and _bars_both(name, folder, path, self.access)
        hidden = forbidden and not barred
        self.named.odd.append(
            OddManifest(path, fault, str(error.strerror), model, barred=barred, hidden=hidden)
        )

    def _count(self, odd: OddManifest, status: os.stat_result, folder: int) -> None:
        """Count a manifest that could be read here, and see whether the server's user can."""
        named, access, path, name = self.named, self.access, odd.path, os.path.basename(odd.path)
        named.count += 1
        other = named.paths.setdefault(path.lower(), path)
        if other != path:
            named.odd.append(OddManifest(path, ManifestFault.CASE, other, odd.model))
        if not access.file(status, Need.READ):
            why = f"the user id {access.user.uid} may not read it"
            named.odd.append(
                OddManifest(path, ManifestFault.UNREADABLE, why, odd.model, barred=True)
            )
            access.bar(Subject.MANIFEST, Need.READ, path, entry(name, status), folder)
        elif not access.file(status, Need.WRITE):
            access.bar(Subject.MANIFEST, Need.WRITE, path, entry(name, status), folder)

    def _name(self, manifest: manifests.Manifest, odd: OddManifest, *, hidden: bool) -> None:
        """Note what the manifest that was counted last names."""
        digests, faults = manifest
        if faults:
            self.named.odd.append(odd._replace(fault=ManifestFault.BAD_DIGEST, why=faults[0]))
        elif not digests:
            why = manifests.NAMES_NOTHING
            self.named.odd.append(odd._replace(fault=ManifestFault.EMPTY, why=why))
        index = len(self.named.models) - 1
        for digest, (size, protects) in digests.items():
            _name_digest(self.named, digest, size, index, protected=protects and not hidden)


def _name_digest(named: Named, digest: str, size: int, index: int, *, protected: bool) -> None:
    """Note that the model `index` names a digest."""
    before = named.digests.get(digest)
    if before is None:
        named.digests[digest] = (size, protected, index)
    else:
        known, already, *others = before
        if size != known or digest in named.disputed:
            by_size = named.disputed.setdefault(digest, {known: list(others)})
            by_size.setdefault(size, []).append(index)
        protected = protected or bool(already)
        named.digests[digest] = (known, protected, *others, index)
    if not protected:
        named.loose = True


def _bars_both(name: str, folder: int, path: str, access: Access) -> bool:
    """Whether the server's user can't read a manifest that we can't read (noted)."""
    with contextlib.suppress(OSError):
        status = os.stat(name, dir_fd=folder)
        if not access.file(status, Need.READ):
            access.bar(Subject.MANIFEST, Need.READ, path, entry(name, status), folder)
            return True
    return False


def _fault_of(error: OSError, name: str, folder: int) -> ManifestFault:
    """What is wrong with a manifest that could not be opened."""
    if error.errno in (errno.EINVAL, errno.ENXIO):
        return ManifestFault.CORRUPT  # a device, a FIFO, a socket, a folder
    leads_nowhere = error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)
    is_dangling = leads_nowhere and _is_link(name, folder)
    return ManifestFault.DANGLING if is_dangling else ManifestFault.UNREADABLE


def _parse_open(fd: int, status: os.stat_result) -> manifests.Manifest:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > manifests.READ_LIMIT:
        raise ValueError(f"{status.st_size} bytes are too many for a manifest")
    return manifests.parse(fs.read_open(fd, min(status.st_size, manifests.READ_LIMIT)))


def _is_link(name: str, folder: int) -> bool:
    found = look(name, folder)
    return found is not None and found.kind is Kind.SYMLINK


# ---------------------------------------------------------------- blobs


def scan_store(
    store: int,
    access: Access | None = None,
    keep: Keep = Keep(),  # noqa: B008 - a value that nothing changes
    *,
    manifests_hidden: bool = False,
) -> Scan:
    """One pass over the whole store behind the descriptor `store`.

    `access`: who the server runs as; None for the store's owner. `manifests_hidden`: the server
    sees no manifest at all, so that none protects a blob.
    """
    access = access or Access(user_of(store, None))
    named = scan_manifests(store, access, space=keep.space)
    downloads: dict[str, Pieces] = {}
    census = _Counting(named, access, keep, manifests_hidden=manifests_hidden)
    # blobs/ itself may be a symlink that the owner made; nothing below it is followed.
    with _folder("blobs", store, named, access, follow=True) as fd:
        if fd is not None:
            _scan_blobs(fd, census, downloads)
            for digest, pieces in census.old_downloads.items():
                downloads.setdefault(digest, pieces)
            _add_finished(fd, downloads)
        census.look_for_stores(store)
        if fd is not None or "blobs" not in named.unlisted:
            census.missing(fd)
    census.temporary_folders(store)
    if not access.folder(store, Need.WRITE) and _lacks(store):
        access.bar(Subject.STORE, Need.WRITE, ".", entry(".", os.fstat(store)), store)
    listing = census.listing() if keep.space else None
    return Scan(census.result(), downloads, named, listing)


def lying(store: int, wanted: Mapping[str, int], model: str) -> tuple[OddBlob, ...]:
    """Of a model's layers, digests with their bytes, those that lie where no server looks."""
    named = Named()
    for digest, size in wanted.items():
        named.add(digest, size, [model])
    census = _Counting(named, Access(user_of(store, None)))
    with _folder("blobs", store, named, follow=True) as fd:
        if fd is not None:
            _scan_blobs(fd, census, {})
            census.look_for_stores(store)
            census.missing(fd)
    return tuple(odd for odd in census.odd if odd.lies is not None)


def _lacks(store: int) -> bool:
    """Whether a server has to make a folder in the store."""
    return any(look(name, store) is None for name in ("blobs", "manifests"))


def scan_above(path: str, access: Access) -> None:
    """Look whether the server's user can pass through a store's folder and those above it."""
    if access.user.unbarred or access.user.elsewhere:
        return  # a container has other folders above it
    real = os.path.realpath(path)
    for at in [at for at, char in enumerate(f"{real}/") if char == "/"]:
        with contextlib.suppress(OSError):
            above = real[:at] or "/"
            fd = os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if not access.folder(fd, Need.ENTER):
                    itself = entry(above, os.fstat(fd))
                    access.bar(Subject.FOLDER, Need.ENTER, above, itself, fd)
            finally:
                os.close(fd)


def scan_digests(store: int, digests: Iterable[str]) -> Scan:
    """A look at the downloads of some digests only, by their names.

    The census stays empty, but for what can't be listed.

    It costs nothing that grows with the store: no folder is listed (so a sidecar with a strange
    name is only seen by a pass over the whole store), and no manifest read.
    """
    named = Named()
    downloads: dict[str, Pieces] = {}
    with _folder("blobs", store, named, follow=True) as fd:
        if fd is not None:
            for found in (found for digest in digests for found in _likely(digest, fd)):
                name = found.name
                new = names.new_spelling(name) if name.startswith("sha256:") else name
                _add_piece(downloads, names.parse_blob(new), found)
            _add_finished(fd, downloads)
    census = BlobCensus(unlisted=tuple(named.unlisted), failing=tuple(named.failing))
    return Scan(census, downloads, named)


def _likely(digest: str, blobs: int) -> Iterator[Entry]:
    """A download's entries by the names that they have, up to the last sidecar that is there.

    Those of older servers count where there are no others.
    """
    for spelled in (names.data, names.old_data):
        found = list(_spelled(spelled(digest), blobs))
        if found:
            yield from found
            return


def _spelled(data: str, blobs: int) -> Iterator[Entry]:
    for name in (data, f"{data.removesuffix(_PARTIAL)}{_TMP}"):
        found = look(name, blobs)
        if found is not None:
            yield found
    number = last = -1
    while number - last < _SIDECARS_APART:
        number += 1
        found = look(f"{data}-{number}", blobs)
        if found is not None:
            last = number
            yield found


class _Counting:
    """The census while it is taken."""

    def __init__(
        self,
        named: Named,
        access: Access,
        keep: Keep = Keep(),  # noqa: B008 - a value that nothing changes
        *,
        manifests_hidden: bool = False,
    ) -> None:
        self.named, self.access, self.keep = named, access, keep
        #: Whether a blob that is named may still be unprotected; rare, so looked at only then.
        self.loose = named.loose or manifests_hidden
        self.manifests_hidden = manifests_hidden
        #: What blobs take, by the indexes of the models that name them; and all other names.
        self._sums: dict[tuple[int, ...], Tally] = {}
        self.others: list[Entry] = []
        #: The descriptor of ``blobs/``, while it is scanned.
        self.folder = -1
        self.unseen: list[Unseen] = []
        self.named_blobs: list[tuple[Entry, tuple[str, ...]]] = []
        #: The server's user can't add, rename and remove names; only rename and remove its own.
        self.sealed = self.sticky = False
        self.entries = self.allocated = self.healthy = self.healthy_bytes = 0
        self.odd: list[OddBlob] = []
        self.unnamed: list[Entry] = []
        #: Files by the digest (in lower case) that their names have, where no server looks.
        self._astray: dict[str, list[Located]] = {}
        #: Pieces of downloads in the spelling of older servers.
        self.old_downloads: dict[str, Pieces] = {}
        self.old: list[Located] = []
        self.rename_faults: list[str] = []
        self.old_protected: set[str] = set()
        self.unprotected: list[Entry] = []
        self.temporaries: list[Temporary] = []
        self.foreign: list[Entry] = []
        self.nested: list[Nested] = []

    def blob(self, digest: str, found: Entry) -> None:
        size = self.named.size_of(digest)
        if size is None and found.kind is not Kind.FILE:
            self.foreign.append(found)
            return
        if size is None:
            self.unnamed.append(found)
            return
        self.guard(digest, found)
        behind: Entry | None = None
        if found.kind is Kind.SYMLINK:
            try:
                behind = content(found.name, self.folder)
            except OSError as error:
                self.unsee(found.name, error)
                return
        read = found if found.kind is not Kind.SYMLINK else behind
        models = self.named.models_of(digest)
        if self.keep.named and read is not None and read.kind is Kind.FILE:
            self.named_blobs.append((read, models))
        fault = self._fault(digest, size, found, read)
        if fault is None:
            self.healthy += 1
            self.healthy_bytes += found.size
        else:
            self.odd.append(OddBlob(digest, fault, size, found, models, behind=behind))

    def _fault(
        self, digest: str, wanted: int, found: Entry, read: Entry | None
    ) -> BlobFault | None:
        """What is wrong with a named blob, by what it is and its size; None where nothing is."""
        if read is None:
            return BlobFault.DANGLING
        if read.kind is not Kind.FILE:
            return BlobFault.NO_FILE
        # No file has a negative size: the manifest is at fault, and says nothing about the blob.
        if wanted < 0 or self.named.gives(digest, read.size):
            return BlobFault.SYMLINK if found.kind is Kind.SYMLINK else None
        return BlobFault.SHORT if read.size < wanted else BlobFault.LONG

    def unsee(self, name: str, error: OSError) -> None:
        """Note a name under ``blobs/`` that could not be looked at."""
        self.unseen.append(Unseen(f"blobs/{name}", os.strerror(error.errno or 0)))

    def bar(self, need: Need, found: Entry, blobs: int) -> None:
        """Keep in mind that the server's user can't read a blob, or write a download's file."""
        subject = Subject.BLOB if need is Need.READ else Subject.DOWNLOAD
        self.access.bar(subject, need, f"blobs/{found.name}", found, blobs)

    def healthy_blob(self, name: str, found: os.stat_result) -> None:
        """Keep a healthy blob that is asked for, or that no manifest protects."""
        if self.keep.space:
            self._sum(name, found)
        if self.loose or self.keep.named:
            listed = entry(name, found)
            self.guard(name[7:], listed)
            if self.keep.named:
                self.named_blobs.append((listed, self.named.models_of(name[7:])))

    def _sum(self, name: str, found: os.stat_result) -> None:
        if found.st_nlink > 1:
            self.others.append(entry(name, found))
            return
        indexes = self.named.digests[name[7:]][2:]
        self._sums[indexes] = self._sums.get(indexes, Tally()).plus(found.st_size, found.st_blocks)

    def listing(self) -> Listing | None:
        """All of ``blobs/``; None where not all of it could be looked at."""
        if "blobs" in self.named.unlisted or self.unseen or self.folder == -1:
            return None
        sums: dict[tuple[str, ...], Tally] = {}
        for indexes, tally in self._sums.items():
            models = tuple(sorted({self.named.models[index] for index in indexes}))
            sums[models] = sums.get(models, Tally()).joined(tally)
        return Listing(sums, self.others)

    def guard(self, digest: str, found: Entry) -> None:
        """Keep a named blob in mind that the server's clean-up would not spare."""
        if self.loose and not self.protects(digest):
            self.unprotected.append(found)

    def protects(self, digest: str) -> bool:
        """Whether a manifest keeps the server's clean-up from a blob."""
        named = self.named.digests.get(digest)
        return named is not None and bool(named[1]) and not self.manifests_hidden

    def missing(self, blobs: int | None) -> None:
        """Add what manifests name and ``blobs/`` does not have; None where that is not there."""
        if self.healthy + len(self.odd) == len(self.named.digests):
            return
        unseen = {each.path for each in self.unseen}
        for each in self.unnamed:
            self.astray(names.parse_blob(each.name).digest, f"blobs/{each.name}", each)
        for digest in self.named.digests.keys() - {odd.digest for odd in self.odd}:
            name = names.blob(digest)
            if f"blobs/{name}" in unseen:
                continue
            try:
                found = None if blobs is None else look(name, blobs)
            except OSError as error:
                self.unsee(name, error)
                continue
            if found is None:
                size, models = self.named.size_of(digest), self.named.models_of(digest)
                lies = None if blobs is None else self._lies(digest, blobs)
                self.odd.append(OddBlob(digest, BlobFault.MISSING, size, None, models, lies=lies))

    def astray(self, digest: str, path: str, found: Entry) -> None:
        """Note a name that may stand for a blob, and under which no server looks for it."""
        if found.kind is Kind.FILE:
            self._astray.setdefault(digest.lower(), []).append(Located(path, found))

    def _lies(self, digest: str, blobs: int) -> Located | None:
        """Where the bytes of a missing blob lie, going by name and size."""
        lower = digest.lower()
        for located in self._astray.get(lower, ()):
            if self.named.gives(digest, located.entry.size):
                if located.entry in self.unnamed:
                    # Somebody counts on it, and the server's clean-up does not spare it.
                    self.unnamed.remove(located.entry)
                    self.unprotected.append(located.entry)
                return located
        if digest != lower and lower in self.named.digests:
            found = look(names.blob(lower), blobs)
            if found is not None and self.named.gives(digest, found.size):
                return Located(f"blobs/{found.name}", found)
        return None

    def look_for_stores(self, store: int) -> None:
        """Take up the stores that lie in this one: what is missing here may be there."""
        inside = [each.name for each in self.foreign if each.kind is Kind.FOLDER]
        for found in nested.find(store, inside):
            blobs, manifests = (
                tuple(Located(path, entry(os.path.basename(path), status)) for path, status in each)
                for each in (found.blobs, found.manifests)
            )
            for path, blob in blobs:
                spelled = names.SPELLED_DIGEST.fullmatch(blob.name)
                if spelled is not None and not path.startswith("blobs/"):
                    self.astray(spelled[2], path, blob)
            twins = [
                each for each in (*blobs, *manifests) if _has_twin(each.path, found.path, store)
            ]
            unfinished = {names.parse_blob(each.entry.name).role for each in twins} & _UNFINISHED
            apart = len(blobs) + len(manifests) - len(twins)
            self.nested.append(Nested(found.path, blobs, manifests, apart, bool(unfinished)))

    def temporary_folders(self, store: int) -> None:
        with os.scandir(store) as listing:
            for item in listing:
                if item.name.startswith("ollama-safetensors"):
                    found = look(item.name, store)
                    if found is not None and found.kind is Kind.FOLDER:
                        kind = TemporaryKind.CREATE_FOLDER
                        self.temporaries.append(Temporary(found, kind, item.name))

    def result(self) -> BlobCensus:
        return BlobCensus(
            manifests=self.named.count,
            models=self.named.seen,
            entries=self.entries,
            allocated=self.allocated,
            healthy=self.healthy,
            healthy_bytes=self.healthy_bytes,
            named=tuple(self.named_blobs),
            odd=tuple(sorted(self.odd, key=lambda odd: odd.digest)),
            unnamed=tuple(sorted(self.unnamed)),
            old_names=tuple(sorted(self.old)),
            rename_faults=tuple(self.rename_faults),
            old_protected=frozenset(self.old_protected),
            unprotected=tuple(sorted(self.unprotected)),
            temporaries=tuple(sorted(self.temporaries)),
            foreign=tuple(sorted(self.foreign)),
            odd_manifests=tuple(self.named.odd),
            unlisted=tuple(self.named.unlisted),
            failing=tuple(self.named.failing),
            behind_foreign=tuple(self.named.foreign),
            unseen=(*self.named.unseen, *self.unseen),
            unlisted_by_server=tuple(self.access.unlisted),
            barred=self.access.result(),
            stuck_folders=tuple(self.named.stuck_folders),
            sealed=self.sealed,
            empty_folders=tuple(self.named.empty_folders),
            nested=tuple(self.nested),
        )


def _has_twin(path: str, inside: str, store: int) -> bool:
    """Whether what lies in a store in this one has its name here, too."""
    try:
        os.stat(path.removeprefix(f"{inside}/"), dir_fd=store, follow_symlinks=False)
    except OSError:
        return False
    return True


def _scan_blobs(fd: int, census: _Counting, downloads: dict[str, Pieces]) -> None:
    census.folder = fd
    with os.scandir(fd) as listing:
        try:
            _scan_names(listing, fd, census, downloads)
        except OSError as error:
            # The disk gives no more of its names.
            census.named.unlist("blobs", error)


def _scan_names(
    listing: Iterable[os.DirEntry[str]],
    fd: int,
    census: _Counting,
    downloads: dict[str, Pieces],
) -> None:
    wanted, special = census.named.digests, census.loose or any(census.keep)
    _judge_folder(fd, census)
    # Most blobs have one owner and one mode: those of the one before, and whether they are barred.
    mode = uid = gid = -1
    barred = False
    entries = blocks = healthy = healthy_bytes = 0
    try:
        for item in listing:
            name = item.name
            try:
                found = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError as error:
                census.unsee(name, error)
                _add_unseen(downloads, name, error)
                continue
            entries += 1
            blocks += found.st_blocks
            # The common case first, and bare: it decides how long a large store takes.
            reference = wanted.get(name[7:])
            if reference is not None:
                size = found.st_size
                if (
                    reference[0] == size
                    and found.st_mode & _TYPE_BITS == stat.S_IFREG
                    and name[:7] == "sha256-"
                ):
                    healthy += 1
                    healthy_bytes += size
                    if found.st_mode != mode or found.st_uid != uid or found.st_gid != gid:
                        mode, uid, gid = found.st_mode, found.st_uid, found.st_gid
                        barred = not census.access.file(found, Need.READ)
                    if barred:
                        census.bar(Need.READ, entry(name, found), fd)
                    if special:
                        census.healthy_blob(name, found)
                    continue
            listed = entry(name, found)
            if census.keep.space:
                census.others.append(listed)
            _sort_out(listed, census, downloads, fd)
            if listed.kind is Kind.FOLDER or name.startswith("sha256:"):
                _look_at_walk(listed, fd, f"blobs/{name}", census)
    finally:
        census.entries, census.allocated = entries, blocks * 512
        census.healthy += healthy
        census.healthy_bytes += healthy_bytes


def _judge_folder(blobs: int, census: _Counting) -> None:
    """What the server's user can't do in ``blobs`` itself."""
    access, status = census.access, os.fstat(blobs)
    itself = entry("blobs", status)
    if not access.folder(blobs, Need.READ):
        access.shut("blobs", itself, blobs)
    elif not access.folder(blobs, Need.WRITE):
        census.sealed = True
        access.bar(Subject.FOLDER, Need.WRITE, "blobs", itself, blobs)
    # In such a folder a name goes, and is renamed, by its owner and by the folder's alone.
    user = access.user
    census.sticky = bool(status.st_mode & stat.S_ISVTX) and status.st_uid != user.uid
    census.sticky = census.sticky and not user.unbarred


def _sort_out(found: Entry, census: _Counting, downloads: dict[str, Pieces], blobs: int) -> None:
    parsed = names.parse_blob(found.name)
    match parsed.role:
        case Role.BLOB:
            census.blob(parsed.digest, found)
            if found.kind is Kind.FILE and not census.access.file(found, Need.READ):
                census.bar(Need.READ, found, blobs)
        case Role.DATA | Role.SIDECAR | Role.TRANSFER:
            _add_piece(downloads, parsed, found)
            stuck = census.sticky and found.uid != census.access.user.uid
            if found.kind is Kind.FILE and (stuck or not census.access.file(found, Need.WRITE)):
                census.bar(Need.WRITE, found, blobs)
        case Role.OLD:
            located = Located(f"blobs/{found.name}", found)
            census.old.append(located)
            spelled = names.SPELLED_DIGEST.fullmatch(found.name)
            if spelled is not None:
                census.astray(spelled[2], located.path, found)
                if census.protects(spelled[2]):
                    census.old_protected.add(located.path)
            parsed = names.parse_blob(names.new_spelling(found.name))
            if parsed.role in _UNFINISHED:
                _add_piece(census.old_downloads, parsed, found)
        case Role.UPLOAD | Role.CREATE if found.kind is Kind.FILE:
            kind = TemporaryKind(parsed.role.value)
            census.temporaries.append(Temporary(found, kind, f"blobs/{found.name}"))
        case _ if found.kind is Kind.FOLDER and found.name.startswith("split-gguf-"):
            kind = TemporaryKind.CREATE_FOLDER
            census.temporaries.append(Temporary(found, kind, f"blobs/{found.name}"))
        case _:
            census.foreign.append(found)


def _look_at_walk(found: Entry, parent: int, path: str, census: _Counting) -> None:
    """What the server's start, which walks through ``blobs/`` and renames, will meet here."""
    inner: list[str] = []
    if found.kind is Kind.FOLDER:
        with _folder(path, parent, census.named, census.access) as fd:
            if fd is not None:
                inner = sorted(os.listdir(fd))
                _look_into(fd, path, inner, census)
    if found.name.startswith("sha256:"):
        fault = _rename_fault(found, parent, inner)
        if fault:
            census.rename_faults.append(f"{names.printable(path)} {fault}")


def _look_into(fd: int, path: str, inner: list[str], census: _Counting) -> None:
    if not census.access.folder(fd, Need.READ):
        census.access.shut(path, entry(path, os.fstat(fd)), fd)
    if path.count("/") >= _DEEPEST:
        return
    for name in inner:
        found = look(name, fd)
        if found is not None:
            if name.startswith("sha256:"):
                census.old.append(Located(f"{path}/{name}", found))
            if (spelled := names.SPELLED_DIGEST.fullmatch(name)) is not None:
                census.astray(spelled[2], f"{path}/{name}", found)
            _look_at_walk(found, fd, f"{path}/{name}", census)


def _rename_fault(old: Entry, parent: int, inner: list[str]) -> str | None:
    """Why the server's start fails at giving an entry the new spelling; None where it doesn't."""
    if inner:
        return "is a folder that is renamed while the server walks through it"
    target = look(names.new_spelling(old.name), parent)
    if target is None:
        return None
    if (target.kind is Kind.FOLDER) != (old.kind is Kind.FOLDER):
        return "can't be renamed: a folder can't replace a file, nor a file a folder"
    if target.kind is Kind.FOLDER:
        with contextlib.suppress(OSError), fs.opened_folder(target.name, parent) as fd:
            if os.listdir(fd):
                return "can't be renamed over a folder that is not empty"
    return None


def _add_piece(downloads: dict[str, Pieces], parsed: names.BlobName, found: Entry) -> None:
    pieces = downloads.get(parsed.digest)
    if pieces is None:
        pieces = downloads[parsed.digest] = Pieces()
    if parsed.role is Role.DATA:
        pieces.data = found
    elif parsed.role is Role.TRANSFER:
        pieces.transfer = found
    else:
        pieces.sidecars.append((parsed.number, found))


def _add_unseen(downloads: dict[str, Pieces], name: str, error: OSError) -> None:
    """Note that something of a download could not be looked at: nothing of it can be judged."""
    parsed = names.parse_blob(name)
    if parsed.role in _UNFINISHED:
        pieces = downloads.setdefault(parsed.digest, Pieces())
        pieces.unseen = f"{names.printable(name)} {os.strerror(error.errno or 0)}"


def _add_finished(blobs: int, downloads: dict[str, Pieces]) -> None:
    for digest, pieces in downloads.items():
        with contextlib.suppress(OSError):  # noted by the pass over all names
            pieces.finished = look(names.blob(digest), blobs)


@contextlib.contextmanager
def _folder(
    path: str, parent: int, named: Named, access: Access | None = None, *, follow: bool = False
) -> Iterator[int | None]:
    """A folder's descriptor; None where it is absent, or can't be listed (then noted).

    `path`: below the store, and its last name the one in `parent`. `access` is told where the
    server's user can't list it either.
    """
    name = os.path.basename(path)
    flags = os.O_RDONLY | os.O_DIRECTORY
    fd = None
    try:
        fd = fs.open_quietly(name, flags if follow else flags | os.O_NOFOLLOW, parent)
        fs.check_link(name, parent, os.fstat(fd))
        # Names may be listed without the right to look at what they stand for.
        os.stat(".", dir_fd=fd)
    except OSError as error:
        if not isinstance(error, FileNotFoundError) or look(name, parent) is not None:
            named.unlist(path, error)
            if access is not None:
                _shut(path, parent, access)
        yield None
    else:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def _shut(path: str, parent: int, access: Access) -> None:
    name = os.path.basename(path)
    with contextlib.suppress(OSError):
        status = os.stat(name, dir_fd=parent)
        if not stat.S_ISDIR(status.st_mode):
            return  # no right makes a folder of it
        if not access.may_list(status, parent, name):
            access.shut(path, entry(path, status), parent)

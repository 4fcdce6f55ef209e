"""One pass over ``blobs/`` and ``manifests/``: the healthy are counted, the oddities kept.

Below ``blobs/`` no symlink is followed; under ``manifests/`` they are, as the server does, since
what lies behind one protects blobs as well; depth is bounded, so a loop ends.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeAlias

from watcher import model
from watcher.model import BlobFault, Entry, Kind, Located, ManifestFault, Need, OddManifest, Subject
from watcher.observe import nested
from watcher.observe.access import Access, user_of
from watcher.ollama import manifests, names
from watcher.ollama.names import Role
from watcher.state import folders, fs

_PARTIAL, _TMP = "-partial", ".tmp"
#: For more digests than this, a listing costs less than a look for each name that they may have.
_LISTED_FROM = 100
_UNFINISHED = frozenset({Role.DATA, Role.SIDECAR, Role.TRANSFER})
_KINDS = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.FOLDER, stat.S_IFLNK: Kind.SYMLINK}
_TAG_DEPTH = 4
_SIDECARS_APART = 64  #: so many numbers in a row without a sidecar, and there are no more of them
_DEEPEST = 6  #: what lies deeper than this is of no use to the server, nor to us
_Parts: TypeAlias = tuple[str, ...]  #: of a path below ``manifests/``


@dataclass(slots=True)
class Pieces:
    data: Entry | None = None
    transfer: Entry | None = None
    sidecars: list[tuple[int | None, Entry]] = field(default_factory=list)
    finished: Entry | None = None
    unseen: str = ""  #: a name of it that could not be looked at, and why


def raise_own(error: OSError) -> None:
    """Raise an error that is about this process or machine, and says nothing about the store."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error


class Named:
    """What all manifests together name; `access` is for the user that the server runs as."""

    def __init__(self, access: Access | None = None, space: model.Tally | None = None) -> None:
        self.access = access or Access(model.ServerUser())
        self.space = space  #: what all takes, where that was asked for and each is a plain file
        #: Digits to (size, whether it is protected, index of a model that names it, more indexes …)
        self.digests: dict[str, tuple[int, ...]] = {}
        self.models: list[str] = []
        self.seen: dict[str, tuple[int, int]] = {}  #: the same with what identifies their manifests
        self.count = 0
        self.odd: list[OddManifest] = []
        self._paths: dict[str, str] = {}  #: the first one of those that differ by case alone
        #: Digests to which manifests give several sizes: each size, and the indexes of its models.
        self.disputed: dict[str, dict[int, list[int]]] = {}
        # As in `BlobCensus`.
        self.unlisted: list[str] = []
        self.failing: list[model.Unseen] = []
        self.foreign: list[str] = []
        self.unseen: list[model.Unseen] = []
        self.empty_folders: list[str] = []
        self.stuck_folders: list[str] = []
        self.loose = False  #: whether any digest is named and yet not protected

    def add(self, digest: str, size: int, models: Sequence[str]) -> None:
        """Name a digest that no manifest of the store names: it protects nothing."""
        if digest not in self.digests:
            first = len(self.models)
            self.models.extend(models)
            self.digests[digest] = (size, False, *range(first, len(self.models)))

    def unlist(self, path: str, error: OSError) -> None:
        """Note a folder below the store that could not be listed."""
        raise_own(error)
        self.unlisted.append(path)
        if error.errno not in (errno.EACCES, errno.EPERM):
            why = folders.NO_FOLDER.get(error.errno or 0) or os.strerror(error.errno or 0)
            self.failing.append(model.Unseen(path, why))

    def models_of(self, digest: str) -> tuple[str, ...]:
        return self.shown(self.digests.get(digest, ())[2:])

    def shown(self, indexes: Iterable[int]) -> tuple[str, ...]:
        return tuple(sorted({self.models[index] for index in indexes}))

    def size_of(self, digest: str) -> int | None:
        found = self.digests.get(digest)
        return found[0] if found else None

    def gives(self, digest: str, size: int) -> bool:
        return size == self.size_of(digest) or size in self.disputed.get(digest, ())

    def models_by_size(self, digest: str) -> dict[int, tuple[str, ...]]:
        """The sizes that manifests give a digest, and the models by which they do."""
        found = self.disputed.get(digest)
        if found is not None:
            return {size: self.shown(indexes) for size, indexes in found.items()}
        size = self.size_of(digest)
        return {} if size is None else {size: self.models_of(digest)}

    @contextlib.contextmanager
    def opened(self, path: str, parent: int, *, follow: bool = False) -> Iterator[int | None]:
        """A folder below the store; None where it is absent, or can't be listed and is noted so."""
        name, shown = os.path.basename(path), None
        flags = os.O_RDONLY | os.O_DIRECTORY | (0 if follow else os.O_NOFOLLOW)
        with contextlib.ExitStack() as held:
            try:
                fd = held.enter_context(fs.closing(fs.open_quietly(name, flags, parent)))
                fs.check_link(name, parent, os.fstat(fd))
                # Names may be listed without the right to look at what they stand for.
                os.stat(".", dir_fd=fd)
                shown = fd
            except OSError as error:
                if not isinstance(error, FileNotFoundError) or look(name, parent) is not None:
                    self._unopened_folder(path, parent, error)
            yield shown

    def _unopened_folder(self, path: str, parent: int, error: OSError) -> None:
        self.unlist(path, error)
        with contextlib.suppress(OSError):
            name = os.path.basename(path)
            status = os.stat(name, dir_fd=parent)
            # No right makes a folder of what is none.
            is_folder = stat.S_ISDIR(status.st_mode)
            if is_folder and not self.access.folder(parent, status, Need.READ, name):
                self.access.shut(path, entry(path, status), parent)

    # ------------------------------------------------------------ the walk through manifests/

    def walk(self, folder: int, parts: _Parts, *, hidden: bool, removable: bool) -> bool:
        """Read a folder (`hidden` from the server, `removable` by it); whether it gets empty."""
        path = "/".join(("manifests", *parts))
        itself = os.fstat(folder)
        if parts:  # its own folder is a name of the store
            self._take(itself)
        writable = self.access.folder(folder, itself, Need.WRITE)
        if not self.access.folder(folder, itself, Need.READ):
            hidden = True
            self.access.shut(path, entry(path, itself), folder)
        elif not writable:
            self.access.bar(Subject.MANIFEST_FOLDER, Need.WRITE, path, entry(path, itself), folder)
        try:
            with os.scandir(folder) as listing:
                # By name, as the server's glob gives them.
                items = sorted(listing, key=lambda item: item.name)
        except OSError as error:
            self.unlist(path, error)
            return False
        if not items:
            self.empty_folders.append(path)
        left = False
        for item in items:
            goes = self._item(item, folder, (*parts, item.name), hidden=hidden, removable=writable)
            left = left or not goes
        if not left and not removable:
            self.stuck_folders.append(path)
        return not left

    def _item(
        self, item: os.DirEntry[str], folder: int, parts: _Parts, *, hidden: bool, removable: bool
    ) -> bool:
        """Read what is at a name; whether it is a folder in which the start leaves nothing."""
        depth, path = len(parts), "/".join(("manifests", *parts))
        above_tags = depth < _TAG_DEPTH
        if item.is_symlink():
            self.space = None
        try:
            is_folder = item.is_dir(follow_symlinks=above_tags)
        except OSError as error:
            raise_own(error)
            is_folder = False
            if above_tags and error.errno != errno.ELOOP:
                self.unseen.append(model.Unseen(path, os.strerror(error.errno or 0)))
                return False
        if is_folder:
            if depth == _TAG_DEPTH:
                self._no_manifest(path, ManifestFault.MISPLACED, "a folder in a tag's place")
            if depth <= _DEEPEST:
                is_link = item.is_symlink()
                with self.opened(path, folder, follow=is_link and above_tags) as fd:
                    if fd is not None:
                        if is_link:
                            self.follow(item.name, folder, path, fd)
                        goes = self.walk(fd, parts, hidden=hidden, removable=removable)
                        return goes and not is_link
        elif depth == _TAG_DEPTH:
            self._manifest(folder, parts, path, hidden=hidden)
        else:
            why = f"a file {depth} deep; manifests lie {_TAG_DEPTH} deep"
            self._no_manifest(path, ManifestFault.MISPLACED, why)
        return False

    def follow(self, name: str, parent: int, path: str, folder: int) -> None:
        """Note an entered folder, unless it is what is there, or a trusted link led there."""
        found = os.fstat(folder)  # what is at its name may be exchanged by now
        with contextlib.suppress(OSError):
            named = os.stat(name, dir_fd=parent, follow_symlinks=False)
            is_link = stat.S_ISLNK(named.st_mode)
            if os.path.samestat(named, found) or (is_link and named.st_uid in (0, found.st_uid)):
                return
        self.foreign.append(path)

    def _take(self, found: os.stat_result) -> None:
        """Count what a file or folder takes; the length of a folder means nothing."""
        if self.space is not None:
            size = found.st_size if stat.S_ISREG(found.st_mode) else 0
            self.space = self.space.plus(size, found.st_blocks)

    def _no_manifest(self, path: str, fault: ManifestFault, why: str) -> None:
        self.space = None
        self.odd.append(OddManifest(path, fault, why))

    def _manifest(self, folder: int, parts: _Parts, path: str, *, hidden: bool) -> None:
        model = names.model_from_path(parts)
        if model is None:
            self._no_manifest(path, ManifestFault.BAD_NAME, "no valid model name")
            return
        try:
            # Followed, as the server does: a manifest behind a symlink protects its blobs as well.
            fd = fs.open_behind(parts[-1], folder)
        except OSError as error:
            if not isinstance(error, FileNotFoundError) or look(parts[-1], folder) is not None:
                self._unopened(error, folder, path, model.shown)
            return  # or removed since it was listed
        odd = OddManifest(path, ManifestFault.CORRUPT, "", model.shown)
        try:
            status = os.fstat(fd)
            if status.st_nlink > 1:
                self.space = None
            self._take(status)
            manifest = _parse_open(fd, status)
        except ValueError as error:
            self.odd.append(odd._replace(why=str(error), changed_at=status.st_mtime))
        except OSError as error:
            why = os.strerror(error.errno or 0)
            self.odd.append(odd._replace(fault=ManifestFault.UNREADABLE, why=why))
        else:
            self._count(odd, status, folder)
            self._name(manifest, odd, hidden=hidden)
        finally:
            os.close(fd)

    def _unopened(self, error: OSError, folder: int, path: str, model: str) -> None:
        raise_own(error)
        self.space = None
        name, fault = os.path.basename(path), ManifestFault.UNREADABLE
        if error.errno in (errno.EINVAL, errno.ENXIO):
            fault = ManifestFault.CORRUPT  # a device, a FIFO, a socket, a folder
        elif error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            found = look(name, folder)
            if found is not None and found.kind is Kind.SYMLINK:
                fault = ManifestFault.DANGLING
        barred, forbidden = False, isinstance(error, PermissionError)
        with contextlib.suppress(OSError):
            status = os.stat(name, dir_fd=folder) if forbidden else None
            if status is not None and not self.access.file(status, Need.READ):
                # Neither can the server's user read it.
                self.access.bar(Subject.MANIFEST, Need.READ, path, entry(name, status), folder)
                barred = True
        odd = OddManifest(path, fault, str(error.strerror), model, barred=barred)
        self.odd.append(odd._replace(hidden=forbidden and not barred))

    def _count(self, odd: OddManifest, status: os.stat_result, folder: int) -> None:
        path, name, model = odd.path, os.path.basename(odd.path), odd.model or ""
        self.models.append(model)
        self.seen[model] = (status.st_ino, status.st_mtime_ns)
        self.count += 1
        other = self._paths.setdefault(path.lower(), path)
        if other != path:
            self.odd.append(OddManifest(path, ManifestFault.CASE, other, model))
        if not self.access.file(status, Need.READ):
            why = f"the user id {self.access.user.uid} may not read it"
            self.odd.append(OddManifest(path, ManifestFault.UNREADABLE, why, model, barred=True))
            self.access.bar(Subject.MANIFEST, Need.READ, path, entry(name, status), folder)
        elif not self.access.file(status, Need.WRITE):
            self.access.bar(Subject.MANIFEST, Need.WRITE, path, entry(name, status), folder)

    def _name(self, manifest: manifests.Manifest, odd: OddManifest, *, hidden: bool) -> None:
        digests, faults = manifest
        if faults:
            self.odd.append(odd._replace(fault=ManifestFault.BAD_DIGEST, why=faults[0]))
        elif not digests:
            why = manifests.NAMES_NOTHING
            self.odd.append(odd._replace(fault=ManifestFault.EMPTY, why=why))
        index = len(self.models) - 1
        for digest, (size, protects) in digests.items():
            protected = protects and not hidden
            before = self.digests.get(digest)
            if before is None:
                self.digests[digest] = (size, protected, index)
            else:
                known, already, *others = before
                if size != known or digest in self.disputed:
                    by_size = self.disputed.setdefault(digest, {known: list(others)})
                    by_size.setdefault(size, []).append(index)
                protected = protected or bool(already)
                self.digests[digest] = (known, protected, *others, index)
            self.loose = self.loose or not protected


class Scan(NamedTuple):
    census: model.BlobCensus
    downloads: dict[str, Pieces]
    named: Named
    #: Of a survey, all of ``blobs/``: valid blobs summed up by their models, and the other names.
    listing: tuple[dict[tuple[str, ...], model.Tally], list[Entry]] | None = None


def entry(name: str, found: os.stat_result) -> Entry:
    return Entry(
        name,
        _KINDS.get(stat.S_IFMT(found.st_mode), Kind.OTHER),
        found.st_size,
        found.st_blocks * 512,
        found.st_dev,
        found.st_ino,
        found.st_nlink,
        found.st_mtime_ns,
        found.st_ctime_ns,
        found.st_uid,
        found.st_gid,
        stat.S_IMODE(found.st_mode),
    )


def look(name: str, folder: int) -> Entry | None:
    """One name in a folder as it is now, or None where it is gone."""
    try:
        return entry(name, os.stat(name, dir_fd=folder, follow_symlinks=False))
    except FileNotFoundError:
        return None


def content(name: str, folder: int) -> Entry | None:
    """What is read under a name, links followed as the server does; None for nothing."""
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
    found = contents(store, wanted)
    return frozenset(digest for digest, blob in found.items() if blob.size == wanted[digest])


def contents(store: int, digests: Iterable[str]) -> dict[str, Entry]:
    """The files that a server reads for some digests, links followed, where there are such."""
    found: dict[str, Entry] = {}
    with contextlib.suppress(OSError), folders.opened_blobs(store, foreign_too=True) as blobs:
        for digest in digests:
            with contextlib.suppress(OSError):
                blob = content(names.blob(digest), blobs)
                if blob is not None and blob.kind is Kind.FILE:
                    found[digest] = blob
    return found


def unfinished(store: int) -> frozenset[str]:
    """The digests of which there is an unfinished layer, or a sidecar of one."""
    with contextlib.suppress(OSError), folders.opened_blobs(store, foreign_too=True) as blobs:
        return _unfinished(blobs)
    return frozenset()


def _unfinished(blobs: int) -> frozenset[str]:
    # Most are finished blobs: those are distinguished by less.
    listed = (x for x in os.listdir(blobs) if x.endswith(_TMP) or _PARTIAL in x)
    seen = (names.parse_blob(names.new_spelling(name)) for name in listed)
    return frozenset(each.digest for each in seen if each.role in _UNFINISHED)


def scan_manifests(store: int, access: Access | None = None, *, space: bool = False) -> Named:
    """Read all manifests, for the server's user (None: the owner); `space`: sum up their sizes."""
    named = Named(access or Access(user_of(store, None)), model.Tally() if space else None)
    with named.opened("manifests", store, follow=True) as top:
        if top is not None:
            named.follow("manifests", store, "manifests", top)
            removable = named.access.folder(store, os.fstat(store), Need.WRITE)
            named.walk(top, (), hidden=False, removable=removable)
    return named


def _parse_open(fd: int, status: os.stat_result) -> manifests.Manifest:
    if status.st_size > manifests.READ_LIMIT:
        raise ValueError(f"{status.st_size:,} bytes are too many for a manifest")
    return manifests.parse(fs.read_open(fd, status.st_size))


def scan_store(store: int, access: Access, mode: model.Mode, *, manifests_hidden: bool) -> Scan:
    """One pass over a store, for the server's user; `manifests_hidden`: who sees none."""
    named = scan_manifests(store, access, space=mode.survey)
    census = _Census(named, mode, manifests_hidden=manifests_hidden)
    # blobs/ itself may be a symlink that the owner made; nothing below it is followed.
    with named.opened("blobs", store, follow=True) as fd:
        if fd is not None:
            named.follow("blobs", store, "blobs", fd)
            census.scan(fd)
            for digest, pieces in census.old_downloads.items():
                census.downloads.setdefault(digest, pieces)
            _add_finished(fd, census.downloads)
        census.look_for_stores(store)
        if fd is not None or "blobs" not in named.unlisted:
            census.missing(fd)
    for name in os.listdir(store):
        found = look(name, store) if name.startswith("ollama-safetensors") else None
        if found is not None and found.kind is Kind.FOLDER:
            census.temporaries.append(Located(name, found))
    writable = named.access.folder(store, os.fstat(store), Need.WRITE)
    if not writable and any(look(name, store) is None for name in ("blobs", "manifests")):
        # A server has to make what is missing.
        named.access.bar(Subject.STORE, Need.WRITE, ".", entry(".", os.fstat(store)), store)
    listing = census.listing() if mode.survey else None
    return Scan(census.result(), census.downloads, named, listing)


def lying(store: int, wanted: Mapping[str, int], name: str) -> tuple[model.OddBlob, ...]:
    """Of a model's layers, digests with their bytes, those that lie where no server looks."""
    named = Named()
    for digest, size in wanted.items():
        named.add(digest, size, [name])
    census = _Census(named, model.Mode(), manifests_hidden=False)
    with named.opened("blobs", store, follow=True) as fd:
        if fd is not None:
            census.scan(fd)
            census.look_for_stores(store)
            census.missing(fd)
    return tuple(odd for odd in census.odd if odd.lies is not None)


def scan_above(path: str, access: Access) -> None:
    """Look whether the server's user can pass through a store's folder and those above it."""
    if access.user.unbarred or access.user.elsewhere:
        return  # a container has other folders above it
    for above in folders.down_to(os.path.realpath(path)):
        with contextlib.suppress(OSError), fs.closing(os.open(above, folders.UNLISTED)) as fd:
            if not access.folder(fd, os.fstat(fd), Need.ENTER):
                itself = entry(above, os.fstat(fd))
                access.bar(Subject.FOLDER, Need.ENTER, above, itself, fd)


def scan_digests(store: int, digests: Set[str]) -> Scan:
    """Downloads by their names: no manifest is read, and for a few digests no folder listed."""
    named = Named()
    downloads: dict[str, Pieces] = {}
    with named.opened("blobs", store, follow=True) as fd:
        if fd is not None:
            if len(digests) > _LISTED_FROM:
                digests = digests & _unfinished(fd)
            for digest in digests:
                # Names of older servers count where there are no others.
                spelled = list(_spelled(names.data(digest), fd))
                for found in spelled or _spelled(f"sha256:{digest}-partial", fd):
                    piece = names.parse_blob(names.new_spelling(found.name))
                    _add_piece(downloads, piece, found)
            _add_finished(fd, downloads)
    census = model.BlobCensus(unlisted=tuple(named.unlisted), failing=tuple(named.failing))
    return Scan(census, downloads, named)


def _spelled(data: str, blobs: int) -> Iterator[Entry]:
    """A download's entries by the names that they have, up to the last sidecar that is there."""
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


class _Census:
    def __init__(self, named: Named, mode: model.Mode, *, manifests_hidden: bool) -> None:
        self.named, self.access, self.mode = named, named.access, mode
        self.downloads: dict[str, Pieces] = {}
        #: Whether a blob that is named may still be unprotected; rare, so looked at only then.
        self.loose = named.loose or manifests_hidden
        self.manifests_hidden = manifests_hidden
        self._sums: dict[tuple[int, ...], model.Tally] = {}  #: blobs by the models that name them
        self._others: list[Entry] = []  #: all other names
        self.folder = -1
        self.unseen: list[model.Unseen] = []
        self.named_blobs: list[tuple[Entry, tuple[str, ...]]] = []
        #: The server's user can't add, rename and remove names; only rename and remove its own.
        self.sealed = self.sticky = False
        self.entries = self.allocated = self.healthy = self.healthy_bytes = 0
        self.odd: list[model.OddBlob] = []
        self.unnamed: list[Entry] = []
        self._astray: dict[str, list[Located]] = {}  #: where no server looks, by digest
        self.old_downloads: dict[str, Pieces] = {}  #: in the spelling of older servers
        self.old: list[Located] = []
        self.rename_faults: list[str] = []
        self.old_protected: set[str] = set()
        self.unprotected: list[Entry] = []
        self.temporaries: list[Located] = []
        self.foreign: list[Entry] = []
        self.nested: list[model.Nested] = []

    def scan(self, blobs: int) -> None:
        self.folder = blobs
        self._judge_folder()
        with os.scandir(blobs) as listing:
            try:
                self._scan_names(listing)
            except OSError as error:
                # The disk gives no more of its names.
                self.named.unlist("blobs", error)

    def _judge_folder(self) -> None:
        access, status = self.access, os.fstat(self.folder)
        itself = entry("blobs", status)
        if not access.folder(self.folder, status, Need.READ):
            access.shut("blobs", itself, self.folder)
        elif not access.folder(self.folder, status, Need.WRITE):
            self.sealed = True
            access.bar(Subject.FOLDER, Need.WRITE, "blobs", itself, self.folder)
        # In such a folder a name goes, and is renamed, by its owner and by the folder's alone.
        others = status.st_uid != access.user.uid and not access.user.unbarred
        self.sticky = bool(status.st_mode & stat.S_ISVTX) and others

    def _scan_names(self, listing: Iterable[os.DirEntry[str]]) -> None:
        wanted, special = self.named.digests, self.loose or self.mode.verify or self.mode.survey
        # Most blobs have one owner and one mode: those of the one before, and if they are barred.
        before, barred = (-1, -1, -1), False
        for item in listing:
            name = item.name
            try:
                found = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._unsee(name, error)
                continue
            self.entries += 1
            self.allocated += found.st_blocks * 512
            # The common case first, and bare: it decides how long a large store takes.
            reference = wanted.get(name[7:])
            if (
                reference is not None
                and reference[0] == found.st_size
                and stat.S_ISREG(found.st_mode)
                and name[:7] == "sha256-"
            ):
                self.healthy += 1
                self.healthy_bytes += found.st_size
                owned = found.st_mode, found.st_uid, found.st_gid
                if owned != before:
                    before, barred = owned, not self.access.file(found, Need.READ)
                if barred:
                    self._bar(Need.READ, entry(name, found))
                if special:
                    self._healthy_blob(name, found)
                continue
            listed = entry(name, found)
            if self.mode.survey:
                self._others.append(listed)
            self._sort_out(listed)
            if listed.kind is Kind.FOLDER or name.startswith("sha256:"):
                self._look_at_walk(listed, self.folder, f"blobs/{name}")

    def _unsee(self, name: str, error: OSError) -> None:
        """Note a name that could not be looked at: nothing of its download can be judged."""
        raise_own(error)
        why = os.strerror(error.errno or 0)
        self.unseen.append(model.Unseen(f"blobs/{name}", why))
        parsed = names.parse_blob(name)
        if parsed.role in _UNFINISHED:
            pieces = self.downloads.setdefault(parsed.digest, Pieces())
            pieces.unseen = f"{names.printable(name)} {why}"

    def _bar(self, need: Need, found: Entry) -> None:
        subject = Subject.BLOB if need is Need.READ else Subject.DOWNLOAD
        self.access.bar(subject, need, f"blobs/{found.name}", found, self.folder)

    def _healthy_blob(self, name: str, found: os.stat_result) -> None:
        """Keep a healthy blob that is asked for, or that no manifest protects."""
        digest = name[7:]
        if self.mode.survey and found.st_nlink > 1:
            self._others.append(entry(name, found))
        elif self.mode.survey:
            indexes = self.named.digests[digest][2:]
            before = self._sums.get(indexes, model.Tally())
            self._sums[indexes] = before.plus(found.st_size, found.st_blocks)
        if self.loose or self.mode.verify:
            listed = entry(name, found)
            self._guard(digest, listed)
            if self.mode.verify:
                self.named_blobs.append((listed, self.named.models_of(digest)))

    def _sort_out(self, found: Entry) -> None:
        parsed = names.parse_blob(found.name)
        path, is_file = f"blobs/{found.name}", found.kind is Kind.FILE
        match parsed.role:
            case Role.BLOB:
                self._blob(parsed.digest, found)
                if is_file and not self.access.file(found, Need.READ):
                    self._bar(Need.READ, found)
            case Role.DATA | Role.SIDECAR | Role.TRANSFER:
                _add_piece(self.downloads, parsed, found)
                stuck = self.sticky and found.uid != self.access.user.uid
                if is_file and (stuck or not self.access.file(found, Need.WRITE)):
                    self._bar(Need.WRITE, found)
            case Role.OLD:
                self.old.append(Located(path, found))
                self._stray(path, found)
                parsed = names.parse_blob(names.new_spelling(found.name))
                if parsed.role is Role.BLOB and self._protects(parsed.digest):
                    self.old_protected.add(path)
                elif parsed.role in _UNFINISHED:
                    _add_piece(self.old_downloads, parsed, found)
            case Role.UPLOAD | Role.CREATE if is_file:
                self.temporaries.append(Located(path, found))
            case _ if found.kind is Kind.FOLDER and found.name.startswith("split-gguf-"):
                self.temporaries.append(Located(path, found))
            case _:
                self.foreign.append(found)

    def _blob(self, digest: str, found: Entry) -> None:
        size = self.named.size_of(digest)
        if size is None:
            (self.unnamed if found.kind is Kind.FILE else self.foreign).append(found)
            return
        self._guard(digest, found)
        read: Entry | None = found
        behind: Entry | None = None
        if found.kind is Kind.SYMLINK:
            try:
                read = behind = content(found.name, self.folder)
            except OSError as error:
                self._unsee(found.name, error)
                return
        models = self.named.models_of(digest)
        is_file = read is not None and read.kind is Kind.FILE
        if self.mode.verify and read is not None and is_file:
            self.named_blobs.append((read, models))
        fault = BlobFault.SYMLINK
        if read is None:
            fault = BlobFault.DANGLING
        elif not is_file:
            fault = BlobFault.NO_FILE
        elif size >= 0 and not self.named.gives(digest, read.size):
            # No file has a negative size: then the manifest is at fault, not the blob.
            fault = BlobFault.SHORT if read.size < size else BlobFault.LONG
        elif behind is None:
            self.healthy += 1
            self.healthy_bytes += found.size
            return
        self.odd.append(model.OddBlob(digest, fault, size, found, models, behind=behind))

    def _guard(self, digest: str, found: Entry) -> None:
        """Keep a named blob in mind that the server's clean-up would not spare."""
        if self.loose and not self._protects(digest):
            self.unprotected.append(found)

    def _protects(self, digest: str) -> bool:
        named = self.named.digests.get(digest)
        return named is not None and bool(named[1]) and not self.manifests_hidden

    # ------------------------------------------------------------ the rest of the store

    def missing(self, blobs: int | None) -> None:
        """Add what manifests name and ``blobs/`` does not have; None where that is not there."""
        if self.healthy + len(self.odd) == len(self.named.digests):
            return
        unseen = {each.path for each in self.unseen}
        for each in self.unnamed:
            self._stray(f"blobs/{each.name}", each)
        for digest in self.named.digests.keys() - {odd.digest for odd in self.odd}:
            name = names.blob(digest)
            if f"blobs/{name}" in unseen:
                continue
            try:
                found = None if blobs is None else look(name, blobs)
            except OSError as error:
                self._unsee(name, error)
                continue
            if found is None:
                named = self.named.size_of(digest), None, self.named.models_of(digest)
                lies = None if blobs is None else self._lies(digest, blobs)
                self.odd.append(model.OddBlob(digest, BlobFault.MISSING, *named, lies=lies))

    def _stray(self, path: str, found: Entry) -> None:
        """Note a file with a blob's name, or an old one, where no server looks for it."""
        spelled = names.SPELLED_DIGEST.fullmatch(found.name)
        if spelled is not None and found.kind is Kind.FILE:
            self._astray.setdefault(spelled[2].lower(), []).append(Located(path, found))

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
        for top, *found in nested.find(store, inside):
            blobs, manifests = (
                tuple(Located(path, entry(os.path.basename(path), status)) for path, status in each)
                for each in found
            )
            for path, blob in blobs:
                if not path.startswith("blobs/"):
                    self._stray(path, blob)
            inner = (*blobs, *manifests)
            is_there = partial(os.access, mode=os.F_OK, dir_fd=store, follow_symlinks=False)
            twins = [each for each in inner if is_there(each.path.removeprefix(f"{top}/"))]
            unfinished = {names.parse_blob(each.entry.name).role for each in twins} & _UNFINISHED
            apart = len(inner) - len(twins)
            self.nested.append(model.Nested(top, blobs, manifests, apart, bool(unfinished)))

    def _look_at_walk(self, found: Entry, parent: int, path: str) -> None:
        """What the server's start, which walks through ``blobs/`` and renames, will meet here."""
        inner: list[str] = []
        if found.kind is Kind.FOLDER:
            with self.named.opened(path, parent) as fd:
                if fd is not None:
                    inner = sorted(os.listdir(fd))
                    self._look_into(fd, path, inner)
        if found.name.startswith("sha256:"):
            fault = _rename_fault(found, parent, inner)
            if fault:
                self.rename_faults.append(f"{names.printable(path)} {fault}")

    def _look_into(self, fd: int, path: str, inner: list[str]) -> None:
        if not self.access.folder(fd, os.fstat(fd), Need.READ):
            self.access.shut(path, entry(path, os.fstat(fd)), fd)
        if path.count("/") >= _DEEPEST:
            return
        for name in inner:
            found, below = look(name, fd), f"{path}/{name}"
            if found is not None:
                if name.startswith("sha256:"):
                    self.old.append(Located(below, found))
                self._stray(below, found)
                self._look_at_walk(found, fd, below)

    # ------------------------------------------------------------ what came of it

    def listing(self) -> tuple[dict[tuple[str, ...], model.Tally], list[Entry]] | None:
        """All of ``blobs/``; None where not all of it could be looked at."""
        if "blobs" in self.named.unlisted or self.unseen or self.folder == -1:
            return None
        sums: dict[tuple[str, ...], model.Tally] = {}
        for indexes, tally in self._sums.items():
            models = self.named.shown(indexes)
            sums[models] = sums.get(models, model.Tally()).joined(tally)
        return sums, self._others

    def result(self) -> model.BlobCensus:
        return model.BlobCensus(
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
    pieces = downloads.setdefault(parsed.digest, Pieces())
    if parsed.role is Role.DATA:
        pieces.data = found
    elif parsed.role is Role.TRANSFER:
        pieces.transfer = found
    else:
        pieces.sidecars.append((parsed.number, found))


def _add_finished(blobs: int, downloads: dict[str, Pieces]) -> None:
    for digest, pieces in downloads.items():
        with contextlib.suppress(OSError):  # noted by the pass over all names
            pieces.finished = look(names.blob(digest), blobs)

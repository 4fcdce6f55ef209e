"""Finished blobs, in their places and in quarantine, with what is remembered: a hash decides."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Set
from typing import TypeAlias

from watcher import model
from watcher.model import DOUBTFUL, BlobFault, Entry, Kept, Kind, OddBlob, Unseen
from watcher.observe import scan
from watcher.ollama import names
from watcher.state import folders, state_folder
from watcher.state.memory import Asked, Memory, bound_to
from watcher.state.registry_cache import KnownLayer, KnownLayers

QUARANTINE = state_folder.QUARANTINE
_NO_FILE = frozenset({"", ".", ".."})
_UNKNOWN_LAYER = KnownLayer(0, ())
_DISPUTED = "other manifests give that blob the size that it has"

#: What the kept manifests of registries have of layers, by digest.
Layers: TypeAlias = Callable[[], KnownLayers]
#: By digest the bytes that a blob has, and why they are right.
_Sized: TypeAlias = dict[str, tuple[int, str]]


def with_memory(
    found: scan.Scan, memory: Memory, store: int, now: float, layers: Layers
) -> model.BlobCensus:
    """The census with what is remembered of its blobs; `layers` is called where it matters."""
    census = found.census
    odd, sized = _decided(found, memory, now)
    known = {each.digest for each in odd}
    unseen = census.unseen
    # How many of the named blobs were right when hashed last, and the files that were wrong.
    named, faulty = found.named.digests.keys(), {each.digest for each in census.odd}
    hashed, wrong = 0, set[str]()
    for right, not_right in memory.hashes.blobs():
        hashed += len((right & named) - faulty)
        wrong |= not_right
    corrupt: list[OddBlob] = []
    unproven: list[Entry] = []
    suspects: list[Entry] = []
    try:
        with folders.opened_blobs(store, foreign_too=True) as blobs:
            suspects = _suspects(found, memory, wrong, blobs)
            sized = {**_disputed(found, blobs, known), **sized}
    except FileNotFoundError:
        pass
    except OSError as error:
        scan.raise_own(error)
        if "blobs" not in census.unlisted:
            unseen = (*unseen, Unseen("blobs", os.strerror(error.errno or 0)))
    for entry in suspects:
        digest = names.parse_blob(entry.name).digest
        if digest not in known and entry.sha256 is None:
            unproven.append(entry)
        elif digest not in known and entry.sha256 != digest.lower():
            size, models = found.named.size_of(digest), found.named.models_of(digest)
            odd_one = OddBlob(digest, BlobFault.CORRUPT, size, entry, models)
            corrupt.append(_corrupt(_with_registry(odd_one, memory, now), memory))
    # They have the right size, so they were counted as healthy.
    counted = [each.entry for each in corrupt if each.entry is not None and each.wanted is not None]
    return census._replace(
        odd=tuple(sorted((*odd, *corrupt), key=lambda each: each.digest)),
        odd_manifests=(*census.odd_manifests, *_wrong_sizes(found.named, sized, layers)),
        named=tuple((remembered(content, memory), models) for content, models in census.named),
        unnamed=tuple(remembered(entry, memory) for entry in census.unnamed),
        unproven=tuple(unproven),
        unseen=unseen,
        hashed=hashed,
        healthy=census.healthy - len(counted),
        healthy_bytes=census.healthy_bytes - sum(entry.size for entry in counted),
    )


def _decided(found: scan.Scan, memory: Memory, now: float) -> tuple[list[OddBlob], _Sized]:
    """Odd blobs, and the sizes of those with the right hash whose manifests give another one."""
    odd: list[OddBlob] = []
    sized: _Sized = {}
    for seen in found.census.odd:
        each = _with_registry(seen, memory, now)
        content = each.content and remembered(each.content, memory)
        if content is None or content.sha256 is None:
            odd.append(each)
            continue
        link = each.behind is not None
        each = each._replace(behind=content) if link else each._replace(entry=content)
        if content.sha256 != each.digest.lower():
            odd.append(_corrupt(each, memory))
            continue
        if each.fault in DOUBTFUL:
            sized[each.digest] = content.size, f"its {content.size:,} bytes are the right ones"
        if link:
            odd.append(each._replace(fault=BlobFault.SYMLINK))
    return odd, sized


def _suspects(found: scan.Scan, memory: Memory, wrong: Set[str], blobs: int) -> list[Entry]:
    """Files that were found corrupt, or were finished on sidecars of ours, as far as known now."""
    mended = {key for key, record in memory.downloads.items() if record.mended}
    wanted = set(map(names.blob, memory.unproven | (mended - found.downloads.keys())))
    suspects: list[Entry] = []
    for name in filter(names.is_blob, sorted(wrong | wanted)):
        with contextlib.suppress(OSError):
            entry = scan.look(name, blobs)
            if entry is not None and entry.kind is Kind.FILE:
                suspects.append(remembered(entry, memory))
    return suspects


def _with_registry(odd: OddBlob, memory: Memory, now: float) -> OddBlob:
    reply = asked(memory, odd.digest, now)
    return odd._replace(registry=reply and reply.length, asked=reply is not None)


def _corrupt(odd: OddBlob, memory: Memory) -> OddBlob:
    hashed = memory.hashes.get(names.blob(odd.digest))
    return odd._replace(fault=BlobFault.CORRUPT, wrong=() if hashed is None else hashed.wrong)


def _disputed(found: scan.Scan, blobs: int, odd: Iterable[str]) -> _Sized:
    """The sizes of blobs to which manifests give several, and which have one of them."""
    sizes: _Sized = {}
    for digest in found.named.disputed.keys() - set(odd):
        with contextlib.suppress(OSError):
            if content := scan.content(names.blob(digest), blobs):
                sizes[digest] = content.size, _DISPUTED
    return sizes


def _wrong_sizes(named: scan.Named, sized: _Sized, layers: Layers) -> Iterator[model.OddManifest]:
    known = layers() if sized else {}
    for digest, (size, why) in sorted(sized.items()):
        for wanted, models in sorted(named.models_by_size(digest).items()):
            for name in models if wanted != size else ():
                parsed = names.parse_model(name)
                path = f"manifests/{parsed.path}" if parsed is not None else "manifests"
                reply = f"it gives {names.short(digest)} {wanted:,} bytes, and {why}"
                odd = model.OddManifest(path, model.ManifestFault.WRONG_SIZE, reply, name)
                layer = known.get(digest, _UNKNOWN_LAYER)
                same = (name, wanted) in zip(layer.models, layer.sizes, strict=True)
                yield odd._replace(published=same)


def remembered(found: Entry, memory: Memory) -> Entry:
    """The entry with what is remembered of it: its own time where we set another, its hash."""
    found = with_own_time(found, memory)
    hashed = memory.hashes.get(found.name)
    if hashed is not None and hashed[:3] == (found.inode, found.size, bound_to(found)):
        return found._replace(sha256=hashed.sha256)
    return found


def with_own_time(found: Entry, memory: Memory) -> Entry:
    """The entry with its own time where we set another: all there is to know of a progress file."""
    touched = memory.touched.get(found.name)
    if touched is not None and (touched.inode, touched.set_ns) == (found.inode, found.mtime_ns):
        return found._replace(own_mtime_ns=touched.own_ns)
    return found


def asked(memory: Memory, digest: str, now: float) -> Asked | None:
    """What a registry answered about a digest within the hour; None where none was asked."""
    found = memory.asked.get(digest)
    return found if found is not None and found.counts(now) else None


def look_at_quarantine(store: int, memory: Memory) -> tuple[tuple[Kept, ...], Unseen | None]:
    """All ``<number>-<own name>``, the oldest first; why they can't be listed, if so."""
    kept: list[Kept] = []
    try:
        with state_folder.opened(store, QUARANTINE) as folder:
            for label in sorted(os.listdir(folder)):
                number, dash, name = label.partition("-")
                ours = number.isascii() and number.isdecimal() and dash
                entry = scan.look(label, folder)
                if ours and name not in _NO_FILE and entry is not None:
                    kept.append(Kept(label, name, entry, replaced=False))
    except FileNotFoundError:
        return (), None
    except OSError as error:
        scan.raise_own(error)
        inside = "" if error.filename == state_folder.FOLDER else f"/{QUARANTINE}"
        path = f"{state_folder.FOLDER}{inside}"
        return (), Unseen(path, str(error.strerror), isinstance(error, PermissionError))
    try:
        with folders.opened_blobs(store, foreign_too=True) as blobs:
            return tuple(_with_place(each, blobs, memory) for each in kept), None
    except FileNotFoundError:
        return tuple(kept), None
    except OSError:
        return tuple(each._replace(place_seen=False) for each in kept), None


def _with_place(kept: Kept, blobs: int, memory: Memory) -> Kept:
    try:
        there, read = scan.look(kept.name, blobs), scan.content(kept.name, blobs)
    except OSError:
        return kept._replace(place_seen=False)
    sha256 = read and remembered(read, memory).sha256
    good = bool(sha256) and sha256 == names.parse_blob(kept.name).digest.lower()
    return kept._replace(replaced=good, there=there)

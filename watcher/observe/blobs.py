"""What is remembered of finished blobs, put together with what was seen: a known hash decides."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Set

from watcher.model import (
    DOUBTFUL,
    BlobCensus,
    BlobFault,
    Entry,
    Kind,
    ManifestFault,
    OddBlob,
    OddManifest,
    Unseen,
)
from watcher.observe import scan
from watcher.ollama import names
from watcher.state import folders
from watcher.state.memory import Memory, bound_to

_DISPUTED = "other manifests give that blob the size that it has"


def with_memory(found: scan.Scan, memory: Memory, store: int, now: float) -> BlobCensus:
    """The census with what is remembered of its blobs."""
    census = found.census
    odd, sized = _decided(found, memory, now)
    known = {each.digest for each in odd}
    unseen = list(census.unseen)
    hashed, wrong = _hashed(found, memory)
    with _opened(store, unseen) as blobs:
        suspects = _suspects(found, memory, wrong, blobs)
        corrupt = [_corrupt(found, memory, each, now) for each in suspects if _is_wrong(each)]
        corrupt = [each for each in corrupt if each.digest not in known]
        sized = {**_disputed(found, blobs, known), **sized}
    # They have the right size, so they were counted as healthy.
    counted = [each.entry for each in corrupt if each.entry is not None and each.wanted is not None]
    known |= {each.digest for each in corrupt}
    return census._replace(
        odd=tuple(sorted((*odd, *corrupt), key=lambda each: each.digest)),
        odd_manifests=(*census.odd_manifests, *_wrong_sizes(found.named, sized)),
        named=tuple((remembered(content, memory), models) for content, models in census.named),
        unnamed=tuple(remembered(entry, memory) for entry in census.unnamed),
        unproven=tuple(
            each
            for each in suspects
            if each.sha256 is None and names.parse_blob(each.name).digest not in known
        ),
        unseen=census.unseen if "blobs" in census.unlisted else tuple(unseen),
        hashed=hashed,
        healthy=census.healthy - len(counted),
        healthy_bytes=census.healthy_bytes - sum(entry.size for entry in counted),
    )


@contextlib.contextmanager
def _opened(store: int, unseen: list[Unseen]) -> Iterator[int | None]:
    """The descriptor of ``blobs/``; None where it is not there, or can't be opened (noted)."""
    with contextlib.ExitStack() as opened:
        try:
            blobs = opened.enter_context(folders.opened_blobs(store, foreign_too=True))
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                unseen.append(Unseen("blobs", os.strerror(error.errno or 0)))
            yield None
            return
        yield blobs


# ---------------------------------------------------------------- what a hash decides


def _decided(
    found: scan.Scan, memory: Memory, now: float
) -> tuple[list[OddBlob], dict[str, tuple[int, str]]]:
    """Odd blobs, and the sizes of those with the right hash whose manifests say another one."""
    odd: list[OddBlob] = []
    sized: dict[str, tuple[int, str]] = {}
    for seen in found.census.odd:
        each = _with_registry(seen, memory, now)
        content = each.content and remembered(each.content, memory)
        if content is None or content.sha256 is None:
            odd.append(each)
            continue
        each = _with_content(each, content)
        if content.sha256 != each.digest.lower():
            odd.append(each._replace(fault=BlobFault.CORRUPT))
            continue
        if each.fault in DOUBTFUL:
            sized[each.digest] = content.size, f"its {content.size} bytes are the right ones"
        if each.behind is not None:
            odd.append(each._replace(fault=BlobFault.SYMLINK))
    return odd, sized


def _with_content(odd: OddBlob, content: Entry) -> OddBlob:
    return odd._replace(entry=content) if odd.behind is None else odd._replace(behind=content)


def _suspects(found: scan.Scan, memory: Memory, wrong: Set[str], blobs: int | None) -> list[Entry]:
    """Files that were found corrupt, or were finished on sidecars of ours, as far as known now."""
    mended = {
        digest
        for digest, record in memory.downloads.items()
        if record.mended and digest not in found.downloads
    }
    wanted = {names.blob(digest) for digest in memory.unproven | mended}
    if blobs is None:
        return []
    listed = (_look(name, blobs) for name in sorted(wrong | wanted) if names.is_blob(name))
    return [remembered(entry, memory) for entry in listed if entry is not None]


def _look(name: str, blobs: int) -> Entry | None:
    """A file; None for anything else, and for what can't be looked at."""
    try:
        entry = scan.look(name, blobs)
    except OSError:
        return None
    return entry if entry is not None and entry.kind is Kind.FILE else None


def _hashed(found: scan.Scan, memory: Memory) -> tuple[int, set[str]]:
    """How many of the named blobs were right when hashed last, and the files that were wrong."""
    named, odd = found.named.digests.keys(), {each.digest for each in found.census.odd}
    count, wrong = 0, set[str]()
    for some in memory.hashes.blobs():
        count += len((some.right & named) - odd)
        wrong |= some.wrong
    return count, wrong


def _is_wrong(entry: Entry) -> bool:
    digest = names.parse_blob(entry.name).digest.lower()
    return entry.sha256 is not None and entry.sha256 != digest


def _corrupt(found: scan.Scan, memory: Memory, entry: Entry, now: float) -> OddBlob:
    digest = names.parse_blob(entry.name).digest
    size, models = found.named.size_of(digest), found.named.models_of(digest)
    return _with_registry(OddBlob(digest, BlobFault.CORRUPT, size, entry, models), memory, now)


def _with_registry(odd: OddBlob, memory: Memory, now: float) -> OddBlob:
    asked = was_asked(memory, odd.digest, now)
    return odd._replace(registry=registry_length(memory, odd.digest, now), asked=asked)


# ---------------------------------------------------------------- manifests with a wrong size


def _disputed(
    found: scan.Scan, blobs: int | None, odd: Iterable[str]
) -> dict[str, tuple[int, str]]:
    """The sizes of blobs to which manifests give several, and which have one of them."""
    sizes: dict[str, tuple[int, str]] = {}
    if blobs is None:
        return sizes
    for digest in found.named.disputed.keys() - set(odd):
        with contextlib.suppress(OSError):
            content = scan.content(names.blob(digest), blobs)
            if content is not None:
                sizes[digest] = content.size, _DISPUTED
    return sizes


def _wrong_sizes(named: scan.Named, sized: Mapping[str, tuple[int, str]]) -> Iterator[OddManifest]:
    """The manifests that give a blob a size that is not its own."""
    for digest, (size, why) in sorted(sized.items()):
        for wanted, models in sorted(named.models_by_size(digest).items()):
            for model in models if wanted != size else ():
                parsed = names.parse_model(model)
                path = f"manifests/{parsed.path}" if parsed is not None else "manifests"
                said = f"it gives {names.short(digest)} {wanted} bytes, and {why}"
                yield OddManifest(path, ManifestFault.WRONG_SIZE, said, model)


# ---------------------------------------------------------------- what is remembered


def remembered(found: Entry, memory: Memory) -> Entry:
    """The entry with what is remembered of it: its own time where we set another, its hash."""
    found = _with_own_time(found, memory)
    hashed = memory.hashes.get(found.name)
    if hashed is not None and hashed[:3] == (found.inode, found.size, bound_to(found)):
        return found._replace(sha256=hashed.sha256)
    return found


def _with_own_time(found: Entry, memory: Memory) -> Entry:
    if memory.touched:
        touched = memory.touched.get(found.name)
        if touched is not None and (touched.inode, touched.set_ns) == (found.inode, found.mtime_ns):
            return found._replace(own_mtime_ns=touched.own_ns)
    return found


def registry_length(memory: Memory, digest: str, now: float) -> int | None:
    """What a registry said of a digest within the hour; None where it said nothing."""
    return memory.asked[digest].length if was_asked(memory, digest, now) else None


def was_asked(memory: Memory, digest: str, now: float) -> bool:
    """Whether a registry was asked about a digest within the hour."""
    asked = memory.asked.get(digest)
    return asked is not None and asked.counts(now)

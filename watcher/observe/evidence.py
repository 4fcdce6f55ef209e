"""One look at a store: listing, parts and processes joined to `Evidence`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from watcher import files, names, sidecars
from watcher.memory import Memory, Record
from watcher.model import (
    Download,
    Entry,
    Evidence,
    Holder,
    Kind,
    ManifestFault,
    Place,
    Policy,
    Sidecar,
    Trust,
)
from watcher.observe import holders, parts, place, scan
from watcher.world import World

#: A manifest is written in place: half of one is normal for an instant.
_WRITING_SECONDS = 2.0
_LOOK_AGAIN_SECONDS = 0.1
_MOST_LOOKS = 5


class _ChangedMeanwhile(Exception):  # noqa: N818 - a signal inside this file, no error
    """An entry is not what it was when it was listed."""


def observe(
    world: World, policy: Policy, memory: Memory, scope: frozenset[str] | None = None
) -> Evidence:
    """Look at the whole store, or at the downloads of some digests (`scope`).

    Raises NoPermissionError where the store's folder can't be entered, FileNotFoundError where it
    is gone.
    """
    try:
        with files.opened_folder(world.store) as store:
            return _observe(world, policy, memory, scope, store)
    except PermissionError:
        raise place.no_permission(world.store) from None


def _observe(
    world: World, policy: Policy, memory: Memory, scope: frozenset[str] | None, store: int
) -> Evidence:
    where = place.describe(world, store)
    found = _scan(world, store, scope, where)
    downloads = _downloads(world, policy, memory, found, store)
    seen = holders.see(
        world,
        [entry for download in downloads for entry in download.entries],
        network=where.network,
        writers_visible=policy.writers_visible,
    )
    return Evidence(
        place=where,
        now=world.clock(),
        view=seen.view,
        servers=tuple(server for server in seen.servers if server.ours is not False),
        others=seen.others,
        downloads=tuple(
            _with_holders(download, seen.holders)
            for download in sorted(downloads, key=lambda download: download.digest)
        ),
        census=found.census,
        scope=scope,
    )


def _scan(world: World, store: int, scope: frozenset[str] | None, where: Place) -> scan.Scan:
    """A pass in which no manifest was being written."""
    for _ in range(_MOST_LOOKS):
        if scope is None:
            found = scan.scan_store(store, manifests_hidden=where.globbed)
        else:
            found = scan.scan_digests(store, scope)
        now = world.clock()
        if not any(
            odd.fault is ManifestFault.CORRUPT
            and odd.changed_at is not None
            and abs(now - odd.changed_at) < _WRITING_SECONDS
            for odd in found.named.odd
        ):
            break
        world.sleep(_LOOK_AGAIN_SECONDS)
    return found


def _with_holders(download: Download, found: Mapping[str, tuple[Holder, ...]]) -> Download:
    held = tuple(holder for entry in download.entries for holder in found.get(entry.name, ()))
    return replace(download, holders=held) if held else download


# ---------------------------------------------------------------- downloads


def _downloads(
    world: World, policy: Policy, memory: Memory, found: scan.Scan, store: int
) -> list[Download]:
    if not found.downloads:
        return []
    started_at = place.started_at(world)
    made: list[Download] = []
    with files.opened_folder("blobs", store, follow=True) as blobs:
        waiting: Mapping[str, scan.Pieces] = found.downloads
        for look in range(_MOST_LOOKS):
            changed: list[str] = []
            for digest, pieces in waiting.items():
                reader = _Reader(blobs, digest, pieces, found.named, memory, started_at, policy)
                try:
                    made.extend(reader.downloads())
                except _ChangedMeanwhile:
                    changed.append(digest)
                except OSError as error:
                    made.append(reader.unreadable(error))
            if not changed:
                break
            if look + 1 < _MOST_LOOKS:
                waiting = scan.scan_digests(store, changed).downloads
            else:
                made.extend(
                    Download(digest, unreadable="it changes faster than it can be read")
                    for digest in changed
                )
    return made


class _Reader:
    """Reads the pieces of one digest."""

    def __init__(
        self,
        blobs: int,
        digest: str,
        pieces: scan.Pieces,
        named: scan.Named,
        memory: Memory,
        started_at: float,
        policy: Policy,
    ) -> None:
        self.blobs = blobs
        self.digest = digest
        self.pieces = pieces
        self.named_size = named.size_of(digest)
        self.memory = memory
        self.named_models = named.models_of(digest)
        self.started_at = started_at
        self.policy = policy

    def downloads(self) -> list[Download]:
        """The download in parts, and the one of the transfer path, where there are such."""
        made: list[Download] = []
        if self.pieces.data is not None or self.pieces.sidecars:
            made.append(self._in_parts())
        if self.pieces.transfer is not None:
            made.append(self._transfer(self.pieces.transfer))
        return made

    def unreadable(self, error: OSError) -> Download:
        """The download when its content can't be read."""
        return self._base(
            data=self.pieces.data,
            sidecars=tuple(
                Sidecar(found, number, None, "not read")
                for number, found in _by_number(self.pieces.sidecars)
            ),
            unreadable=f"{names.printable(str(error.filename or ''))} {error.strerror}".strip(),
        )

    def _base(self, **more: Any) -> Download:
        made = Download(digest=self.digest, finished=self.pieces.finished, **more)
        record = _matching(self.memory, made.key, list(made.entries))
        remembered = record.models if record else ()
        return replace(
            made,
            models=tuple(sorted({*self.named_models, *remembered})),
            progress_at=record.progress_at if record else None,
        )

    def _in_parts(self) -> Download:
        data = self.pieces.data
        read = tuple(
            self._sidecar(number, found) for number, found in _by_number(self.pieces.sidecars)
        )
        entries = [each for each in (data, *(sidecar.entry for sidecar in read)) if each]
        known, known_from = self._known_length(entries)
        faults = sidecars.faults(read, known) if read else ()
        claimed_total = sum(each.part.size for each in read if each.part)
        if data is not None and read and not faults and data.size > claimed_total:
            faults = (f"the data has {data.size} bytes, the parts only {claimed_total}",)
        total, total_from = known, known_from
        if read and not faults:
            total, total_from = claimed_total, "sidecars"
        elif known is None and data is not None and not _was_cut(data, read):
            # The server creates the data file at its full length.
            total, total_from = data.size, "data"
        return self._base(
            data=data,
            sidecars=read,
            total=total,
            total_from=total_from,
            faults=faults,
            trust=self._trust(data, read, faults, total),
        )

    def _known_length(self, entries: list[Entry]) -> tuple[int | None, str | None]:
        if self.named_size is not None and self.named_size > 0:
            return self.named_size, "manifest"
        record = _matching(self.memory, self.digest, entries)
        if record is not None and record.total is not None:
            return record.total, "memory"
        return None, None

    def _trust(
        self,
        data: Entry | None,
        read: tuple[Sidecar, ...],
        faults: tuple[str, ...],
        total: int | None,
    ) -> Trust:
        if total is None:
            return Trust()
        if faults or not read:
            whole = sidecars.fill_gaps(sidecars.believable(read, total), total)
        else:
            whole = tuple(
                sorted((each.part for each in read if each.part), key=lambda part: part.offset)
            )
        if data is None or data.kind is not Kind.FILE:
            return parts.trust(None, 0, whole, rebooted=False, read_limit=None)
        fd = self._open(data)
        try:
            return parts.trust(
                fd,
                min(data.size, total),
                whole,
                rebooted=data.mtime < self.started_at,
                read_limit=self.policy.read_limit_bytes,
            )
        finally:
            os.close(fd)

    def _sidecar(self, number: int | None, found: Entry) -> Sidecar:
        if found.kind is not Kind.FILE:
            return Sidecar(found, number, None, f"a {found.kind.value}, no file")
        fd = self._open(found)
        try:
            part = sidecars.parse(os.read(fd, sidecars.READ_LIMIT))
        except ValueError as error:
            return Sidecar(found, number, None, str(error))
        finally:
            os.close(fd)
        return Sidecar(found, number, part, sidecars.part_fault(number, part))

    def _open(self, found: Entry) -> int:
        """Open an entry; it must still be the one that was listed."""
        try:
            fd = files.open_to_read(found.name, self.blobs)
        except FileNotFoundError:
            raise _ChangedMeanwhile from None
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != found.identity:
            os.close(fd)
            raise _ChangedMeanwhile
        return fd

    def _transfer(self, found: Entry) -> Download:
        written = ((0, found.size),) if found.size and found.kind is Kind.FILE else ()
        return self._base(
            data=found,
            transfer=True,
            total=self.named_size,
            total_from=None if self.named_size is None else "manifest",
            trust=Trust(written, written, written),
        )


def _by_number(found: Iterable[tuple[int | None, Entry]]) -> list[tuple[int | None, Entry]]:
    return sorted(found, key=lambda each: (each[0] is None, each[0] or 0, each[1].name))


def _was_cut(data: Entry, read: Iterable[Sidecar]) -> bool:
    """A part lies beyond the data's end: a pull with a sidecar missing has cut the data."""
    return any(each.part is not None and each.part.end > data.size for each in read)


def _matching(memory: Memory, key: str, entries: list[Entry]) -> Record | None:
    """What is remembered of this very download: the digest alone may stand for another file."""
    record = memory.downloads.get(key)
    if record is None or not entries or record.identity != entries[0].identity:
        return None
    return record

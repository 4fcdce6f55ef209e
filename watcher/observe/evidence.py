"""One look at a store: listing, parts and processes joined to `Evidence`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from watcher.model import (
    BlobCensus,
    Download,
    Entry,
    Evidence,
    Holder,
    Kind,
    ManifestFault,
    NextStart,
    Place,
    Reads,
    Rules,
    ServerUser,
    Sidecar,
    Trust,
)
from watcher.observe import (
    access,
    clock,
    intents,
    parts,
    place,
    processes,
    quarantine,
    scan,
    serving,
    sharing,
    space,
    unit,
)
from watcher.observe.blobs import registry_length, remembered, with_memory
from watcher.observe.content import Content, data_behind
from watcher.observe.host import Host
from watcher.ollama import names, ranges, sidecars
from watcher.state import folders, fs
from watcher.state.memory import Memory, Remembered
from watcher.state.registry_cache import KnownLayer

#: A manifest is written in place: half of one is normal for an instant.
_WRITING_SECONDS = 2.0
_LOOK_AGAIN_SECONDS = 0.1
_MOST_LOOKS = 5
#: How far apart two times of a file system's clock are at most; where it has seconds alone, theirs.
_TICK_SECONDS, _COARSE_TICK_SECONDS = 0.1, 2.0
#: No symlink followed, no wait for a FIFO's writer.
_READ_ONLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


class _ChangedMeanwhile(Exception):  # noqa: N818 - a signal inside this file, no error
    """An entry is not what it was when it was listed."""


def observe(
    host: Host, rules: Rules, memory: Memory, scope: frozenset[str] | None = None
) -> Evidence:
    """Look at the whole store, or at the downloads of some digests (`scope`).

    Raises NoPermissionError where the store's folder can't be entered, NoStoreError where it is
    gone.
    """
    with place.opened(host.store) as store:
        host.go_on()
        start = place.start(host)
        # Without the hashes of what only an earlier start of the machine had in memory.
        memory = replace(memory, hashes=memory.hashes.of_disk(store, start.id))
        seeing = _Seeing(host, rules, memory, scope, store)
        return _observe(seeing, place.describe(host, store), start)


class _Seeing(NamedTuple):
    """What is looked at, and with what."""

    host: Host
    rules: Rules
    memory: Memory
    #: None for the whole store.
    scope: frozenset[str] | None
    #: The descriptor of the store's folder.
    store: int


def _observe(seeing: _Seeing, where: Place, start: place.Start) -> Evidence:
    host, rules, memory, scope, store = seeing
    coming = _next_start(host, store) if scope is None else NextStart()
    found = _scan(seeing, where, coming.user)
    host.go_on()
    downloads = _downloads(seeing, where, found)
    seen = processes.see(
        host,
        [entry for download in downloads for entry in download.entries],
        network=where.network,
        writers_visible=rules.settings.writers_visible,
        ours_only=True,
    )
    made = Evidence(
        place=where,
        now=0.0,
        view=seen.view,
        boot=start.id,
        servers=seen.servers,
        others=seen.others,
        downloads=tuple(
            _with_holders(download, seen.holders)
            for download in sorted(downloads, key=lambda download: download.digest)
        ),
        census=found.census,
        scope=scope,
        uid=os.geteuid(),
        caller=host.caller,
        pulling=_pulling(downloads, seen.holders, memory, scope),
    )
    if scope is None:
        made = _of_store(seeing, made, found, (coming, seen))
    host.go_on()
    now = host.clock()
    time = clock.look(memory.clock, now, host.counted(), start.id)
    forgotten = memory.unreadable or memory.lost or memory.hashes.unread
    return replace(made, now=now, uptime=host.uptime(), clock=time, forgotten=forgotten)


def _of_store(
    seeing: _Seeing,
    made: Evidence,
    found: scan.Scan,
    known: tuple[NextStart, processes.Seen],
) -> Evidence:
    """The evidence with what only a look at the whole store tells."""
    host, rules, memory, _, store = seeing
    coming, seen = known
    user = _user(host, seen, coming.user)
    if user is not None:
        if user._replace(by=coming.user.by) != coming.user:
            # Another user than was thought: what it protects, and what it can't use, differs.
            found = _scan(seeing, made.place, user)
        coming = coming._replace(user=user)
    host.go_on()
    census = with_memory(found, memory, store, host.clock())
    shared = sharing.look(store, (*seen.servers, *seen.strangers))
    aside = quarantine.look(store, memory)
    return replace(
        made,
        next_start=coming,
        census=_with_used(sharing.apart(census, shared), host),
        sharing=shared,
        known_as=_known_as(host, store, census),
        quarantine=aside.kept,
        quarantine_unseen=aside.unseen,
        intents=intents.foreign(store, made.boot),
        space=space.survey(store, found) if rules.mode.survey else None,
    )


def _user(host: Host, seen: processes.Seen, foreseen: ServerUser) -> ServerUser | None:
    """Who a running server of the store runs as.

    One who can change nothing in it counts only where everything may have become root's by mistake:
    else anybody could have the store given to him.
    """
    mistaken = foreseen.by == ServerUser().by and foreseen.uid == 0
    return access.running(host, (*seen.servers, *(seen.strangers if mistaken else ())))


def _with_used(census: BlobCensus, host: Host) -> BlobCensus:
    """The census that knows on which of the stores in the store a server runs."""
    if not census.nested:
        return census
    served = {os.path.realpath(path) for path, _ in processes.served_stores(host.proc)}
    inside = (os.path.realpath(f"{host.store}/{each.path}") for each in census.nested)
    return census._replace(
        nested=tuple(
            each._replace(used=path in served)
            for each, path in zip(census.nested, inside, strict=True)
        )
    )


def _known_as(host: Host, store: int, census: BlobCensus) -> dict[str, tuple[str, ...]]:
    """The models of blobs that no manifest here names, by digest, as far as registries told."""
    layers = host.known_layers(store) if census.unnamed else {}
    if not layers:
        return {}
    digests = {names.parse_blob(entry.name).digest for entry in census.unnamed}
    return {digest: layers[digest].models for digest in digests & layers.keys()}


def _next_start(host: Host, store: int) -> NextStart:
    """What is known of the server's next start besides the store."""
    server = unit.from_files(host.system)
    if server is not None and not access.is_of(server, store):
        server = None
    return NextStart(
        user=access.user_of(store, server),
        no_prune=server is not None and server.no_prune,
        prepared=server is not None and server.prepares(host.store),
        watched=serving.daemon(host.store) is not None,
    )


def _scan(seeing: _Seeing, where: Place, user: ServerUser) -> scan.Scan:
    """A pass in which no manifest was being written, for a server that runs as `user`."""
    host = seeing.host
    for _ in range(_MOST_LOOKS):
        found = _scan_once(seeing, where, user)
        now = host.clock()
        if not any(
            odd.fault is ManifestFault.CORRUPT
            and odd.changed_at is not None
            and abs(now - odd.changed_at) < _WRITING_SECONDS
            for odd in found.named.odd
        ):
            break
        host.sleep(_LOOK_AGAIN_SECONDS)
    return found


def _scan_once(seeing: _Seeing, where: Place, user: ServerUser) -> scan.Scan:
    if seeing.scope is not None:
        return scan.scan_digests(seeing.store, seeing.scope)
    barred = access.Access(user)
    scan.scan_above(seeing.host.store, barred)
    mode = seeing.rules.mode
    keep = scan.Keep(named=mode.verify, space=mode.survey)
    return scan.scan_store(seeing.store, barred, keep, manifests_hidden=where.globbed)


def _last_progress(record: Remembered, data: Entry | None) -> float:
    """When bytes last arrived: as remembered, or since then, while nobody looked."""
    return record.progress_at if data is None else max(record.progress_at, data.changed_at)


def _pulling(
    downloads: list[Download],
    held: Mapping[str, tuple[Holder, ...]],
    memory: Memory,
    scope: frozenset[str] | None,
) -> frozenset[str]:
    here = {
        download.key
        for download in downloads
        if any(holder.writes for entry in download.entries for holder in held.get(entry.name, ()))
    }
    elsewhere = {
        key
        for key, record in memory.downloads.items()
        if scope is not None and key.removesuffix(".tmp") not in scope and record.pulling
    }
    return frozenset(here | elsewhere)


def _with_holders(download: Download, found: Mapping[str, tuple[Holder, ...]]) -> Download:
    held = tuple(holder for entry in download.entries for holder in found.get(entry.name, ()))
    return replace(download, holders=held) if held else download


# ---------------------------------------------------------------- downloads


def _doubted_first(
    found: Mapping[str, scan.Pieces], memory: Memory, boot: str
) -> Mapping[str, scan.Pieces]:
    """Those first whose claims another start has noted, the most valuable one of them before all.

    They have to be read, and there may be no time to read all.
    """
    noted = {
        digest: -known.claimed
        for digest in found
        if (known := memory.downloads.get(digest)) and known.unsynced not in ("", boot)
    }
    return {digest: found[digest] for digest in sorted(found, key=lambda each: noted.get(each, 1))}


class _Around(NamedTuple):
    """What the pieces of a download are read with."""

    host: Host
    rules: Rules
    memory: Memory
    named: scan.Named
    #: What is known of layers that no manifest of the store names.
    kept: Mapping[str, KnownLayer]
    start: place.Start
    #: Taken after the listing: what lies beyond it is no time of this clock.
    now: float
    #: The descriptor of ``blobs``.
    blobs: int
    #: Other machines may change what is there.
    network: bool


def _downloads(seeing: _Seeing, where: Place, found: scan.Scan) -> list[Download]:
    if not found.downloads:
        return []
    host, rules, memory, store = seeing.host, seeing.rules, seeing.memory, seeing.store
    kept = host.known_layers(store)
    for digest in found.downloads.keys() & kept.keys():
        # Whoever has a registry can say anything of a digest: no length of it comes before others.
        found.named.add(digest, 0, kept[digest].models)
    start, now = place.start(host), host.clock()
    with (
        contextlib.suppress(FileNotFoundError, NotADirectoryError),  # gone since it was listed
        folders.opened_blobs(store, foreign_too=True) as blobs,
    ):
        around = _Around(host, rules, memory, found.named, kept, start, now, blobs, where.network)
        return _read_all(around, found.downloads, store)
    return []


def _read_all(around: _Around, found: Mapping[str, scan.Pieces], store: int) -> list[Download]:
    made: list[Download] = []
    waiting = _doubted_first(found, around.memory, around.start.id)
    for look in range(_MOST_LOOKS):
        changed: list[str] = []
        for digest, pieces in waiting.items():
            around.host.go_on()
            reader = _Reader(around, digest, pieces)
            if pieces.unseen:
                made.append(reader.unreadable(pieces.unseen))
                continue
            try:
                made.extend(reader.downloads())
            except _ChangedMeanwhile:
                changed.append(digest)
            except OSError as error:
                what = names.printable(str(error.filename or ""))
                made.append(reader.unreadable(f"{what} {error.strerror}".strip()))
        if not changed:
            return made
        if look + 1 < _MOST_LOOKS:
            waiting = scan.scan_digests(store, changed).downloads
    faster = "it changes faster than it can be read"
    return [*made, *(Download(digest, unreadable=faster) for digest in changed)]


class _Reader:
    """Reads the pieces of one digest."""

    def __init__(self, around: _Around, digest: str, pieces: scan.Pieces) -> None:
        memory = around.memory
        self.around, self.digest = around, digest
        self.data = pieces.data and remembered(pieces.data, memory)
        self.transfer = pieces.transfer and remembered(pieces.transfer, memory)
        self.sidecars = [
            (number, remembered(found, memory))
            for number, found in sorted(pieces.sidecars, key=_by_number)
        ]
        self.finished = pieces.finished and remembered(pieces.finished, memory)
        self.named_size = around.named.size_of(digest) or None
        self.named_models = around.named.models_of(digest)
        layer = around.kept.get(digest)
        #: What a kept manifest says, for when nothing else tells.
        self.kept_size = layer.size if layer is not None else None
        #: What was read of the data, once it was.
        self.reads: Reads | None = None

    def downloads(self) -> list[Download]:
        """The download in parts, and the one of the transfer path, where there are such."""
        made: list[Download] = []
        if self.data is not None or self.sidecars:
            made.append(self._in_parts())
        if self.transfer is not None:
            made.append(self._of_transfer(self.transfer))
        return made

    def unreadable(self, why: str) -> Download:
        """The download when its content can't be read."""
        return self._base(
            data=self.data,
            sidecars=tuple(
                Sidecar(found, number, None, "not read") for number, found in self.sidecars
            ),
            unreadable=why,
        )

    def _base(self, **more: Any) -> Download:
        made = Download(digest=self.digest, finished=self.finished, **more)
        record = self._record(made.key, list(made.entries))
        models = record.models if record else ()
        return replace(
            made,
            models=tuple(sorted({*self.named_models, *models})),
            progress_at=_last_progress(record, made.data) if record else None,
            ahead=record.ahead if record else None,
            registry=registry_length(self.around.memory, self.digest, self.around.now),
            born_ns=fs.born(made.entries[0].name, self.around.blobs) if made.entries else 0,
        )

    def _in_parts(self) -> Download:
        data = self.data
        read = tuple(self._sidecar(number, found) for number, found in self.sidecars)
        entries = [each for each in (data, *(sidecar.entry for sidecar in read)) if each]
        record = self._record(self.digest, entries)
        known, known_from = self._known_length(record)
        doubt = "" if known is None else self._contradiction(known, read)
        if doubt:
            known, doubt = None, f"the {known_from} says {known:,} bytes, {doubt}"
        faults = sidecars.faults(read, known) if read else ()
        claimed_total = sum(each.part.size for each in read if each.part)
        longer = data is not None and data.size > claimed_total
        if data is not None and read and not faults and known is None and longer:
            faults = (f"the data has {data.size} bytes, the parts only {claimed_total}",)
        total, total_from = known, known_from
        if read and not faults:
            total, total_from = claimed_total, "sidecars"
        elif known is None and data is not None and not _was_cut(data, read):
            # The server creates the data file at its full length; a copy may have ended early.
            if self._agrees(data.size):
                total, total_from = data.size, "data"
            else:
                doubt = (
                    f"the data has {data.size:,} bytes, and the registry's manifest says "
                    f"{self.kept_size:,}"
                )
        elif known is None and self.kept_size and self.kept_size >= (data.size if data else 0):
            total, total_from = self.kept_size, "registry"
        if total is not None and total > sidecars.LARGEST_LAYER:
            total, total_from = None, None
            faults = (*faults, "more bytes than any layer has")
        made = self._base(
            data=data,
            sidecars=read,
            total=total,
            total_from=total_from,
            faults=faults,
            doubted_length="" if total is not None else doubt or self._why_not_said(),
            trust=self._trust(read, faults, total, record),
            reads=self.reads,
        )
        # A wrong hash that no doubted bytes explain: any byte may be wrong.
        refuted = made.is_wrong and made.trust.zeros_read and made.trust.trusted == ((0, total),)
        return replace(made, trust=made.trust._replace(trusted=())) if refuted else made

    def _record(self, key: str, entries: list[Entry]) -> Remembered | None:
        """What is remembered of this very download; the digest alone may stand for another file."""
        record = self.around.memory.downloads.get(key)
        if record is None or not entries:
            return None
        anchor = entries[0]
        born_ns = fs.born(anchor.name, self.around.blobs)
        return record if record.is_of(*anchor.identity, born_ns) else None

    def _named_length(self) -> int | None:
        """The length that a manifest says, where a layer can have it."""
        known = self.named_size is not None and 0 < self.named_size <= sidecars.LARGEST_LAYER
        return self.named_size if known else None

    def _known_length(self, record: Remembered | None) -> tuple[int | None, str | None]:
        if (compared := self.around.rules.mode.lengths.get(self.digest)) is not None:
            return compared, "registry"
        if (named := self._named_length()) is not None:
            return named, "manifest"
        if record is not None and record.total is not None and self._agrees(record.total):
            return record.total, "memory"
        asked = registry_length(self.around.memory, self.digest, self.around.now)
        return asked, None if asked is None else "registry"

    def _agrees(self, total: int) -> bool:
        """Whether a length that was inferred is not another than that of a kept manifest."""
        return not self.kept_size or total == self.kept_size

    def _why_not_said(self) -> str:
        asked = self.around.memory.asked.get(self.digest)
        return asked.why if asked is not None and asked.counts(self.around.now) else ""

    def _contradiction(self, known: int, read: tuple[Sidecar, ...]) -> str:
        """What shows that a layer has more bytes than somebody says; "" where nothing does."""
        claims = [each.part for each in read if each.part is not None]
        if sum(part.completed for part in claims) > known:
            ends = ((part.offset, part.offset + part.completed) for part in claims)
            claimed = ranges.size(ranges.normal(ends))
            if claimed > known:
                return f"and the sidecars claim {claimed:,}"
        if self.data is None or self.data.kind is not Kind.FILE or self.data.size <= known:
            return ""
        fd = self._open(self.data)
        try:
            found = data_behind(fd, known)
        finally:
            os.close(fd)
        return f"and there is data at byte {found:,}" if found is not None else ""

    def _trust(
        self,
        read: tuple[Sidecar, ...],
        faults: tuple[str, ...],
        total: int | None,
        record: Remembered | None,
    ) -> Trust:
        data = self.data
        if not total:
            return Trust()
        if faults or not read:
            before = record.partition if record is not None else ()
            whole = sidecars.fill_gaps(sidecars.believable(read, total), total, before)
        else:
            whole = tuple(
                sorted((each.part for each in read if each.part), key=lambda part: part.offset)
            )
        # Of a copy the file that it was made of may tell more than it does itself.
        known = self.around.memory.downloads.get(self.digest)
        if data is None or data.kind is not Kind.FILE:
            return parts.trust(None, whole, parts.Doubts(), parts.Limits())
        noted = known is not None and known.unsynced not in ("", self.around.start.id)
        doubts = parts.Doubts(
            rebooted=noted or self._rebooted(data, record),
            refused=record.lost if record is not None else (),
            doubted=known.doubted if known is not None else (),
            starts=[part.offset for part in known.partition] if known is not None else (),
        )
        limit = self.around.rules.mode.read_limit_bytes
        # Claims that a power cut may have left without their data are looked through.
        limits = parts.Limits(None if noted and limit else limit, self.around.host.reads_no_more)
        fd = self._open(data)
        try:
            now = self._unchanged_since(os.fstat(fd))
            reads = record.reads if record is not None else None
            same = now is not None and reads is not None and reads._replace(answers="") == now
            content = Content(fd, min(data.size, total), reads if same else None)
            trust = parts.trust(content, whole, doubts, limits)
            self.reads = now and now._replace(answers=content.answers)
            return trust
        finally:
            os.close(fd)

    def _unchanged_since(self, status: os.stat_result) -> Reads | None:
        """What tells that a data file has not changed; None where nothing does.

        A change within the same tick of the file system's clock as the last one shows in no time.
        """
        boot, changed_ns = self.around.start.id, status.st_ctime_ns
        whole_seconds = changed_ns % 1_000_000_000 == 0
        tick = _COARSE_TICK_SECONDS if whole_seconds else _TICK_SECONDS
        settled = self.around.now - changed_ns / 1e9 > tick
        if not boot or self.around.network or not settled:
            return None
        return Reads(status.st_size, changed_ns, boot, "")

    def _rebooted(self, data: Entry, record: Remembered | None) -> bool:
        """Whether some of the data may have been written before the machine started.

        A pull that went on since then has changed its time, not its past; what a repair has looked
        through since then is known.
        """
        if record is not None and self._since_start(record.checked_at):
            return False
        born_ns = fs.born(data.name, self.around.blobs)
        written = min(data.changed_at, born_ns / 1e9) if born_ns else data.changed_at
        return not self._since_start(written)

    def _since_start(self, at: float) -> bool:
        """Whether it lies between the machine's start and now; the future tells nothing."""
        return self.around.start.at <= at <= self.around.now

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
            fd = fs.open_quietly(found.name, _READ_ONLY, self.around.blobs)
        except FileNotFoundError:
            raise _ChangedMeanwhile from None
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != found.identity:
            os.close(fd)
            raise _ChangedMeanwhile
        return fd

    def _of_transfer(self, found: Entry) -> Download:
        written = ((0, found.size),) if found.size and found.kind is Kind.FILE else ()
        total = self._named_length()
        return self._base(
            data=found,
            transfer=True,
            total=total,
            total_from=None if total is None else "manifest",
            trust=Trust(written, written, written),
        )


def _by_number(found: tuple[int | None, Entry]) -> tuple[bool, int, str]:
    number, entry = found
    return number is None, number or 0, entry.name


def _was_cut(data: Entry, read: Iterable[Sidecar]) -> bool:
    """A part lies beyond the data's end: a pull with a sidecar missing has cut the data."""
    return any(each.part is not None and each.part.end > data.size for each in read)

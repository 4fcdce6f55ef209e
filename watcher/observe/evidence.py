"""One look at a store: listing, parts and processes joined to `Evidence`."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from watcher import model
from watcher.model import OURS, Download, Entry, Evidence, Kind, NextStart, Rules, Sidecar, Trust
from watcher.observe import access, clock, intents, parts, place, processes, scan, sharing, space
from watcher.observe.blobs import asked, look_at_quarantine, remembered, with_memory, with_own_time
from watcher.observe.host import Host
from watcher.observe.transfers import Found, look_at_transfers
from watcher.ollama import names, ranges, sidecars
from watcher.state import folders, fs
from watcher.state.memory import Memory, Remembered, bound_to
from watcher.state.registry_cache import KnownLayers

_WRITING_SECONDS = 2.0  #: a manifest is written in place: half of one is normal for an instant
_LOOK_AGAIN_SECONDS = 0.1
_MOST_LOOKS = 5
#: How far apart two times of a file system's clock are at most; where it has seconds alone, theirs.
_TICK_SECONDS, _COARSE_TICK_SECONDS = 0.1, 2.0
#: No symlink followed, no wait for a FIFO's writer.
_READ_ONLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


class _ChangedMeanwhile(Exception):  # noqa: N818 - a signal inside this file, no error
    """An entry is not what it was when it was listed."""


def observe(host: Host, rules: Rules, memory: Memory, scope: frozenset[str] | None) -> Evidence:
    """Look at the whole store, or at downloads of some digests. Raises as `place.opened` does."""
    with place.opened(host.store) as store:
        host.go_on()
        return _Look(host, rules, memory, scope, store).evidence()


class _Look:
    def __init__(
        self, host: Host, rules: Rules, memory: Memory, scope: frozenset[str] | None, store: int
    ) -> None:
        self.host, self.rules, self.scope = host, rules, scope
        self.boot, self.started_at = place.boot(host), place.started_at(host)
        # Without the hashes of what only an earlier start of the machine had in memory.
        self.memory = replace(memory, hashes=memory.hashes.of_disk(store, self.boot))
        self.store = store
        self.place = place.describe(host, store)
        self.named = scan.Named()
        self.kept: KnownLayers = {}  #: layers that no manifest of the store names
        self.now = 0.0  #: taken after the listing: what lies beyond it is no time of this clock
        self.blobs = -1
        self.transfers_unseen: model.Unseen | None = (
            None  #: why those of ours can't be listed, if so
        )
        self.second_names: list[model.SecondName] = []

    def evidence(self) -> Evidence:
        host, rules, memory, scope = self.host, self.rules, self.memory, self.scope
        coming = access.next_start(host, self.store) if scope is None else NextStart()
        found = self._scan(coming.user)
        host.go_on()
        listed = sorted(self._downloads(found), key=lambda download: download.digest)
        wanted = [entry for each in listed if not each.ours for entry in each.entries]
        wanted += [each.blob for each in self.second_names]
        seen = processes.see(host, wanted)
        network, visible = self.place.network, rules.settings.writers_visible
        downloads: list[Download] = []
        for each in listed:
            held = [holder for entry in each.entries for holder in seen.holders.get(entry.name, ())]
            downloads.append(replace(each, holders=tuple(held)) if held else each)
        pulling = {each.key for each in downloads if each.writers and not each.ours}
        for key, record in memory.downloads.items():
            if scope is not None and model.digest_of(key) not in scope and record.pulling:
                pulling.add(key)
        made = Evidence(
            place=self.place,
            now=0.0,
            view=processes.view(host, seen.unread, network=network, writers_visible=visible),
            boot=self.boot,
            servers=tuple(each for each in seen.servers if each.ours is not False),
            others=seen.others,
            downloads=tuple(downloads),
            census=found.census,
            scope=scope,
            uid=os.geteuid(),
            caller=host.caller,
            pulling=frozenset(pulling),
            transfers_unseen=self.transfers_unseen,
            second_names=tuple(
                each._replace(held=each.blob.name in seen.holders) for each in self.second_names
            ),
        )
        if scope is None:
            made = self._of_store(made, found, coming, seen)
        host.go_on()
        now = host.clock()
        reading = clock.read(self.boot, now, host.counted(), place.machine(host))
        own, others = clock.look(memory.clocks, reading)
        made = made._replace(now=now, uptime=host.uptime(), clock=own, other_clocks=others)
        return made._replace(forgotten=memory.unreadable or memory.lost or memory.hashes.unread)

    def _of_store(
        self, made: Evidence, found: scan.Scan, coming: NextStart, seen: processes.Seen
    ) -> Evidence:
        host, memory, store = self.host, self.memory, self.store
        # A running server's user who can change nothing here counts only where everything may have
        # become root's by mistake: else anybody could have the store given to him.
        mistaken = coming.user.by == model.ServerUser().by and coming.user.uid == 0
        user = access.running(host, (*seen.servers, *(seen.strangers if mistaken else ())))
        if user is not None:
            if user._replace(by=coming.user.by) != coming.user:
                # Another user than was thought: what it protects, and what it can't use, differs.
                found = self._scan(user)
            coming = coming._replace(user=user)
        host.go_on()
        known = partial(host.known_layers, store)
        census = with_memory(found, memory, store, host.clock(), known)
        shared = sharing.look(store, (*seen.servers, *seen.strangers))
        # What registries know of the blobs that no manifest here names.
        layers = host.known_layers(store) if census.unnamed else {}
        unnamed = {names.parse_blob(entry.name).digest for entry in census.unnamed}
        kept, quarantine_unseen = look_at_quarantine(store, memory)
        return made._replace(
            next_start=coming,
            census=self._with_used(sharing.apart(self._with_one_name(census), shared)),
            sharing=shared,
            known_as={digest: layers[digest].models for digest in unnamed & layers.keys()},
            quarantine=kept,
            quarantine_unseen=quarantine_unseen,
            intents=intents.foreign(store, made.boot),
            space=space.survey(store, found) if self.rules.mode.survey else None,
        )

    def _with_one_name(self, census: model.BlobCensus) -> model.BlobCensus:
        """The census without second names of ours: they go before anything happens to a blob."""
        second = {each.blob.name for each in self.second_names}

        def alone(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
            return tuple(x._replace(links=x.links - (x.name in second)) for x in entries)

        unnamed, unprotected = alone(census.unnamed), alone(census.unprotected)
        return census._replace(unnamed=unnamed, unprotected=unprotected)

    def _with_used(self, census: model.BlobCensus) -> model.BlobCensus:
        if not census.nested:
            return census
        served = {os.path.realpath(path) for path, _ in processes.served_stores(self.host.proc)}
        nested = [
            each._replace(used=os.path.realpath(f"{self.host.store}/{each.path}") in served)
            for each in census.nested
        ]
        return census._replace(nested=tuple(nested))

    def _scan(self, user: model.ServerUser) -> scan.Scan:
        """A pass in which no manifest was being written, for a server that runs as `user`."""
        for _ in range(_MOST_LOOKS):
            if self.scope is not None:
                found = scan.scan_digests(self.store, self.scope)
            else:
                barred, hidden = access.Access(user), self.place.globbed
                scan.scan_above(self.host.store, barred)
                mode = self.rules.mode
                found = scan.scan_store(self.store, barred, mode, manifests_hidden=hidden)
            now = self.host.clock()
            corrupt = [odd for odd in found.named.odd if odd.fault is model.ManifestFault.CORRUPT]
            times = [odd.changed_at for odd in corrupt if odd.changed_at is not None]
            if not any(abs(now - at) < _WRITING_SECONDS for at in times):
                break
            self.host.sleep(_LOOK_AGAIN_SECONDS)
        return found

    def _downloads(self, found: scan.Scan) -> list[Download]:
        ours, self.transfers_unseen = look_at_transfers(self.store, self.boot, self.scope)
        self.host.go_on()
        if not (found.downloads or ours):
            return []
        self.named, self.kept = found.named, self.host.known_layers(self.store)
        for digest in {*found.downloads, *(each.digest for each in ours)} & self.kept.keys():
            # Whoever runs a registry can claim anything of a digest: its length never comes first.
            self.named.add(digest, 0, self.kept[digest].models)
        self.now = self.host.clock()
        made: list[Download] = []
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),  # gone since it was listed
            folders.opened_blobs(self.store, foreign_too=True) as self.blobs,
        ):
            made = self._read_all(found.downloads)
            for each in ours:
                blob = scan.look(names.blob(each.digest), self.blobs)
                if blob and each.data and blob.identity == each.data.identity:
                    second = model.SecondName(each.digest, remembered(blob, self.memory))
                    self.second_names.append(second)
                else:
                    reader = _Reader(self, each.digest, scan.Pieces(finished=blob))
                    made.append(reader.of_ours(each))
        return made

    def _read_all(self, found: Mapping[str, scan.Pieces]) -> list[Download]:
        made: list[Download] = []
        waiting = _doubted_first(found, self.memory, self.boot)
        for _ in range(_MOST_LOOKS):
            changed: list[str] = []
            for digest, pieces in waiting.items():
                self.host.go_on()
                reader = _Reader(self, digest, pieces)
                if pieces.unseen:
                    made.append(reader.unreadable(pieces.unseen))
                    continue
                try:
                    made.extend(reader.downloads())
                except _ChangedMeanwhile:
                    changed.append(digest)
                except OSError as error:
                    scan.raise_own(error)
                    what = names.printable(str(error.filename or ""))
                    made.append(reader.unreadable(f"{what} {error.strerror}".strip()))
            if not changed:
                return made
            waiting = scan.scan_digests(self.store, set(changed)).downloads
        faster = "it changes faster than it can be read"
        return [*made, *(Download(digest, unreadable=faster) for digest in changed)]


def _doubted_first(
    found: Mapping[str, scan.Pieces], memory: Memory, boot: str
) -> Mapping[str, scan.Pieces]:
    """First, by value, those whose claims another start has noted: they have to be read."""
    noted = {
        digest: -known.claimed
        for digest in found
        if (known := memory.downloads.get(digest)) and known.unsynced not in ("", boot)
    }
    return {digest: found[digest] for digest in sorted(found, key=lambda each: noted.get(each, 1))}


def _as_proven(trust: Trust, proven: model.Proven, lost: model.Ranges) -> Trust:
    """What can be believed once chunks were compared; `lost`: what the disk did not take."""
    right = ranges.difference(proven.right, lost)
    trusted = ranges.union(ranges.difference(trust.trusted, proven.wrong), right)
    present = ranges.union(trust.present, right)
    return trust._replace(present=present, trusted=trusted, proven=right)


class _Reader:
    def __init__(self, around: _Look, digest: str, pieces: scan.Pieces) -> None:
        memory = around.memory
        self.around, self.digest = around, digest
        self.data = pieces.data and remembered(pieces.data, memory)
        self.transfer = pieces.transfer and remembered(pieces.transfer, memory)
        listed = sorted(
            pieces.sidecars, key=lambda each: (each[0] is None, each[0] or 0, each[1].name)
        )
        self.sidecars = [(number, with_own_time(found, memory)) for number, found in listed]
        first = self.sidecars[0][1] if self.sidecars else None
        self.record, self.born_ns = self._remembered(digest, self.data or first)
        self.asked = asked(memory, digest, around.now)
        self.finished = pieces.finished and remembered(pieces.finished, memory)
        size = around.named.size_of(digest) or 0
        #: The length that a manifest gives, where a layer can have it.
        self.named_size = size if 0 < size <= sidecars.LARGEST_LAYER else None
        self.named_models = around.named.models_of(digest)
        layer = around.kept.get(digest)
        #: What a kept manifest gives, for when nothing else gives one.
        self.kept_size = layer.size if layer is not None else None
        self.reads: model.Reads | None = None  #: what was read of the data, once it was

    def downloads(self) -> list[Download]:
        """The download in parts, and the one of the transfer path, where there are such."""
        made: list[Download] = []
        if self.data is not None or self.sidecars:
            made.append(self._in_parts())
        found, total = self.transfer, self.named_size
        if found is not None:
            written = ((0, found.size),) if found.size and found.kind is Kind.FILE else ()
            trust = Trust(written, written, written)
            by = None if total is None else "manifest"
            own = self._remembered(f"{self.digest}.tmp", found)
            transfer = self._base(
                *own, data=found, transfer=True, total=total, total_from=by, trust=trust
            )
            made.append(transfer)
        return made

    def unreadable(self, why: str) -> Download:
        return self._base(
            self.record,
            self.born_ns,
            data=self.data,
            sidecars=tuple(Sidecar(each, n, None, "not read") for n, each in self.sidecars),
            unreadable=why,
        )

    def of_ours(self, found: Found) -> Download:
        """The transfer of ours: its ledger is as good as its files show."""
        kept, arrived = found.kept, found.arrived
        heard = self.kept_size or (self.asked and self.asked.length)
        lengths = {"transfer": kept.total, "manifest": self.named_size, "registry": heard}
        by, total = next(((by, size) for by, size in lengths.items() if size), (None, None))
        faults = (f"its ledger is damaged: {found.fault}",) if found.fault else ()
        is_unjudged = kept.is_left and not kept.is_wrong
        if is_unjudged:
            faults = ("the server finished it, and removed it; its hash is not known",)
        record = self.around.memory.downloads.get(f"{self.digest}{OURS}")
        is_it = record and found.data and record.is_of(*found.data.identity, found.born_ns)
        proven = self._proven(found.data)
        doubted = arrived if kept.is_wrong else ranges.union(kept.taken, kept.mirrored)
        sure = ranges.union(kept.proven, () if proven is None else proven.right)
        return self._base(
            record if is_it else None,
            found.born_ns,
            data=found.data,
            ours=True,
            total=total,
            total_from=by,
            faults=faults or (("its hash was wrong",) if kept.is_wrong else ()),
            trust=Trust(
                kept.durable, arrived, arrived, proven=ranges.intersection(kept.proven, arrived)
            ),
            holders=(found.holder,) if found.holder else (),
            unreadable=found.unreadable or None,
            by_server=kept.finished,
            discarded=kept.is_left and kept.is_wrong,
            may_be_right=is_unjudged and arrived == ((0, total),),
            is_refuted=kept.is_wrong,
            doubted=ranges.difference(doubted, sure),
            proven=proven,
        )

    def _base(
        self, record: Remembered | None, born_ns: int, *, data: Entry | None, **more: Any
    ) -> Download:
        progress_at = record.progress_at if record else None
        if progress_at is not None and data is not None:
            # As remembered, or since then, while nobody looked.
            progress_at = max(progress_at, data.changed_at)
        return Download(
            digest=self.digest,
            data=data,
            finished=self.finished,
            models=tuple(sorted({*self.named_models, *(record.models if record else ())})),
            progress_at=progress_at,
            ahead=record.ahead if record else None,
            registry=self.asked and self.asked.length,
            born_ns=born_ns,
            **more,
        )

    def _in_parts(self) -> Download:
        data = self.data
        read = tuple(self._sidecar(number, found) for number, found in self.sidecars)
        known, known_from = self._known_length()
        doubt = "" if known is None else self._contradiction(known, read)
        if doubt:
            known, doubt = None, f"the {known_from} says {known:,} bytes, {doubt}"
        faults = sidecars.faults(read, known) if read else ()
        claimed_total = sum(each.part.size for each in read if each.part)
        if data and read and not faults and known is None and data.size > claimed_total:
            both = ranges.in_words(data.size, claimed_total)
            faults = ("the data has {}, the parts only {}".format(*both),)
        total, total_from = known, known_from
        # A part beyond the data's end: a pull with a sidecar missing has cut the data.
        was_cut = data is not None and any(each.part.end > data.size for each in read if each.part)
        if read and not faults:
            total, total_from = claimed_total, "sidecars"
        elif known is None and data is not None and not was_cut:
            # The server creates the data file at its full length; a copy may have ended early.
            if self._agrees(data.size):
                total, total_from = data.size, "data"
            else:
                doubt = f"the data has {data.size:,} bytes"
                doubt += f", and the registry's manifest says {self.kept_size:,}"
        elif known is None and self.kept_size and self.kept_size >= (data.size if data else 0):
            total, total_from = self.kept_size, "registry"
        if total is not None and total > sidecars.LARGEST_LAYER:
            total, total_from = None, None
            faults = (*faults, "more bytes than any layer has")
        why_not = self.asked.why if self.asked is not None else ""
        trust, proven = self._trust(read, faults, total), self._proven(data)
        if proven is not None:
            trust = _as_proven(trust, proven, self.record.lost if self.record is not None else ())
        made = self._base(
            self.record,
            self.born_ns,
            data=data,
            sidecars=read,
            total=total,
            total_from=total_from,
            faults=faults,
            doubted_length="" if total is not None else doubt or why_not,
            trust=trust,
            reads=self.reads,
            proven=proven,
        )
        # A wrong hash that no doubted bytes explain: any byte may be wrong.
        refuted = made.is_wrong and made.trust.zeros_read and made.trust.trusted == ((0, total),)
        return replace(made, trust=made.trust._replace(trusted=())) if refuted else made

    def _proven(self, data: Entry | None) -> model.Proven | None:
        """What comparing has shown of the data as it is."""
        found = self.around.memory.proven.get(self.digest)
        if data is None or found is None:
            return None
        now = data.inode, data.size, bound_to(data), self.around.boot
        return found if found[:4] == now else None

    def _remembered(self, key: str, anchor: Entry | None) -> tuple[Remembered | None, int]:
        """What is remembered of this very file, not just of its digest, and when it was born."""
        if anchor is None:
            return None, 0
        record = self.around.memory.downloads.get(key)
        born_ns = fs.born(anchor.name, self.around.blobs)
        same = record is not None and record.is_of(*anchor.identity, born_ns)
        return record if same else None, born_ns

    def _known_length(self) -> tuple[int | None, str | None]:
        record = self.record
        if self.named_size is not None:
            return self.named_size, "manifest"
        if record is not None and record.total is not None and self._agrees(record.total):
            return record.total, "memory"
        length = self.asked and self.asked.length
        return length, None if length is None else "registry"

    def _agrees(self, total: int) -> bool:
        """Whether a length that was inferred is not another than that of a kept manifest."""
        return not self.kept_size or total == self.kept_size

    def _contradiction(self, known: int, read: tuple[Sidecar, ...]) -> str:
        """What shows that a layer has more bytes than somebody claims; "" where nothing does."""
        claimed = ranges.size(sidecars.claims([each.part for each in read if each.part]))
        if claimed > known:
            return f"and the sidecars claim {claimed:,}"
        if self.data is None or self.data.kind is not Kind.FILE or self.data.size <= known:
            return ""
        with self._opened(self.data) as fd:
            found = parts.data_behind(fd, known)
        return f"and there is data at byte {found:,}" if found is not None else ""

    def _trust(self, read: Sequence[Sidecar], faults: Sequence[str], total: int | None) -> Trust:
        data, record = self.data, self.record
        if not total:
            return Trust()
        if faults or not read:
            before = record.partition if record is not None else ()
            whole = sidecars.fill_gaps(sidecars.believable(read, total), total, before)
        else:
            claims = (each.part for each in read if each.part)
            whole = tuple(sorted(claims, key=lambda part: part.offset))
        # Of a copy the file that it was made of may show more than it does itself.
        known = self.around.memory.downloads.get(self.digest)
        if data is None or data.kind is not Kind.FILE:
            return parts.trust(None, whole, parts.Doubts(), parts.Limits())
        noted = known is not None and known.unsynced not in ("", self.around.boot)
        doubts = parts.Doubts(
            rebooted=noted or self._rebooted(data),
            refused=record.lost if record is not None else (),
            doubted=known.doubted if known is not None else (),
            starts=[part.offset for part in known.partition] if known is not None else (),
        )
        limit = self.around.rules.mode.read_limit_bytes
        # Claims that a power cut may have left without their data are looked through.
        limits = parts.Limits(None if noted and limit else limit, self.around.host.reads_no_more)
        with self._opened(data) as fd:
            now = self._unchanged_since(os.fstat(fd))
            reads = record.reads if record is not None else None
            same = now is not None and reads is not None and reads._replace(answers="") == now
            content = parts.Content(fd, min(data.size, total), reads if same else None)
            trust = parts.trust(content, whole, doubts, limits)
            self.reads = now and now._replace(answers=content.answers)
            return trust

    def _unchanged_since(self, status: os.stat_result) -> model.Reads | None:
        """What shows that a data file has not changed; None where nothing does."""
        boot, changed_ns = self.around.boot, status.st_ctime_ns
        # A change within the same tick as the last one shows in no time.
        whole_seconds = changed_ns % 1_000_000_000 == 0
        tick = _COARSE_TICK_SECONDS if whole_seconds else _TICK_SECONDS
        settled = self.around.now - changed_ns / 1e9 > tick
        if not boot or self.around.place.network or not settled:
            return None
        return model.Reads(status.st_size, changed_ns, boot, "")

    def _rebooted(self, data: Entry) -> bool:
        """Whether some of the data may have been written before the machine started."""
        # A pull that went on since then has changed its time, not its past.
        if self.record is not None and self._since_start(self.record.checked_at):
            return False
        written = min(data.changed_at, self.born_ns / 1e9) if self.born_ns else data.changed_at
        return not self._since_start(written)

    def _since_start(self, at: float) -> bool:
        """Whether it lies between the machine's start and now; the future shows nothing."""
        return self.around.started_at <= at <= self.around.now

    def _sidecar(self, number: int | None, found: Entry) -> Sidecar:
        if found.kind is not Kind.FILE:
            return Sidecar(found, number, None, f"{found.kind.words}, no file")
        with self._opened(found) as fd:
            raw = os.read(fd, sidecars.READ_LIMIT)
        try:
            part = sidecars.parse(raw)
        except ValueError as error:
            return Sidecar(found, number, None, str(error))
        return Sidecar(found, number, part, sidecars.part_fault(number, part))

    @contextlib.contextmanager
    def _opened(self, found: Entry) -> Iterator[int]:
        """The descriptor of an entry; it must still be the one that was listed."""
        try:
            fd = fs.open_quietly(found.name, _READ_ONLY, self.around.blobs)
        except FileNotFoundError:
            raise _ChangedMeanwhile from None
        with fs.closing(fd):
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) != found.identity:
                raise _ChangedMeanwhile
            yield fd

"""Numbers for dashboards and alerts: of the last scans, and of what this process did.

`docs/metrics.md` has them all. prometheus_client is loaded only if the settings ask for metrics.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Self, TypeAlias

from watcher import __version__
from watcher.config import Settings
from watcher.decide.findings import is_blind
from watcher.model import (
    Condition,
    Diagnosed,
    Evidence,
    Outcome,
    Refusal,
    RefusalKind,
    Severity,
    Visibility,
)
from watcher.ollama import names, ranges
from watcher.reconcile import Report
from watcher.state import fs
from watcher.state.event_log import Event, EventType

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric


class Unfinished(NamedTuple):
    """The numbers of an unfinished download; `missing` is 0 where its length is unknown."""

    condition: Condition
    stale: bool
    present: int
    missing: int
    progress_at: float


@dataclass(frozen=True, slots=True)
class Looked:
    """The results of scans: of each digest the last one that had it in its scope."""

    visibility: Visibility
    free_bytes: int
    downloads: Mapping[str, tuple[Unfinished, ...]] = field(default_factory=dict)
    #: From here on: what only a full scan shows. Findings by severity and kind.
    findings: Mapping[tuple[Severity, str], int] = field(default_factory=dict)
    blobs: int = 0
    blob_bytes: int = 0
    orphan_bytes: int = 0
    quarantine_bytes: int = 0
    #: Whether it could list ``blobs``, and the manifests: otherwise their content is unknown.
    lists_blobs: bool = True
    lists_manifests: bool = True
    #: When the last one was, and how long it took.
    full_at: float = 0.0
    full_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Counted:
    """Events since this process began."""

    repairs: int = 0
    saved_bytes: int = 0
    freed_bytes: int = 0
    #: All kinds, and errors, from the start: a counter that begins at 1 has no rate.
    refusals: Mapping[str, int] = field(
        default_factory=lambda: dict.fromkeys(map(str, RefusalKind), 0)
    )
    events: Mapping[str, int] = field(default_factory=lambda: {"error": 0})


# ---------------------------------------------------------------- from reports and events


def looked(before: Looked | None, report: Report, seconds: float) -> Looked:
    """What is known after a scan that took `seconds`.

    A narrow one covers the digests in its scope, and no others.
    """
    seen = report.evidence
    visibility, free, census = seen.view.visibility, seen.place.free_bytes, seen.census
    lists_blobs = "blobs" not in census.unlisted
    found: dict[str, tuple[Unfinished, ...]] = {}
    for each in report.diagnosis.diagnosed:
        found[each.digest] = (*found.get(each.digest, ()), _unfinished(each, seen))
    if seen.scope is not None:
        before = before or Looked(visibility, free)
        others = {
            digest: each for digest, each in before.downloads.items() if digest not in seen.scope
        }
        return replace(
            before,
            visibility=visibility,
            free_bytes=free,
            downloads=others | found,
            lists_blobs=before.lists_blobs and lists_blobs,
        )
    return Looked(
        visibility,
        free,
        found,
        findings=Counter((each.severity, each.kind) for each in report.diagnosis.findings),
        blobs=census.healthy,
        blob_bytes=census.healthy_bytes,
        orphan_bytes=sum(entry.allocated for entry in census.unnamed),
        quarantine_bytes=sum(kept.entry.allocated for kept in seen.quarantine),
        lists_blobs=lists_blobs,
        lists_manifests=not is_blind(seen),
        full_at=seen.now,
        full_seconds=seconds,
    )


def _unfinished(diagnosed: Diagnosed, seen: Evidence) -> Unfinished:
    present, total = ranges.size(diagnosed.download.trust.present), diagnosed.download.total
    return Unfinished(
        diagnosed.condition,
        diagnosed.stale,
        present,
        0 if total is None else max(0, total - present),
        seen.now - diagnosed.age,
    )


def counted(before: Counted, event: Event) -> Counted:
    """The counts after an event."""
    after = replace(before, events=_one_more(before.events, event.event_type))
    match event.about:
        case Refusal() as refusal:
            return _refused(after, refusal)
        case Outcome() as outcome if event.event_type == EventType.DOWNLOAD_REPAIRED:
            saved = after.saved_bytes + outcome.action.saves
            return replace(after, repairs=after.repairs + 1, saved_bytes=saved)
        case Outcome() as outcome:
            after = replace(after, freed_bytes=after.freed_bytes + outcome.freed)
            return after if outcome.refusal is None else _refused(after, outcome.refusal)
        case _:
            return after


def _refused(before: Counted, refusal: Refusal) -> Counted:
    return replace(before, refusals=_one_more(before.refusals, refusal.kind.value))


def _one_more(counts: Mapping[str, int], key: str) -> dict[str, int]:
    return {**counts, key: counts.get(key, 0) + 1}


# ---------------------------------------------------------------- for Prometheus


#: Numbers by the values of their labels.
Samples: TypeAlias = Mapping[tuple[str, ...], float]


class Family(NamedTuple):
    """One metric: its name without the prefix, its meaning, and its samples by their labels."""

    name: str
    meaning: str
    samples: Samples
    labels: tuple[str, ...] = ()
    counts: bool = False


def families(known: Looked | None, counts: Counted) -> Iterator[Family]:
    """Every metric; before the first scan only when that was (never), and the counts."""
    yield Family("build_info", "The version of ollama-watch.", {(__version__,): 1}, ("version",))
    yield Family(
        "last_full_look_timestamp_seconds",
        "The time of the last full scan, in seconds since the epoch; 0 before the first.",
        {(): 0 if known is None else known.full_at},
    )
    if known is not None:
        yield from _of_store(known)
        if known.lists_blobs:
            yield from _of_blobs(known)
            yield from _of_downloads(known.downloads)
    yield from _of_counts(counts)


def _of_store(known: Looked) -> Iterator[Family]:
    yield Family(
        "last_full_look_duration_seconds",
        "How long it took, including the actions after it.",
        {(): known.full_seconds},
    )
    yield Family(
        "findings",
        "Findings of the last full scan.",
        {(severity.value, kind): number for (severity, kind), number in known.findings.items()},
        ("severity", "kind"),
    )
    quarantine: Samples = {(): known.quarantine_bytes}
    yield Family("quarantine_bytes", "Disk space of the quarantine.", quarantine)
    yield Family("free_bytes", "Free space on the store's file system.", {(): known.free_bytes})
    yield Family(
        "sight",
        "The visibility of processes: 1 for the present one.",
        {(visibility.value,): visibility is known.visibility for visibility in Visibility},
        ("sight",),
    )


def _of_blobs(known: Looked) -> Iterator[Family]:
    yield Family(
        "blobs",
        "Finished blobs that a model names and that have the right size.",
        {(): known.blobs},
    )
    yield Family("blob_bytes", "The length of those blobs.", {(): known.blob_bytes})
    yield Family(
        "orphan_bytes",
        "Disk space of finished blobs that no model names.",
        {(): known.orphan_bytes} if known.lists_manifests else {},
    )


def _of_downloads(downloads: Mapping[str, tuple[Unfinished, ...]]) -> Iterator[Family]:
    every = [each for those in downloads.values() for each in those]
    number, size = Counter[Condition](), Counter[tuple[str, str]]()
    for each in every:
        number[each.condition] += 1
        size[each.condition.value, "present"] += each.present
        size[each.condition.value, "missing"] += each.missing
    yield Family(
        "downloads",
        "Unfinished downloads.",
        {(condition.value,): number[condition] for condition in Condition},
        ("condition",),
    )
    yield Family(
        "download_bytes",
        "Bytes of unfinished downloads that are on the disk, and that are missing.",
        {
            (c.value, part): size[c.value, part]
            for c in Condition
            for part in ("present", "missing")
        },
        ("condition", "part"),
    )
    yield Family(
        "stale_downloads",
        "Downloads without progress for stale_after.",
        {(): sum(each.stale for each in every)},
    )
    waiting = [each.progress_at for each in every if each.condition is not Condition.LIVE]
    yield Family(
        "oldest_progress_timestamp_seconds",
        "When bytes last arrived of the download that has waited longest; absent without any.",
        {(): min(waiting)} if waiting else {},
    )


def _of_counts(counts: Counted) -> Iterator[Family]:
    for name, meaning, number in (
        ("repairs_total", "Repaired downloads.", counts.repairs),
        ("saved_bytes_total", "Bytes saved from downloading by repairs.", counts.saved_bytes),
        ("freed_bytes_total", "Bytes freed by removals.", counts.freed_bytes),
    ):
        yield Family(name, meaning, {(): number}, counts=True)
    for name, meaning, numbers, label in (
        ("refusals_total", "Refusals, by kind.", counts.refusals, "kind"),
        ("events_total", "Events, by type.", counts.events, "type"),
    ):
        samples: Samples = {(value,): number for value, number in numbers.items()}
        yield Family(name, meaning, samples, (label,), counts=True)


class Metrics:
    """Keeps the numbers of one daemon, and hands them out as the settings say; else does nothing.

    A context: in it the listener answers. Raises ListenError at its beginning.
    """

    def __init__(self, store: str, settings: Settings) -> None:
        self._store = names.printable(store)
        self._file, self._address = settings.metrics_file, settings.metrics_listen
        self._held = contextlib.ExitStack()
        #: Values that are replaced as a whole: a scrape reads them at any moment.
        self._looked: Looked | None = None
        self._counted = Counted()
        #: Events come from more than one thread.
        self._count_lock = threading.Lock()
        self._registry: CollectorRegistry | None = None
        #: Writing the file failed: reported once, until it succeeds.
        self._failing = False
        #: The port of the listener.
        self.port: int | None = None

    def __enter__(self) -> Self:
        if self._file or self._address is not None:
            self._registry = _registry(self.collect)
        if self._registry is not None and self._address is not None:
            from watcher.service.listener import listening

            self.port = self._held.enter_context(listening(*self._address, self._registry))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def counting(self, tell: Callable[[Event], None]) -> Callable[[Event], None]:
        """`tell`, with each event counted on its way."""

        def both(event: Event) -> None:
            self.event(event)
            tell(event)

        return both

    def event(self, event: Event) -> None:
        """Count an event."""
        if self._registry is not None:
            with self._count_lock:
                self._counted = counted(self._counted, event)

    def look(self, report: Report, seconds: float) -> str:
        """Take in a scan, and write the file; why that failed, if that is new, else ""."""
        if self._registry is None:
            return ""
        self._looked = looked(self._looked, report, seconds)
        if not self._file:
            return ""
        try:
            self._write(self._registry)
        except OSError as error:
            new, self._failing = not self._failing, True
            why = f"metrics_file: writing {self._file} failed: {error.strerror}"
            return why if new else ""
        self._failing = False
        return ""

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        for family in families(self._looked, self._counted):
            kind = CounterMetricFamily if family.counts else GaugeMetricFamily
            made = kind(
                f"ollama_watch_{family.name}", family.meaning, labels=("store", *family.labels)
            )
            for values, number in family.samples.items():
                made.add_metric((self._store, *values), number)
            yield made

    def _write(self, registry: CollectorRegistry) -> None:
        from prometheus_client import generate_latest

        folder, name = os.path.split(self._file)
        with fs.opened_folder(folder) as parent:
            # The next scan writes it again: it need not survive a crash of the machine.
            fs.save(name, parent, generate_latest(registry), durable=False)


def _registry(collect: Callable[[], Iterator[Metric]]) -> CollectorRegistry:
    from prometheus_client import CollectorRegistry
    from prometheus_client.registry import Collector

    class Source(Collector):
        def collect(self) -> Iterator[Metric]:
            return collect()

    registry = CollectorRegistry()
    registry.register(Source())
    return registry

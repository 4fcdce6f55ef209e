"""Numbers for dashboards and alerts: of the last scans, and of what this process did.

`docs/metrics.md` has them all. prometheus_client is loaded only if the settings ask for metrics.
"""

import contextlib
import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, Self, TypeAlias, cast

from watcher import __version__, model
from watcher.config import Settings
from watcher.decide.findings import is_blind
from watcher.ollama import names, ranges
from watcher.reconcile import Report
from watcher.state import fs
from watcher.state.event_log import Event, EventType

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric
    from prometheus_client.registry import Collector


class _Family(NamedTuple):
    """What one metric means, and its labels besides the store; `counts`: it is a counter."""

    meaning: str
    labels: tuple[str, ...] = ()
    counts: bool = False


#: Every metric by its name without the prefix, in the order in which they are handed out.
_FAMILIES = {
    "build_info": _Family("The version of ollama-watch.", ("version",)),
    "last_full_look_timestamp_seconds": _Family("When the last full scan was; 0 before the first."),
    "last_full_look_duration_seconds": _Family("How long it took, with the actions after it."),
    "findings": _Family("Findings of the last full scan.", ("severity", "kind")),
    "quarantine_bytes": _Family("Disk space of the quarantine."),
    "free_bytes": _Family("Free space on the store's file system."),
    "sight": _Family("The visibility of processes: 1 for the current one.", ("sight",)),
    "blobs": _Family("Finished blobs that a model names and that have the right size."),
    "blob_bytes": _Family("The total length of those blobs."),
    "at_risk_bytes": _Family("Needed bytes that the next server start deletes."),
    "orphan_bytes": _Family("Disk space of finished blobs that no model names."),
    "downloads": _Family("Unfinished downloads.", ("condition",)),
    "download_bytes": _Family("Their bytes on disk, and missing ones.", ("condition", "part")),
    "repairable_bytes": _Family("Bytes that the next pull downloads again without a repair."),
    "stale_downloads": _Family("Unfinished downloads that received no bytes for stale_after."),
    "oldest_progress_timestamp_seconds": _Family("When the longest idle one last received bytes."),
    "repairs_total": _Family("Repaired downloads.", counts=True),
    "saved_bytes_total": _Family("Bytes saved from downloading by repairs.", counts=True),
    "freed_bytes_total": _Family("Bytes freed by removals.", counts=True),
    "refusals_total": _Family("Refusals, by kind.", ("kind",), counts=True),
    "events_total": _Family("Events, by type.", ("type",), counts=True),
}

Samples: TypeAlias = Mapping[tuple[str, ...], float]  #: by the values of labels


class _Unfinished(NamedTuple):
    """The numbers of an unfinished download; `missing` is 0 where its length is unknown."""

    condition: model.Condition
    stale: bool
    present: int
    missing: int
    repairable: int
    progress_at: float


class Metrics:
    """The numbers of one daemon, handed out by the settings, if so. Entering raises ListenError."""

    def __init__(self, store: str, settings: Settings) -> None:
        self._store = names.printable(store)
        self._file, self._address = settings.metrics_file, settings.metrics_listen
        self._held = contextlib.ExitStack()
        #: By metric. Replaced as a whole: a scrape reads it at any moment.
        self._scanned: dict[str, Samples] = {
            "build_info": {(__version__,): 1},
            "last_full_look_timestamp_seconds": {(): 0},
        }
        self._downloads: dict[str, tuple[_Unfinished, ...]] = {}  #: by digest, as scanned last
        self._lists_blobs = True  #: whether all scans since the last full one could list the blobs
        # What is asked for from the start: a counter that begins at 1 has no rate.
        self._counts: dict[str, Counter[tuple[str, ...]]] = {
            "repairs_total": Counter({(): 0}),
            "saved_bytes_total": Counter({(): 0}),
            "freed_bytes_total": Counter({(): 0}),
            "refusals_total": Counter({(kind.value,): 0 for kind in model.RefusalKind}),
            "events_total": Counter({(EventType.ERROR.value,): 0, (EventType.REFUSED.value,): 0}),
        }
        self._count_lock = threading.Lock()
        self._registry: CollectorRegistry | None = None
        self._failing = False  #: writing the file failed: reported once, until it succeeds
        #: Why the listener could accept no client: reported with the next scan.
        self._troubles: deque[str] = deque()
        self.port: int | None = None  #: the port of the listener

    def __enter__(self) -> Self:
        if self._file or self._address is not None:
            from prometheus_client import CollectorRegistry

            self._registry = CollectorRegistry()
            self._registry.register(cast("Collector", self))  # all it needs is `collect`
        if self._registry is not None and self._address is not None:
            from watcher.service.listener import listening

            served = listening(*self._address, self._registry, self._troubles.append)
            self.port = self._held.enter_context(served)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def event(self, event: Event) -> None:
        """Count an event. Safe among threads."""
        if self._registry is None:
            return
        with self._count_lock:
            self._counts["events_total"][event.event_type,] += 1
            match event.about:
                case model.Refusal() as refusal:
                    self._counts["refusals_total"][refusal.kind.value,] += 1
                case model.Outcome() as outcome if event.event_type == EventType.DOWNLOAD_REPAIRED:
                    self._counts["repairs_total"][()] += 1
                    self._counts["saved_bytes_total"][()] += outcome.action.saves
                case model.Outcome() as outcome:
                    self._counts["freed_bytes_total"][()] += outcome.freed
                    if outcome.refusal is not None:
                        self._counts["refusals_total"][outcome.refusal.kind.value,] += 1

    def look(self, report: Report, seconds: float) -> str:
        """Take in a scan, and write the file; what failed of that, or while listening, if new."""
        if self._registry is None:
            return ""
        self._take(report, seconds)
        failed = self._write() if self._file else ""
        return failed or (self._troubles.popleft() if self._troubles else "")

    def _write(self) -> str:
        """Write the file; why that failed, if that is new, else ""."""
        assert self._registry is not None
        from prometheus_client import generate_latest

        folder, name = os.path.split(self._file)
        try:
            with fs.opened_folder(folder) as parent:
                # The next scan writes it again: it need not survive a crash of the machine.
                fs.save(name, parent, generate_latest(self._registry), durable=False)
        except OSError as error:
            new, self._failing = not self._failing, True
            why = f"metrics_file: writing {self._file} failed: {error.strerror}"
            return why if new else ""
        self._failing = False
        return ""

    def _take(self, report: Report, seconds: float) -> None:
        """A narrow scan covers the digests in its scope, and no others."""
        seen = report.evidence
        found: dict[str, tuple[_Unfinished, ...]] = {}
        for each in report.diagnosis.diagnosed:
            found[each.digest] = (*found.get(each.digest, ()), _unfinished(each, seen))
        lists_blobs = "blobs" not in seen.census.unlisted
        scanned = dict(self._scanned)
        if seen.scope is None:
            scanned |= _of_full_scan(report, seconds)
            self._downloads, self._lists_blobs = found, lists_blobs
        else:
            others = self._downloads.items()
            found |= {digest: each for digest, each in others if digest not in seen.scope}
            self._downloads, self._lists_blobs = found, self._lists_blobs and lists_blobs
        scanned["free_bytes"] = {(): seen.place.free_bytes}
        sight = seen.view.visibility
        scanned["sight"] = {(each.value,): each is sight for each in model.Visibility}
        scanned |= _of_downloads([each for those in self._downloads.values() for each in those])
        if not self._lists_blobs:
            for name in _OF_BLOBS:
                scanned.pop(name, None)
        self._scanned = scanned

    def collect(self) -> Iterator["Metric"]:
        """The metrics as they are now; before the first scan only when that was, and counts."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        scanned = self._scanned
        with self._count_lock:
            counts = {name: dict(samples) for name, samples in self._counts.items()}
        for name, (meaning, labels, counts_up) in _FAMILIES.items():
            samples = counts[name] if counts_up else scanned.get(name)
            if samples is None:
                continue
            kind = CounterMetricFamily if counts_up else GaugeMetricFamily
            family = kind(f"ollama_watch_{name}", meaning, labels=("store", *labels))
            for values, number in samples.items():
                family.add_metric((self._store, *values), number)
            yield family


#: What is unknown while the blobs can't be listed.
_OF_BLOBS = (
    *("blobs", "blob_bytes", "orphan_bytes", "at_risk_bytes", "repairable_bytes"),
    *("downloads", "download_bytes", "stale_downloads", "oldest_progress_timestamp_seconds"),
)
#: The findings about what the next server start deletes although it is needed.
_AT_RISK = ("download_at_risk", "blob_at_risk")
#: So many kinds of findings have a series of their own, the worst first; all others are one.
MOST_FINDINGS = 32


def _of_full_scan(report: Report, seconds: float) -> dict[str, Samples]:
    seen, census = report.evidence, report.evidence.census
    at_risk = (each for each in report.diagnosis.findings if each.kind in _AT_RISK)
    orphans = sum(entry.allocated for entry in census.unnamed)
    return {
        "last_full_look_timestamp_seconds": {(): seen.now},
        "last_full_look_duration_seconds": {(): seconds},
        "findings": _of_findings(report.diagnosis.findings),
        "quarantine_bytes": {(): sum(kept.entry.allocated for kept in seen.quarantine)},
        "blobs": {(): census.healthy},
        "blob_bytes": {(): census.healthy_bytes},
        "at_risk_bytes": {(): sum(each.sizes.allocated for each in at_risk)},
        "orphan_bytes": {} if is_blind(seen) else {(): orphans},
    }


def _of_findings(findings: Iterable[model.Finding]) -> Samples:
    """How many there are of each kind; they come the worst first."""
    number: Counter[tuple[str, ...]] = Counter()
    for each in findings:
        key = each.severity.value, each.kind
        known = key in number or len(number) < MOST_FINDINGS - len(model.Severity)
        number[key if known else (each.severity.value, "other")] += 1
    return number


def _unfinished(diagnosed: model.Diagnosed, seen: model.Evidence) -> _Unfinished:
    present, total = ranges.size(diagnosed.download.trust.present), diagnosed.download.total
    alone = total if diagnosed.cost_alone is None else diagnosed.cost_alone
    repaired = alone if diagnosed.cost_repaired is None else diagnosed.cost_repaired
    return _Unfinished(
        condition=diagnosed.condition,
        stale=diagnosed.stale,
        present=present,
        missing=max(0, (total or 0) - present),
        repairable=max(0, (alone or 0) - (repaired or 0)),
        progress_at=seen.now - diagnosed.age,
    )


def _of_downloads(every: list[_Unfinished]) -> dict[str, Samples]:
    number: Counter[tuple[str, ...]] = Counter()
    size: Counter[tuple[str, ...]] = Counter()
    for condition in model.Condition:
        number[condition.value,] = 0
        size[condition.value, "present"] = size[condition.value, "missing"] = 0
    for each in every:
        number[each.condition.value,] += 1
        size[each.condition.value, "present"] += each.present
        size[each.condition.value, "missing"] += each.missing
    waiting = [each.progress_at for each in every if each.condition is not model.Condition.LIVE]
    return {
        "downloads": number,
        "download_bytes": size,
        "repairable_bytes": {(): sum(each.repairable for each in every)},
        "stale_downloads": {(): sum(each.stale for each in every)},
        "oldest_progress_timestamp_seconds": {(): min(waiting)} if waiting else {},
    }

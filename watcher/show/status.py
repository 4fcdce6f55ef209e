"""What is going on in a store: looked at, as text and as a document."""

import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple

from watcher.config import Settings
from watcher.decide import conditions, following, remaining, transitions
from watcher.errors import WatchError
from watcher.model import DAY, QUIET_SECONDS, Condition, Diagnosed, Unseen, Visibility
from watcher.observe.host import Host
from watcher.ollama import names, ranges
from watcher.pull import queue as queues
from watcher.pull.failures import Asked, Cause, of_error
from watcher.pull.speed import Spread, spread
from watcher.reconcile import Reconciler, Report, remembered
from watcher.show import documents, log, queue, tables
from watcher.show.text import Line, Part, Span, Table, command, name, size
from watcher.state import event_log, folders, records, state_folder
from watcher.state.event_log import clock
from watcher.state.memory import Memory, Sample
from watcher.state.records import Record, Records, State
from watcher.system import advice

_SILENT_SECONDS = 60.0  #: a record of a download that goes on is changed each second, but for waits
_OVERDUE_SECONDS = 1800.0  #: a daemon scans every ten minutes; a unit's watchdog waits so long, too
APART_SECONDS = 1.0  #: a rate takes two looks


class Pace(NamedTuple):
    """Bytes a second that arrive on the disk, and the seconds left; None where not known."""

    per_second: float | None = None
    left: float | None = None
    lately: Spread | None = None  #: the rates of the last minutes, where a daemon runs


class Status:
    """One look at a store, and what else is known of it.

    `past` is an earlier look; without one it looks twice, so many seconds `apart`, or 0: once.
    """

    def __init__(
        self,
        host: Host,
        settings: Settings,
        past: Report | None = None,
        apart: float = APART_SECONDS,
    ) -> None:
        reconciler = Reconciler(host, settings)
        self.report = reconciler.inspect()
        seen = {each.condition for each in self.report.diagnosis.diagnosed}
        if past is None and apart and Condition.LIVE in seen:
            time.sleep(apart)
            past, self.report = self.report, reconciler.inspect()
        memory = remembered(host)
        self.looked_at = memory.looked_at  #: the last full scan with a memory; 0 for never
        self.paces = _paces(past, self.report, memory)  #: of each live download, by its key
        self.daemon = state_folder.daemon(host.store)
        self.runner = state_folder.queue_runner(host.store)
        kept, self.queue, unread = _kept(host.store)
        self.unseen = (*remaining.out_of_sight(self.report.evidence), *unread)  #: not inspected
        self.records = _as_they_are(kept, self.report, whole=not self.unseen)

    @property
    def diagnosed(self) -> tuple[Diagnosed, ...]:
        """Each download as it is now: one that has just broken off is live no more."""
        found = []
        for each in self.report.diagnosis.diagnosed:
            if self._has_broken_off(each):
                condition, because = conditions.settled_condition(each.download)
                left = max(0.0, QUIET_SECONDS - each.quiet)
                why = "no process has it open; a pull may still continue it for"
                each = each._replace(condition=condition, because=f"{why} {left:.0f} s; {because}")
            found.append(each)
        return tuple(found)

    def _has_broken_off(self, diagnosed: Diagnosed) -> bool:
        """Whether it counts as live by a change alone: it is not open, and no bytes arrive."""
        download = diagnosed.download
        if diagnosed.condition is not Condition.LIVE or download.writers:
            return False
        if self.paces[download.key].per_second != 0:
            return False
        records = (self.records.get(shown.lower()) for shown in download.models)
        failed = any(each is not None and each.state is State.ERROR for each in records)
        return failed or self.report.evidence.view.visibility is not Visibility.PARTIAL

    @property
    def pulled(self) -> dict[str, Record]:
        """The records of downloads that go on, and of failures that are fresh or left files."""
        seen = self.report.evidence
        unfinished = {shown.lower() for each in seen.downloads for shown in each.models}
        return {
            key: each
            for key, each in sorted(self.records.items())
            if each.state.active
            or (
                each.state is State.ERROR
                and (key in unfinished or seen.now - each.updated_at < DAY)
            )
        }


def _kept(path: str) -> tuple[Records, queues.Queue, list[Unseen]]:
    """What is kept of the models' downloads, and the queue; and what of it can't be read."""
    known: Records = {}
    line = queues.Queue()
    failed: dict[str, WatchError] = {}
    with suppress(OSError), folders.opened_store(path) as store:
        try:
            known = records.read(store)
        except WatchError as error:
            failed[f"{state_folder.FOLDER}/{records.NAME}"] = error
        try:
            line = queues.FILE.read(store)
        except WatchError as error:
            failed[f"{state_folder.FOLDER}/{queues.FILE.name}"] = error
    whys = {
        file: each.message.removeprefix(f"{file} can't be read: ") for file, each in failed.items()
    }
    return known, line, [Unseen(file, why) for file, why in whys.items()]


def _as_they_are(known: Records, report: Report, *, whole: bool) -> Records:
    """The records, where their reasons are no longer so as the store is; `whole`: all was seen."""
    unfinished = [(each.download.models, each.condition) for each in report.diagnosis.diagnosed]
    written = report.evidence.census.models.keys() if whole else None
    damaged = transitions.damaged(report.diagnosis.findings)
    now = dict(known)
    for key, state, why in following.restated(
        known, following.Standing(tuple(unfinished), written, damaged)
    ):
        now[key] = records.restate(now[key], state, why, now[key].updated_at)
    return now


def _paces(past: Report | None, now: Report, memory: Memory) -> dict[str, Pace]:
    """How fast each live download comes, by its key: between two looks, and as a daemon saw it."""
    before = {} if past is None else {each.key: each for each in past.evidence.downloads}
    found: dict[str, Pace] = {}
    for diagnosed in now.diagnosis.diagnosed:
        download = diagnosed.download
        if diagnosed.condition is not Condition.LIVE:
            continue
        per_second = left = None
        if past is not None and download.key in before:
            first = Sample(past.evidence.now, before[download.key].allocated)
            per_second = transitions.rate((first, Sample(now.evidence.now, download.allocated)))
        if per_second and download.total is not None:
            left = max(0, download.total - download.allocated) / per_second
        known = memory.downloads.get(download.key)
        rates = map(transitions.rate, pairwise(known.samples if known else ()))
        lately = spread([each for each in rates if each is not None])
        found[download.key] = Pace(per_second, left, lately)
    return found


def unhealthy(host: Host) -> str:
    """Why nothing watches a store as it should; "" where a daemon does."""
    running = state_folder.daemon(host.store)
    if running is None:
        return "no daemon is seen to watch it"
    began = datetime.fromisoformat(running.since).timestamp() if running.since else 0.0
    silent = host.clock() - max(remembered(host).looked_at, began)
    if silent > _OVERDUE_SECONDS:
        return f"the daemon has made no full scan for {advice.duration(silent)}"
    return ""


def health(store: str, why: str) -> dict[str, Any]:
    return {
        "schema": "ollama-watch/health/1",
        "store": names.exact(store),
        "healthy": not why,
        "why": why or None,
    }


def document(status: Status) -> dict[str, Any]:
    seen = status.report.evidence
    running = status.daemon
    return {
        "schema": "ollama-watch/status/1",
        "time": event_log.rfc3339(seen.now),
        "store": names.exact(seen.place.path),
        "daemon": None if running is None else {"pid": running.pid, "since": running.since},
        "queue": {
            "waiting": len(status.queue.line),
            "paused": status.queue.paused,
            "run_by": queue.run_by(status.runner),
        },
        "looked_at": event_log.rfc3339(status.looked_at) if status.looked_at else None,
        "visibility": seen.view.visibility.value,
        "sight": seen.view.visibility.value,
        "servers": [{"pid": each.pid, "state": each.state.value} for each in seen.servers],
        "downloads": [_download(each, status) for each in status.diagnosed],
        "models": [
            {
                **documents.record(key, each),
                "resets": each.resets,
                "stalls": each.stalls,
                "lost_bytes": each.lost_bytes,
                "updated_at": event_log.rfc3339(each.updated_at),
            }
            for key, each in status.pulled.items()
        ],
        "per_second_bytes": round(sum(rates(status).values())),
        "advice": [words for words, _ in hints(status)],
        "commands": [
            *(command for _, command in hints(status) if command),
            *remaining.opening(status.unseen, status.report.diagnosis),
        ],
        "unseen": documents.unseen(status.unseen),
        "due": documents.due(status.report.plan),
    }


def _download(diagnosed: Diagnosed, status: Status) -> dict[str, Any]:
    download = diagnosed.download
    live = diagnosed.condition is Condition.LIVE
    pace = status.paces[download.key] if live else Pace()
    lately = pace.lately
    return {
        "digest": f"sha256:{download.digest}",
        "models": list(download.models),
        "transfer": download.transfer,
        "ours": download.ours,
        "condition": diagnosed.condition.value,
        "words": conditions.row(diagnosed.condition).words,
        "because": diagnosed.because,
        "stale": diagnosed.stale,
        "total_bytes": download.total,
        "claimed_bytes": ranges.size(download.trust.claimed),
        "present_bytes": ranges.size(download.trust.present),
        "allocated_bytes": download.allocated,
        "per_second_bytes": None if pace.per_second is None else round(pace.per_second),
        "lately_per_second_bytes": lately
        and {
            "min": round(lately.minimum),
            "median": round(lately.median),
            "max": round(lately.maximum),
        },
        "left_seconds": None if pace.left is None else round(pace.left, 1),
        "writers": [
            {"pid": each.pid, "process": names.exact(each.process)} for each in download.writers
        ],
    }


def rates(status: Status) -> dict[str, float]:
    """Bytes a second by model, or digest: our pulls' by the server, others' by the disk."""
    now = status.report.evidence.now
    found = {
        key: each.bytes_per_second
        for key, each in status.pulled.items()
        if each.state.active and each.bytes_per_second and now - each.updated_at < _SILENT_SECONDS
    }
    driven = frozenset(found)
    for diagnosed in status.report.diagnosis.diagnosed:
        download = diagnosed.download
        pace = status.paces.get(download.key, Pace())
        models = [each.lower() for each in download.models]
        if pace.per_second and driven.isdisjoint(models):
            key = models[0] if models else download.digest
            found[key] = found.get(key, 0.0) + pace.per_second
    return found


def hints(status: Status) -> Iterator[tuple[str, str]]:
    """What helps, in words, and as a command; "" where none does."""
    seen = status.report.evidence
    pulls = rates(status)
    if len(pulls) > 1:
        together = size(round(sum(pulls.values())))
        yield f"{len(pulls)} pulls share the connection: {together}/s in total", ""
    for key, record in status.pulled.items():
        if record.state.active and record.resets:
            yield f"{key}: connections are reset; the pull repairs it", ""
        if record.state is State.ERROR and record.error:
            cause = of_error(record.error)
            insecure = ("--insecure",) if advice.is_on_loopback(key) else ()
            url = advice.server_of(seen)
            asked = Asked(key, url, seen.place.path, seen.place.found_by, insecure)
            if cause is Cause.BLOCKED and not _needs_repair(key, status):
                cause = Cause.INTERRUPTED
            if cause is Cause.RESETS:
                words = f"{key}: connections are reset; to survive that, pull it with:"
                yield words, Cause.CANCELLED.command(asked)
            elif cause is not Cause.UNKNOWN:
                yield f"{key}: {cause.step}", cause.command(asked)


def _needs_repair(key: str, status: Status) -> bool:
    """Whether a repair does anything about what is unfinished of a model, or may."""
    steps = (
        conditions.row(each.condition).repair
        for each in status.report.diagnosis.diagnosed
        if not each.download.models or key in map(str.lower, each.download.models)
    )
    return any(step is not conditions.Step.NOTHING for step in steps)


def table(status: Status, *, verbose: bool) -> Iterator[Part]:
    """The same for people; `verbose`: every download, not only the first ones."""
    report = status.report
    now = report.evidence.now
    # The liveliest first.
    found = sorted(status.diagnosed, key=lambda each: (-each.download.allocated, each.digest))
    found.sort(key=lambda each: each.condition is not Condition.LIVE)
    yield _verdict(status, found)
    yield ""
    yield from tables.summary(report.evidence)
    yield tables.row("daemon", _daemon(status))
    if status.queue.line:
        runs = queue.runs(status.queue, status.runner)
        yield tables.row("queue", f"{len(status.queue.line):,} queued; {runs}")
        place = report.evidence.place
        if helps := queue.restart(status.queue, status.runner, place.path, place.found_by):
            yield command(helps)
    if found:
        yield ""
        yield from tables.downloads(found, lambda each: _drawn(each, status), verbose=verbose)
    yield from tables.not_seen(status.unseen, report.diagnosis)
    if status.pulled:
        yield ""
        style = {State.ERROR: "red"}
        yield Table(
            [
                (Span(name(key), "bold"), Span(_stage(each, now), style.get(each.state, "")))
                for key, each in status.pulled.items()
            ]
        )
        for words, helps in hints(status):
            yield names.printable(words)
            if helps:
                yield command(helps)
    models = {each.digest: each.download.models for each in report.diagnosis.diagnosed}
    due = next((each for each in report.plan.due if each.then), None)
    if due is not None:
        who = name(names.known_as(models.get(due.digest, ()), due.digest))
        text = f"{who} {due.then} at {clock(due.at, now)} unless bytes arrive"
        yield Line(text, 2, "dim")


def _verdict(status: Status, found: list[Diagnosed]) -> Line:
    for key, record in status.pulled.items():
        if record.state.active and record.total_bytes:
            stage = _stage(record, status.report.evidence.now)
            return Line((Span(f"{name(key)}:", "bold"), Span(f" {stage}.")))
    live = [each for each in found if each.condition is Condition.LIVE]
    if live:
        first = live[0]
        alike = [each for each in live if each.download.models[:1] == first.download.models[:1]]
        alike = alike if first.download.models else [first]
        paces = [status.paces[each.download.key] for each in alike]
        rates = [each.per_second for each in paces if each.per_second is not None]
        left = [each.left for each in paces if each.per_second is not None]
        last = None if None in left else max(filter(None, left), default=None)
        pace = _pace(Pace(sum(rates) if rates else None, last))
        others = len(live) - len(alike)
        more = f"; {others:,} more in use" if others else ""
        text = f" {tables.on_disk(alike)}{pace}{more}."
        return Line((Span(f"{tables.known_as(first)}:", "bold"), Span(text)))
    if found:
        diagnosis = status.report.diagnosis._replace(diagnosed=tuple(found))
        return tables.verdict(status.report._replace(diagnosis=diagnosis))
    return Line(f"No unfinished downloads{', as far as visible' * bool(status.unseen)}.")


def _drawn(diagnosed: Diagnosed, status: Status) -> Iterator[Line]:
    live = diagnosed.condition is Condition.LIVE
    yield from tables.drawn(diagnosed, _pace(status.paces[diagnosed.download.key]) if live else "")
    for holder in diagnosed.download.writers[:1]:
        yield tables.beside(f"pulled by {name(holder.process)} ({holder.pid})")


def _stage(record: Record, now: float) -> str:
    text = record.state.stage
    if record.total_bytes:
        text += f" {record.progress_percent:.0f} % of {size(record.total_bytes)}"
    if record.state.active and round(record.bytes_per_second or 0):
        text += f", {size(round(record.bytes_per_second or 0))}/s"
        if record.total_bytes and record.state is State.DOWNLOADING:
            left = max(0, record.total_bytes - record.downloaded_bytes)
            text += f", {advice.duration(left / (record.bytes_per_second or 1))} left"
    for each in log.losses(record.resets, record.stalls, record.lost_bytes):
        text += f", {each}"
    silent = now - record.updated_at
    if record.state.active and silent >= _SILENT_SECONDS:
        text += f"; no news for {advice.duration(silent)}"
    return f"{text}: {record.error}" if record.error else text


def _daemon(status: Status) -> str:
    running = status.daemon
    known = running and f"pid {running.pid}, since {running.since}"
    text = known or "not running on this store"
    if status.looked_at:
        ago = advice.duration(max(0.0, status.report.evidence.now - status.looked_at))
        text += f"; last full scan {ago} ago"
    return text


def _pace(pace: Pace) -> str:
    if pace.per_second is None:
        return ""
    spread = ""
    if pace.lately is not None:
        slow, fast = size(round(pace.lately.minimum)), size(round(pace.lately.maximum))
        spread = f" ({slow}/s to {fast}/s in the last minutes)"
    left = "" if pace.left is None else f", {advice.duration(pace.left)} left"
    return f"; {size(round(pace.per_second))}/s{spread}{left}"

"""What is going on in a store, as text and as a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from watcher.decide import remaining
from watcher.decide.diagnose import settled_condition
from watcher.model import DAY, QUIET_SECONDS, Condition, Diagnosed, Unseen, Visibility
from watcher.observe.serving import QueueRunner, Running
from watcher.ollama import names, ranges
from watcher.pull.failures import Asked, Cause, of_error
from watcher.pull.queue import Queue
from watcher.pull.speed import Spread
from watcher.reconcile import Report
from watcher.show import documents, lines, log
from watcher.state import event_log
from watcher.state.download_states import State
from watcher.state.records import Record, Records
from watcher.system import advice

#: A record of a download that goes on is changed each second, but for waits.
_SILENT_SECONDS = 60.0
_NOBODY = "nobody has it open"


class Pace(NamedTuple):
    """Bytes a second that arrive on the disk, and the seconds left; None where not known."""

    per_second: float
    left: float | None


@dataclass(frozen=True, slots=True)
class Status:
    """One look, the paces of what is pulled by key, and who else looks."""

    report: Report
    paces: Mapping[str, Pace]
    daemon: Running | None
    #: When somebody who keeps a memory has looked at the whole store last; 0 for never.
    looked_at: float
    #: Of each model, by `ModelName.key`, what is kept of its download.
    records: Records
    #: What is to be downloaded, and who sees to it.
    queue: Queue
    runner: QueueRunner | None
    #: How fast live downloads came in the last minutes, by key, where somebody has looked.
    spreads: Mapping[str, Spread]
    #: What could not be looked at.
    unseen: tuple[Unseen, ...] = ()

    @property
    def diagnosed(self) -> tuple[Diagnosed, ...]:
        """Each download as one true thing: one that has just broken off is live no more.

        It counts as live by a change alone, and nothing of it may be changed for so long; but
        nobody has it open, nothing comes, and those who write could be seen, by us or by a daemon.
        """
        return tuple(
            _settled(each) if self._has_broken_off(each) else each
            for each in self.report.diagnosis.diagnosed
        )

    def _has_broken_off(self, diagnosed: Diagnosed) -> bool:
        download, pace = diagnosed.download, self.paces.get(diagnosed.download.key)
        if diagnosed.condition is not Condition.LIVE or download.writers:
            return False
        if pace is None or pace.per_second:
            return False
        records = (self.records.get(shown.lower()) for shown in download.models)
        told = any(each is not None and each.state is State.ERROR for each in records)
        return told or self.report.evidence.view.visibility is not Visibility.PARTIAL

    @property
    def pulled(self) -> dict[str, Record]:
        """The records that are worth a word: a download goes on, or has broken off.

        Of an old failure only where something of it is here still: it may have arrived since.
        """
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


def _settled(diagnosed: Diagnosed) -> Diagnosed:
    condition, because = settled_condition(diagnosed.download)
    left = max(0.0, QUIET_SECONDS - diagnosed.quiet)
    why = f"{_NOBODY}, and a pull may go on with it for {left:.0f} s more; {because}"
    return diagnosed._replace(condition=condition, because=why)


def document(status: Status) -> dict[str, Any]:
    """What ``status --json`` prints."""
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
            "run_by": lines.run_by(status.runner),
        },
        "looked_at": event_log.rfc3339(status.looked_at) if status.looked_at else None,
        "sight": seen.view.visibility.value,
        "servers": [{"pid": each.pid, "state": each.state.value} for each in seen.servers],
        "downloads": [_download(each, status) for each in status.diagnosed],
        "models": [_model(key, each) for key, each in status.pulled.items()],
        "per_second_bytes": round(sum(rates(status).values())),
        "advice": [each.words for each in hints(status)],
        "commands": [
            *(each.command for each in hints(status) if each.command),
            *remaining.opening(status.unseen, status.report.diagnosis),
        ],
        "unseen": documents.unseen(status.unseen),
        "due": [
            {"at": event_log.rfc3339(each.at), "digest": f"sha256:{each.digest}"}
            for each in status.report.plan.due
        ],
    }


def _download(diagnosed: Diagnosed, status: Status) -> dict[str, Any]:
    download = diagnosed.download
    live = diagnosed.condition is Condition.LIVE
    pace = status.paces.get(download.key) if live else None
    lately = status.spreads.get(download.key) if live else None
    return {
        "digest": f"sha256:{download.digest}",
        "models": list(download.models),
        "condition": diagnosed.condition.value,
        "stale": diagnosed.stale,
        "total_bytes": download.total,
        "claimed_bytes": ranges.size(download.trust.claimed),
        "present_bytes": ranges.size(download.trust.present),
        "allocated_bytes": download.allocated,
        "per_second_bytes": None if pace is None else round(pace.per_second),
        "lately_per_second_bytes": lately
        and {
            "min": round(lately.minimum),
            "median": round(lately.median),
            "max": round(lately.maximum),
        },
        "left_seconds": None if pace is None or pace.left is None else round(pace.left, 1),
        "writers": [
            {"pid": each.pid, "process": names.exact(each.process)} for each in download.writers
        ],
    }


def _model(key: str, record: Record) -> dict[str, Any]:
    rate = record.bytes_per_second
    return {
        "model": key,
        "status": record.state.value,
        "stage": record.stage,
        "progress_percent": round(record.progress_percent, 2),
        "downloaded_bytes": record.downloaded_bytes,
        "total_bytes": record.total_bytes,
        "per_second_bytes": None if rate is None else round(rate),
        "resets": record.resets,
        "stalls": record.stalls,
        "lost_bytes": record.lost_bytes,
        "error": record.error,
        "updated_at": event_log.rfc3339(record.updated_at),
    }


def rates(status: Status) -> dict[str, float]:
    """Bytes a second of each pull of which some come: by model, or digest where that is not known.

    Of those that a process of ours drives by what the server tells, of others by what comes on the
    disk.
    """
    now = status.report.evidence.now
    found = {
        key: each.bytes_per_second
        for key, each in status.pulled.items()
        if each.state.active and each.bytes_per_second and now - each.updated_at < _SILENT_SECONDS
    }
    driven = frozenset(found)
    for diagnosed in status.report.diagnosis.diagnosed:
        download, pace = diagnosed.download, status.paces.get(diagnosed.download.key)
        models = [each.lower() for each in download.models]
        if pace is not None and pace.per_second and driven.isdisjoint(models):
            key = models[0] if models else download.digest
            found[key] = found.get(key, 0.0) + pace.per_second
    return found


class Hint(NamedTuple):
    """What helps, in words, and as a command where one does."""

    words: str
    command: str = ""


def hints(status: Status) -> Iterator[Hint]:
    """What helps, where what is kept says so."""
    from rich.filesize import decimal

    pulls = rates(status)
    if len(pulls) > 1:
        together = decimal(round(sum(pulls.values())))
        yield Hint(f"{len(pulls)} pulls share one line: {together}/s together")
    for key, record in status.pulled.items():
        if record.state.active and record.resets:
            yield Hint(f"{key}: connections are reset, and the cure is on")
        if record.state is State.ERROR and record.error:
            cause = of_error(record.error)
            if cause is Cause.RESETS:
                command = Cause.CANCELLED.command(_asked(status, key))
                yield Hint(f"{key}: connections are reset, which a pull of ours survives", command)
            elif cause is not Cause.UNKNOWN:
                yield Hint(f"{key}: {cause.step}", cause.command(_asked(status, key)))


def _asked(status: Status, model: str) -> Asked:
    """What was pulled, and where, as commands about it need it."""
    seen = status.report.evidence
    url = advice.server_of(seen)
    options = ("--insecure",) if advice.is_on_loopback(model) else ()
    return Asked(model, url, seen.place.path, seen.place.found_by, options)


def table(status: Status) -> Iterator[object]:
    """The same for people."""
    from rich.padding import Padding
    from rich.text import Text

    from watcher.show import part_map, tables

    summary = tables.summary(status.report.evidence)
    summary.add_row(Text("daemon", style="bold"), _daemon(status))
    if status.queue.line:
        runs = lines.runs(status.queue, status.runner)
        summary.add_row(Text("queue", style="bold"), f"{len(status.queue.line)} in line; {runs}")
    yield summary
    place = status.report.evidence.place
    helps = lines.runs_it(status.queue, status.runner, place.path, place.found_by)
    if status.queue.line and helps:
        yield tables.Command(helps)
    for diagnosed in sorted(status.diagnosed, key=_liveliest_first):
        key = diagnosed.download.key
        if diagnosed.condition is Condition.LIVE:
            block = tables.drawn(diagnosed, _pace(status.paces.get(key), status.spreads.get(key)))
        else:
            block = tables.drawn(diagnosed)
        if diagnosed.because.startswith(_NOBODY):
            block.add_row("", diagnosed.because)
        for holder in diagnosed.download.writers[:1]:
            block.add_row("", f"pulled by {names.printable(holder.process)} ({holder.pid})")
        yield Padding(block, (1, 0, 0, 0))
    if status.report.diagnosis.diagnosed:
        yield Text(f"\n  {part_map.LEGEND}", style="dim")
    else:
        yield Text(f"\nno download is unfinished{' as far as could be seen' * bool(status.unseen)}")
    yield from tables.not_seen(status.unseen, status.report.diagnosis)
    yield from _models(status)
    yield from _due(status)


def _models(status: Status) -> Iterator[object]:
    """Each model's stage, percent and error, and what helps."""
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    from watcher.show import tables

    if not status.pulled:
        return
    rows = Table.grid(padding=(0, 2))
    rows.add_column(overflow="fold", ratio=1)
    rows.add_column(overflow="fold", ratio=2)
    rows.expand = True
    for key, record in status.pulled.items():
        told = record.stage
        if record.total_bytes:
            told += f" {record.progress_percent:.0f} % of {decimal(record.total_bytes)}"
        if record.state.active and round(record.bytes_per_second or 0):
            told += f", {decimal(round(record.bytes_per_second or 0))}/s"
        for each in log.losses(record.resets, record.stalls, record.lost_bytes):
            told += f", {each}"
        silent = status.report.evidence.now - record.updated_at
        if record.state.active and silent >= _SILENT_SECONDS:
            told += f"; nothing was heard of it for {advice.duration(silent)}"
        if record.error:
            told += f": {record.error}"
        style = "red" if record.state is State.ERROR else ""
        rows.add_row(Text(names.printable(key), style="bold"), Text(told, style=style))
    yield Text("")
    yield rows
    for hint in hints(status):
        yield Text(names.printable(hint.words))
        if hint.command:
            yield tables.Command(hint.command)


def _daemon(status: Status) -> str:
    running = status.daemon
    if running is None:
        told = "none watches this store"
    else:
        told = f"pid {running.pid}, since {running.since}"
    if status.looked_at:
        ago = max(0.0, status.report.evidence.now - status.looked_at)
        told += f"; the last look at all of it {advice.duration(ago)} ago"
    return told


def _pace(pace: Pace | None, lately: Spread | None) -> str:
    from rich.filesize import decimal

    if pace is None:
        return ""
    spread = ""
    if lately is not None:
        slow, fast = decimal(round(lately.minimum)), decimal(round(lately.maximum))
        spread = f" ({slow}/s to {fast}/s in the last minutes)"
    left = "" if pace.left is None else f", {advice.duration(pace.left)} left"
    return f"; {decimal(round(pace.per_second))}/s{spread}{left}"


def _due(status: Status) -> Iterator[object]:
    """What is worth another look next, and when."""
    from rich.text import Text

    from watcher.show import tables

    models = {each.digest: each.download.models for each in status.report.diagnosis.diagnosed}
    for due in status.report.plan.due[:1]:
        who = names.known_as(models.get(due.digest, ()), due.digest)
        when = tables.clock(due.at, status.report.evidence.now)
        yield Text(f"  next: {who} at {when}", style="dim")


def _liveliest_first(diagnosed: Diagnosed) -> tuple[bool, int, str]:
    return (
        diagnosed.condition is not Condition.LIVE,
        -diagnosed.download.allocated,
        diagnosed.digest,
    )

"""What is going on in a store, as text and as a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from watcher import events, names, ranges
from watcher.cycle import Report
from watcher.decide import findings
from watcher.model import Condition, Judged
from watcher.observe.service import Running


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


def document(status: Status) -> dict[str, Any]:
    """What ``status --json`` prints."""
    seen = status.report.evidence
    running = status.daemon
    return {
        "schema": "ollama-watch/status/1",
        "time": events.rfc3339(seen.now),
        "store": names.printable(seen.place.path),
        "daemon": None if running is None else {"pid": running.pid, "since": running.since},
        "looked_at": events.rfc3339(status.looked_at) if status.looked_at else None,
        "sight": seen.view.sight.value,
        "servers": [{"pid": each.pid, "state": each.state.value} for each in seen.servers],
        "downloads": [_download(each, status) for each in status.report.verdict.judged],
        "due": [
            {"at": events.rfc3339(each.at), "digest": f"sha256:{each.digest}"}
            for each in status.report.plan.due
        ],
    }


def _download(judged: Judged, status: Status) -> dict[str, Any]:
    download, pace = judged.download, status.paces.get(judged.download.key)
    return {
        "digest": f"sha256:{download.digest}",
        "models": list(download.models),
        "condition": judged.condition.value,
        "stale": judged.stale,
        "total_bytes": download.total,
        "claimed_bytes": ranges.size(download.trust.claimed),
        "present_bytes": ranges.size(download.trust.present),
        "allocated_bytes": download.allocated,
        "per_second_bytes": None if pace is None else round(pace.per_second),
        "left_seconds": None if pace is None or pace.left is None else round(pace.left, 1),
        "writers": [
            {"pid": each.pid, "process": names.printable(each.process)} for each in download.writers
        ],
    }


def table(status: Status) -> Iterator[object]:
    """The same for people."""
    from rich.padding import Padding
    from rich.text import Text

    from watcher.show import pieces, tables

    summary = tables.summary(status.report.evidence)
    summary.add_row(Text("daemon", style="bold"), _daemon(status))
    yield summary
    for judged in sorted(status.report.verdict.judged, key=_liveliest_first):
        block = tables.drawn(judged, _pace(status.paces.get(judged.download.key)))
        for holder in judged.download.writers[:1]:
            block.add_row("", f"pulled by {names.printable(holder.process)} ({holder.pid})")
        yield Padding(block, (1, 0, 0, 0))
    if status.report.verdict.judged:
        yield Text(f"\n  {pieces.LEGEND}", style="dim")
    else:
        yield Text("\nno download is unfinished")
    yield from _due(status)


def _daemon(status: Status) -> str:
    running = status.daemon
    if running is None:
        told = "none watches this store"
    else:
        told = f"pid {running.pid}, since {running.since}"
    if status.looked_at:
        ago = max(0.0, status.report.evidence.now - status.looked_at)
        told += f"; the last look at all of it {findings.duration(ago)} ago"
    return told


def _pace(pace: Pace | None) -> str:
    from rich.filesize import decimal

    if pace is None:
        return ""
    left = "" if pace.left is None else f", {findings.duration(pace.left)} left"
    return f"; {decimal(round(pace.per_second))}/s{left}"


def _due(status: Status) -> Iterator[object]:
    """What is worth another look next, and when."""
    from rich.text import Text

    from watcher.show import tables

    models = {each.digest: each.download.models for each in status.report.verdict.judged}
    for due in status.report.plan.due[:1]:
        who = names.known_as(models.get(due.digest, ()), due.digest)
        when = tables.clock(due.at, status.report.evidence.now)
        yield Text(f"  next: {who} at {when}", style="dim")


def _liveliest_first(judged: Judged) -> tuple[bool, int, str]:
    return judged.condition is not Condition.LIVE, -judged.download.allocated, judged.digest

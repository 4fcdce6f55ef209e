"""What fits into one line of plain text, without rich's tables, which take long to load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from watcher import advice, names
from watcher.cycle import Report
from watcher.model import Verb

if TYPE_CHECKING:
    from watcher.observe.serving import QueueRunner
    from watcher.pull.queue import Queue


def count(number: int, what: str) -> str:
    """A number of things, in words: ``1 model``, ``2,000 models``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def healthy_line(report: Report) -> str:
    """The one line for a store with nothing to tell."""
    census = report.evidence.census
    return (
        f"healthy: {names.printable(report.evidence.place.path)}: "
        f"{count(census.manifests, 'model')}, {count(census.healthy, 'blob')}, "
        f"{decimal(census.healthy_bytes)}\n"
    )


def verified_line(report: Report, wrong: int) -> str:
    """How much a verification has hashed, and how many blobs are known to be wrong."""
    hashed = [each for each in report.outcomes if each.sha256 is not None]
    size = sum(each.action.expects[0].size for each in hashed)
    left = sum(each.verb is Verb.HASH for each in report.plan.actions) - len(report.outcomes)
    told = f"hashed {count(len(hashed), 'blob')}, {decimal(size)}"
    told += f"; {count(wrong, 'blob')} corrupt" if wrong else "; none is corrupt"
    if left > 0:
        told += f"; {count(left, 'blob')} left for the next run"
    return f"{told}\n"


def runs(kept: Queue, by: QueueRunner | None) -> str:
    """Who runs the queue, in words; or that nobody does."""
    if kept.paused:
        return "paused as a whole"
    if by is None:
        return "nobody runs it; a daemon does with queue = true in the settings"
    pid = "" if by.pid is None else f" (pid {by.pid})"
    return f"run by the daemon{pid}" if by.is_daemon else f"run by ollama-watch queue run{pid}"


def runs_it(kept: Queue, by: QueueRunner | None, store: str, found_by: str) -> str:
    """The command that gets a queue going again; "" where it is going."""
    if kept.paused:
        return advice.on(store, found_by, "queue", "resume")
    return advice.on(store, found_by, "queue", "run") if by is None else ""


def run_by(by: QueueRunner | None) -> dict[str, Any] | None:
    """Who runs the queue, in a document."""
    return None if by is None else {"pid": by.pid, "daemon": by.is_daemon}

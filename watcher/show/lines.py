"""What fits into one line of plain text, without rich's tables, which take long to load."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from watcher.decide.verifying import Verified
from watcher.model import BlobFault
from watcher.ollama import names
from watcher.reconcile import Report
from watcher.system import advice

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
        f"{decimal(census.healthy_bytes)}{_never_hashed(report)}\n"
    )


def _never_hashed(report: Report) -> str:
    """How many of the healthy blobs are so by their sizes alone, and what would tell more."""
    census = report.evidence.census
    left = max(0, census.healthy - census.hashed)
    if not left:
        return ""
    verify = advice.watch(report.evidence, "verify")
    return f"; {left:,} never hashed: {verify}" if verify else f"; {left:,} never hashed"


_WRONG = {
    BlobFault.CORRUPT: "corrupt",
    BlobFault.MISSING: "missing",
    BlobFault.DANGLING: "linked to nothing",
    BlobFault.NO_FILE: "no file",
}
_ASTRAY = "where no server looks"
_WORDS = (*_WRONG.values(), _ASTRAY)


def verified_line(done: Verified) -> str:
    """How many blobs a verification has compared with their names, and what came of it."""
    wrong = Counter(_WRONG[odd.fault] if odd.lies is None else _ASTRAY for odd in done.wrong)
    if wrong:
        diagnosis = ", ".join(f"{wrong[word]:,} {word}" for word in _WORDS if wrong[word])
    elif done.unchecked:
        diagnosis = "these match" if done.checked else "nothing is known"
    else:
        diagnosis = "all match" if done.checked else "there is nothing to check"
    left = f"; {done.unchecked:,} not checked" if done.unchecked else ""
    return (
        f"{count(done.checked, 'blob')} checked: {done.read:,} read, "
        f"{done.unchanged:,} unchanged; {diagnosis}{left}\n"
    )


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

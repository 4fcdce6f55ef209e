"""Repairs for a pull: progress files for what is on the disk, written by a reconcile."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import replace

from rich.filesize import decimal

from watcher.config import Settings
from watcher.decide import blob_findings, modes
from watcher.decide.conditions import settled_condition
from watcher.errors import LockedError, WatchError
from watcher.model import ActionKind, Condition, Plan, RefusalKind, Result, Scope
from watcher.observe import scan
from watcher.observe.host import Host
from watcher.ollama import ranges
from watcher.pull.target import Target
from watcher.reconcile import Reconciler, Report
from watcher.state import folders
from watcher.system.worker import Worker

#: A part that waits for its retry keeps the file open so long after its request was closed.
_RELEASE_SECONDS = 45.0
#: What a request of ours had under way is on the disk so long after it was closed: whatever is
#: written later, another client pulls.
_AFTERMATH_SECONDS = 1.0
#: Whether the files are closed is checked this often.
_TICK_SECONDS = 0.2
#: A repair takes three seconds and more: after some that saved little the next waits so long.
_PAUSES = (0.0, 5.0, 15.0, 60.0)
_WORTH_A_REPAIR = 1 << 20
#: What is in the way of a repair for some moments only.
_PASSING = frozenset({RefusalKind.SERVER_STARTS, RefusalKind.HELD, RefusalKind.CHANGED})
#: What is in the way of a repair until somebody does something about it.
_NOTED = frozenset(
    {RefusalKind.SIGHT, RefusalKind.OWNER, RefusalKind.PERMISSION, RefusalKind.OLD_NAMES}
)
_REMOVALS = frozenset({ActionKind.REMOVE_DOWNLOAD, ActionKind.REMOVE_SURPLUS})
_WAITS_FOR_FILES = (
    "stopping when the server has closed its files, to keep what was downloaded; "
    "a second Ctrl-C stops at once"
)


class Pace:
    """How often a pull may be interrupted for a repair."""

    def __init__(self) -> None:
        self._idle = 0
        self._at = 0.0
        self._done = 0

    def allows(self, now: float) -> bool:
        """Whether another repair is not too early, on the monotonic clock."""
        return now - self._at >= _PAUSES[min(self._idle, len(_PAUSES) - 1)]

    def note(self, done: int) -> None:
        """A repair ended just now, after which `done` bytes of the model are on disk."""
        self._idle = 0 if done - self._done >= _WORTH_A_REPAIR else self._idle + 1
        self._at, self._done = time.monotonic(), done


def look(target: Target, digests: Set[str]) -> Report | None:
    """The state of some downloads, with nothing changed; None where it is not visible."""
    if target.host is None or not digests:
        return None
    try:
        return Reconciler(target.host, target.settings).inspect(scope=Scope(frozenset(digests)))
    except (WatchError, OSError):
        return None


def blocked(target: Target, digests: Set[str]) -> frozenset[str]:
    report = look(target, digests)
    if report is None:
        return frozenset()
    return frozenset(
        each.digest
        for each in report.evidence.downloads
        if not each.holders and settled_condition(each)[0] is Condition.BLOCKED
    )


def run(
    target: Target,
    digests: frozenset[str],
    own: frozenset[str] | None,
    lengths: Mapping[str, int],
    cancelled: Callable[[], bool],
) -> Generator[str, None, Report | None]:
    """Write progress files for what is on the disk, with notes on the way.

    Returns the last report; None where there is none.

    `own`: what our requests have pulled of it. The last of them has just ended, so this waits until
    the server has closed the files; None: it does not wait. `lengths`: of layers of which the
    registry has announced another one to the server.
    """
    if target.host is None:
        return None
    reconciler = Reconciler(target.host, target.settings)
    mode = modes.PULL._replace(own_pulls=own or frozenset(), lengths=lengths)
    began = time.monotonic()
    until = began + (0.0 if own is None else _RELEASE_SECONDS)
    written: dict[str, int] = {}
    while True:
        try:
            report = reconciler.reconcile(mode, Scope(digests))
        except LockedError:
            report = None
        except (WatchError, OSError) as error:
            yield f"not repaired: {error}"
            return None
        if report is not None:
            _sync_behind(target.host, target.settings, report)
        waits = report is None or held(report) or _is_refused(report, _PASSING)
        now = time.monotonic()
        if not waits or now >= until:
            return report
        if report is not None and now - began >= _AFTERMATH_SECONDS:
            if _grows(report, written):
                return report
            if cancelled():
                yield _WAITS_FOR_FILES
        time.sleep(_TICK_SECONDS)


def remove_surplus(target: Target, digests: Set[str]) -> None:
    """Remove what a server has left of layers that are finished, if that may go by now."""
    if target.host is None or not digests:
        return
    settings = replace(target.settings, stale_after=0.0)

    def approve(planned: Plan) -> Plan:
        return planned.filtered(lambda each: each.subject in digests and each.kind in _REMOVALS)

    reconciler, scope = Reconciler(target.host, settings), Scope(frozenset(digests))
    with suppress(WatchError, OSError):  # `clean` does it later
        # Only where it may go: by these settings all that is seen is stale, which is no news.
        if approve(reconciler.inspect(modes.CLEAN, scope).plan).actions:
            reconciler.reconcile(modes.CLEAN, scope, approve)


def _sync_behind(host: Host, settings: Settings, report: Report) -> None:
    """Write the data back that is recorded now, while the pull goes on."""
    from watcher.act.durability import noted, sync_noted

    def sync() -> None:
        with suppress(WatchError, OSError):
            sync_noted(host, settings)

    if report.memory is not None and noted(report.memory, report.evidence.boot):
        with suppress(RuntimeError):  # no thread: the next scan does it
            Worker("behind", sync).wake()


def notes(report: Report) -> Iterator[str]:
    saved = sum(each.action.saves for each in report.outcomes if each.result is Result.DONE)
    if saved:
        yield f"kept {decimal(saved)} that would have been downloaded again"
    for refusal in report.plan.refusals:
        if refusal.kind in _NOTED:
            command = f": {refusal.command}" if refusal.command else ""
            yield f"not repaired: {refusal.why}; {refusal.remedy}{command}"


def astray(target: Target, model: str, missing: Mapping[str, int]) -> Iterator[str]:
    """Where the bytes of missing layers lie, and the command that brings them to their place.

    `missing`: digests with their bytes, as the registry's manifest of `model` has them.
    """
    host = target.host or target.named
    if host is None or not missing:
        return
    try:
        with folders.opened_store(host.store) as store:
            lying = scan.lying(store, missing, model)
        if not lying:
            return
        seen = Reconciler(host, target.settings).inspect().evidence
    except (WatchError, OSError):
        return
    seen = seen._replace(census=seen.census._replace(odd=lying))
    for finding in blob_findings.astray(seen):
        if finding.models:
            helps = finding.command or finding.remedy
            helps = f"; to avoid that, stop the pull and move them first: {helps}" if helps else ""
            yield f"{finding.message}; this pull downloads it again{helps}"


def held(report: Report) -> frozenset[str]:
    return frozenset(each.digest for each in report.diagnosis.diagnosed if each.download.writers)


def trusted(report: Report) -> dict[str, int]:
    """Bytes of each unfinished layer that are on disk and trusted."""
    return {
        each.digest: ranges.size(each.download.trust.trusted) for each in report.diagnosis.diagnosed
    }


def claimed(report: Report) -> dict[str, int]:
    """Bytes of each unfinished layer that another pull need not fetch."""
    return {
        each.digest: ranges.size(each.download.trust.claimed) for each in report.diagnosis.diagnosed
    }


def _grows(report: Report, before: dict[str, int]) -> bool:
    """Whether data that a process has open was written since the first call with this `before`."""
    return any(
        before.setdefault(each.digest, each.data.mtime_ns) != each.data.mtime_ns
        for each in report.evidence.downloads
        if each.data is not None and each.writers
    )


def _is_refused(report: Report, kinds: frozenset[RefusalKind]) -> bool:
    refusals = (*report.plan.refusals, *(each.refusal for each in report.outcomes))
    return any(each is not None and each.kind in kinds for each in refusals)

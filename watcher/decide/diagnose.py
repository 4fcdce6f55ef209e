"""Evidence to judgements: each download gets its one condition. Pure."""

from __future__ import annotations

from typing import assert_never

from watcher.decide import astray, at_risk, findings, forecast, server_view
from watcher.model import (
    QUIET_SECONDS,
    Condition,
    Diagnosed,
    Diagnosis,
    Download,
    Evidence,
    Kind,
    Rules,
    Severity,
    Visibility,
)
from watcher.ollama import names, ranges


def judge(evidence: Evidence, rules: Rules) -> tuple[Diagnosed, ...]:
    """Give each download its one condition: all that a plan needs besides the evidence."""
    return tuple(_judge(download, evidence, rules) for download in evidence.downloads)


def diagnosis(diagnosed: tuple[Diagnosed, ...], evidence: Evidence, rules: Rules) -> Diagnosis:
    """Everything worth telling of what was judged, and what the server's next start does."""
    whole_store = evidence.scope is None
    kept = (
        at_risk.paths(diagnosed, evidence, rules)
        if evidence.next_start.prepared
        else frozenset[str]()
    )
    foreseen = forecast.forecast(evidence, kept) if whole_store else None
    doomed = {} if foreseen is None else findings.doomed(foreseen)
    found = [
        finding
        for each in diagnosed
        for finding in findings.of_download(each, evidence, rules, doomed)
    ]
    if foreseen is not None:
        found.extend(findings.of_store(evidence, diagnosed, foreseen, rules))
        found.extend(findings.of_blobs(evidence, diagnosed, rules, doomed, blind=foreseen.blind))
        found.extend(findings.of_manifests(evidence))
        found.extend(findings.of_leftovers(evidence, doomed))
        found.extend(astray.of_blobs(evidence))
        found.extend(server_view.barred(evidence))
        found.extend(server_view.at_risk(diagnosed, evidence, rules, doomed))
        if evidence.place.read_only and any(each.severity is not Severity.INFO for each in found):
            found.append(findings.OF_READ_ONLY)
    found.sort(key=lambda each: (-each.severity.rank, -each.sizes.allocated, each.path, each.kind))
    return Diagnosis(diagnosed, tuple(found), foreseen)


# ---------------------------------------------------------------- conditions


def _judge(download: Download, evidence: Evidence, rules: Rules) -> Diagnosed:
    quiet = _quiet(download, evidence)
    if download.digest in rules.mode.own_pulls:
        quiet = max(quiet, QUIET_SECONDS)
    since = download.changed_at if download.progress_at is None else download.progress_at
    age = 0.0 if since is None else evidence.age_of(since)
    condition, because = condition_of(download, evidence, quiet)
    stale = condition is not Condition.LIVE and age >= rules.settings.stale_after
    return Diagnosed(
        download=download,
        condition=condition,
        stale=stale,
        because=because,
        age=age,
        quiet=quiet,
        cost_alone=_cost_alone(download, condition),
        cost_repaired=_cost_repaired(download, condition),
    )


def _quiet(download: Download, evidence: Evidence) -> float:
    """Seconds since any entry of it changed, as far as times, or looks, can tell."""
    latest = download.changed_at
    if latest is None:
        return 0.0
    if latest <= evidence.now:
        clock = evidence.clock
        quiet = evidence.now - latest
        # After a jump ahead only what was counted since is certain.
        return min(quiet, clock.held) if clock is not None and clock.jumped else quiet
    known = download.ahead
    if known is None or not known.still(latest, evidence.boot):
        return 0.0
    # What has changed since the clock was set back has a time that is past.
    ages = (evidence.now - each.changed_at for each in download.entries)
    return min([evidence.uptime - known.seen_at, *(age for age in ages if age >= 0)])


def condition_of(download: Download, evidence: Evidence, quiet: float) -> tuple[Condition, str]:
    """The one condition of a download, and why. `quiet`: seconds since any entry of it changed."""
    alive = _why_alive(download, evidence, quiet)
    return (Condition.LIVE, alive) if alive else settled_condition(download)


def settled_condition(download: Download) -> tuple[Condition, str]:
    """The condition of a download that nobody pulls, and why."""
    strange = _why_strange(download)
    if strange:
        return Condition.UNKNOWN, strange
    trust, total = download.trust, download.total
    finished = download.finished
    if finished is not None and finished.kind is Kind.FILE and total in (None, finished.size):
        return Condition.REDUNDANT, "the finished blob is there as well"
    if download.transfer:
        return Condition.PAUSED, "a layer of the transfer path, which goes on by its size"
    if download.data is not None and total and ranges.size(trust.present) == total:
        return Condition.WHOLE, "no byte of it is absent on the disk"
    if not download.sidecars:
        return Condition.UNCLAIMED, "data without a single sidecar"
    if download.faults:
        return Condition.BLOCKED, "; ".join(download.faults[:3])
    hollow = ranges.size(ranges.difference(trust.claimed, trust.trusted))
    if hollow:
        what = "there is no data file" if download.data is None else "the data does not have them"
        return Condition.HOLLOW, f"{hollow} claimed bytes are not there: {what}"
    beyond = ranges.size(ranges.difference(trust.trusted, trust.claimed))
    if beyond:
        return Condition.BEHIND, f"{beyond} bytes are on the disk beyond what the sidecars claim"
    return Condition.PAUSED, "the sidecars are complete and true"


def _why_alive(download: Download, evidence: Evidence, quiet: float) -> str:
    if download.writers:
        first = download.writers[0]
        return f"{first.process} ({first.pid}) has it open for writing{first.doubt}"
    if quiet >= QUIET_SECONDS:
        return ""
    ago = f"it changed {quiet:.0f} s ago"
    if evidence.servers:
        return f"a server runs (pid {evidence.servers[0].pid}), and {ago}"
    if evidence.view.visibility is Visibility.PARTIAL:
        return f"a server may run unseen ({evidence.view.why}), and {ago}"
    return ""


def _why_strange(download: Download) -> str:
    if download.unreadable:
        return f"it can't be read: {download.unreadable}"
    for entry in download.entries:
        if entry.kind is not Kind.FILE:
            return f"{names.printable(entry.name)} is a {entry.kind.value}, no file"
    return ""


def _cost_alone(download: Download, condition: Condition) -> int | None:
    """Bytes that Ollama alone would still download; None where it can't arrive or isn't known."""
    total = download.total
    if total is None:
        return None
    claimed = ranges.size(download.trust.claimed)
    match condition:
        case Condition.PAUSED | Condition.BEHIND | Condition.LIVE:
            return total - claimed
        case Condition.WHOLE if not download.faults:
            return total - claimed
        case Condition.HOLLOW:
            # The rest first, then the mismatch discards everything and it starts again.
            return total - claimed + total
        case Condition.UNCLAIMED:
            return total
        case Condition.REDUNDANT:
            return 0
        case Condition.BLOCKED | Condition.UNKNOWN | Condition.WHOLE:
            return None
        case _:
            assert_never(condition)


def _cost_repaired(download: Download, condition: Condition) -> int | None:
    """Bytes that a pull would download after a repair; None where no repair is possible."""
    if download.total is None or condition in (Condition.LIVE, Condition.UNKNOWN):
        return None
    if condition in (Condition.WHOLE, Condition.REDUNDANT):
        return 0
    return download.total - ranges.size(download.trust.trusted)

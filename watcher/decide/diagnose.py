"""Evidence to a diagnosis: each download gets its one condition. Pure."""

from watcher import model
from watcher.decide import at_risk, blob_findings, conditions, findings, forecast, server_view
from watcher.decide.finding_kinds import found as finding
from watcher.model import QUIET_SECONDS, Condition, Diagnosed, Diagnosis, Download, Evidence, Rules
from watcher.state.event_log import clock


def diagnose(evidence: Evidence, rules: Rules) -> tuple[Diagnosed, ...]:
    """Give each download its one condition: all that a plan needs besides the evidence."""
    return tuple(_diagnose(download, evidence, rules) for download in evidence.downloads)


def diagnosis(diagnosed: tuple[Diagnosed, ...], evidence: Evidence, rules: Rules) -> Diagnosis:
    """All findings; of a scan of the whole store its own, and what the next start does."""
    is_whole = evidence.scope is None
    prepared = is_whole and evidence.next_start.prepared
    kept = at_risk.paths(diagnosed, evidence, rules) if prepared else frozenset[str]()
    foreseen = forecast.forecast(evidence, kept) if is_whole else None
    doomed = {} if foreseen is None else findings.doomed(foreseen)
    found: list[model.Finding] = []
    for each in diagnosed:
        found.extend(findings.of_download(each, evidence, rules, doomed))
    if foreseen is not None:
        gone = None if foreseen.blind else doomed
        found.extend(findings.of_store(evidence, diagnosed, foreseen, rules))
        found.extend(blob_findings.of_blobs(evidence, diagnosed, rules, gone))
        found.extend(blob_findings.of_manifests(evidence))
        found.extend(blob_findings.of_leftovers(evidence, doomed))
        found.extend(blob_findings.astray(evidence))
        found.extend(server_view.barred(evidence))
        found.extend(blob_findings.at_risk_of_start(evidence, rules, doomed))
        if evidence.place.read_only and any(each.severity.rank for each in found):
            found.append(finding("store_read_only", ""))
    found.sort(key=lambda each: (-each.severity.rank, -each.sizes.allocated, each.path, each.kind))
    return Diagnosis(diagnosed, tuple(found), foreseen)


def _diagnose(download: Download, evidence: Evidence, rules: Rules) -> Diagnosed:
    latest = download.changed_at
    quiet = 0.0 if latest is None else _quiet(download, latest, evidence)
    since = latest if download.progress_at is None else download.progress_at
    age = 0.0 if since is None else evidence.age_of(since)
    condition, because = conditions.settled_condition(download)
    if alive := _why_alive(download, evidence, quiet):
        condition, because = Condition.LIVE, alive
    row = conditions.row(condition)
    return Diagnosed(
        download=download,
        condition=condition,
        stale=condition is not Condition.LIVE and age >= rules.settings.stale_after,
        because=because,
        age=age,
        quiet=quiet,
        cost_alone=row.cost_alone(download),
        cost_repaired=row.cost_repaired(download),
    )


def _quiet(download: Download, latest: float, evidence: Evidence) -> float:
    """Seconds since any entry of it changed, as far as times, or scans, show."""
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


def _why_alive(download: Download, evidence: Evidence, quiet: float) -> str:
    """Why a pull of it may be running; "" where none is. `quiet`: seconds since it changed."""
    for first in download.writers:
        if download.ours:  # a process has its lock
            since = "" if first.since is None else f" since {clock(first.since, evidence.now)}"
            return f"{first.process} ({first.pid or 'elsewhere'}) fetches it{since}"
        return f"{first.process} ({first.pid}) has it open for writing{first.doubt}"
    if download.ours or quiet >= QUIET_SECONDS:
        return ""
    ago = f"it changed {quiet:.0f} s ago"
    if evidence.servers:
        return f"a server is running (pid {evidence.servers[0].pid}), and {ago}"
    if evidence.view.visibility is model.Visibility.PARTIAL:
        return f"a server may be running unseen ({evidence.view.why}), and {ago}"
    return ""

"""The JSON documents: one versioned object for each command, with names as `names.exact`."""

from collections.abc import Iterable
from typing import Any

from watcher import model
from watcher.decide import conditions, findings, remaining
from watcher.decide.remaining import Remaining, Verified
from watcher.ollama import names, ranges
from watcher.reconcile import Report
from watcher.show import tables, text, usage
from watcher.state import event_log
from watcher.state.records import Record

_NOTHING_LEFT = Remaining()


def _begun(command: str, seen: model.Evidence) -> dict[str, Any]:
    return {
        "schema": f"ollama-watch/{command}/1",
        "time": event_log.rfc3339(seen.now),
        "store": _store(seen),
    }


def audit(report: Report) -> dict[str, Any]:
    seen = report.evidence
    view = {"unseen": [names.exact(each) for each in seen.view.unseen], "why": seen.view.why}
    verdict = tables.verdict(report)
    return {
        **_begun("audit", seen),
        "verdict": {"text": text.plain(verdict.text), "command": verdict.run},
        "visibility": {"visibility": seen.view.visibility.value, **view},
        "sight": {"sight": seen.view.visibility.value, **view},
        "servers": [
            {
                "pid": server.pid,
                "user": server.user,
                "since": event_log.rfc3339(server.since),
                "state": server.state.value,
                "store": None if server.store is None else names.exact(server.store),
                "serves_this_store": server.ours,
                "url": server.url,
                "version": server.version,
            }
            for server in seen.servers
        ],
        "downloads": [_download(diagnosed, seen) for diagnosed in report.diagnosis.diagnosed],
        "findings": [_finding(finding) for finding in report.diagnosis.findings],
        "forecast": _forecast(report.diagnosis.forecast),
        "plan": plan(report.plan),
    }


def acting(command: str, report: Report, left: Remaining = _NOTHING_LEFT) -> dict[str, Any]:
    """What a command that acts prints, such as ``clean --json``."""
    return {
        **_begun(command, report.evidence),
        "plan": plan(report.plan),
        "outcomes": [
            {
                "result": outcome.result.value,
                "verb": outcome.action.kind.value,
                "subject": names.exact(outcome.action.subject),
                "message": " ".join(filter(None, (outcome.message, outcome.command))),
                "freed_bytes": outcome.freed,
                "refusal": outcome.refusal and _refusal(outcome.refusal),
            }
            for outcome in report.outcomes
        ],
        "warnings": list(report.warnings),
        "troubles": list(report.warnings),
        "remaining": [_finding(finding) for finding in left.findings],
    }


def verified(report: Report, done: Verified) -> dict[str, Any]:
    return {
        **acting("verify", report),
        "checked": done.checked,
        "read": done.read,
        "unchanged": done.unchanged,
        "unchecked": done.unchecked,
        "wrong": [_finding(each) for each in remaining.of_verified(report.diagnosis, done)],
        "unseen": unseen(done.unseen),
    }


def unseen(found: Iterable[model.Unseen]) -> list[dict[str, str]]:
    return [{"path": names.exact(each.path), "why": each.why} for each in found]


def quarantine(report: Report) -> dict[str, Any]:
    return {
        **_begun("quarantine", report.evidence),
        "kept": [
            {
                "label": names.exact(kept.label),
                "name": names.exact(kept.name),
                "size_bytes": kept.entry.size,
                "in_its_place": kept.there is not None if kept.place_seen else None,
                "replaced": kept.replaced,
            }
            for kept in report.evidence.quarantine
        ],
        "unseen": unseen(remaining.quarantine_unseen(report.evidence)),
    }


def record(name: str, known: Record) -> dict[str, Any]:
    rate = known.bytes_per_second
    return {
        "model": name,
        "status": known.state.value,
        "stage": known.state.stage,
        "progress_percent": round(known.progress_percent, 2),
        "downloaded_bytes": known.downloaded_bytes,
        "total_bytes": known.total_bytes,
        "per_second_bytes": None if rate is None else round(rate),
        "error": known.error,
    }


def df(
    report: Report, space: model.Space, uses: Iterable[model.Use], total: model.Sizes
) -> dict[str, Any]:
    return {
        **_begun("df", report.evidence),
        "uses": [
            {
                "kind": use.kind.value,
                "name": use.name or None,
                "words": text.plain(usage.words(use)),
                "files": use.files,
                "sizes": _sizes(use.sizes),
            }
            for use in uses
        ],
        "total": _sizes(total),
        "linked": list(space.linked),
        "unlisted": [names.exact(each) for each in space.unlisted],
    }


def plan(planned: model.Plan) -> dict[str, Any]:
    return {
        "actions": [
            {
                "verb": action.kind.value,
                "subject": names.exact(action.subject),
                "because": action.because,
                "models": action.models,
                "entries": [names.exact(entry.name) for entry in action.expects],
                "frees_bytes": action.frees,
                "saves_bytes": action.saves,
                "fetches_bytes": action.fetches,
                "needs_bytes": action.needs,
                "parts": [part._asdict() for part in action.parts],
            }
            for action in planned.actions
        ],
        "refusals": [_refusal(refusal) for refusal in planned.refusals],
        "frees_bytes": planned.frees,
        "saves_bytes": planned.saves,
        "fetches_bytes": planned.fetches,
        "free_bytes": planned.free,
        "spared": [
            {
                "digest": f"sha256:{spared.digest}",
                "models": list(spared.models),
                "age_seconds": round(spared.age, 3),
                "frees_bytes": spared.frees,
            }
            for spared in planned.spared
        ],
        "due": due(planned),
    }


def due(planned: model.Plan) -> list[dict[str, str]]:
    at = event_log.rfc3339
    return [{"at": at(each.at), "digest": f"sha256:{each.digest}"} for each in planned.due]


def _forecast(foreseen: model.Forecast | None) -> dict[str, Any] | None:
    if foreseen is None:
        return None
    return {
        "deletes": [names.exact(each.path) for each in foreseen.deletes],
        "bytes": foreseen.freed,
        "start_fails": foreseen.start_fails,
        "pruning_off": foreseen.pruning_off,
        "why": list(foreseen.why),
        "later": [
            {
                "at": event_log.rfc3339(at),
                "path": names.exact(located.path),
                "bytes": located.entry.freed,
            }
            for at, located in foreseen.later
        ],
        "renames": [names.exact(each.path) for each in foreseen.renames],
        "empty_folders": [names.exact(each) for each in foreseen.empty_folders],
    }


def _store(seen: model.Evidence) -> dict[str, Any]:
    place, census = seen.place, seen.census
    return {
        "path": names.exact(place.path),
        "found_by": place.found_by,
        "file_system": place.file_system,
        "network": place.network,
        "free_bytes": place.free_bytes,
        "free_inodes": place.free_inodes,
        "read_only": place.read_only,
        "manifests": census.manifests,
        "entries": census.entries,
        "allocated_bytes": census.allocated,
        "healthy_blobs": census.healthy,
        "healthy_bytes": census.healthy_bytes,
        "hashed_blobs": census.hashed,
    }


def _download(diagnosed: model.Diagnosed, seen: model.Evidence) -> dict[str, Any]:
    download, trust = diagnosed.download, diagnosed.download.trust
    known = download.unreadable is None
    return {
        "digest": f"sha256:{download.digest}",
        "models": list(download.models),
        "condition": diagnosed.condition.value,
        "words": conditions.row(diagnosed.condition).words,
        "because": diagnosed.because,
        "stale": diagnosed.stale,
        "transfer": download.transfer,
        "ours": download.ours,
        "bytes": {
            "total": download.total,
            "claimed": ranges.size(trust.claimed) if known else None,
            "present": ranges.size(trust.present) if known else None,
            "trusted": ranges.size(trust.trusted) if known else None,
            "allocated": download.allocated,
            "alone": diagnosed.cost_alone,
            "repaired": diagnosed.cost_repaired,
        },
        "ranges": {
            "claimed": trust.claimed,
            "present": trust.present,
            "trusted": trust.trusted,
            "proven": trust.proven,
        },
        "holders": [
            {
                "pid": holder.pid,
                "process": names.exact(holder.process),
                "entry": names.exact(holder.entry),
                "writes": holder.writes,
            }
            for holder in download.holders
        ],
        "advice": findings.helps(diagnosed, seen),
        "age_seconds": round(diagnosed.age, 3),
        "quiet_seconds": round(diagnosed.quiet, 3),
        "changed_at": None
        if download.changed_at is None
        else event_log.rfc3339(min(download.changed_at, seen.now)),
    }


def _finding(finding: model.Finding) -> dict[str, Any]:
    return {**finding._asdict(), "path": names.exact(finding.path), "sizes": _sizes(finding.sizes)}


def _sizes(sizes: model.Sizes) -> dict[str, int]:
    return {f"{key}_bytes": value for key, value in sizes._asdict().items()}


def _refusal(refusal: model.Refusal) -> dict[str, Any]:
    return {
        "kind": refusal.kind.value,
        "verb": refusal.action.value,
        "subject": names.exact(refusal.subject),
        "models": list(refusal.models),
        "why": refusal.why,
        "remedy": refusal.remedy,
        "command": refusal.command,
        "frees_bytes": refusal.frees,
        "seconds_left": refusal.seconds_left,
    }

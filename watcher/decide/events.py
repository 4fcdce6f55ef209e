"""The events that follow from what was seen and done, each with its typed details. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import groupby
from typing import TypedDict

from rich.filesize import decimal

from watcher import model
from watcher.decide import actions, conditions
from watcher.model import Action, ActionKind, Diagnosed, Finding, Kind, Outcome, Refusal, Result
from watcher.ollama import names, ranges
from watcher.state.event_log import Event, EventType
from watcher.state.memory import Memory, Remembered
from watcher.system import advice

_MOST_SUBJECTS = 20


class DownloadDetails(TypedDict):
    digest: str
    models: list[str]
    condition: str
    because: str
    can_resume: bool
    total_bytes: int | None
    claimed_bytes: int
    present_bytes: int
    allocated_bytes: int
    age_seconds: float


class ActionDetails(TypedDict):
    verb: str
    subject: str
    models: list[str]
    files: int
    frees_bytes: int
    saves_bytes: int


def of_download(at: float, kind: EventType, message: str, diagnosed: Diagnosed) -> Event:
    download = diagnosed.download
    details: DownloadDetails = {
        "digest": f"sha256:{diagnosed.digest}",
        "models": list(download.models),
        "condition": diagnosed.condition.value,
        "because": diagnosed.because,
        "can_resume": conditions.resumes(diagnosed.condition),
        "total_bytes": download.total,
        "claimed_bytes": ranges.size(download.trust.claimed),
        "present_bytes": ranges.size(download.trust.present),
        "allocated_bytes": download.allocated,
        "age_seconds": round(diagnosed.age, 3),
    }
    who = names.known_as(download.models, diagnosed.digest)
    return Event(at, kind, message, who, details, diagnosed)


def progress(at: float, diagnosed: Diagnosed, now: Remembered, speed: float | None) -> Event:
    """How far a pull has come, how fast it is, and how long it still takes."""
    left = None if not speed or now.total is None else max(0, now.total - now.allocated) / speed
    who = names.known_as(diagnosed.download.models, diagnosed.digest)
    of = "" if now.total is None else f" of {decimal(now.total)}"
    message = f"{who}: {decimal(now.allocated)}{of} on disk"
    event = of_download(at, EventType.DOWNLOAD_PROGRESS, message, diagnosed)
    pace = {
        "per_second_bytes": None if speed is None else round(speed),
        "left_seconds": None if left is None else round(left, 1),
    }
    return replace(event, details={**event.details, **pace})


def gone(digest: str, record: Remembered, size: int | None, at: float) -> Event:
    """A download is not there any more; `size`: that of its finished blob, where there is one."""
    who = names.known_as(record.models, digest)
    details: dict[str, object] = {"digest": f"sha256:{digest}", "models": list(record.models)}
    if size is not None:
        details["total_bytes"] = size
        layer = f"{who}: {names.short(digest)}" if record.models else who
        message = f"{layer} is complete ({decimal(size)})"
        return Event(at, EventType.DOWNLOAD_COMPLETED, message, who, details)
    details["allocated_bytes"] = record.allocated
    message = f"another process removed the unfinished download of {who}"
    return Event(at, EventType.PARTIAL_REMOVED, message, who, details)


def clock_jumped(jump: float, at: float) -> Event:
    by, steady = map(advice.duration, (abs(jump), model.CLOCK_SETTLED_SECONDS))
    until = f"until it has been steady for {steady}"
    effect = f"it does not make anything old enough to remove {until}"
    message = f"the clock jumped {'ahead' if jump > 0 else 'back'} by {by}: {effect}"
    believed = {"believed_after_seconds": model.CLOCK_SETTLED_SECONDS}
    details = {"jump_seconds": round(jump, 3), **believed}
    return Event(at, EventType.CLOCK_JUMPED, message, None, details)


def of_models(
    memory: Memory, models: Mapping[str, tuple[int, int]], damaged: Set[str], at: float
) -> Iterator[Event]:
    """The models that came or went since the memory was written."""
    if memory.models is None:
        return  # the first scan: nothing is known to have happened
    for name in sorted(models.keys() | memory.models.keys()):
        details: dict[str, object] = {"models": [name]}
        if name not in models:
            message = f"{name} was removed: its manifest is gone"
            yield Event(at, EventType.MODEL_REMOVED, message, name, details)
        elif models[name] != memory.models.get(name):
            message = f"{name} is complete"
            if name in damaged:
                message = f"the manifest of {name} is written, but some of its blobs are damaged"
            yield Event(at, EventType.MANIFEST_WRITTEN, message, name, details)


def problems(found: Iterable[Finding], new: Set[tuple[str, str]], at: float) -> Iterator[Event]:
    """One event for each kind of problem that came up since the last scan."""
    fresh = [each for each in found if (each.kind, each.path) in new]
    fresh.sort(key=lambda each: (each.kind, each.path))
    for kind, group in groupby(fresh, key=lambda each: each.kind):
        alike = list(group)
        details = {
            "kind": kind,
            "severity": alike[0].severity.value,
            "paths": [names.exact(each.path) for each in alike[:_MOST_SUBJECTS]],
            "count": len(alike),
            "models": sorted({name for each in alike for name in each.models}),
            "command": alike[0].command,
        }
        more = f" (and {len(alike) - 1} more)" if len(alike) > 1 else ""
        yield Event(at, EventType.STORE_PROBLEM, f"{alike[0].message}{more}", None, details)


def begun(action: Action, at: float) -> Event:
    message = f"{actions.does(action, actions.subject(action))}: {action.because}"
    return _of_action(at, EventType.ACT_STARTED, message, action)


def ended(outcome: Outcome, at: float) -> Event:
    kind = actions.row(outcome.action.kind).event
    assert kind is not None, f"{outcome.action.kind} has no event"
    if outcome.result is not Result.DONE:
        kind = EventType.REFUSED if outcome.result is Result.REFUSED else EventType.ERROR
    event = _of_action(at, kind, outcome.message, outcome.action)
    details = {**event.details, "freed_bytes": outcome.freed}
    if outcome.refusal is not None:
        details["kind"] = outcome.refusal.kind.value
    return replace(event, details=details, about=outcome)


def _of_action(at: float, kind: EventType, message: str, action: Action) -> Event:
    details: ActionDetails = {
        "verb": action.kind.value,
        "subject": names.exact(action.subject),
        "models": list(action.models),
        "files": sum(entry.kind is Kind.FILE for entry in action.expects),
        "frees_bytes": action.frees,
        "saves_bytes": action.saves,
    }
    of_download = actions.row(action.kind).of_download
    who = names.known_as(action.models, action.subject) if of_download else None
    return Event(at, kind, message, who, details)


def refused(refusal: Refusal, at: float) -> Event:
    """Something can't be done, and waiting does not help."""
    details = {
        "kind": refusal.kind.value,
        "subject": refusal.subject,
        "remedy": refusal.remedy,
        "command": refusal.command,
        "models": list(refusal.models),
    }
    does = actions.does(refusal, actions.subject(refusal))
    message = f"refused to {does}: {refusal.why}"
    who = refusal.models[0] if refusal.models else None
    return Event(at, EventType.REFUSED, message, who, details, refusal)


def refreshed(outcomes: Sequence[Outcome], at: float) -> Event:
    """One event for all the times that were set together: they change nothing of worth."""
    failed = [outcome.message for outcome in outcomes if outcome.result is not Result.DONE]
    if failed:
        message = f"protecting files from pruning failed: {failed[0]}"
        return Event(at, EventType.ERROR, message, details={"failed": len(failed)})
    subjects = [names.exact(outcome.action.subject) for outcome in outcomes]
    many = "1 download or blob" if len(subjects) == 1 else f"{len(subjects):,} downloads and blobs"
    message = f"protected {many} from pruning"
    return Event(at, EventType.REFRESHED, message, details={"subjects": subjects[:_MOST_SUBJECTS]})


def hashed(outcome: Outcome, at: float) -> Event | None:
    """A file can't be read, or a finished blob's hash is wrong; None where all is well."""
    subject = outcome.action.subject
    details = {"digest": f"sha256:{subject}"}
    if outcome.action.kind is not ActionKind.HASH:
        return None
    if outcome.result is Result.FAILED:
        return Event(at, EventType.ERROR, outcome.message, details=details)
    entry = outcome.action.expects[0] if outcome.action.expects else None
    if entry is None or outcome.sha256 in (None, subject.lower()) or not names.is_blob(entry.name):
        return None
    if outcome.sha256 != model.UNREADABLE:
        details["hashed"] = f"sha256:{outcome.sha256}"
    message = f"{entry.name[:19]}: {outcome.message}"
    return Event(at, EventType.BLOB_CORRUPT, message, details=details)

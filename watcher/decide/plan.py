"""Findings and policy to a `Plan`: actions, typed refusals, and when to look again."""

from __future__ import annotations

from collections.abc import Iterator

from watcher import names
from watcher.model import (
    HOUR,
    QUIET_SECONDS,
    QUIET_UNSEEN_SECONDS,
    Action,
    Condition,
    Download,
    Due,
    Entry,
    Evidence,
    Judged,
    Kind,
    ManifestFault,
    Plan,
    Policy,
    Refusal,
    RefusalKind,
    ServerState,
    Sight,
    Verb,
    Verdict,
)

#: A server reads the sidecars before it opens the data; it must have met the guard by then.
GUARD_SECONDS = 2.0
_STOP = "stop the server (systemctl stop ollama) and end other ollama processes"
#: Manifests that protect blobs nobody can name.
_BLINDING = frozenset({ManifestFault.CORRUPT, ManifestFault.UNREADABLE, ManifestFault.DANGLING})


def plan_cleaning(verdict: Verdict, evidence: Evidence, policy: Policy) -> Plan:
    """What is worth nothing and can go: stale downloads, surplus sidecars, orphans, temporaries."""
    actions: list[Action] = []
    refusals: list[Refusal] = []
    for step in _steps(verdict, evidence, policy):
        if isinstance(step, Action):
            actions.append(step)
        else:
            refusals.append(step)
    actions.sort(key=lambda action: (-action.frees, action.subject))
    return Plan(tuple(actions), tuple(refusals), due(verdict, evidence, policy, tuple(refusals)))


def due(
    verdict: Verdict, evidence: Evidence, policy: Policy, refusals: tuple[Refusal, ...] = ()
) -> tuple[Due, ...]:
    """When each download is worth another look, by itself: quiet ends, it turns stale."""
    when: list[Due] = []
    for judged in verdict.judged:
        if judged.condition is Condition.LIVE:
            # With a writer the close of its file tells; without one only time does.
            if not judged.download.writers:
                when.append(Due(evidence.now - judged.quiet + QUIET_SECONDS, judged.digest))
        elif not judged.stale:
            when.append(Due(evidence.now - judged.age + policy.stale_after, judged.digest))
    digests = {judged.digest for judged in verdict.judged}
    when.extend(
        Due(evidence.now + refusal.seconds_left, refusal.subject)
        for refusal in refusals
        if refusal.seconds_left is not None and refusal.subject in digests
    )
    return tuple(sorted(when))


def _steps(verdict: Verdict, evidence: Evidence, policy: Policy) -> Iterator[Action | Refusal]:
    for judged in verdict.judged:
        if judged.stale:
            yield from _clean_download(judged, evidence)
    if evidence.scope is None:
        # Whether nothing else names a blob takes all manifests, so a narrow look plans none of it.
        yield from _clean_orphans(evidence, policy)
        yield from _clean_temporaries(evidence)


# ---------------------------------------------------------------- downloads


def _clean_download(judged: Judged, evidence: Evidence) -> Iterator[Action | Refusal]:
    download = judged.download
    match judged.condition:
        case Condition.LIVE | Condition.UNKNOWN:
            return
        case Condition.REDUNDANT:
            sidecars = tuple(sidecar.entry for sidecar in download.sidecars)
            if download.data is not None:
                yield _refusal(
                    RefusalKind.UNPROVEN,
                    judged,
                    Verb.REMOVE_DOWNLOAD,
                    "the finished blob's hash is not known, so the partial data may be needed",
                    f"check the blob: sha256sum blobs/{names.blob(download.digest)}",
                )
            elif sidecars:
                yield _permitted(judged, evidence, Verb.REMOVE_SURPLUS, sidecars)
        case _:
            yield _permitted(judged, evidence, Verb.REMOVE_DOWNLOAD, download.entries)


def _permitted(
    judged: Judged, evidence: Evidence, verb: Verb, expects: tuple[Entry, ...]
) -> Action | Refusal:
    """The action, if names of this download may be taken away now, else why not."""
    refusal = _why_not(judged, evidence, verb)
    if refusal is not None:
        return refusal
    return Action(
        verb=verb,
        subject=judged.digest,
        because=f"{judged.condition.value}, no progress for {judged.age / HOUR:.0f} hours",
        expects=expects,
        frees=sum(entry.freed for entry in expects),
        models=judged.download.models,
        wait_seconds=GUARD_SECONDS if evidence.servers else 0.0,
    )


def _why_not(judged: Judged, evidence: Evidence, verb: Verb) -> Refusal | None:
    download: Download = judged.download
    if download.holders:
        first = download.holders[0]
        return _refusal(
            RefusalKind.HELD,
            judged,
            verb,
            f"{first.process} ({first.pid}) has {names.printable(first.entry)} open",
            f"wait until it has ended, or end it: kill {first.pid}",
        )
    unsafe = _store_forbids(evidence)
    if unsafe is not None:
        return _refusal(unsafe[0], judged, verb, unsafe[1], unsafe[2])
    needed = QUIET_SECONDS if evidence.view.sight is Sight.FULL else QUIET_UNSEEN_SECONDS
    if judged.quiet < needed:
        left = needed - judged.quiet
        if evidence.view.sight is Sight.FULL:
            return _refusal(
                RefusalKind.NOT_QUIET,
                judged,
                verb,
                f"it changed {judged.quiet:.0f} s ago",
                f"try again in {left:.0f} s",
                left,
            )
        return _refusal(
            RefusalKind.SIGHT,
            judged,
            verb,
            f"not every process could be seen: {evidence.view.why}",
            f"run it as root, or try again in {left:.0f} s",
            left,
        )
    if judged.condition is Condition.UNCLAIMED and any(
        server.connections != 0 for server in evidence.servers
    ):
        return _refusal(
            RefusalKind.SERVER_RUNS,
            judged,
            verb,
            "a client is connected to the server: a pull may be about to write the sidecars",
            _STOP,
        )
    return None


def _store_forbids(evidence: Evidence) -> tuple[RefusalKind, str, str] | None:
    """Why no name under ``blobs/`` may be taken away at all."""
    for server in evidence.servers:
        if server.state is ServerState.STARTING:
            return (
                RefusalKind.SERVER_STARTS,
                f"a server is starting (pid {server.pid}); it stops where a name goes meanwhile",
                "try again when it answers",
            )
    if evidence.place.globbed and evidence.servers:
        return (
            RefusalKind.SERVER_RUNS,
            "the store's path has glob characters: a running server would not see the guard",
            _STOP,
        )
    if evidence.place.blobs_elsewhere:
        return (
            RefusalKind.LINKED,
            "blobs/ lies on another file system than the store, so nothing can be moved out of it",
            "mount or link the whole store instead of blobs/ alone",
        )
    if evidence.place.read_only:
        return (RefusalKind.PERMISSION, "the file system is mounted read-only", "remount it rw")
    return None


def _refusal(
    kind: RefusalKind,
    judged: Judged,
    verb: Verb,
    why: str,
    remedy: str,
    seconds_left: float | None = None,
) -> Refusal:
    return Refusal(kind, judged.digest, verb, why, remedy, seconds_left, judged.download.models)


# ---------------------------------------------------------------- orphans and temporaries


def _clean_orphans(evidence: Evidence, policy: Policy) -> Iterator[Action | Refusal]:
    old = [
        entry
        for entry in evidence.census.unnamed
        if evidence.now - entry.mtime >= policy.stale_after and entry.kind is Kind.FILE
    ]
    if not old:
        return
    forbidden = _orphans_forbidden(evidence)
    if forbidden is not None:
        subject = f"{len(old)} orphaned blob{'s' if len(old) > 1 else ''}"
        yield Refusal(forbidden[0], subject, Verb.REMOVE_ORPHAN, forbidden[1], forbidden[2])
        return
    for entry in old:
        days = (evidence.now - entry.mtime) / (24 * HOUR)
        because = f"no manifest names it, {days:.0f} days old"
        yield Action(Verb.REMOVE_ORPHAN, entry.name, because, (entry,), entry.freed)


def _orphans_forbidden(evidence: Evidence) -> tuple[RefusalKind, str, str] | None:
    """Why no finished blob may be removed: something may name it, or be about to."""
    for odd in evidence.census.odd_manifests:
        if odd.fault in _BLINDING:
            who = odd.model or names.printable(odd.path)
            return (
                RefusalKind.MANIFESTS,
                f"the manifest of {who} is {odd.fault.value}: it may name any of them",
                f"mend it: ollama pull {who}" if odd.model else "mend it",
            )
    for path in evidence.census.unlisted:
        return (
            RefusalKind.MANIFESTS,
            f"{names.printable(path)} can't be listed: a manifest in it may name any of them",
            f"chmod u+rx {names.printable(path)}",
        )
    if evidence.census.manifests == 0:
        return (
            RefusalKind.MANIFESTS,
            "there is not a single manifest: more likely manifests/ is missing than all is waste",
            "bring manifests/ back, or remove the store by hand",
        )
    return _idle_forbids(evidence)


def _idle_forbids(evidence: Evidence) -> tuple[RefusalKind, str, str] | None:
    """Why nothing may go that a pull or create may be about to use."""
    unsafe = _store_forbids(evidence)
    if unsafe is not None:
        return unsafe
    at_work = [f"ollama serve ({server.pid})" for server in evidence.servers]
    at_work.extend(evidence.others)
    if at_work:
        return (
            RefusalKind.SERVER_RUNS,
            f"{at_work[0]} runs: a pull or create may be about to use them",
            _STOP,
        )
    if evidence.view.sight is Sight.PARTIAL:
        return (
            RefusalKind.SIGHT,
            f"a server may run unseen: {evidence.view.why}",
            "run it as root, outside of containers",
        )
    return None


def _clean_temporaries(evidence: Evidence) -> Iterator[Action | Refusal]:
    old = [
        temporary.entry
        for temporary in evidence.census.temporaries
        if temporary.entry.kind is Kind.FILE and evidence.now - temporary.entry.mtime >= HOUR
    ]
    if not old:
        return
    forbidden = _idle_forbids(evidence)
    if forbidden is not None:
        subject = f"{len(old)} left-over{'s' if len(old) > 1 else ''} of ollama create"
        yield Refusal(forbidden[0], subject, Verb.REMOVE_TEMPORARY, forbidden[1], forbidden[2])
        return
    for entry in old:
        because = "a left-over of ollama create"
        yield Action(Verb.REMOVE_TEMPORARY, entry.name, because, (entry,), entry.freed)

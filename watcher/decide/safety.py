"""When names under ``blobs/`` may be changed at all, and why not. Pure; the words are the design's.

Adding or replacing takes less than taking away: a server that reads while we write fails once at
the guard, while a name taken from under it is lost to it.
"""

from __future__ import annotations

from watcher import names
from watcher.model import (
    LIVE_LOOK_SECONDS,
    QUIET_SECONDS,
    QUIET_UNSEEN_SECONDS,
    Condition,
    Evidence,
    Judged,
    Refusal,
    RefusalKind,
    ServerState,
    Sight,
    Verb,
)

#: A server reads the sidecars before it opens the data; it must have met the guard by then.
GUARD_SECONDS = 2.0
STOP = "stop the server (systemctl stop ollama) and end other ollama processes"

#: Why something can't be done: kind, reason, remedy, and the seconds left where time helps.
Why = tuple[RefusalKind, str, str, float | None]


def refusal(why: Why, judged: Judged, verb: Verb) -> Refusal:
    """The refusal of an act on a download."""
    kind, reason, remedy, left = why
    return Refusal(kind, judged.digest, verb, reason, remedy, left, judged.download.models)


def guard_seconds(evidence: Evidence) -> float:
    """How long the guard waits for a server that has read the sidecars already."""
    unseen = evidence.view.sight is Sight.PARTIAL
    return GUARD_SECONDS if evidence.servers or unseen else 0.0


def why_not_take(judged: Judged, evidence: Evidence) -> Why | None:
    """Why no name of a download may be taken away now: FULL sight and 90 s, else an hour."""
    full = evidence.view.sight is Sight.FULL
    needed = QUIET_SECONDS if full else QUIET_UNSEEN_SECONDS
    why = _why_not(judged, evidence, needed, enough_sight=full)
    return why or another_is_live(judged, evidence)


def why_not_add(judged: Judged, evidence: Evidence) -> Why | None:
    """Why no sidecar may be replaced or added now: NAMED sight is enough, or an hour's quiet."""
    named = evidence.view.sight is not Sight.PARTIAL
    needed = (QUIET_SECONDS if evidence.servers else 0.0) if named else QUIET_UNSEEN_SECONDS
    return _why_not(judged, evidence, needed, enough_sight=named)


def another_is_live(judged: Judged, evidence: Evidence) -> Why | None:
    """Why to wait for another: within one pull a later layer may lie untouched for hours."""
    others = evidence.pulling - {judged.download.key}
    if not others or not (evidence.servers or evidence.view.sight is Sight.PARTIAL):
        return None
    return (
        RefusalKind.LIVE,
        f"{names.short(min(others))} is being pulled, and this may be another layer of the model",
        "try again when that pull has ended",
        LIVE_LOOK_SECONDS,
    )


def _why_not(
    judged: Judged, evidence: Evidence, needed: float, *, enough_sight: bool
) -> Why | None:
    download = judged.download
    if download.holders:
        first = download.holders[0]
        return (
            RefusalKind.HELD,
            f"{first.process} ({first.pid}) has {names.printable(first.entry)} open{first.doubt}",
            f"wait until it has ended, or end it: kill {first.pid}",
            None,
        )
    unsafe = store_forbids(evidence)
    if unsafe is not None:
        return unsafe
    if judged.quiet < needed:
        left = needed - judged.quiet
        if enough_sight:
            return (
                RefusalKind.NOT_QUIET,
                _ago(judged, evidence),
                f"try again in {left:.0f} s",
                left,
            )
        return (
            RefusalKind.SIGHT,
            f"not every process could be seen: {evidence.view.why}",
            f"run it as root, or try again in {left:.0f} s",
            left,
        )
    if judged.condition is Condition.UNCLAIMED and any(
        server.connections != 0 for server in evidence.servers
    ):
        return (
            RefusalKind.SERVER_RUNS,
            "a client is connected to the server: a pull may be about to write the sidecars",
            STOP,
            None,
        )
    return None


def _ago(judged: Judged, evidence: Evidence) -> str:
    latest = judged.download.changed_at
    if latest is None or latest <= evidence.now:
        return f"it changed {judged.quiet:.0f} s ago"
    return f"its files' times lie in the future, and it was seen unchanged for {judged.quiet:.0f} s"


#: Root has looked at where the symlink leads, then.
TRUST_LINK = "if that is meant, let root own the symlink: sudo chown -h root:root, and its path"


def store_forbids(evidence: Evidence) -> Why | None:
    """Why no name under ``blobs/`` may be changed, whichever it is."""
    for server in evidence.servers:
        if server.state is ServerState.STARTING:
            return (
                RefusalKind.SERVER_STARTS,
                f"a server is starting (pid {server.pid}); it stops where a name goes meanwhile",
                "try again when it answers",
                None,
            )
    if evidence.place.globbed and evidence.servers:
        return (
            RefusalKind.SERVER_RUNS,
            "the store's path has glob characters: a running server would not see the guard",
            STOP,
            None,
        )
    if evidence.place.blobs_elsewhere:
        return (
            RefusalKind.LINKED,
            "blobs/ lies on another file system than the store, so nothing can be moved out of it",
            "mount or link the whole store instead of blobs/ alone",
            None,
        )
    if evidence.place.foreign:
        why = f"{evidence.place.foreign}, so what lies there is not this store's"
        return RefusalKind.OWNER, why, TRUST_LINK, None
    if evidence.place.read_only:
        why = "the file system is mounted read-only"
        return RefusalKind.PERMISSION, why, "mount it for writing", None
    return None


def idle_forbids(evidence: Evidence) -> Why | None:
    """Why nothing may go that a pull or create may be about to use."""
    unsafe = store_forbids(evidence)
    if unsafe is not None:
        return unsafe
    at_work = [f"ollama serve ({server.pid})" for server in evidence.servers]
    at_work.extend(evidence.others)
    if at_work:
        return (
            RefusalKind.SERVER_RUNS,
            f"{at_work[0]} runs: a pull or create may be about to use them",
            STOP,
            None,
        )
    if evidence.view.sight is Sight.PARTIAL:
        return (
            RefusalKind.SIGHT,
            f"a server may run unseen: {evidence.view.why}",
            "run it as root, outside of containers",
            None,
        )
    return None

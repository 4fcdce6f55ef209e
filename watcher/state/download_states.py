"""The states of a model's download, and the ways between them.

The ways are those of the server's own statuses (`docs/store.md`, What a client is told; the
recordings in ``tests/fidelity/truth``), and those that are inferred of downloads that others drive,
of which only the store is seen.
"""

from __future__ import annotations

import enum
import re


class State(enum.StrEnum):
    """Where a model's download is."""

    IDLE = "idle"
    STARTING = "starting"
    PULLING_MANIFEST = "pulling_manifest"
    DOWNLOADING = "downloading"
    WRITING_MANIFEST = "writing_manifest"
    VERIFYING = "verifying"
    COMPLETED = "completed"
    ERROR = "error"
    RESET = "reset"

    @property
    def stage(self) -> str:
        """What people are told."""
        return _STAGES[self]

    @property
    def active(self) -> bool:
        """Somebody is at work on it."""
        return self in ACTIVE


_STAGES = {
    State.IDLE: "Not started",
    State.STARTING: "Waiting for manifest...",
    State.PULLING_MANIFEST: "Pulling manifest from Ollama registry...",
    State.DOWNLOADING: "Downloading model layers...",
    State.VERIFYING: "Verifying download integrity...",
    State.WRITING_MANIFEST: "Writing model manifest...",
    State.COMPLETED: "Download complete",
    State.ERROR: "Download interrupted",
    State.RESET: "Download reset",
}

ACTIVE = frozenset(
    {
        State.STARTING,
        State.PULLING_MANIFEST,
        State.DOWNLOADING,
        State.VERIFYING,
        State.WRITING_MANIFEST,
    }
)

#: How each active state goes on when all goes well, as the server tells it.
_ONWARD = {
    State.STARTING: {State.PULLING_MANIFEST},
    # Straight to the check where nothing is missing, or where a download was too short to be told;
    # straight to the manifest on the transfer path, which hashes layers as they arrive.
    State.PULLING_MANIFEST: {State.DOWNLOADING, State.VERIFYING, State.WRITING_MANIFEST},
    # Past the check on the transfer path.
    State.DOWNLOADING: {State.VERIFYING, State.WRITING_MANIFEST},
    State.VERIFYING: {State.WRITING_MANIFEST},
    State.WRITING_MANIFEST: set[State](),
}

#: Where every active state may go besides.
_FROM_ACTIVE = {
    # The request is made again, after a cure or after whoever had made it has died.
    State.STARTING,
    # The server says so, it is gone, the digest does not match, or the request was cancelled; of a
    # download that others drive: it was interrupted.
    State.ERROR,
    # The server says success; or the model's manifest has appeared, since a server goes on alone
    # once the data is in, and another client may have been quicker.
    State.COMPLETED,
}

#: Where every other state may go.
_FROM_RESTING = {
    # A try begins, with a request or with a manifest that is at hand.
    State.STARTING,
    State.PULLING_MANIFEST,
    # Somebody else's is seen live at once, or goes on.
    State.DOWNLOADING,
    # A try can't even begin; or an unfinished download was found that nobody drives.
    State.ERROR,
    # What there was is forgotten. Never while somebody is at work on it: that is cancelled first.
    State.RESET,
    # Nothing of it is left in the store.
    State.IDLE,
}

#: From each state to those that may follow it. To stay is always possible.
WAYS: dict[State, frozenset[State]] = {
    **{state: frozenset(_FROM_ACTIVE | onward) - {state} for state, onward in _ONWARD.items()},
    **{state: frozenset(_FROM_RESTING) - {state} for state in State if state not in ACTIVE},
    # An interrupted download of somebody else's may have gone on and ended between two looks.
    State.ERROR: frozenset(_FROM_RESTING | {State.COMPLETED}) - {State.ERROR},
}

_OF_STATUS = (
    (re.compile("pulling manifest"), State.PULLING_MANIFEST),
    # The second and the third are those of the transfer path.
    (re.compile("pulling [0-9a-f]{12}|pulling model|sha256:.*"), State.DOWNLOADING),
    (re.compile("verifying sha256 digest"), State.VERIFYING),
    (re.compile("writing manifest|removing unused layers"), State.WRITING_MANIFEST),
    (re.compile("success"), State.COMPLETED),
)


def may_follow(before: State, after: State) -> bool:
    """Whether there is a way from one state to another one."""
    return before is after or after in WAYS[before]


def way(before: State, after: State) -> tuple[State, ...]:
    """The states to go through to a state that was seen, with itself at the end.

    What lies between two looks is not seen: a try, or its end. Nothing where it is there already.
    """
    if before is after:
        return ()
    if after in WAYS[before]:
        return (after,)
    between = State.ERROR if before.active else State.STARTING
    return (between, after)


def of_status(status: str) -> State | None:
    """The state that a status of the server's stream tells; None for one that is not known."""
    return next((state for shape, state in _OF_STATUS if shape.fullmatch(status)), None)

"""Evidence in short, for what is decided without looking at anything."""

from __future__ import annotations

from typing import Any

from tests.support.runs import rules
from watcher.decide import diagnose
from watcher.model import (
    DAY,
    HOUR,
    Diagnosis,
    Download,
    Entry,
    Evidence,
    Holder,
    Kind,
    Part,
    Place,
    Ranges,
    Rules,
    Server,
    ServerState,
    Sidecar,
    Trust,
    View,
    Visibility,
)
from watcher.ollama import ranges

NOW = 1_764_000_000.0
MB = 1_000_000
D = "0123456789abcdef" * 4
POLICY = rules()
#: Only what `clean` does.
CLEANING = rules(clean=True, repair=False)


def entry(name: str, *, ago: float = 2 * HOUR, size: int = 100, **more: Any) -> Entry:
    then = round((NOW - ago) * 1e9)
    made = Entry(name, Kind.FILE, size, 4096, 1, hash(name) % 2**40, 1, then, then, 0, 0, 0o644)
    return made._replace(**more)


def download(
    *, ago: float = 2 * HOUR, claimed: Ranges = ((0, 50 * MB),), trusted: Ranges | None = None,
    total: int | None = 200 * MB, data: bool = True, parts: int = 2, digest: str = D, **more: Any,
) -> Download:  # fmt: skip
    """A download of two parts whose sidecars are sound; what is trusted is what is claimed."""
    believed = claimed if trusted is None else trusted
    size = (total or 0) // parts if parts else 0
    each = tuple(
        Sidecar(entry(f"sha256-{digest}-partial-{n}", ago=ago), n, Part(n, n * size, size, 0), None)
        for n in range(parts)
    )
    given: dict[str, Any] = {
        "digest": digest,
        "data": entry(f"sha256-{digest}-partial", ago=ago, size=total or 0) if data else None,
        "sidecars": each,
        "total": total,
        "total_from": "sidecars",
        "trust": Trust(claimed, ranges.union(believed, ()) if data else (), believed),
    }
    return Download(**{**given, **more})


def server(**more: Any) -> Server:
    given: dict[str, Any] = {
        "pid": 7, "user": "ollama", "since": NOW - DAY, "state": ServerState.ANSWERING,
        "ours": True, "connections": 0,
    }  # fmt: skip
    return Server(**{**given, **more})


def writer(name: str = "ollama", *, writes: bool = True) -> Holder:
    return Holder(42, name, f"sha256-{D}-partial", writes)


def evidence(
    *downloads: Download, visibility: Visibility = Visibility.FULL, **more: Any
) -> Evidence:
    given: dict[str, Any] = {
        "place": Place("/models", "--store"),
        "now": NOW,
        "view": View(visibility, (), "" if visibility is Visibility.FULL else "the reason"),
        "downloads": downloads,
    }
    return Evidence(**{**given, **more})


def diagnosis(seen: Evidence, policy: Rules = POLICY) -> Diagnosis:
    """What there is to tell of what was seen."""
    return diagnose.diagnosis(diagnose.diagnose(seen, policy), seen, policy)

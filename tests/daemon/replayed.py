"""What the event log tells of a store, replayed; and what stands in the store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tests.support.driving import HealthyStore, audit

#: After these a download is no more.
_GONE = ("download_completed", "partial_removed", "partial_cleaned")


class State(NamedTuple):
    """Unfinished downloads with condition and models, complete models, digests put aside."""

    downloads: Mapping[str, tuple[str, tuple[str, ...]]]
    models: frozenset[str]
    quarantined: frozenset[str]


def replay(lines: Iterable[Mapping[str, Any]]) -> State:
    """The state that events lead to, from an empty store on."""
    downloads: dict[str, tuple[str, tuple[str, ...]]] = {}
    models: set[str] = set()
    quarantined: set[str] = set()
    for line in lines:
        kind, details = line["event_type"], line["details"]
        digest = str(details.get("digest") or details.get("subject")).removeprefix("sha256:")
        if "condition" in details:
            downloads[digest] = details["condition"], tuple(details["models"])
        elif kind in _GONE:
            downloads.pop(digest, None)
        elif kind == "download_repaired":
            condition, known = downloads[digest]
            downloads[digest] = "whole" if condition == "whole" else "paused", known
        elif kind == "manifest_written":
            models.add(line["model_name"])
        elif kind == "model_removed":
            models.discard(line["model_name"])
        elif kind == "quarantined":
            quarantined.add(digest)
    return State(downloads, frozenset(models), frozenset(quarantined))


def on_disk(store: HealthyStore) -> State:
    """The same as it stands, told by a look that keeps nothing."""
    document = audit(store.path)
    named = (path for path in (store.path / "manifests").glob("*/*/*/*") if path.is_file())
    put_aside = (store.ours / "quarantine").glob("*-sha256-*")
    return State(
        {
            each["digest"].removeprefix("sha256:"): (each["condition"], tuple(each["models"]))
            for each in document["downloads"]
        },
        frozenset(_shown(path.parts[-4:]) for path in named),
        frozenset(path.name.rpartition("-")[2] for path in put_aside),
    )


def _shown(parts: tuple[str, ...]) -> str:
    host, namespace, model, tag = parts
    where = () if host == "registry.ollama.ai" else (host,)
    whose = () if not where and namespace == "library" else (namespace,)
    return f"{'/'.join((*where, *whose, model))}:{tag}"

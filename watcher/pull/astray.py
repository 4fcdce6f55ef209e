"""Layers that a pull would download although the store has their bytes in another place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from watcher.decide import astray
from watcher.errors import WatchError
from watcher.observe import scan
from watcher.pull.target import Target
from watcher.reconcile import Reconciler
from watcher.state import folders


def notes(target: Target, model: str, missing: Mapping[str, int]) -> Iterator[str]:
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
    for finding in astray.of_blobs(replace(seen, census=seen.census._replace(odd=lying))):
        if finding.models:
            helps = finding.command or finding.remedy
            helps = f"; to avoid that, stop the pull and move them first: {helps}" if helps else ""
            yield f"{finding.message}; this pull downloads it again{helps}"

"""What somebody still counts on, and a start of the server takes once it is an hour old. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from watcher.model import Diagnosed, Entry, Evidence, Rules


class AtRisk(NamedTuple):
    """One thing that is wanted: a digest, or a blob's name, and its files, which go together."""

    subject: str
    entries: tuple[Entry, ...]
    models: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Its files as paths below the store."""
        return tuple(f"blobs/{entry.name}" for entry in self.entries)


def of_downloads(diagnosed: Iterable[Diagnosed]) -> Iterator[AtRisk]:
    """Every download that is not stale."""
    for each in diagnosed:
        if not each.stale:
            yield AtRisk(each.digest, each.download.entries, each.download.models)


def of_blobs(evidence: Evidence, rules: Rules) -> Iterator[AtRisk]:
    """Young blobs that no manifest names yet, and those that one names so that it protects none.

    As for `clean`, a time that we have set to keep a blob makes it no younger.
    """
    for entry in evidence.census.unnamed:
        if evidence.age_of(entry.changed_at) < rules.settings.stale_after:
            yield AtRisk(entry.name, (entry,))
    if not evidence.place.globbed:  # there it is the path that has to change
        for entry in evidence.census.unprotected:
            yield AtRisk(entry.name, (entry,))


def paths(diagnosed: Iterable[Diagnosed], evidence: Evidence, rules: Rules) -> frozenset[str]:
    """All of it, as paths below the store."""
    every = (*of_downloads(diagnosed), *of_blobs(evidence, rules))
    return frozenset(path for each in every for path in each.paths)

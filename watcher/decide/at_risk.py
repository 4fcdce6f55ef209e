"""Files that are needed, and that a start of the server deletes once they are an hour old. Pure."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

from watcher.model import HOUR, Diagnosed, Entry, Evidence, Finding, Rules, Severity
from watcher.state.event_log import clock
from watcher.system import advice

Doomed: TypeAlias = Mapping[str, float]  #: paths that a server start deletes, and from when on
#: Times of what is at risk are set anew when they are this old: well before the server's hour.
REFRESH_AFTER = HOUR / 2


class AtRisk(NamedTuple):
    """One thing that is needed: a digest, or a blob's name, and its files, which go together."""

    subject: str
    entries: tuple[Entry, ...]
    models: tuple[str, ...] = ()


def is_needed(each: Diagnosed) -> bool:
    """Whether something of a server's download is worth keeping, and it is not stale."""
    return not (each.stale or each.download.ours or each.download.is_needless)


def of_downloads(diagnosed: Iterable[Diagnosed]) -> Iterator[AtRisk]:
    for each in filter(is_needed, diagnosed):
        yield AtRisk(each.digest, each.download.entries, each.download.models)


def of_blobs(evidence: Evidence, rules: Rules) -> Iterator[AtRisk]:
    """Young blobs that no manifest names yet, and those that one names so that it protects none."""
    young = [entry for entry in evidence.census.unnamed if is_young(entry, evidence, rules)]
    # With glob characters it is the store's path that has to change.
    unprotected = () if evidence.place.globbed else evidence.census.unprotected
    for entry in (*young, *unprotected):
        yield AtRisk(entry.name, (entry,))


def is_young(entry: Entry, evidence: Evidence, rules: Rules) -> bool:
    """As for `clean`: a time that we have set to protect it makes it no younger."""
    return evidence.age_of(entry.changed_at) < rules.settings.stale_after


def paths(diagnosed: Iterable[Diagnosed], evidence: Evidence, rules: Rules) -> frozenset[str]:
    every = (*of_downloads(diagnosed), *of_blobs(evidence, rules))
    return frozenset(f"blobs/{entry.name}" for each in every for entry in each.entries)


def fades(entries: Iterable[Entry], now: float) -> bool:
    """Whether a repair would set the times of any of them anew."""
    return any(now - entry.mtime > REFRESH_AFTER for entry in entries)


def ends(entries: Iterable[Entry], doomed: Doomed) -> list[float]:
    """From when on a start deletes each of the files that it deletes, the first one first."""
    found = (doomed.get(f"blobs/{entry.name}") for entry in entries)
    return sorted(at for at in found if at is not None)


def unwatched(when: list[float], evidence: Evidence) -> list[float]:
    """The same without what a daemon protects; where it can't, that is old by now."""
    return when[: bisect_right(when, evidence.now)] if evidence.next_start.watched else when


def finding(
    usual: Finding, entries: tuple[Entry, ...], when: list[float], known_as: str, evidence: Evidence
) -> Finding:
    """With what a start does, and what protects from it. `known_as`: what the command names."""
    now = bisect_right(when, evidence.now)
    taken, files = now or len(when), len(entries)
    what = "all of it" if taken == files else f"{taken} of its {files} files"
    if now:
        old = min(entry.mtime for entry in entries) + HOUR
        alone = f"the next server start deletes {what}"
        since = f"old enough to be pruned since {clock(old, evidence.now)}"
    else:
        first = clock(when[0], evidence.now)
        alone = f"a server start after {first} deletes {what}"
        since = f"old enough to be pruned at {first}"
    command, remedy = "", ""
    if fades(entries, evidence.now):
        remedy = "the command protects it for one hour; "
        named = filter(None, (known_as,))
        command = advice.watch(evidence, "repair", *named, owner=entries[0].uid)
    service = "the service, or `prepare` in the server's unit, protects it permanently"
    return usual._replace(
        severity=Severity.WARNING if now else Severity.INFO,
        evidence=since,
        alone=alone,
        command=command,
        remedy=f"{remedy}{service}",
    )

"""Files that are needed, and that a start of the server deletes once they are an hour old. Pure."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from math import inf
from typing import NamedTuple

from watcher.decide import findings
from watcher.decide.finding_kinds import found
from watcher.model import HOUR, Diagnosed, Entry, Evidence, Finding, Rules, Severity
from watcher.ollama import names
from watcher.state.event_log import clock
from watcher.system import advice

#: Times of what is at risk are set anew when they are this old: well before the server's hour.
REFRESH_AFTER = HOUR / 2


class AtRisk(NamedTuple):
    """One thing that is needed: a digest, or a blob's name, and its files, which go together."""

    subject: str
    #: What a command knows it by.
    who: str
    entries: tuple[Entry, ...]
    models: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Its first file as a path below the store."""
        return f"blobs/{self.entries[0].name}"

    def ends(self, doomed: Mapping[str, float]) -> list[float]:
        """When a start begins to delete each of its files that it deletes, the first one first."""
        found = (doomed.get(f"blobs/{entry.name}") for entry in self.entries)
        return sorted(at for at in found if at is not None)


def of_downloads(diagnosed: Iterable[Diagnosed]) -> Iterator[AtRisk]:
    """Every download that is not stale, and of which something is worth keeping."""
    for each in diagnosed:
        if not each.stale and not each.download.is_useless:
            yield of_download(each)


def of_download(each: Diagnosed) -> AtRisk:
    """A download with its files."""
    models = each.download.models
    return AtRisk(each.digest, names.known_as(models, each.digest), each.download.entries, models)


def of_blobs(evidence: Evidence, rules: Rules) -> Iterator[AtRisk]:
    """Young blobs that no manifest names yet, and those that one names so that it protects none.

    As for `clean`, a time that we have set to keep a blob makes it no younger.
    """
    unnamed, age = evidence.census.unnamed, rules.settings.stale_after
    young = [entry for entry in unnamed if evidence.age_of(entry.changed_at) < age]
    # With glob characters it is the store's path that has to change.
    unprotected = () if evidence.place.globbed else evidence.census.unprotected
    for entry in (*young, *unprotected):
        yield AtRisk(entry.name, names.short(names.parse_blob(entry.name).digest), (entry,))


def paths(diagnosed: Iterable[Diagnosed], evidence: Evidence, rules: Rules) -> frozenset[str]:
    """All of it, as paths below the store."""
    every = (*of_downloads(diagnosed), *of_blobs(evidence, rules))
    return frozenset(f"blobs/{entry.name}" for each in every for entry in each.entries)


def fades(entries: Iterable[Entry], now: float) -> bool:
    """Whether a repair would set the times of any of them anew."""
    return any(now - entry.mtime > REFRESH_AFTER for entry in entries)


def findings_about(
    diagnosed: Iterable[Diagnosed], evidence: Evidence, rules: Rules, doomed: Mapping[str, float]
) -> Iterator[Finding]:
    """What a start of the server deletes though it is needed: a warning where it would do so now.

    `doomed`: the paths that a start deletes, and from when on.
    """
    if evidence.next_start.watched:
        # A daemon protects it; where it can't, it is old by now.
        doomed = {path: at for path, at in doomed.items() if at <= evidence.now}
    for each in of_downloads(diagnosed):
        if ends := each.ends(doomed):
            usual = found("download_at_risk", each.path, who=each.who)
            yield _finding(usual, each, ends, evidence)
    # One finding for all finished blobs that a start deletes now, one for those of a later one.
    due = [(doomed.get(each.path, inf), each) for each in of_blobs(evidence, rules)]
    now = [each for at, each in due if at <= evidence.now]
    later = [each for at, each in due if evidence.now < at < inf]
    for alike in filter(None, (now, later)):
        what, them, together = "a finished blob is", "it", alike[0]
        if len(alike) > 1:
            what, them = f"{len(alike):,} finished blobs are", "them"
            together = AtRisk("", "", tuple(entry for each in alike for entry in each.entries))
        usual = found("blob_at_risk", together.path, what=what, them=them)
        yield _finding(usual, together, together.ends(doomed), evidence)


def _finding(usual: Finding, each: AtRisk, ends: list[float], evidence: Evidence) -> Finding:
    """With what a start does, from when on, and what protects from it."""
    now = bisect_right(ends, evidence.now)
    taken, files = now or len(ends), len(each.entries)
    what = "all of it" if taken == files else f"{taken} of its {files} files"
    if now:
        old = min(entry.mtime for entry in each.entries) + HOUR
        alone = f"the next server start deletes {what}"
        since = f"old enough to be pruned since {clock(old, evidence.now)}"
    else:
        first = clock(ends[0], evidence.now)
        alone = f"a server start after {first} deletes {what}"
        since = f"old enough to be pruned at {first}"
    command, remedy = "", ""
    if fades(each.entries, evidence.now):
        remedy = "the command protects it for one hour; "
        named = filter(None, (each.who,))
        command = advice.watch(evidence, "repair", *named, owner=each.entries[0].uid)
    service = "the service, or `prepare` in the server's unit, protects it permanently"
    return usual._replace(
        severity=Severity.WARNING if now else Severity.INFO,
        evidence=since,
        alone=alone,
        command=command,
        sizes=findings.sizes(each.entries),
        models=each.models,
        remedy=f"{remedy}{service}",
    )

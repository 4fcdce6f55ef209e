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
    entries: tuple[Entry, ...]
    models: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Its files as paths below the store."""
        return tuple(f"blobs/{entry.name}" for entry in self.entries)


def of_downloads(diagnosed: Iterable[Diagnosed]) -> Iterator[AtRisk]:
    """Every download that is not stale, and of which something is worth keeping."""
    for each in diagnosed:
        if not each.stale and not each.download.is_useless:
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
        if any(path in doomed for path in each.paths):
            who = names.known_as(each.models, each.subject)
            usual = found("download_at_risk", each.paths[0], who=who)
            yield _finding(usual, each, evidence, doomed)
    # One finding for all finished blobs that a start deletes now, one for those of a later one.
    due = [(doomed.get(each.paths[0], inf), each) for each in of_blobs(evidence, rules)]
    now = [each for at, each in due if at <= evidence.now]
    later = [each for at, each in due if evidence.now < at < inf]
    for alike in filter(None, (now, later)):
        what, them, subject = "a finished blob is", "it", alike[0].subject
        if len(alike) > 1:
            what, them, subject = f"{len(alike):,} finished blobs are", "them", ""
        usual = found("blob_at_risk", alike[0].paths[0], what=what, them=them)
        together = AtRisk(subject, tuple(entry for each in alike for entry in each.entries))
        yield _finding(usual, together, evidence, doomed)


def _finding(
    usual: Finding, each: AtRisk, evidence: Evidence, doomed: Mapping[str, float]
) -> Finding:
    """With what a start does, from when on, and what protects from it."""
    when = sorted(doomed[path] for path in each.paths if path in doomed)
    now = bisect_right(when, evidence.now)
    taken, files = now or len(when), len(each.paths)
    what = "all of it" if taken == files else f"{taken} of its {files} files"
    if now:
        old = min(entry.mtime for entry in each.entries) + HOUR
        alone = f"the next server start deletes {what}"
        since = f"old enough to be pruned since {clock(old, evidence.now)}"
    else:
        first = clock(when[0], evidence.now)
        alone = f"a server start after {first} deletes {what}"
        since = f"old enough to be pruned at {first}"
    command, remedy = "", ""
    if fades(each.entries, evidence.now):
        remedy = "the command protects it for one hour; "
        digest = names.parse_blob(each.subject).digest or each.subject
        known_as = each.models[:1] or ((names.short(digest),) if digest else ())
        command = advice.watch(evidence, "repair", *known_as, owner=each.entries[0].uid)
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

"""Blobs whose bytes lie where no server looks for them: an old spelling, a copy, a case. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from watcher import advice, names
from watcher.decide import findings
from watcher.model import Evidence, Finding, Located, OddBlob, Severity


def of_blobs(evidence: Evidence) -> Iterator[Finding]:
    """What lies astray, that of one folder or spelling together, with the command that helps."""
    for finding in _of_blobs(evidence):
        away = findings.is_led_away(finding.path, evidence)
        yield finding._replace(command="", remedy=findings.BEHIND_LINK) if away else finding


def _of_blobs(evidence: Evidence) -> Iterator[Finding]:
    groups: dict[str, list[OddBlob]] = {}
    for odd in evidence.census.odd:
        if odd.lies is not None:
            groups.setdefault(_group(odd.lies), []).append(odd)
    for folder, group in sorted(groups.items()):
        if folder == _OLD:
            yield _old(group, evidence)
        elif folder:
            yield _copied(folder, group, evidence)
        else:
            yield from (_case(odd, evidence) for odd in group)


#: Not a folder's path.
_OLD = "sha256:"


def _group(lies: Located) -> str:
    """The folder that a blob lies in, "" for ``blobs`` itself; or `_OLD` for the old spelling."""
    folder = lies.path.rpartition("/")[0]
    if folder != "blobs":
        return folder
    return _OLD if lies.entry.name.startswith("sha256:") else ""


def _old(group: list[OddBlob], evidence: Evidence) -> Finding:
    serves = any(server.ours for server in evidence.servers)
    waits = not (serves or evidence.place.blobs_linked or _is_sealed(evidence))
    return _finding(
        Severity.INFO if waits else Severity.ERROR,
        group,
        f"{_many(group)} under the names of older servers (sha256:…)",
        "the next start of the server renames them"
        if waits
        else "the server does not find them, and a pull fetches them again",
        advice.new_spellings(evidence),
    )


def _is_sealed(evidence: Evidence) -> bool:
    return evidence.place.read_only or evidence.census.sealed


def _copied(folder: str, group: list[OddBlob], evidence: Evidence) -> Finding:
    return _finding(
        Severity.ERROR,
        group,
        f"{_many(group)} in {names.printable(folder)}, where no server looks",
        "the server does not find them, and a pull fetches them again",
        advice.brought_up(evidence, folder),
    )


def _case(odd: OddBlob, evidence: Evidence) -> Finding:
    assert odd.lies is not None
    here = f"{evidence.place.path}/{odd.lies.path}"
    there = f"{evidence.place.path}/blobs/{names.blob(odd.digest)}"
    # A name that another manifest has stays.
    words = ("mv", "-nT") if odd.lies.entry in evidence.census.unprotected else ("ln", "-T")
    owner = evidence.place.owner
    return _finding(
        Severity.ERROR,
        [odd],
        f"{_many([odd])} under a name that differs by case",
        "the server does not find it, and a pull fetches it again",
        advice.shell(evidence, *words, here, there, owner=owner),
    )


def _many(group: list[OddBlob]) -> str:
    if len(group) > 1:
        return f"{len(group):,} blobs that manifests name lie"
    return f"a blob of {names.known_as(group[0].models, group[0].digest)} lies"


def _finding(
    severity: Severity,
    group: list[OddBlob],
    message: str,
    alone: str,
    command: str,
) -> Finding:
    lies = [odd.lies for odd in group if odd.lies is not None]
    return Finding(
        severity,
        "blob_astray",
        lies[0].path,
        message,
        evidence=_first(each.path for each in lies),
        alone=alone,
        command=command,
        sizes=findings.sizes(each.entry for each in lies),
        models=tuple(sorted({model for odd in group for model in odd.models})),
    )


def _first(paths: Iterable[str]) -> str:
    every = [names.printable(path) for path in paths]
    more = f", and {len(every) - 3:,} more" if len(every) > 3 else ""
    return ", ".join(every[:3]) + more

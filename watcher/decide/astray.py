"""Blobs whose bytes lie where no server looks for them: an old spelling, a copy, a case. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from watcher.decide import findings
from watcher.model import Evidence, Finding, Located, Nested, OddBlob, Severity
from watcher.ollama import names
from watcher.system import advice


def of_blobs(evidence: Evidence) -> Iterator[Finding]:
    """What lies astray, that of one folder or spelling together, with the command that helps."""
    for finding in _of_blobs(evidence):
        away = findings.is_led_away(finding.path, evidence)
        yield finding._replace(command="", remedy=findings.BEHIND_LINK) if away else finding


def _of_blobs(evidence: Evidence) -> Iterator[Finding]:
    groups: dict[str, list[OddBlob]] = {}
    stores = evidence.census.nested
    yield from (_nested(each, evidence) for each in stores)
    for odd in evidence.census.odd:
        if odd.lies is not None and not any(is_in(odd.lies.path, each) for each in stores):
            groups.setdefault(_group(odd.lies), []).append(odd)
    for folder, group in sorted(groups.items()):
        if folder == _OLD:
            yield _old(group, evidence)
        elif folder:
            yield _copied(folder, group, evidence)
        else:
            yield from (_case(odd, evidence) for odd in group)


def is_in(path: str, nested: Nested) -> bool:
    """Whether something lies in a store in the store."""
    return path.startswith((f"{nested.path}/blobs/", f"{nested.path}/manifests/"))


def _nested(nested: Nested, evidence: Evidence) -> Finding:
    """A store in the store, with what is missing outside of it."""
    lost = [
        odd for odd in evidence.census.odd if odd.lies is not None and is_in(odd.lies.path, nested)
    ]
    files = _files(nested)
    parts = [part for part, found in _parts(nested) if found]
    # Of a copy in blobs/ itself not all that is in there.
    whole = nested.path not in ("blobs", "manifests")
    places = [nested.path] if whole else [f"{nested.path}/{part}" for part in parts]
    shown = " and ".join(names.printable(f"{place}/") for place in places)
    moves = bool(nested.apart) and not nested.used
    return Finding(
        Severity.ERROR if lost else Severity.WARNING,
        _kind(nested, lost),
        _first_of(nested, lost).path,
        f"{files} in {shown}, where no server looks",
        evidence=_of_lost(lost) or _of_twins(nested),
        alone="the server does not find them, and a pull fetches them again"
        if lost
        else "nothing: they stay, and take the room",
        command=advice.moved_up(evidence, nested.path, parts, finished=nested.collides)
        if moves
        else "",
        sizes=findings.sizes(each.entry for _, found in _parts(nested) for each in found),
        models=tuple(sorted({model for odd in lost for model in odd.models})),
        remedy=_instead(nested, shown),
    )


def _kind(nested: Nested, lost: list[OddBlob]) -> str:
    if not nested.blobs:
        return "manifest_misplaced"
    # Of files that are nobody's, in a folder of blobs/, one kind of finding is enough.
    is_folder = nested.path == "blobs" and not nested.manifests
    return "file_foreign" if is_folder and not lost else "blob_astray"


def _first_of(nested: Nested, lost: list[OddBlob]) -> Located:
    missing = [odd.lies for odd in lost if odd.lies is not None]
    return (*missing, *nested.blobs, *nested.manifests)[0]


def _parts(nested: Nested) -> tuple[tuple[str, tuple[Located, ...]], ...]:
    return (("blobs", nested.blobs), ("manifests", nested.manifests))


def _files(nested: Nested) -> str:
    counted = [
        f"{len(found):,} {word}{'s' if len(found) > 1 else ''}"
        for word, found in (("file", nested.blobs), ("manifest", nested.manifests))
        if found
    ]
    together = len(nested.blobs) + len(nested.manifests)
    return f"{' and '.join(counted)} of a store {'lie' if together > 1 else 'lies'}"


def _of_lost(lost: list[OddBlob]) -> str:
    if not lost:
        return ""
    return f"manifests of this store name {len(lost):,} of them, whose places are empty"


def _of_twins(nested: Nested) -> str:
    every = len(nested.blobs) + len(nested.manifests)
    twins = every - nested.apart
    known = "have their names" if twins > 1 else "has its name"
    return f"{f'{twins:,}' if twins else 'none'} of them {known} in this store as well"


def _instead(nested: Nested, shown: str) -> str:
    """What there is to say besides the command, or in its place."""
    if nested.used:
        return "a server runs on it: leave it, or stop that server first"
    if not nested.apart:
        return f"if it is a copy that went wrong, remove {shown} after a look at it"
    return "what has its name in this store already stays there"


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

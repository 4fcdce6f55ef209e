"""Blobs whose bytes lie where no server looks for them: an old spelling, a copy, a case. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from watcher.decide import findings
from watcher.decide.finding_kinds import BEHIND_LINK, found
from watcher.model import Evidence, Finding, Located, Nested, OddBlob, Severity
from watcher.ollama import names
from watcher.system import advice


def of_blobs(evidence: Evidence) -> Iterator[Finding]:
    """What lies astray, that of one folder or spelling together, with the command that helps."""
    for finding in _of_blobs(evidence):
        away = findings.is_led_away(finding.path, evidence)
        yield finding._replace(command="", remedy=BEHIND_LINK) if away else finding


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
    parts = [part for part, files in _parts(nested) if files]
    # Of a copy in blobs/ itself not all that is in there.
    whole = nested.path not in ("blobs", "manifests")
    places = [nested.path] if whole else [f"{nested.path}/{part}" for part in parts]
    shown = " and ".join(names.printable(f"{place}/") for place in places)
    moves = bool(nested.apart) and not nested.used
    finding = found("blob_astray", _first_of(nested, lost).path, what="")
    return finding._replace(
        severity=Severity.ERROR if lost else Severity.WARNING,
        kind=_kind(nested, lost),
        message=f"{files} in {shown}, where no server looks",
        evidence=_of_lost(lost) or _of_twins(nested),
        alone=finding.alone if lost else "nothing: they stay and use the space",
        command=advice.moved_up(evidence, nested.path, parts, finished=nested.collides)
        if moves
        else "",
        sizes=findings.sizes(each.entry for _, files in _parts(nested) for each in files),
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
        f"{len(files):,} {word}{'s' if len(files) > 1 else ''}"
        for word, files in (("file", nested.blobs), ("manifest", nested.manifests))
        if files
    ]
    together = len(nested.blobs) + len(nested.manifests)
    return f"{' and '.join(counted)} of a store {'are' if together > 1 else 'is'}"


def _of_lost(lost: list[OddBlob]) -> str:
    if not lost:
        return ""
    return f"this store lacks {len(lost):,} of them"


def _of_twins(nested: Nested) -> str:
    every = len(nested.blobs) + len(nested.manifests)
    twins = every - nested.apart
    verb = "are" if twins > 1 else "is"
    return f"{f'{twins:,}' if twins else 'none'} of them {verb} also in this store"


def _instead(nested: Nested, shown: str) -> str:
    """What there is to say besides the command, or in its place."""
    if nested.used:
        return "a server runs on it: leave it, or stop that server first"
    if not nested.apart:
        return f"if it is a failed copy, inspect and remove {shown}"
    return "files that this store already has stay there"


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
    finding = _finding(
        group,
        f"{_many(group)} under names of older servers (sha256:…)",
        advice.new_spellings(evidence),
    )
    if serves or evidence.place.blobs_linked or _is_sealed(evidence):
        return finding
    alone = "the next server start renames them"
    return finding._replace(severity=Severity.INFO, alone=alone)


def _is_sealed(evidence: Evidence) -> bool:
    return evidence.place.read_only or evidence.census.sealed


def _copied(folder: str, group: list[OddBlob], evidence: Evidence) -> Finding:
    return _finding(
        group,
        f"{_many(group)} in {names.printable(folder)}, where no server looks",
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
        [odd],
        f"{_many([odd])} under a name that differs by case",
        advice.shell(evidence, *words, here, there, owner=owner),
    )


def _many(group: list[OddBlob]) -> str:
    if len(group) > 1:
        return f"{len(group):,} blobs of models are"
    return f"a blob of {names.known_as(group[0].models, group[0].digest)} is"


def _finding(group: list[OddBlob], message: str, command: str) -> Finding:
    lies = [odd.lies for odd in group if odd.lies is not None]
    return found("blob_astray", lies[0].path, what=message)._replace(
        evidence=_first(each.path for each in lies),
        command=command,
        sizes=findings.sizes(each.entry for each in lies),
        models=tuple(sorted({model for odd in group for model in odd.models})),
    )


def _first(paths: Iterable[str]) -> str:
    every = [names.printable(path) for path in paths]
    more = f", and {len(every) - 3:,} more" if len(every) > 3 else ""
    return ", ".join(every[:3]) + more

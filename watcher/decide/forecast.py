"""What the next start of the server does to a store: deletes, renames, fails on. Pure.

The rules are the server's own (`docs/store.md`, The server's start), as read in its source and seen
on a real one: first every name with ``sha256:`` is renamed, then, if every manifest parses,
everything in ``blobs/`` that is an hour old and that no manifest names goes.
"""

from __future__ import annotations

from collections.abc import Iterator

from watcher.model import (
    HOUR,
    Evidence,
    Forecast,
    Kind,
    Located,
    ManifestFault,
    Need,
    Place,
    Subject,
)
from watcher.ollama import names

#: Servers before this one deleted without regard to age.
_FIRST_WITH_GRACE = (0, 21)
#: Manifests on which the server's reading of all manifests ends in an error.
_SKIPS_PRUNING = frozenset(
    {
        ManifestFault.CORRUPT,
        ManifestFault.UNREADABLE,
        ManifestFault.DANGLING,
        ManifestFault.BAD_NAME,
    }
)


def forecast(evidence: Evidence, wanted: frozenset[str] = frozenset()) -> Forecast:
    """What a start at this very moment would do.

    `wanted`: the paths that `prepare` protects where the server's unit calls it before.
    """
    fails = tuple(_why_renaming_fails(evidence))
    renames = evidence.census.old_names if _renames(evidence) else ()
    if fails:
        return Forecast(renames=renames, start_fails=True, why=fails)
    off = tuple(_why_pruning_is_off(evidence))
    if off:
        return Forecast(renames=renames, pruning_off=True, why=off)
    grace, why = _grace(evidence)
    deletes: list[Located] = []
    later: list[tuple[float, Located]] = []
    unprotected = [] if _removes_nothing(evidence) else list(_unprotected(evidence))
    hidden = hidden_manifests(evidence)
    if hidden:
        unprotected = [each for each in unprotected if not _is_blob(each.entry.name)]
        why = (*why, f"this user can't read {hidden[0]}, so it is unknown which blobs are kept")
    if evidence.next_start.prepared and any(each.path in wanted for each in unprotected):
        why = (*why, "ollama-watch prepare protects downloads before each start of the unit")
        unprotected = [each for each in unprotected if each.path not in wanted]
    for located in unprotected:
        # A time in the future is younger than any age.
        due = located.entry.mtime + grace
        if due <= evidence.now:
            deletes.append(located)
        else:
            later.append((due, located))
    blind = tuple(
        f"the server can't list {names.printable(path)}: it deletes the blobs of its models, "
        "then fails to start"
        for path in evidence.census.unlisted_by_server
        if path.startswith("manifests")
    )
    stuck = tuple(_why_folders_stay(evidence))
    return Forecast(
        deletes=tuple(sorted(deletes, key=lambda each: (each.entry.mtime_ns, each.path))),
        later=tuple(sorted(later)),
        renames=renames,
        empty_folders=evidence.census.empty_folders,
        start_fails=bool(blind or stuck),
        blind=bool(hidden),
        why=(*why, *blind, *stuck),
    )


def hidden_manifests(evidence: Evidence) -> list[str]:
    """What there is below ``manifests`` that the server may read and we may not, to be printed."""
    census = evidence.census
    known = {*census.unlisted_by_server, *(each.path for each in census.failing)}
    folders = (path for path in census.unlisted if path not in known)
    files = (odd.path for odd in census.odd_manifests if odd.hidden)
    return [names.printable(each) for each in (*folders, *files) if each.startswith("manifests")]


def _is_blob(name: str) -> bool:
    return names.is_blob(names.new_spelling(name) if name.startswith("sha256:") else name)


def _removes_nothing(evidence: Evidence) -> bool:
    """Whether each removal under ``blobs/`` fails, which a start only logs."""
    return evidence.census.sealed or evidence.place.read_only


def _why_folders_stay(evidence: Evidence) -> Iterator[str]:
    """What ends the start in its last step, the removal of empty folders of manifests."""
    if evidence.place.read_only:
        for path in evidence.census.empty_folders[:1]:
            why = "can't be removed: the file system is read-only"
            yield f"{names.printable(path)} is empty and {why}"
    for path in evidence.census.stuck_folders[:1]:
        user = evidence.next_start.user.uid
        yield f"{names.printable(path)} is empty, and user id {user} can't remove it"


def _why_renaming_fails(evidence: Evidence) -> Iterator[str]:
    """What ends the start in its first step, the walk that renames old spellings."""
    yield from _why_unreachable(evidence)
    if evidence.place.blobs_broken:
        yield _why_broken(evidence.place)
    if not _renames(evidence):
        return  # a linked blobs/ is not walked
    for path in evidence.census.unlisted_by_server:
        if path.startswith("blobs"):
            yield f"the server can't read the folder {names.printable(path)}"
    yield from evidence.census.rename_faults
    if evidence.census.old_names:
        first = names.printable(evidence.census.old_names[0].path)
        if evidence.place.read_only:
            yield f"{first} can't be renamed: the file system is mounted read-only"
        elif evidence.census.sealed:
            yield f"{first} can't be renamed by user id {evidence.next_start.user.uid}"


def _why_unreachable(evidence: Evidence) -> Iterator[str]:
    """What keeps the server from its store: a folder on the way, or no right to make one."""
    user = evidence.next_start.user.uid
    for barred in evidence.census.barred:
        path = barred.first[0].path
        if barred.need is Need.ENTER:
            yield f"user id {user} can't enter {names.printable(path)}"
        elif barred.subject is Subject.STORE and evidence.place.blobs == (0, 0):
            yield f"user id {user} can't create blobs in the store's folder"


def _why_broken(place: Place) -> str:
    """Why ``blobs`` is no folder."""
    if not place.blobs_target:
        return "blobs is not a folder"
    target = place.blobs_target
    where = names.printable(target if target.startswith("/") else f"{place.path}/{target}")
    found = "does not exist" if place.blobs == (0, 0) else "is not a folder"
    return f"blobs is a link to {where}, which {found}"


def _why_pruning_is_off(evidence: Evidence) -> Iterator[str]:
    if any(server.no_prune for server in evidence.servers):
        yield "OLLAMA_NOPRUNE is set for the running server"
    elif evidence.next_start.no_prune:
        yield "OLLAMA_NOPRUNE is set in the server's unit"
    if evidence.place.glob_fails:
        path = "the path of the store is not a valid pattern"
        yield f"{path}, so the server can't search for manifests"
    elif evidence.place.globbed:
        return  # no manifest is seen, so none is in the way
    for odd in evidence.census.odd_manifests:
        if odd.fault in _SKIPS_PRUNING and not odd.hidden:
            yield f"{names.printable(odd.path)}: {odd.why}"


def _grace(evidence: Evidence) -> tuple[float, tuple[str, ...]]:
    """The age in seconds from which on things go, and what there is to say about it."""
    for server in evidence.servers:
        version = _version(server.version)
        if (0, 0) < version < _FIRST_WITH_GRACE:
            return 0.0, (f"Ollama {server.version} prunes files of any age",)
    if not any(server.version for server in evidence.servers):
        return HOUR, ("the version of the server is unknown; this assumes 0.21 or later",)
    return HOUR, ()


def _version(text: str | None) -> tuple[int, int]:
    """Major and minor of a version; (0, 0) where it is none, or a build without one."""
    numbers = (text or "").split("-")[0].split(".")
    if len(numbers) < 2 or not all(number.isdecimal() for number in numbers[:2]):
        return 0, 0
    return int(numbers[0]), int(numbers[1])


def _unprotected(evidence: Evidence) -> Iterator[Located]:
    """Everything right in ``blobs/`` that no manifest keeps, as it is after the renaming."""
    census = evidence.census
    renamed = (
        {names.new_spelling(old.entry.name): old for old in _top(evidence)}
        if _renames(evidence)
        else {}
    )
    downloads = (
        entry
        for download in evidence.downloads
        if not download.has_old_names  # among the old names, below
        for entry in download.entries
    )
    temporaries = (
        each.entry for each in census.temporaries if each.path == f"blobs/{each.entry.name}"
    )
    for entry in (
        *downloads,
        *census.unnamed,
        *census.elsewhere,
        *census.unprotected,
        *census.foreign,
        *temporaries,
    ):
        # Renaming puts the old spelling's file, and its time, in the place of the new one's.
        twin = renamed.get(entry.name)
        if entry.kind is not Kind.FOLDER:
            yield Located(f"blobs/{entry.name}", entry if twin is None else twin.entry)
    for old in _top(evidence):
        is_blob = names.is_blob(names.new_spelling(old.entry.name))
        # Not renamed, a blob is looked for under its new spelling only, so the old one stays.
        if old.path not in census.old_protected and (_renames(evidence) or not is_blob):
            yield old


def _renames(evidence: Evidence) -> bool:
    return not evidence.place.blobs_linked


def _top(evidence: Evidence) -> Iterator[Located]:
    """Files in the old spelling right in ``blobs/``; what lies deeper is renamed and stays."""
    for old in evidence.census.old_names:
        if old.path == f"blobs/{old.entry.name}" and old.entry.kind is not Kind.FOLDER:
            yield old

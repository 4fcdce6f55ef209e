"""What the next start of the server does to a store: deletes, renames, fails on. Pure.

The rules are the server's own (`docs/store.md`, The server's start), as read in its source and seen
on a real one: first every name with ``sha256:`` is renamed, then, if every manifest parses,
everything in ``blobs/`` that is an hour old and that no manifest names goes.
"""

from collections.abc import Iterator

from watcher import model
from watcher.model import BLINDING, HOUR, Evidence, Forecast, Kind, Located, ManifestFault, Place
from watcher.ollama import names

_FIRST_WITH_GRACE = (0, 21)  #: servers before this one deleted without regard to age
#: Manifests on which the server's reading of all manifests ends in an error.
_SKIPS_PRUNING = BLINDING | {ManifestFault.BAD_NAME}


def forecast(evidence: Evidence, wanted: frozenset[str] = frozenset()) -> Forecast:
    """What a start now would do; `wanted`: what `prepare` protects where the unit calls it."""
    census = evidence.census
    renames = () if evidence.place.blobs_linked else census.old_names
    if fails := tuple(_why_renaming_fails(evidence)):
        return Forecast(renames=renames, start_fails=True, why=fails)
    if off := tuple(_why_pruning_is_off(evidence)):
        return Forecast(renames=renames, pruning_off=True, why=off)
    grace, assumed = _grace(evidence)
    why = [assumed] if assumed else []
    # Each removal under a blobs/ that can't be changed fails, which a start only logs.
    fixed = census.sealed or evidence.place.read_only
    unprotected = [] if fixed else list(_unprotected(evidence))
    hidden = hidden_manifests(evidence)
    if hidden:
        unprotected = [each for each in unprotected if not _is_blob(each.entry.name)]
        why.append(f"this user can't read {hidden[0]}, so it is unknown which blobs are kept")
    if evidence.next_start.prepared and any(each.path in wanted for each in unprotected):
        why.append("ollama-watch prepare protects downloads before each start of the unit")
        unprotected = [each for each in unprotected if each.path not in wanted]
    # A time in the future is younger than any age.
    due = [(each.entry.mtime + grace, each) for each in unprotected]
    deletes = [each for at, each in due if at <= evidence.now]
    fails = tuple(_why_it_fails_at_the_end(evidence))
    return Forecast(
        deletes=tuple(sorted(deletes, key=lambda each: (each.entry.mtime_ns, each.path))),
        later=tuple(sorted((at, each) for at, each in due if at > evidence.now)),
        renames=renames,
        empty_folders=census.empty_folders,
        start_fails=bool(fails),
        blind=bool(hidden),
        why=(*why, *fails),
    )


def hidden_manifests(evidence: Evidence) -> list[str]:
    """What there is below ``manifests`` that the server may read and we may not, to be printed."""
    census = evidence.census
    known = {*census.unlisted_by_server, *(each.path for each in census.failing)}
    folders = (path for path in census.unlisted if path not in known)
    files = (odd.path for odd in census.odd_manifests if odd.hidden)
    return [names.printable(each) for each in (*folders, *files) if each.startswith("manifests")]


def _is_blob(name: str) -> bool:
    return names.is_blob(names.new_spelling(name))


def _why_renaming_fails(evidence: Evidence) -> Iterator[str]:
    """What ends the start in its first step, the walk that renames old spellings."""
    place, census, user = evidence.place, evidence.census, evidence.next_start.user.uid
    for barred in census.barred:  # a folder on the way, or no right to make one
        if barred.need is model.Need.ENTER:
            yield f"user id {user} can't enter {names.printable(barred.first[0].path)}"
        elif barred.subject is model.Subject.STORE and place.blobs == (0, 0):
            yield f"user id {user} can't create blobs in the store's folder"
    if place.blobs_broken:
        yield _why_broken(place)
    if place.blobs_linked:
        return  # a linked blobs/ is not walked
    for path in census.unlisted_by_server:
        if path.startswith("blobs"):
            yield f"the server can't read the folder {names.printable(path)}"
    yield from census.rename_faults
    if census.old_names and (place.read_only or census.sealed):
        so = "can't be renamed: the file system is mounted read-only"
        if not place.read_only:
            so = f"can't be renamed by user id {user}"
        yield f"{names.printable(census.old_names[0].path)} {so}"


def _why_broken(place: Place) -> str:
    target = place.blobs_target
    if not target:
        return "blobs is not a folder"
    where = names.printable(target if target.startswith("/") else f"{place.path}/{target}")
    found = "does not exist" if place.blobs == (0, 0) else "is not a folder"
    return f"blobs is a symlink to {where}, which {found}"


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


def _why_it_fails_at_the_end(evidence: Evidence) -> Iterator[str]:
    """What ends the start in its last step, the removal of empty folders of manifests."""
    census = evidence.census
    for path in census.unlisted_by_server:
        if path.startswith("manifests"):
            cannot = f"the server can't list {names.printable(path)}"
            yield f"{cannot}: it deletes the blobs of its models, then fails to start"
    if evidence.place.read_only and census.empty_folders:
        why = "can't be removed: the file system is read-only"
        yield f"{names.printable(census.empty_folders[0])} is empty and {why}"
    for path in census.stuck_folders[:1]:
        user = evidence.next_start.user.uid
        yield f"{names.printable(path)} is empty, and user id {user} can't remove it"


def _grace(evidence: Evidence) -> tuple[float, str]:
    """The age in seconds from which on things go, and what there is to add."""
    versions = [server.version for server in evidence.servers if server.version]
    for version in versions:
        numbers = version.split("-")[0].split(".")[:2]
        # A build without a version has 0.0, and what is no version means nothing.
        known = len(numbers) == 2 and all(number.isdecimal() for number in numbers)
        if known and (0, 0) < tuple(map(int, numbers)) < _FIRST_WITH_GRACE:
            return 0.0, f"Ollama {version} prunes files of any age"
    unknown = "the server's version is unknown; this assumes 0.21 or later"
    return HOUR, "" if versions else unknown


def _unprotected(evidence: Evidence) -> Iterator[Located]:
    """Everything right in ``blobs/`` that no manifest keeps, as it is after the renaming."""
    census, is_renamed = evidence.census, not evidence.place.blobs_linked
    # What lies deeper is renamed and stays.
    in_blobs = (each for each in census.old_names if each.path == f"blobs/{each.entry.name}")
    old_names = [each for each in in_blobs if each.entry.kind is not Kind.FOLDER]
    renamed = {names.new_spelling(old.entry.name): old for old in old_names if is_renamed}
    downloads = (
        entry
        for download in evidence.downloads
        # Those with old names are among these, below.
        if not (download.ours or download.has_old_names)
        for entry in download.entries
    )
    left = (each.entry for each in census.temporaries if each.path == f"blobs/{each.entry.name}")
    every = (*downloads, *census.unnamed, *census.elsewhere, *census.unprotected, *census.foreign)
    for entry in (*every, *left):
        # Renaming puts the old spelling's file, and its time, in the place of the new one's.
        twin = renamed.get(entry.name)
        if entry.kind is not Kind.FOLDER:
            yield Located(f"blobs/{entry.name}", entry if twin is None else twin.entry)
    for old in old_names:
        # Not renamed, a blob is looked for under its new spelling only, so the old one stays.
        goes = is_renamed or not _is_blob(old.entry.name)
        if old.path not in census.old_protected and goes:
            yield old

"""What the server's user can't use in a store, and what lets it. Pure."""

from collections.abc import Iterator

from watcher.decide import findings
from watcher.decide.finding_kinds import BEHIND_LINK, found
from watcher.model import Barred, Evidence, Finding, Kind, Need, Subject
from watcher.ollama import names
from watcher.system import advice

_FAILS = "it fails to start"
#: For each: the finding's kind, what the server can't do, and what comes of it.
_BARRED = {
    (Subject.BLOB, Need.READ): (
        "blob_unreadable",
        "read {}",
        "its models can't run, and `ollama list` omits a model whose config it is",
    ),
    (Subject.DOWNLOAD, Need.WRITE): (
        "file_owner",
        "write {} of unfinished downloads",
        "a pull of it fails",
    ),
    (Subject.MANIFEST, Need.READ): (
        "manifest_unreadable",
        "read {}",
        "`ollama list` omits its model, pulls of it fail, and server starts no longer prune",
    ),
    (Subject.MANIFEST, Need.WRITE): (
        "manifest_unwritable",
        "write {}",
        "each pull of its model fails at its end",
    ),
    (Subject.MANIFEST_FOLDER, Need.READ): (
        "store_unreadable",
        "list {}",
        "it sees no model there: its start deletes blobs that only they name, then fails",
    ),
    (Subject.MANIFEST_FOLDER, Need.WRITE): (
        "store_unwritable",
        "add names to {}",
        "the pull of a model there fails at its end, and `ollama rm` fails",
    ),
    (Subject.FOLDER, Need.READ): ("store_unreadable", "list {}", _FAILS),
    (Subject.FOLDER, Need.WRITE): (
        "store_unwritable",
        "add names to {}",
        "no pull can begin or end, and nothing is removed",
    ),
    (Subject.FOLDER, Need.ENTER): ("store_unreadable", "enter {}", _FAILS),
    (Subject.STORE, Need.WRITE): (
        "store_unwritable",
        "create blobs/ or manifests/ in the store",
        "it can't start, or can't list and pull",
    ),
}


def barred(evidence: Evidence) -> Iterator[Finding]:
    """What the server's user can't use, each kind of it once, with the command that lets it."""
    user, census = evidence.next_start.user, evidence.census
    for each in census.barred:
        kind, cannot, alone = _BARRED[each.subject, each.need]
        path = each.first[0].path
        away = any(findings.is_led_away(located.path, evidence) for located in each.first)
        away = away and each.need is not Need.ENTER
        models: tuple[str, ...] = ()
        if (each.subject, each.need) == (Subject.MANIFEST, Need.READ):
            models = tuple(odd.model for odd in census.odd_manifests if odd.barred and odd.model)
        usual = found(kind, path.removeprefix("."), who="", cannot="")
        yield usual._replace(
            # One that we can't list ourselves has its own kind.
            kind="store_unlisted" if path in census.unlisted else kind,
            message=f"the server can't {cannot.format(_counted(each))}",
            evidence=f"it runs as user id {user.uid} ({user.by}); {_owned(each)}",
            alone=alone,
            command="" if away else _cure(each, evidence),
            remedy=BEHIND_LINK if away else "",
            models=models,
        )


def _counted(each: Barred) -> str:
    words = {Subject.BLOB: "blob", Subject.DOWNLOAD: "file", Subject.MANIFEST: "manifest"}
    word = words.get(each.subject, "folder")
    if each.total == 1:
        return names.printable(each.first[0].path) if word == "folder" else f"a {word}"
    return f"{each.total:,} {word}s"


def _owned(each: Barred) -> str:
    shown: list[str] = []
    for path, entry in each.first:
        digest = names.parse_blob(path.rpartition("/")[2]).digest
        name = names.printable(path).replace(digest, digest[:12])
        name = "the store's folder" if path == "." else name
        shown.append(f"{name} belongs to {entry.uid}:{entry.gid}, mode {entry.mode:04o}")
    if each.total > len(shown):
        shown.append(f"and {each.total - len(shown):,} more")
    return "; ".join(shown)


def _cure(each: Barred, evidence: Evidence) -> str:
    user, entry = evidence.next_start.user, each.first[0].entry
    if each.need is Need.ENTER:
        who = "u" if each.own else "g" if entry.gid in user.groups else "o"
        return advice.shell(evidence, "chmod", f"{who}+x", each.first[0].path, owner=entry.uid)
    is_folder = entry.kind is Kind.FOLDER
    rights = {Need.READ: "rx" if is_folder else "r", Need.WRITE: "wx" if is_folder else "rw"}[
        each.need
    ]
    change, owner = ["chown", "-h", str(user.uid)], None
    if each.own:
        change, owner = ["chmod", f"u+{rights}"], user.uid
    bits = sum({"r": 4, "w": 2, "x": 1}[right] for right in rights)
    # Another owner alone is enough where the mode has these rights.
    would_do = all((located.entry.mode >> 6) & bits == bits for located in each.first)
    if each.total <= len(each.first) and (each.own or would_do):
        paths = (_path(located.path, evidence) for located in each.first)
        return advice.shell(evidence, *change, *paths, owner=owner)
    changes = [*change, "{}", "+"]
    if not each.own:
        changes += ["-exec", "chmod", f"u+{rights}", "{}", "+"]
    found_by = _selected(each, evidence, rights)
    return advice.shell(evidence, "find", *found_by, "-exec", *changes, owner=owner)


def _path(path: str, evidence: Evidence) -> str:
    """The whole path; of ``blobs`` behind a symlink that of the folder, and not of the symlink."""
    whole = findings.path_of(evidence, path).removesuffix("/.")
    return f"{whole}/." if path == "blobs" and evidence.place.blobs_linked else whole


def _selected(each: Barred, evidence: Evidence, rights: str) -> list[str]:
    """What selects all of them for ``find``, and nothing that the server's user can use."""
    uid, in_blobs = str(evidence.next_start.user.uid), (Subject.BLOB, Subject.DOWNLOAD)
    below = "blobs" if each.subject in (*in_blobs, Subject.FOLDER) else "manifests"
    where = [f"{evidence.place.path}/{below}/"]
    if each.subject is Subject.STORE:
        where = [f"{evidence.place.path}/", "-maxdepth", "0"]
    elif each.subject in in_blobs:
        where += ["-maxdepth", "1"]
    where += ["-type", "d" if each.first[0].entry.kind is Kind.FOLDER else "f"]
    if each.subject is Subject.BLOB:
        where += ["-name", "sha256-*"]
    elif each.subject is Subject.DOWNLOAD:
        where += ["(", "-name", "*-partial*", "-o", "-name", "*.tmp", ")"]
    if each.own:
        return [*where, "-user", uid, "!", "-perm", f"-u={rights}"]
    suffices = [] if each.subject is Subject.DOWNLOAD else ["!", "-perm", f"-o={rights}"]
    return [*where, "!", "-user", uid, *suffices]

"""What the server's user can't use in a store, and what lets it. Pure."""

from __future__ import annotations

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
_WORDS = {
    Subject.BLOB: "blob",
    Subject.DOWNLOAD: "file",
    Subject.MANIFEST: "manifest",
    Subject.FOLDER: "folder",
    Subject.MANIFEST_FOLDER: "folder",
    Subject.STORE: "folder",
}


def barred(evidence: Evidence) -> Iterator[Finding]:
    """What the server's user can't use, each kind of it once, with the command that lets it."""
    user = evidence.next_start.user
    for each in evidence.census.barred:
        kind, cannot, alone = _BARRED[each.subject, each.need]
        path = each.first[0].path
        away = each.need is not Need.ENTER and any(
            findings.is_led_away(located.path, evidence) for located in each.first
        )
        usual = found(kind, path.removeprefix("."), who="", cannot="")
        yield usual._replace(
            # One that we can't list ourselves has its own kind.
            kind="store_unlisted" if path in evidence.census.unlisted else kind,
            message=f"the server can't {cannot.format(_counted(each))}",
            evidence=f"it runs as user id {user.uid} ({user.by}); {_owned(each)}",
            alone=alone,
            command="" if away else _cure(each, evidence),
            remedy=BEHIND_LINK if away else "",
            models=_models(each, evidence),
        )


def _counted(each: Barred) -> str:
    word = _WORDS[each.subject]
    if each.total == 1:
        return names.printable(each.first[0].path) if word == "folder" else f"a {word}"
    return f"{each.total:,} {word}s"


def _owned(each: Barred) -> str:
    """Whose the first few are, with which mode."""
    shown = [
        f"{_shown(located.path)} belongs to {located.entry.uid}:{located.entry.gid}, "
        f"mode {located.entry.mode:04o}"
        for located in each.first
    ]
    more = each.total - len(shown)
    return "; ".join(shown) + (f"; and {more:,} more" if more > 0 else "")


def _shown(path: str) -> str:
    if path == ".":
        return "the store's folder"
    digest = names.parse_blob(path.rpartition("/")[2]).digest or ""
    return names.printable(path).replace(digest, digest[:12])


def _models(each: Barred, evidence: Evidence) -> tuple[str, ...]:
    if (each.subject, each.need) != (Subject.MANIFEST, Need.READ):
        return ()
    return tuple(odd.model for odd in evidence.census.odd_manifests if odd.barred and odd.model)


def _cure(each: Barred, evidence: Evidence) -> str:
    """The command that lets the server's user in."""
    user = evidence.next_start.user
    if each.need is Need.ENTER:
        entry = each.first[0].entry
        who = "u" if each.own else "g" if entry.gid in user.groups else "o"
        return advice.shell(evidence, "chmod", f"{who}+x", each.first[0].path, owner=entry.uid)
    rights = _rights(each)
    if each.own:
        change, owner = ["chmod", f"u+{rights}"], user.uid
    else:
        change, owner = ["chown", "-h", str(user.uid)], None
    if each.total <= len(each.first) and (each.own or all(_would_do(each, rights))):
        paths = (_path(located.path, evidence) for located in each.first)
        return advice.shell(evidence, *change, *paths, owner=owner)
    changes = [*change, "{}", "+"]
    if not each.own:
        changes += ["-exec", "chmod", f"u+{rights}", "{}", "+"]
    return advice.shell(
        evidence, "find", *_selected(each, evidence), "-exec", *changes, owner=owner
    )


def _path(path: str, evidence: Evidence) -> str:
    """The whole path; of ``blobs`` behind a symlink that of the folder, and not of the symlink."""
    whole = findings.path_of(evidence, path).removesuffix("/.")
    return f"{whole}/." if path == "blobs" and evidence.place.blobs_linked else whole


def _rights(each: Barred) -> str:
    folder = each.first[0].entry.kind is Kind.FOLDER
    return {Need.READ: "rx" if folder else "r", Need.WRITE: "wx" if folder else "rw"}[each.need]


def _would_do(each: Barred, rights: str) -> Iterator[bool]:
    """Of each of the first few, whether another owner alone is enough."""
    bits = sum({"r": 4, "w": 2, "x": 1}[right] for right in rights)
    return ((located.entry.mode >> 6) & bits == bits for located in each.first)


def _selected(each: Barred, evidence: Evidence) -> list[str]:
    """What selects all of them for ``find``, and nothing that the server's user can use."""
    uid, rights = str(evidence.next_start.user.uid), _rights(each)
    below = (
        "blobs" if each.subject in (Subject.BLOB, Subject.DOWNLOAD, Subject.FOLDER) else "manifests"
    )
    if each.subject is Subject.STORE:
        where = [f"{evidence.place.path}/", "-maxdepth", "0"]
    else:
        where = [f"{evidence.place.path}/{below}/"]
    if each.subject in (Subject.BLOB, Subject.DOWNLOAD):
        where += ["-maxdepth", "1"]
    kind = "d" if each.first[0].entry.kind is Kind.FOLDER else "f"
    named = {
        Subject.BLOB: ["-name", "sha256-*"],
        Subject.DOWNLOAD: ["(", "-name", "*-partial*", "-o", "-name", "*.tmp", ")"],
    }.get(each.subject, [])
    if each.own:
        which = ["-user", uid, "!", "-perm", f"-u={rights}"]
    elif each.subject is Subject.DOWNLOAD:
        which = ["!", "-user", uid]
    else:
        which = ["!", "-user", uid, "!", "-perm", f"-o={rights}"]
    return [*where, "-type", kind, *named, *which]

"""How a store stands with its server: what that can't use, and what its next start takes. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from math import inf

from watcher.decide import at_risk as wanted
from watcher.decide import findings
from watcher.model import (
    HOUR,
    Barred,
    Diagnosed,
    Evidence,
    Finding,
    Kind,
    Need,
    Rules,
    Severity,
    Subject,
)
from watcher.ollama import names
from watcher.state.event_log import clock
from watcher.system import advice

# ---------------------------------------------------------------- what the server can't use

#: For each: the finding's kind and severity, what the server can't do, and what comes of it.
_BARRED = {
    (Subject.BLOB, Need.READ): (
        "blob_unreadable",
        Severity.ERROR,
        "read {}",
        "models that have it can't be run, and `ollama list` leaves out one whose config it is",
    ),
    (Subject.DOWNLOAD, Need.WRITE): (
        "file_owner",
        Severity.ERROR,
        "write {} of unfinished downloads",
        "a pull of it fails",
    ),
    (Subject.MANIFEST, Need.READ): (
        "manifest_unreadable",
        Severity.ERROR,
        "read {}",
        "its model is not in `ollama list`, pulls of it fail, and no start cleans up any more",
    ),
    (Subject.MANIFEST, Need.WRITE): (
        "manifest_unwritable",
        Severity.WARNING,
        "write {}",
        "each pull of its model fails at its end",
    ),
    (Subject.MANIFEST_FOLDER, Need.READ): (
        "store_unreadable",
        Severity.ERROR,
        "list {}",
        "it sees no model there: its start deletes what only they name, then ends with an error",
    ),
    (Subject.MANIFEST_FOLDER, Need.WRITE): (
        "store_unwritable",
        Severity.ERROR,
        "add names to {}",
        "the pull of a model there fails at its end, and `ollama rm` fails",
    ),
    (Subject.FOLDER, Need.READ): (
        "store_unreadable",
        Severity.ERROR,
        "list {}",
        "its start ends with an error",
    ),
    (Subject.FOLDER, Need.WRITE): (
        "store_unwritable",
        Severity.ERROR,
        "add names to {}",
        "no pull can begin or end, and nothing is removed",
    ),
    (Subject.FOLDER, Need.ENTER): (
        "store_unreadable",
        Severity.ERROR,
        "pass through {}",
        "its start ends with an error",
    ),
    (Subject.STORE, Need.WRITE): (
        "store_unwritable",
        Severity.ERROR,
        "make blobs/ or manifests/ in the store",
        "it can't start, or list and pull nothing",
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
    """What the server's user can't use, each kind of it once, with the command that cures it."""
    user = evidence.next_start.user
    for each in evidence.census.barred:
        kind, severity, cannot, alone = _BARRED[each.subject, each.need]
        first = each.first[0]
        away = each.need is not Need.ENTER and any(
            findings.is_led_away(located.path, evidence) for located in each.first
        )
        yield Finding(
            severity,
            # One that we can't list ourselves has its own kind.
            "store_unlisted" if first.path in evidence.census.unlisted else kind,
            first.path.removeprefix("."),
            f"the server can't {cannot.format(_counted(each))}",
            evidence=f"it runs as user id {user.uid} ({user.by}); {_owned(each)}",
            alone=alone,
            command="" if away else _cure(each, evidence),
            remedy=findings.BEHIND_LINK if away else "",
            models=_models(each, evidence),
        )


def _counted(each: Barred) -> str:
    word = _WORDS[each.subject]
    if each.total == 1:
        return names.printable(each.first[0].path) if word == "folder" else f"a {word}"
    return f"{each.total:,} {word}s"


def _owned(each: Barred) -> str:
    """Whose the first few are, with which mode."""
    told = [
        f"{_shown(located.path)} belongs to {located.entry.uid}:{located.entry.gid}, "
        f"mode {located.entry.mode:04o}"
        for located in each.first
    ]
    more = each.total - len(told)
    return "; ".join(told) + (f"; and {more:,} more" if more > 0 else "")


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


# ---------------------------------------------------------------- what the next start takes


def at_risk(
    diagnosed: Iterable[Diagnosed], evidence: Evidence, rules: Rules, doomed: Mapping[str, float]
) -> Iterator[Finding]:
    """What is wanted and a start of the server takes: a warning where one would take it now.

    `doomed`: the paths that a start deletes, and from when on.
    """
    if evidence.next_start.watched:
        # A daemon keeps what is wanted fresh; where it can't, it is old by now.
        doomed = {path: at for path, at in doomed.items() if at <= evidence.now}
    for each in wanted.of_downloads(diagnosed):
        found = _at_risk(each, evidence, doomed)
        if found is not None:
            who = names.known_as(each.models, each.subject)
            yield found._replace(
                kind="download_at_risk", message=f"the download of {who} is at risk"
            )
    yield from _blobs_at_risk(list(wanted.of_blobs(evidence, rules)), evidence, doomed)


def _blobs_at_risk(
    every: list[wanted.AtRisk], evidence: Evidence, doomed: Mapping[str, float]
) -> Iterator[Finding]:
    """One finding for all finished blobs that a start takes now, and one for all that are next."""
    due = [(min(doomed.get(path, inf) for path in each.paths), each) for each in every]
    now = [each for at, each in due if at <= evidence.now]
    later = [each for at, each in due if evidence.now < at < inf]
    for alike in (now, later):
        if not alike:
            continue
        subject = alike[0].subject if len(alike) == 1 else ""
        together = wanted.AtRisk(subject, tuple(entry for each in alike for entry in each.entries))
        found = _at_risk(together, evidence, doomed)
        if found is not None:
            many = f"{len(alike):,} finished blobs are at risk"
            one = "a finished blob is at risk"
            counts = "an unfinished pull, or a model, counts on it"
            yield found._replace(
                kind="blob_at_risk",
                message=f"{one if subject else many}: {counts}",
            )


def _at_risk(
    each: wanted.AtRisk, evidence: Evidence, doomed: Mapping[str, float]
) -> Finding | None:
    """What a start does to it, from when on, and what keeps it; None where it does nothing."""
    paths = each.paths
    when = sorted(doomed[path] for path in paths if path in doomed)
    if not when:
        return None
    now = bisect_right(when, evidence.now)
    taken, files = now or len(when), len(paths)
    what = "all of it" if taken == files else f"{taken} of its {files} files"
    if now:
        old = min(entry.mtime for entry in each.entries) + HOUR
        alone = f"the next start of the server deletes {what}"
        since = f"an hour old since {clock(old, evidence.now)}"
    else:
        first = clock(when[0], evidence.now)
        alone = f"a start of the server after {first} deletes {what}"
        since = f"an hour old at {first}"
    digest = names.parse_blob(each.subject).digest or each.subject
    known_as = each.models[:1] or ((names.short(digest),) if digest else ())
    words = ("repair", *known_as)
    return Finding(
        Severity.WARNING if now else Severity.INFO,
        "",
        paths[0],
        "",
        evidence=since,
        alone=alone,
        command=advice.watch(evidence, *words, owner=each.entries[0].uid),
        sizes=findings.sizes(each.entries),
        models=each.models,
        remedy="this keeps it for an hour; the service, or `prepare` in the server's unit, keeps it"
        " for good",
    )

"""The kinds of findings, one row each: words, severity, event, what repair and clean leave."""

import enum
import functools
from typing import NamedTuple

from watcher.decide import conditions
from watcher.model import Finding, Severity
from watcher.ollama import names

INFO, WARNING, ERROR = Severity.INFO, Severity.WARNING, Severity.ERROR


class Left(enum.Enum):
    """Which command reports it as still wrong, where it is an error."""

    NONE = enum.auto()
    BY_REPAIR = enum.auto()
    BY_BOTH = enum.auto()  #: it keeps both from what they would do
    UNFETCHED = enum.auto()  #: by repair, be it an error or not: it fetches nothing unless told to


class Row(NamedTuple):
    kind: str
    #: What it is, and what Ollama alone does: usual texts, with names of what is filled in.
    message: str
    alone: str = ""
    remedy: str = ""  #: what helps besides a command, in words
    severity: Severity = WARNING  #: the usual one
    logged: bool = False  #: its first appearance is the event `store_problem`
    left: Left = Left.NONE
    hides: bool = False  #: it is about what could not be inspected


_NO_PRUNING = "the server prunes nothing when it starts"
_REPAIRS_NOTHING = "a pull reports success and repairs nothing"
_ONE_LAYER = "a pull downloads this layer only"
_NOT_FOUND = "the server does not find them, and a pull downloads them again"
CHECK_DISK = "check the kernel's log and the permissions of the folders on the path"
#: Of what is behind another user's symlink, in place of a command.
BEHIND_LINK = "it is behind another user's symlink: check where that leads"

_notice = functools.partial(Row, severity=INFO)
_error = functools.partial(Row, severity=ERROR)
_of_file = functools.partial(_error, logged=True, left=Left.BY_REPAIR)

_DOWNLOADS = (
    *(
        Row(
            f"download_{each.condition.value}",
            each.sentence.replace("{}", "{who}"),
            severity=each.severity,
            left=Left.BY_BOTH
            if each.severity is ERROR and each.repair is conditions.Step.NOTHING
            else Left.NONE,
        )
        for each in conditions.TABLE
    ),
    Row(
        "download_discarded",
        "the server discarded its finished download of {who}, and ollama-watch has kept the bytes",
        left=Left.UNFETCHED,
    ),
    Row("download_stale", "the download of {who} received no bytes for {age}"),
    Row("download_at_risk", "the download of {who} is at risk"),
    _notice("download_no_holes", "the data of {who} is unfinished but has no holes"),
)
_BLOBS = (
    _of_file(
        "blob_corrupt",
        "a blob of {who} is corrupt: checksum mismatch",
        _REPAIRS_NOTHING,
        logged=False,  # `blob_corrupt` is an event of its own
    ),
    _of_file("blob_short", "a blob of {who} is truncated", _REPAIRS_NOTHING),
    _of_file("blob_long", "a blob of {who} is too long", _REPAIRS_NOTHING),
    _of_file("blob_missing", "a blob of {who} is missing", _ONE_LAYER),
    _of_file(
        "blob_dangling",
        "a blob of {who} is a dangling symlink",
        f"{_ONE_LAYER}, and replaces the symlink",
    ),
    _of_file("blob_no_file", "a blob of {who} is not a file", _REPAIRS_NOTHING),
    _notice("blob_symlink", "a blob of {who} is a symlink", "the server uses it as it is"),
    _notice(
        "blob_unproven",
        "{name} is not verified yet: it was finished from repaired progress files, or changed "
        "after a checksum mismatch",
        "the server has verified it if its pull succeeded",
    ),
    Row("blob_orphan", "no {manifest} names {name}"),
    _notice(
        "blob_old_name",
        "{name} has the name format of older servers",
        "the next server start renames it, and replaces a file that has the new name",
    ),
    _of_file("blob_astray", "{what}", _NOT_FOUND, logged=False),
    _of_file("blob_unreadable", "the server can't {cannot}", "", logged=False),
    Row("blob_at_risk", "{what} at risk: an unfinished pull or a model needs {them}"),
)
_MANIFESTS = (
    _of_file(
        "manifest_corrupt",
        "the manifest of {who} is corrupt",
        f"`ollama list` omits the model; {_NO_PRUNING}",
    ),
    _of_file("manifest_unreadable", "the manifest of {who} can't be read", _NO_PRUNING)._replace(
        hides=True
    ),
    _of_file("manifest_unwritable", "the server can't {cannot}", "", severity=WARNING),
    _of_file(
        "manifest_dangling",
        "the manifest of {who} is a dangling symlink",
        f"`ollama list`, `pull` and `rm` fail (`list` until a restart); {_NO_PRUNING}",
    ),
    _of_file("manifest_bad_name", "{path} is not a valid model name", _NO_PRUNING),
    _of_file(
        "manifest_bad_digest",
        "the manifest of {who} has an invalid layer",
        "the model can't load, or `ollama list` shows a wrong size",
    ),
    _of_file(
        "manifest_empty",
        "the manifest of {who} names no layer",
        "`ollama list` shows the model, but it can't load",
    ),
    _of_file(
        "manifest_wrong_size",
        "the manifest of {who} gives a blob a wrong size",
        "the server uses the blob as it is",
        severity=WARNING,
    ),
    _of_file(
        "manifest_misplaced",
        "{path} is at the wrong depth",
        "the server does not see it, and it protects no blob",
        severity=WARNING,
    ),
    _of_file(
        "manifest_case",
        "the name of {who} differs from another model's by case only",
        "the server picks one of the two by chance",
        severity=WARNING,
    ),
)
_FILES = (
    Row("file_temporary", "{name} is a temporary file of ollama create"),
    _notice("file_foreign", "{name} does not belong in blobs/"),
    _error("file_owner", "the server can't {cannot}"),
)
_STORE = (
    _error(
        "store_start_fails", "no server can start on this store", "each start of the server fails"
    ),
    _error("store_unlisted", "the folder {path} can't be listed", left=Left.BY_BOTH, hides=True),
    _error(
        "store_unseen",
        "{path} could not be inspected",
        "a server of the same user can't read it either",
        CHECK_DISK,
        left=Left.BY_BOTH,
        hides=True,
    ),
    _error("store_unreadable", "the server can't {cannot}", left=Left.BY_REPAIR),
    _error("store_unwritable", "the server can't {cannot}", left=Left.BY_REPAIR),
    _error(
        "store_no_manifests",
        "the store has blobs but no manifest",
        "the next server start deletes every blob older than one hour",
        "restore manifests/ before the server starts",
    ),
    _error(
        "store_globbed",
        "the path of the store contains glob characters: {path}",
        "the server finds neither manifests nor progress files: a start deletes every blob older "
        "than one hour, and each pull starts at 0",
        "move the store to a path without [ and \\",
    ),
    Row("store_foreign", "{link}: the store is inspected, never changed", remedy=names.TRUST_LINK),
    Row(
        "store_shared",
        "it shares its blobs folder with another store; only that store names {count} of its blobs",
        "a server start on one store deletes blobs that only the other one names",
    ),
    Row(
        "store_two_servers",
        "{count} servers run on this store (pid {pids})",
        "each deletes or truncates what the other writes",
    ),
    _notice("store_network", "the store is on a network file system ({file_system})"),
    Row(
        "store_no_room",
        "the disk has no room for all unfinished downloads",
        "the last ones fail with `no space left on device`",
        "remove a model that you don't need: ollama list, ollama rm MODEL",
    ),
    Row("store_foreign_intent", "{path} is not a change that ollama-watch began: {why}"),
    Row(
        "store_read_only",
        "the file system is mounted read-only: nothing can be repaired",
        remedy="mount it writable, then run the audit again: it prints the commands that help",
    ),
)
_STATE = (
    _error(
        "state_owner",
        "{path} belongs to user id {found}, but the blobs belong to {user}",
        "nothing: the server ignores it",
    ),
    _notice(
        "state_forgotten",
        "earlier results are lost: damaged blobs may look healthy until they are verified",
    ),
)
TABLE = (
    *(*_DOWNLOADS, *_BLOBS, *_MANIFESTS, *_FILES),
    *(row._replace(logged=True) for row in _STORE),
    *_STATE,
)
_ROWS = {row.kind: row for row in TABLE}


def row(kind: str) -> Row:
    return _ROWS[kind]


def found(kind: str, path: str, /, **words: object) -> Finding:
    """A finding in the usual words of its kind, with `words` filled in."""
    usual = _ROWS[kind]
    return Finding(
        usual.severity,
        kind,
        path,
        usual.message.format_map(words),
        alone=usual.alone,
        remedy=usual.remedy,
    )

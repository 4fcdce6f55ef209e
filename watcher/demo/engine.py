"""A small Ollama server: it treats a model store as the real one does, and runs no models.

It exists to show and to test what happens to a store, so it copies behaviour, weaknesses included:
how the start removes files, how a pull writes, resumes, verifies and discards. All of that was read
in Ollama's sources (v0.33 era) or seen on a real server; the recordings beside the tests hold it to
account. It imports nothing of the rest of this project, so that a misreading can't cancel itself
out, and only the standard library.

    python -m watcher.demo.engine serve

OLLAMA_MODELS, OLLAMA_HOST and OLLAMA_NOPRUNE mean what they mean to Ollama (port 0: a free one).
For tests, the real server's constants can be made smaller:

DEMO_PART_BYTES     smallest part (100,000,000; the real maximum 1,000,000,000 stays)
DEMO_RETRY_SECONDS  wait before the first retry of a part, doubled each time (1)
DEMO_STALL_SECONDS  silence after which a part is fetched anew (30)
DEMO_DIRECT_SECONDS how long the address of a layer's data is tried for (30)
DEMO_EXIT           what SIGTERM and SIGINT leave of a download: `well` (sidecars written) or, as
                    the real server does at times, `lost` (not written) or `torn` (one left empty)

Not imitated: loading models, pushing, signing in, models with tensor layers (refused with the
message of a server without MLX), and a panic: the real server is gone when the last but one request
for a layer is closed while that layer is still being prepared.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import os
import random
import re
import select
import signal
import socket
import stat
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

VERSION = "0.0.0-demo"
MODEL = "application/vnd.ollama.image.model"
TENSOR = "application/vnd.ollama.image.tensor"
CONFIG = "application/vnd.docker.container.image.v1+json"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
PARTS = 16
MAX_PART = 1_000_000_000
MAX_TRIES = 6
GRACE_SECONDS = 3600
PROGRESS_SECONDS = 0.06
CHUNK = 1 << 18
INT64 = range(-(2**63), 2**63)
WRAP = 2**64


# Settings


def setting(name: str) -> str:
    """An environment variable, without blanks and quotes around it."""
    return os.environ.get(name, "").strip().strip("\"'")


def models_dir() -> str:
    """The store that the environment names."""
    return setting("OLLAMA_MODELS") or os.path.join(os.path.expanduser("~"), ".ollama", "models")


def no_prune() -> bool:
    """Whether cleaning up is off: any value that is not a false one."""
    return setting("OLLAMA_NOPRUNE") not in ("", "0", "f", "F", "false", "FALSE", "False")


def seconds(name: str, default: float) -> float:
    """A duration from the environment."""
    return float(setting(name) or default)


def listen_address() -> tuple[str, int]:
    """Host and port to listen on."""
    text = setting("OLLAMA_HOST").rpartition("://")[2].partition("/")[0]
    host, _, port = text.rpartition(":")
    if not port.isdigit():
        host, port = text, "11434"
    return host.strip("[]") or "127.0.0.1", int(port)


def log(text: str) -> None:
    """One line on stderr."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    sys.stderr.write(f"time={now} level=INFO source=engine.py msg={json.dumps(text)}\n")
    sys.stderr.flush()


# Errors


class EngineError(Exception):
    """What is told to a client or stops the server; its text is the real server's."""


class NotExistError(EngineError):
    """A file or a tag that is not there."""

    def __init__(self, text: str = "file does not exist") -> None:
        super().__init__(text)


class CanceledError(EngineError):
    """The request or the download was given up."""

    def __init__(self) -> None:
        super().__init__("context canceled")


class DeadlineError(EngineError):
    """Something took longer than it may."""

    def __init__(self) -> None:
        super().__init__("context deadline exceeded")


class StalledError(EngineError):
    """A part of which nothing came for too long."""

    def __init__(self) -> None:
        super().__init__("part stalled")


class UnexpectedEndError(EngineError):
    """A body that ended before the length it promised."""

    def __init__(self) -> None:
        super().__init__("unexpected EOF")


class NoSpaceError(EngineError):
    """The disk is full."""


class MismatchError(EngineError):
    """A layer whose bytes are not what its digest says."""


class AbandonedError(Exception):
    """Nobody listens to this pull any more: the real server's goroutine waits there for ever."""


def _reason(error: OSError) -> str:
    text = os.strerror(error.errno) if error.errno else str(error)
    return text[:1].lower() + text[1:]


@contextlib.contextmanager
def told(operation: str, path: str) -> Iterator[None]:
    """Turn an OSError into the words of the real server: `<operation> <path>: <reason>`."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotExistError(f"{operation} {path}: {_reason(error)}") from error
    except OSError as error:
        kind = NoSpaceError if error.errno == errno.ENOSPC else EngineError
        raise kind(f"{operation} {path}: {_reason(error)}") from error


def read_file(path: str) -> tuple[bytes, os.stat_result]:
    """A file's content and state. Raises NotExistError or EngineError (a folder can't be read)."""
    with told("open", path):
        descriptor = os.open(path, os.O_RDONLY)
    try:
        with told("read", path):
            state = os.fstat(descriptor)
            data = b"".join(iter(lambda: os.read(descriptor, CHUNK), b""))
    finally:
        os.close(descriptor)
    return data, state


# JSON as Go reads it


def _no_constant(text: str) -> NoReturn:
    raise ValueError(text)


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def first_json(data: bytes) -> Any:
    """The first JSON value in `data`; what follows it is not looked at."""
    text = data.decode("utf-8", "replace").lstrip(" \t\r\n")
    if not text:
        raise EngineError("EOF")
    try:
        return _DECODER.raw_decode(text)[0]
    except json.JSONDecodeError as error:
        rest = text[error.pos :]
        if error.msg.startswith("Unterminated") or not rest:
            raise EngineError("unexpected EOF") from error
        raise EngineError(
            f"invalid character {rest[0]!r} looking for beginning of value"
        ) from error
    except (ValueError, RecursionError) as error:
        raise EngineError("invalid character in JSON") from error


def json_fields(value: Any, *names: str) -> dict[str, Any]:
    """The named fields of an object; names match without regard to case, null counts as absent."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise EngineError(f"json: cannot unmarshal {type(value).__name__} into Go value")
    exact = {name: name for name in names}
    folded = {name.lower(): name for name in names}
    found = {}
    for key, item in value.items():
        name = exact.get(key) or folded.get(key.lower())
        if name and item is not None:
            found[name] = item
    return found


def json_int(value: Any) -> int:
    """A 64-bit integer, nothing else."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in INT64:
        raise EngineError(f"json: cannot unmarshal {value!r} into Go value of type int64")
    return value


def int64(value: int) -> int:
    """A sum as 64-bit arithmetic has it: too large a one turns negative."""
    return (value - INT64.start) % WRAP + INT64.start


def json_str(value: Any) -> str:
    """A string, nothing else."""
    if not isinstance(value, str):
        raise EngineError(f"json: cannot unmarshal {value!r} into Go value of type string")
    return value


def go_json(value: Any) -> bytes:
    """JSON as the real server writes it: compact, and safe inside HTML."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "surrogateescape")


# Names


_FIRST = r"[A-Za-z0-9_]"
_HOST = re.compile(_FIRST + r"[A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(_FIRST + r"[A-Za-z0-9_-]{0,79}")
_MODEL = re.compile(_FIRST + r"[A-Za-z0-9_.-]{0,79}")


@dataclass(frozen=True, order=True)
class Name:
    """A model's full name; a manifest lies at `<host>/<namespace>/<model>/<tag>`."""

    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> Name:
        """From what a user writes, with the usual defaults; may be invalid."""
        tag = ""
        if text.rfind(":") > text.rfind("/"):
            text, _, tag = text.rpartition(":")
            tag = tag or "!"
        rest, slash, model = text.rpartition("/")
        host = namespace = ""
        if slash:
            rest, slash, namespace = rest.rpartition("/")
            if slash:
                host = rest.partition("://")[2] or rest
        return cls(
            host or "registry.ollama.ai", namespace or "library", model or "!", tag or "latest"
        )

    @classmethod
    def of_path(cls, relative: str) -> Name | None:
        """From a path below manifests/, None where it is no valid name."""
        parts = relative.split("/")
        name = cls(*parts) if len(parts) == 4 else None
        return name if name and name.valid else None

    @property
    def valid(self) -> bool:
        """Whether every part has the characters and the length it may have."""
        return bool(
            _HOST.fullmatch(self.host)
            and _NAMESPACE.fullmatch(self.namespace)
            and _MODEL.fullmatch(self.model)
            and _MODEL.fullmatch(self.tag)
        )

    @property
    def path(self) -> str:
        """Its path below manifests/."""
        return "/".join((self.host, self.namespace, self.model, self.tag))

    @property
    def short(self) -> str:
        """As `ollama list` shows it."""
        if self.host.lower() != "registry.ollama.ai":
            return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"
        if self.namespace.lower() != "library":
            return f"{self.namespace}/{self.model}:{self.tag}"
        return f"{self.model}:{self.tag}"

    def folded_like(self, other: Name) -> Name:
        """This name with each part spelled as `other` spells it, where only case differs."""
        return Name(
            *(
                theirs if ours.lower() == theirs.lower() else ours
                for ours, theirs in zip(self._parts, other._parts, strict=True)
            )
        )

    @property
    def _parts(self) -> tuple[str, str, str, str]:
        return self.host, self.namespace, self.model, self.tag


# Globs as Go's filepath.Glob does them


_MAGIC = re.compile(r"[*?\[\\]")


def glob(pattern: str) -> list[str]:
    """Paths that match, folder by folder in lexical order; unreadable folders are passed over.

    Every component is a pattern, those of the store's own path too. Raises EngineError where the
    pattern is malformed.
    """
    _component(os.path.basename(pattern))
    if not _MAGIC.search(pattern):
        return [pattern] if os.path.lexists(pattern) else []
    folder, _, last = pattern.rpartition("/")
    matcher = _component(last)
    folders = glob(folder) if _MAGIC.search(folder) else [folder or "/"]
    return [os.path.join(at, name) for at in folders for name in _names(at) if matcher(name)]


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder), key=os.fsencode)
    except OSError:
        return []


def _component(pattern: str) -> Callable[[str], bool]:
    expression = re.compile(_expression(pattern), re.DOTALL)
    return lambda name: expression.fullmatch(name) is not None


def _expression(pattern: str) -> str:
    out, rest = "", pattern
    while rest:
        first, rest = rest[0], rest[1:]
        if first == "*":
            out += ".*"
        elif first == "?":
            out += "."
        elif first == "[":
            piece, rest = _char_class(rest)
            out += piece
        elif first == "\\":
            if not rest:
                raise EngineError("syntax error in pattern")
            out, rest = out + re.escape(rest[0]), rest[1:]
        else:
            out += re.escape(first)
    return out


def _char_class(rest: str) -> tuple[str, str]:
    negated, rest = rest.startswith("^"), rest.removeprefix("^")
    ranges: list[tuple[str, str]] = []
    while not (ranges and rest.startswith("]")):
        low, rest = _class_member(rest)
        high = low
        if rest.startswith("-"):
            high, rest = _class_member(rest[1:])
        ranges.append((low, high))
    members = "".join(f"{re.escape(a)}-{re.escape(b)}" for a, b in ranges if a <= b)
    if not members:
        return "." if negated else "(?!)", rest[1:]
    return f"[{'^' if negated else ''}{members}]", rest[1:]


def _class_member(rest: str) -> tuple[str, str]:
    if rest[:1] in ("", "-", "]"):
        raise EngineError("syntax error in pattern")
    rest = rest.removeprefix("\\")
    if len(rest) < 2:
        raise EngineError("syntax error in pattern")
    return rest[0], rest[1:]


# The store


_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")


def blobs_dir() -> str:
    """The folder of blobs, made where it is missing."""
    path = os.path.join(models_dir(), "blobs")
    with told("mkdir", path):
        os.makedirs(path, 0o755, exist_ok=True)
    return path


def manifests_dir() -> str:
    """The folder of manifests, made where it is missing."""
    path = os.path.join(models_dir(), "manifests")
    with told("mkdir", path):
        os.makedirs(path, 0o755, exist_ok=True)
    return path


def blob_path(digest: str) -> str:
    """Where the blob of a digest lies. Raises EngineError where it is no digest."""
    if not _DIGEST.fullmatch(digest):
        raise EngineError("invalid digest format")
    return os.path.join(blobs_dir(), digest.replace(":", "-"))


@dataclass(frozen=True)
class LayerRef:
    """A layer as a manifest names it."""

    media_type: str = ""
    digest: str = ""
    size: int = 0
    source: str = ""
    name: str = ""

    @classmethod
    def of_json(cls, value: Any) -> LayerRef:
        """From a decoded manifest; null gives an empty one. Raises EngineError."""
        found = json_fields(value, "mediaType", "digest", "size", "from", "name")
        return cls(
            json_str(found.get("mediaType", "")),
            json_str(found.get("digest", "")),
            json_int(found.get("size", 0)),
            json_str(found.get("from", "")),
            json_str(found.get("name", "")),
        )

    def to_json(self) -> dict[str, Any]:
        """As the real server writes it."""
        value = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        optional = {"from": self.source, "name": self.name}
        return value | {key: text for key, text in optional.items() if text}


@dataclass(frozen=True)
class Manifest:
    """A parsed manifest; `sha` is the hash of its file, `modified` its mtime in seconds."""

    config: LayerRef
    layers: tuple[LayerRef, ...]
    path: str = ""
    sha: str = ""
    modified: float = 0.0

    @classmethod
    def of_bytes(cls, data: bytes) -> Manifest:
        """Parse; bytes after the first JSON value are ignored. Raises EngineError."""
        found = json_fields(first_json(data), "schemaVersion", "mediaType", "config", "layers")
        json_int(found.get("schemaVersion", 0))
        json_str(found.get("mediaType", ""))
        layers = found.get("layers", [])
        if not isinstance(layers, list):
            raise EngineError("json: cannot unmarshal into Go struct field Manifest.layers")
        return cls(
            LayerRef.of_json(found.get("config")), tuple(LayerRef.of_json(x) for x in layers)
        )

    @property
    def all_layers(self) -> list[LayerRef]:
        """The layers, then the config where it has a digest: the order of a pull."""
        return [*self.layers, *([self.config] if self.config.digest else [])]

    @property
    def digests(self) -> set[str]:
        """All digests it names, spelled as it spells them."""
        return {layer.digest for layer in (*self.layers, self.config)} - {""}


def read_manifest(name: Name) -> Manifest:
    """The manifest of a model. Raises NotExistError or EngineError."""
    if not name.valid:
        raise EngineError(f"unqualified name: {name.short}")
    path = os.path.join(manifests_dir(), name.path)
    data, state = read_file(path)
    parsed = Manifest.of_bytes(data)
    sha = hashlib.sha256(data).hexdigest()
    return Manifest(parsed.config, parsed.layers, path, sha, state.st_mtime)


def all_manifests(*, lenient: bool) -> dict[Name, Manifest]:
    """Every manifest exactly four folders deep.

    `lenient` passes over invalid names and broken manifests; what can't even be looked at (a
    dangling symlink) is an error either way.
    """
    root = manifests_dir()
    found: dict[Name, Manifest] = {}
    for path in glob(os.path.join(root, "*", "*", "*", "*")):
        with told("stat", path):
            if stat.S_ISDIR(os.stat(path).st_mode):
                continue
        name = Name.of_path(os.path.relpath(path, root))
        try:
            if name is None:
                raise EngineError(f"{os.path.relpath(path, root)} %!w(<nil>)")
            found[name] = read_manifest(name)
        except EngineError as error:
            if not lenient:
                raise EngineError(f"{path} {error}") from error
            log(f"bad manifest {path}: {error}")
    return found


def existing_name(name: Name) -> Name:
    """The name in the spelling that the store already uses for its parts."""
    for known in sorted(all_manifests(lenient=True)):
        name = name.folded_like(known)
    return name


def remove(path: str) -> None:
    """Remove a file or an empty folder. Raises EngineError."""
    with told("remove", path):
        try:
            os.unlink(path)
        except (IsADirectoryError, PermissionError) as error:
            if not os.path.isdir(path) or os.path.islink(path):
                raise
            with contextlib.suppress(NotADirectoryError):
                os.rmdir(path)
                return
            raise error


def prune_folder(path: str) -> None:
    """Remove empty folders, the top one included; symlinks are not followed."""
    with told("lstat", path):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            return
    with told("open", path):
        names = sorted(os.listdir(path), key=os.fsencode)
    for name in names:
        prune_folder(os.path.join(path, name))
    with told("open", path):
        empty = not os.listdir(path)
    if empty:
        remove(path)


def remove_unused(digests: set[str]) -> None:
    """Remove those blobs that no readable manifest names; each failure is only logged."""
    used = {used for known in all_manifests(lenient=True).values() for used in known.digests}
    for digest in sorted(digests - used):
        try:
            remove(blob_path(digest))
        except EngineError as error:
            log(f"couldn't remove unused layer {digest}: {error}")


def remove_layers(manifest: Manifest) -> None:
    """What `rm` does with a removed model's layers: gone is fine, any other failure is an error."""
    used = {used for known in all_manifests(lenient=True).values() for used in known.digests}
    for layer in (*manifest.layers, manifest.config):
        if layer.digest and layer.digest not in used:
            with contextlib.suppress(NotExistError):
                remove(blob_path(layer.digest))


# The start


def start_store() -> None:
    """What a server's start does to its store. Raises EngineError where it stops the server."""
    rename_old_spelling(blobs_dir())
    if no_prune():
        return
    try:
        all_manifests(lenient=False)
    except EngineError as error:
        log(f"corrupt manifests detected, skipping prune operation: {error}")
        return
    prune_blobs()
    prune_folder(manifests_dir())


def rename_old_spelling(path: str) -> None:
    """Rename every `sha256:…` at or below `path`; symlinks are not walked.

    A folder's names are read before it is renamed itself, so a folder of that name with anything
    in it stops the server.
    """
    with told("lstat", path):
        is_folder = stat.S_ISDIR(os.lstat(path).st_mode)
    names: list[str] = []
    if is_folder:
        with told("open", path):
            names = sorted(os.listdir(path), key=os.fsencode)
    folder, base = os.path.split(path)
    if base.startswith("sha256:"):
        with told("rename", path):
            os.rename(path, os.path.join(folder, base.replace(":", "-", 1)))
    for name in names:
        rename_old_spelling(os.path.join(path, name))


def prune_blobs() -> None:
    """Remove what lies in blobs/ for an hour and that no manifest names."""
    folder = blobs_dir()
    with told("open", folder):
        entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    unnamed = set()
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) or _young(entry):
            continue
        digest = entry.name.replace("-", ":")
        if _DIGEST.fullmatch(digest):
            unnamed.add(digest)
            continue
        try:
            remove(entry.path)
        except EngineError as error:
            log(f"couldn't remove blob {entry.name}: {error}")
    log(f"total blobs: {len(unnamed)}")
    try:
        remove_unused(unnamed)
    except EngineError as error:
        log(f"couldn't remove unused layers: {error}")


def _young(entry: os.DirEntry[str]) -> bool:
    try:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime < GRACE_SECONDS
    except OSError as error:
        log(f"couldn't stat blob {entry.name}: {error}")
        return True


# Giving up


class Context:
    """Whether something is given up, and why; its children are given up with it."""

    def __init__(self, parent: Context | None = None, timeout: float | None = None) -> None:
        self._lock = threading.Lock()
        self._error: EngineError | None = None
        self._callbacks: dict[object, Callable[[], None]] = {}
        self._parent = parent
        self._leave = parent.on_cancel(self._follow) if parent else lambda: None
        self._timer: threading.Timer | None = None
        if timeout is not None:
            self._timer = threading.Timer(timeout, self._give_up, (DeadlineError(),))
            self._timer.daemon = True
            self._timer.start()

    def cancel(self, cause: EngineError | None = None) -> None:
        """Give up now; doing it twice changes nothing. Who is waiting is told the cause."""
        self._give_up(cause or CanceledError())

    def close(self) -> None:
        """Give up and leave the parent."""
        self.cancel()
        self._leave()
        if self._timer:
            self._timer.cancel()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def canceled(self) -> bool:
        """Whether it is given up."""
        return self._error is not None

    def check(self) -> None:
        """Raise the cause where it is given up: a CanceledError where none was named."""
        if self._error:
            raise self._error

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back once when given up, at once where it already is; returns how to undo that."""
        key = object()
        with self._lock:
            if not self._error:
                self._callbacks[key] = callback
        if self._error:
            callback()
        return lambda: self._forget(key)

    def wait(self, duration: float) -> None:
        """Wait; raises as `check` does when given up meanwhile."""
        event = threading.Event()
        take_back = self.on_cancel(event.set)
        event.wait(duration)
        take_back()
        self.check()

    def _follow(self) -> None:
        assert self._parent is not None
        self._give_up(self._parent._error or CanceledError())

    def _forget(self, key: object) -> None:
        with self._lock:
            self._callbacks.pop(key, None)

    def _give_up(self, error: EngineError) -> None:
        with self._lock:
            if self._error:
                return
            self._error = error
            callbacks = list(self._callbacks.values())
            self._callbacks.clear()
        for callback in callbacks:
            callback()


# Asking the registry


@dataclass
class Answer:
    """A response whose body is still to be read."""

    status: int
    headers: http.client.HTTPMessage
    url: str
    _connection: http.client.HTTPConnection
    _response: http.client.HTTPResponse
    _context: Context
    _take_back: Callable[[], None]
    _address: str

    def read_some(self, most: int) -> bytes:
        """Some of the body, at most `most` bytes, b"" at its end.

        Raises CanceledError, UnexpectedEndError where less than promised came, EngineError where
        the connection broke.
        """
        promised = self._response.length
        try:
            data = self._response.read1(most)
        except http.client.IncompleteRead as error:
            self._context.check()
            raise UnexpectedEndError from error
        except (OSError, ValueError) as error:
            self._context.check()
            reason = _reason(error) if isinstance(error, OSError) else str(error)
            raise EngineError(f"read tcp {self._address}: read: {reason}") from error
        if data:
            return data
        self._context.check()
        if promised:
            raise UnexpectedEndError
        return data

    def read_all(self) -> bytes:
        """The whole body. Raises as `read_some`."""
        return b"".join(iter(lambda: self.read_some(CHUNK), b""))

    def close(self) -> None:
        """Close the connection."""
        self._take_back()
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def ask_once(context: Context, method: str, url: str, headers: Mapping[str, str]) -> Answer:
    """One request without following redirects. Raises CanceledError or EngineError."""
    context.check()
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=30)
    what = f'{method.title()} "{url}": '
    try:
        connection.connect()
        plain = connection.sock
        plain.settimeout(None)
        take_back = context.on_cancel(lambda: _shut(plain))
        address = f"{_address(plain.getsockname())}->{_address(plain.getpeername())}"
        target = parts.path + ("?" + parts.query if parts.query else "")
        connection.request(method, target, headers={"User-Agent": f"ollama/{VERSION}", **headers})
        response = connection.getresponse()
    except http.client.RemoteDisconnected as error:
        connection.close()
        context.check()
        raise EngineError(what + "EOF") from error
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        context.check()
        reason = _reason(error) if isinstance(error, OSError) else str(error)
        raise EngineError(f"{what}dial tcp {parts.netloc}: {reason}") from error
    return Answer(
        response.status, response.headers, url, connection, response, context, take_back, address
    )


def _address(end: tuple[Any, ...]) -> str:
    return f"{end[0]}:{end[1]}"


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def ask(
    context: Context,
    method: str,
    url: str,
    headers: Mapping[str, str] | None = None,
    *,
    same_host: bool = False,
) -> Answer:
    """A request that follows redirects, with `same_host` only those within the host's name."""
    hostname = urllib.parse.urlsplit(url).hostname
    for _ in range(11):
        answer = ask_once(context, method, url, headers or {})
        location = answer.headers.get("Location")
        if answer.status not in (301, 302, 303, 307, 308) or not location:
            return answer
        url = urllib.parse.urljoin(url, location)
        if same_host and urllib.parse.urlsplit(url).hostname != hostname:
            return answer
        answer.close()
    raise EngineError("stopped after 10 redirects")


def ask_registry(
    context: Context,
    method: str,
    url: str,
    headers: Mapping[str, str] | None = None,
    *,
    same_host: bool = False,
) -> Answer:
    """As `ask`; a status of 400 and more is an error, 404 a NotExistError."""
    answer = ask(context, method, url, headers, same_host=same_host)
    if answer.status < 400:
        return answer
    with answer:
        if answer.status == 404:
            raise NotExistError
        if answer.status == 401:
            raise EngineError("unauthorized: access denied")
        body = answer.read_all() if method != "HEAD" else b""
        raise EngineError(f"{answer.status}: {body.decode('utf-8', 'replace')}")


# Downloading one layer


@dataclass
class Part:
    """A range of a layer, fetched by one connection at a time; `path` is its sidecar."""

    number: int
    offset: int
    size: int
    completed: int
    path: str
    heard: float = 0.0

    @classmethod
    def read(cls, prefix: str, path: str) -> Part:
        """From a sidecar. It is written to `<prefix>-<N>` again, whatever `path` is called."""
        data, _ = read_file(path)
        found = json_fields(first_json(data), "N", "Offset", "Size", "Completed")
        number, offset, size, completed = (
            json_int(found.get(key, 0)) for key in ("N", "Offset", "Size", "Completed")
        )
        return cls(number, offset, size, completed, f"{prefix}-{number}")

    def write(self) -> None:
        """Write the sidecar, in place. Raises NoSpaceError or EngineError."""
        text = (
            f'{{"N":{self.number},"Offset":{self.offset},"Size":{self.size},'
            f'"Completed":{self.completed}}}\n'
        )
        with told("open", self.path):
            descriptor = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
        try:
            with told("write", self.path):
                os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


@dataclass
class Attempt:
    """One connection for one part, as the watchdog sees it."""

    part: Part
    context: Context
    started: float


def part_ranges(total: int) -> Iterator[tuple[int, int]]:
    """(offset, size) of each part of a fresh download: total/16 within the limits."""
    smallest = int(setting("DEMO_PART_BYTES") or 100_000_000)
    size = min(max(total // PARTS, smallest), MAX_PART)
    for offset in range(0, total, size):
        yield offset, min(size, total - offset)


class Download:
    """The download of one layer, shared by all requests that want it at the same time."""

    def __init__(self, digest: str, url: str) -> None:
        self.digest = digest
        self.url = url
        self.path = blob_path(digest)
        self.partial = self.path + "-partial"
        self.parts: list[Part] = []
        self.total = 0
        self.completed = 0
        self.done = False
        self.error: EngineError | None = None
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting = 0
        self._context = Context()
        self._attempts: list[Attempt] = []
        self._descriptor = -1

    @property
    def short(self) -> str:
        """Twelve digits of the digest, as statuses and log name it."""
        return self.digest[7:19]

    # For the requests

    def prepare(self, context: Context) -> None:
        """Believe every sidecar that is found, in lexical order; without any, ask for the length
        and write fresh ones. Nothing is opened before the last sidecar is read."""
        for path in glob(self.partial + "-*"):
            part = Part.read(self.partial, path)
            self.total = int64(self.total + part.size)
            self.completed = int64(self.completed + part.completed)
            self.parts.append(part)
        if not self.parts:
            with ask_registry(context, "HEAD", self.url) as answer:
                self.total = _length(answer)
            for number, (offset, size) in enumerate(part_ranges(self.total)):
                part = Part(number, offset, size, 0, f"{self.partial}-{number}")
                part.write()
                self.parts.append(part)
        log(f"downloading {self.short} in {len(self.parts)} part(s)")

    def wait(self, context: Context, emit: Callable[[dict[str, Any]], None]) -> None:
        """Report until it is done. The last one to leave gives the download up."""
        with self._lock:
            self._waiting += 1
        take_back = context.on_cancel(self._wake)
        try:
            while not self._wait_done(context):
                context.check()
                emit(progress(self.digest, self.total, self.completed))
            if self.error:
                raise self.error
        finally:
            take_back()
            with self._lock:
                self._waiting -= 1
                last = self._waiting == 0
            if last:
                self._context.cancel()

    def _wait_done(self, context: Context) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self.done or context.canceled, PROGRESS_SECONDS)
            return self.done

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def run(self) -> None:
        """Download; `done` is set at the end and `error` says how it went."""
        try:
            self._run()
        except EngineError as error:
            self.error = error
        except Exception as error:
            # A defect of this engine must not look like a finished download.
            self.error = EngineError(repr(error))
        finally:
            DOWNLOADS.forget(self)
            self.done = True
            self._wake()

    # How it goes

    def _run(self) -> None:
        with told("open", self.partial):
            self._descriptor = os.open(self.partial, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.total)
            self._fetch_parts(self._direct_url())
        finally:
            os.close(self._descriptor)
        for number in range(len(self.parts)):
            remove(f"{self.partial}-{number}")
        with told("rename", f"{self.partial} {self.path}"):
            os.rename(self.partial, self.path)

    def _direct_url(self) -> str:
        """Where the data is: the first redirect to another host name."""
        with Context(self._context, timeout=seconds("DEMO_DIRECT_SECONDS", 30)) as context:
            for number in range(1, sys.maxsize):
                try:
                    answer = ask_registry(context, "GET", self.url, same_host=True)
                    break
                except EngineError as error:
                    log(f"failed to get direct URL; backing off and retrying: {error}")
                    context.check()
                pause = min(number * number * 0.01, 10.0)
                context.wait(pause * (random.random() + 0.5))
            with answer:
                if answer.status not in (200, 307):
                    raise EngineError(f"unexpected status code {answer.status}")
                location = answer.headers.get("Location")
        if not location:
            raise EngineError("http: no Location header in response")
        return urllib.parse.urljoin(answer.url, location)

    def _fetch_parts(self, url: str) -> None:
        """Fetch what is missing, up to 16 parts at once; the first failure ends all."""
        errors: list[EngineError] = []
        slots = threading.Semaphore(PARTS)
        with Context(self._context) as group:
            watchdog = threading.Thread(target=self._watch, args=(group,), daemon=True)
            watchdog.start()
            threads = []
            for part in self.parts:
                if part.completed == part.size:
                    continue
                slots.acquire()
                args = (url, part, group, errors, slots)
                thread = threading.Thread(target=self._part_thread, args=args, daemon=True)
                thread.start()
                threads.append(thread)
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]

    def _part_thread(
        self,
        url: str,
        part: Part,
        group: Context,
        errors: list[EngineError],
        slots: threading.Semaphore,
    ) -> None:
        try:
            self._fetch_part(url, part, group)
        except Exception as error:
            cause = error if isinstance(error, EngineError) else EngineError(repr(error))
            errors.append(cause)
            group.cancel(cause)
        finally:
            slots.release()

    def _fetch_part(self, url: str, part: Part, group: Context) -> None:
        """Try until the part is there: a stall starts anew at once and as often as it happens;
        other failures six times, each wait twice the last, and not cut short by giving up."""
        tries = 0
        while True:
            try:
                self._attempt(url, part, group)
                return
            except StalledError:
                log(f"{self.short} part {part.number} stalled; retrying")
            except (CanceledError, NoSpaceError):
                raise
            except EngineError as error:
                pause = seconds("DEMO_RETRY_SECONDS", 1.0) * 2**tries
                log(
                    f"{self.short} part {part.number} attempt {tries} failed: {error}, "
                    f"retrying in {pause:g}s"
                )
                time.sleep(pause)
                tries += 1
                if tries == MAX_TRIES:
                    raise EngineError(f"max retries exceeded: {error}") from error

    def _attempt(self, url: str, part: Part, group: Context) -> None:
        with Context(group) as context:
            attempt = Attempt(part, context, time.monotonic())
            with self._lock:
                self._attempts.append(attempt)
            try:
                self._copy(url, part, context)
            except (StalledError, CanceledError):
                raise
            except EngineError as error:
                # The real server may still wait for one more retry here: two threads race.
                if group.canceled:
                    raise CanceledError from error
                raise
            finally:
                with self._lock:
                    self._attempts.remove(attempt)

    def _copy(self, url: str, part: Part, context: Context) -> None:
        """Write what comes behind what is there. The sidecar is rewritten only where the attempt
        ends well, in an unexpected EOF, or because the last request or the server ended; else its
        bytes don't count, nor after a stall or a sibling's failure (seen on a real server)."""
        start = int64(part.offset + part.completed)
        stop = int64(part.offset + part.size)
        copied, ended = 0, None
        # The answer's status is not looked at: an error page is data like any other.
        with ask(context, "GET", url, {"Range": f"bytes={start}-{stop - 1}"}) as answer:
            try:
                while start + copied < stop:
                    data = answer.read_some(min(CHUNK, stop - start - copied))
                    if not data:
                        raise EngineError("EOF")
                    self._write(data, start + copied)
                    copied += len(data)
                    part.heard = time.monotonic()
                    self._count(len(data))
            except (CanceledError, UnexpectedEndError) as error:
                ended = error
            except EngineError:
                self._count(-copied)
                raise
            part.completed += copied
            part.write()
        if ended:
            raise ended

    def _write(self, data: bytes, offset: int) -> None:
        if offset < 0:
            raise EngineError(f"writeat {self.partial}: negative offset")
        with told("write", self.partial):
            view = memoryview(data)
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written

    def _count(self, size: int) -> None:
        with self._lock:
            self.completed += size

    def _watch(self, group: Context) -> None:
        """Give up attempts of which nothing came for too long."""
        limit = seconds("DEMO_STALL_SECONDS", 30)
        with contextlib.suppress(EngineError):
            while True:
                group.wait(min(1.0, limit / 2))
                now = time.monotonic()
                with self._lock:
                    attempts = list(self._attempts)
                for attempt in attempts:
                    if now - max(attempt.started, attempt.part.heard) > limit:
                        attempt.part.heard = 0.0
                        attempt.context.cancel(StalledError())

    # For the end of the server

    def give_up(self) -> None:
        """As if the last request for it were closed."""
        self._context.cancel()

    @property
    def writing(self) -> list[Part]:
        """Parts with an attempt under way."""
        with self._lock:
            return [attempt.part for attempt in self._attempts]


def _length(answer: Answer) -> int:
    text = answer.headers.get("Content-Length") or ""
    return int(text) if text.isdigit() else 0


class Downloads:
    """The downloads under way, by digest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_digest: dict[str, Download] = {}

    def join(self, digest: str, url: str) -> tuple[Download, bool]:
        """The download of a digest, and whether it is new: the caller has to start a new one."""
        with self._lock:
            known = self._by_digest.get(digest)
            if known:
                return known, False
            download = self._by_digest[digest] = Download(digest, url)
            return download, True

    def forget(self, download: Download) -> None:
        """Make room for another try."""
        with self._lock:
            self._by_digest.pop(download.digest, None)

    def all(self) -> list[Download]:
        """Those under way."""
        with self._lock:
            return list(self._by_digest.values())


DOWNLOADS = Downloads()


# Pulling


Emit = Callable[[dict[str, Any]], None]


def progress(digest: str, total: int, completed: int) -> dict[str, Any]:
    """A status line of a layer; numbers that are 0 are left out."""
    line: dict[str, Any] = {"status": f"pulling {digest[7:19]}", "digest": digest}
    if total:
        line["total"] = total
    if completed:
        line["completed"] = completed
    return line


def pull(context: Context, name: Name, insecure: bool, emit: Emit) -> None:
    """Pull a model. Raises EngineError; statuses go to `emit`."""
    old = _old_digests(name)
    emit({"status": "pulling manifest"})
    base = f"{'http' if insecure else 'https'}://{name.host}/v2/{name.namespace}/{name.model}"
    data = _fetch_manifest(context, f"{base}/manifests/{name.tag}")
    manifest = Manifest.of_bytes(data)
    layers = manifest.all_layers
    if any(layer.media_type == TENSOR for layer in manifest.layers):
        raise EngineError("this model requires MLX support, but the MLX runtime is not available")
    fetched: dict[str, bool] = {}
    for layer in layers:
        fresh = _pull_layer(context, name, base, layer.digest, emit)
        fetched[layer.digest] = fetched.get(layer.digest, False) or fresh
    emit({"status": "verifying sha256 digest"})
    for layer in layers:
        if fetched[layer.digest]:
            verify(layer.digest)
    emit({"status": "writing manifest"})
    _write_manifest(name, data)
    old -= manifest.digests
    if old and not no_prune():
        emit({"status": "removing unused layers"})
        try:
            remove_unused(old)
        except EngineError as error:
            emit({"status": f"couldn't remove unused layers: {error}"})
    emit({"status": "success"})


def _old_digests(name: Name) -> set[str]:
    try:
        return read_manifest(name).digests
    except NotExistError:
        return set()
    except EngineError as error:
        log(f"pulling model with bad existing manifest {name.short}: {error}")
        return set()


def _fetch_manifest(context: Context, url: str) -> bytes:
    try:
        with ask_registry(context, "GET", url, {"Accept": MANIFEST}) as answer:
            data = answer.read_all()
        Manifest.of_bytes(data)
        _check_end(data)
    except EngineError as error:
        raise EngineError(f"pull model manifest: {error}") from error
    return data


def _check_end(data: bytes) -> None:
    """Unlike a manifest on disk, one from a registry may have nothing behind its JSON."""
    text = data.decode("utf-8", "replace").strip(" \t\r\n")
    end = _DECODER.raw_decode(text)[1]
    if end != len(text):
        raise EngineError(f"invalid character {text[end]!r} after top-level value")


def _pull_layer(context: Context, name: Name, base: str, digest: str, emit: Emit) -> bool:
    """Bring one layer; False where it was already there (it is not looked at any closer)."""
    if not digest:
        raise EngineError(f"{name.namespace}/{name.model}: digest is empty")
    path = blob_path(digest)
    try:
        with told("stat", path):
            size = os.stat(path).st_size
    except NotExistError:
        pass
    else:
        emit(progress(digest, size, size))
        return False
    download, new = DOWNLOADS.join(digest, f"{base}/blobs/{digest}")
    if new:
        try:
            download.prepare(context)
        except EngineError:
            DOWNLOADS.forget(download)
            raise
        threading.Thread(target=download.run, daemon=True).start()
    download.wait(context, emit)
    return True


def verify(digest: str) -> None:
    """Hash a blob; one that is not what its digest says is removed. Raises MismatchError."""
    path = blob_path(digest)
    with told("open", path), open(path, "rb", buffering=0) as file:
        found = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    if found == digest:
        return
    try:
        remove(path)
    except EngineError as error:
        log(f"couldn't remove file with digest mismatch: {error}")
    raise MismatchError(
        f"digest mismatch, file must be downloaded again: want {digest}, got {found}"
    )


def _write_manifest(name: Name, data: bytes) -> None:
    path = os.path.join(manifests_dir(), name.path)
    with told("mkdir", os.path.dirname(path)):
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    with told("open", path), open(path, "wb") as file:
        file.write(data)


# Models made here


def new_layer(source: Iterator[bytes], media_type: str = "") -> tuple[LayerRef, str]:
    """Store a layer through a temporary `sha256-<digits>`; the layer and how to call that."""
    folder = blobs_dir()
    temporary = os.path.join(folder, f"sha256-{random.randrange(2**32)}")
    sha, size = hashlib.sha256(), 0
    try:
        with told("open", temporary):
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        with told("write", temporary), open(descriptor, "wb") as file:
            for data in source:
                sha.update(data)
                size += file.write(data)
        digest = "sha256:" + sha.hexdigest()
        path, status = blob_path(digest), "using existing layer"
        if not os.path.exists(path):
            status = "creating new layer"
            with told("rename", path):
                os.rename(temporary, path)
                os.chmod(path, 0o644)
        with told("chtimes", path):
            os.utime(path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    return LayerRef(media_type, digest, size), f"{status} {digest}"


def create(request: Mapping[str, Any], name: Name, emit: Emit) -> None:
    """Make a model of uploaded blobs (`files`) or of another model (`from`)."""
    old = _manifest_or_none(name)
    made = [(layer, f"using existing layer {layer.digest}") for layer in _base_layers(request)]
    for key, kind in (("template", "template"), ("system", "system"), ("license", "license")):
        if text := request.get(key):
            media_type = f"application/vnd.ollama.image.{kind}"
            made = [(layer, how) for layer, how in made if layer.media_type != media_type]
            made.append(new_layer(iter([json_str(text).encode()]), media_type))
    config = go_json({"model_format": "gguf", "architecture": "amd64", "os": "linux"}) + b"\n"
    config_layer, _ = new_layer(iter([config]), CONFIG)
    for _, how in made:
        emit({"status": how})
    emit({"status": "writing manifest"})
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config_layer.to_json(),
        "layers": [layer.to_json() for layer, _ in made],
    }
    _write_manifest(name, go_json(manifest) + b"\n")
    if old and not no_prune():
        remove_layers(old)
    emit({"status": "success"})


def _manifest_or_none(name: Name) -> Manifest | None:
    try:
        return read_manifest(name)
    except EngineError:
        return None


def _base_layers(request: Mapping[str, Any]) -> list[LayerRef]:
    if source := request.get("from"):
        name = existing_name(Name.parse(json_str(source)))
        return [
            _touched(LayerRef(layer.media_type, layer.digest, layer.size, name.short))
            for layer in read_manifest(name).layers
        ]
    files = request.get("files")
    if not files:
        raise BadRequestError("neither 'from' or 'files' was specified")
    return [_touched(LayerRef(MODEL, json_str(digest))) for digest in files.values()]


def _touched(layer: LayerRef) -> LayerRef:
    path = blob_path(layer.digest)
    with told("stat", path):
        size = os.stat(path).st_size
        os.utime(path)
    return LayerRef(layer.media_type, layer.digest, size, layer.source)


def copy(source: Name, target: Name) -> None:
    """Copy a manifest over another one, in place. Raises NotExistError or EngineError."""
    if source == target:
        return
    root = manifests_dir()
    source_path, target_path = (os.path.join(root, name.path) for name in (source, target))
    with told("mkdir", target_path):
        os.makedirs(os.path.dirname(target_path), 0o755, exist_ok=True)
    data, _ = read_file(source_path)
    with told("open", target_path), open(target_path, "wb") as file:
        file.write(data)


def delete(name: Name) -> None:
    """Remove a model's manifest, and at once every blob that no other readable one names."""
    manifest = read_manifest(name)
    remove(manifest.path)
    prune_folder(manifests_dir())
    remove_layers(manifest)


class ModelList:
    """What `list` shows, remembered by the hash of each manifest.

    So a model whose config or template vanishes stays in the list until its manifest changes or
    the server starts again. A failure at the start stays for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Name, tuple[str, dict[str, Any]]] = {}
        self._failure: EngineError | None = None

    def start(self) -> None:
        """Read all models once."""
        try:
            self._update()
        except EngineError as error:
            self._failure = error

    def models(self) -> list[dict[str, Any]]:
        """All models, the last changed first. Raises EngineError."""
        if self._failure:
            raise self._failure
        self._update()
        with self._lock:
            models = [summary for _, summary in self._known.values()]
        return sorted(models, key=lambda model: str(model["modified_at"]), reverse=True)

    def refresh(self, name: Name) -> None:
        """Read one model again."""
        with self._lock:
            self._known.pop(name, None)
            try:
                manifest = read_manifest(name)
                self._known[name] = manifest.sha, summarize(name, manifest)
            except EngineError as error:
                log(f"failed to refresh model list: {error}")

    def _update(self) -> None:
        manifests = all_manifests(lenient=True)
        with self._lock:
            known, self._known = self._known, {}
            for name, manifest in manifests.items():
                try:
                    entry = known.get(name)
                    if not entry or entry[0] != manifest.sha:
                        entry = manifest.sha, summarize(name, manifest)
                    self._known[name] = entry
                except EngineError as error:
                    log(f"failed to list {name.short}: {error}")


def summarize(name: Name, manifest: Manifest) -> dict[str, Any]:
    """A model as `list` shows it; reads its config and template. Raises EngineError."""
    config: dict[str, Any] = {}
    if manifest.config.digest:
        value = first_json(_read_blob(manifest.config.digest))
        config = json_fields(
            value, "model_format", "model_family", "model_families", "model_type", "file_type",
            "remote_model", "remote_host",
        )  # fmt: skip
    for layer in manifest.layers:
        if layer.media_type.endswith((".image.prompt", ".image.template")):
            _read_blob(layer.digest)
    remote = {key: config[key] for key in ("remote_model", "remote_host") if config.get(key)}
    modified = datetime.fromtimestamp(manifest.modified, UTC).isoformat().replace("+00:00", "Z")
    parents = [layer.source for layer in manifest.layers if layer.media_type == MODEL]
    return {
        "name": name.short,
        "model": name.short,
        **remote,
        "modified_at": modified,
        "size": sum(layer.size for layer in (*manifest.layers, manifest.config)),
        "digest": manifest.sha,
        "details": {
            "parent_model": parents[-1] if parents else "",
            "format": config.get("model_format", ""),
            "family": config.get("model_family", ""),
            "families": config.get("model_families"),
            "parameter_size": config.get("model_type", ""),
            "quantization_level": config.get("file_type", ""),
        },
    }


def _read_blob(digest: str) -> bytes:
    return read_file(blob_path(digest))[0]


# HTTP


class BadRequestError(EngineError):
    """What is answered with status 400, also in the middle of a handler."""


class Stream:
    """Hands a worker's lines to the handler of its request, one by one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._lines: list[dict[str, Any]] = []
        self._ended = False
        self._abandoned = False

    def put(self, line: dict[str, Any]) -> None:
        """Wait until the handler takes the line. Raises AbandonedError where it is gone."""
        with self._changed:
            self._lines.append(line)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._abandoned or not self._lines)
            if self._lines:
                raise AbandonedError

    def end(self) -> None:
        """No more lines."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def take(self) -> dict[str, Any] | None:
        """The next line, None after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._ended)
            line = self._lines.pop(0) if self._lines else None
            self._changed.notify_all()
            return line

    def abandon(self) -> None:
        """Take no more lines."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()


class Watched:
    """A request's context, given up as soon as its client closes the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.context = Context()
        self._connection = connection
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def end(self) -> None:
        """The handler returns."""
        self._ended.set()
        self.context.cancel()

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        with contextlib.suppress(OSError, ValueError):
            while not self._ended.is_set():
                if not poll.poll(100):
                    continue
                if self._connection.recv(1, socket.MSG_PEEK):
                    # The client sends more: it is there, and can't be watched any longer.
                    return
                break
        self.context.cancel()


class Server(ThreadingHTTPServer):
    """The API's server. It listens at once and answers only once `serve_forever` runs."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, Handler)
        self.models = ModelList()
        self.requests: set[Context] = set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away; only other errors are worth a trace."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """The API's paths."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Requests are not logged."""

    def do_GET(self) -> None:
        self._read_only()

    def do_HEAD(self) -> None:
        if self.path.startswith("/api/blobs/"):
            self._guard(self._head_blob)
        else:
            self._read_only()

    def do_POST(self) -> None:
        routes = {"/api/pull": self._pull, "/api/copy": self._copy, "/api/create": self._create}
        if self.path.startswith("/api/blobs/"):
            self._guard(self._post_blob)
        elif self.path in routes:
            self._guard(routes[self.path])
        else:
            self._not_found()

    def do_DELETE(self) -> None:
        if self.path == "/api/delete":
            self._guard(self._delete)
        else:
            self._not_found()

    # Answers

    def _read_only(self) -> None:
        match self.path:
            case "/":
                self._send(200, b"Ollama is running", "text/plain; charset=utf-8")
            case "/api/version":
                self._json(200, {"version": VERSION})
            case "/api/ps":
                self._json(200, {"models": []})
            case "/api/tags":
                self._guard(lambda: self._json(200, {"models": self.server.models.models()}))
            case _:
                self._not_found()

    def _not_found(self) -> None:
        self.close_connection = True
        self._send(404, b"404 page not found", "text/plain")

    def _guard(self, handler: Callable[[], None]) -> None:
        try:
            handler()
        except BadRequestError as error:
            # Its body may be unread still.
            self.close_connection = True
            self._json(400, {"error": str(error)})
        except EngineError as error:
            self._json(500, {"error": str(error)})

    def _json(self, status: int, value: Any) -> None:
        self._send(status, go_json(value), "application/json; charset=utf-8")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _request(self) -> dict[str, Any]:
        body = b"".join(self._body())
        if not body:
            raise BadRequestError("missing request body")
        try:
            value = first_json(body)
        except EngineError as error:
            raise BadRequestError(str(error)) from error
        if not isinstance(value, dict):
            raise BadRequestError("json: cannot unmarshal into Go value")
        return value

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left and (data := self.rfile.read(min(CHUNK, left))):
            left -= len(data)
            yield data

    # Handlers

    def _pull(self) -> None:
        request = self._request()
        name = _model_name(request)
        if not name or not name.valid:
            raise BadRequestError("invalid model name")
        name = _or_bad_request(name)
        self._work(request, lambda context, emit: self._pull_and_list(context, request, name, emit))

    def _pull_and_list(
        self, context: Context, request: Mapping[str, Any], name: Name, emit: Emit
    ) -> None:
        pull(context, name, bool(request.get("insecure")), emit)
        self.server.models.refresh(name)

    def _create(self) -> None:
        request = self._request()
        name = _model_name(request)
        if not name or not name.valid:
            raise BadRequestError("invalid model name")
        name = _or_bad_request(name)
        self._work(request, lambda _, emit: self._create_and_list(request, name, emit))

    def _create_and_list(self, request: Mapping[str, Any], name: Name, emit: Emit) -> None:
        create(request, name, emit)
        self.server.models.refresh(name)

    def _copy(self) -> None:
        request = self._request()
        names = []
        for key in ("source", "destination"):
            text = str(request.get(key) or "")
            name = Name.parse(text)
            if not name.valid:
                raise BadRequestError(f'{key} "{text}" is invalid')
            names.append(_or_bad_request(name))
        try:
            copy(*names)
        except NotExistError:
            self._json(404, {"error": f'model "{request.get("source")}" not found'})
            return
        self.server.models.refresh(names[1])
        self._send(200, b"", "text/plain")

    def _delete(self) -> None:
        request = self._request()
        text = request.get("model") or request.get("name") or ""
        name = _model_name(request)
        if not name or not name.valid:
            raise BadRequestError(f'name "{text}" is invalid')
        try:
            name = existing_name(name)
            missing = not os.path.exists(os.path.join(manifests_dir(), name.path))
        except EngineError:
            missing = True
        if missing:
            self._json(404, {"error": f"model '{text}' not found"})
            return
        delete(name)
        self._send(200, b"", "text/plain")

    def _head_blob(self) -> None:
        try:
            path = blob_path(self.path.removeprefix("/api/blobs/"))
        except EngineError as error:
            raise BadRequestError(str(error)) from error
        self._send(200 if os.path.exists(path) else 404, b"", "text/plain")

    def _post_blob(self) -> None:
        digest = self.path.removeprefix("/api/blobs/")
        try:
            path = blob_path(digest)
        except EngineError as error:
            raise BadRequestError(str(error)) from error
        if os.path.exists(path):
            self.close_connection = True
            self._send(200, b"", "text/plain")
            return
        layer, _ = new_layer(self._body())
        if layer.digest != digest:
            raise BadRequestError(f'digest mismatch, expected "{digest}", got "{layer.digest}"')
        self._send(201, b"", "text/plain")

    # Streams

    def _work(self, request: Mapping[str, Any], work: Callable[[Context, Emit], None]) -> None:
        """Run `work` in a thread of its own, which goes on where its client goes away."""
        watched, stream = Watched(self.connection), Stream()
        self.server.requests.add(watched.context)
        args = (work, watched.context, stream)
        threading.Thread(target=_worker, args=args, daemon=True).start()
        try:
            if request.get("stream") is False:
                self._answer_last(stream)
            else:
                self._answer_lines(watched.context, stream)
        finally:
            stream.abandon()
            watched.end()
            self.server.requests.discard(watched.context)

    def _answer_last(self, stream: Stream) -> None:
        last: dict[str, Any] = {}
        while line := stream.take():
            last = line
            if "error" in line:
                self._json(line.pop("code", 500), line)
                return
        self._json(200, last)

    def _answer_lines(self, context: Context, stream: Stream) -> None:
        line = stream.take()
        if line and "error" in line:
            self._json(line.pop("code", 500), line)
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while line:
            line.pop("code", None)
            data = go_json(line) + b"\n"
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            if context.canceled:
                return
            line = stream.take()
        self.wfile.write(b"0\r\n\r\n")


def _worker(work: Callable[[Context, Emit], None], context: Context, stream: Stream) -> None:
    try:
        work(context, stream.put)
    except AbandonedError:
        return
    except EngineError as error:
        with contextlib.suppress(AbandonedError):
            code = {"code": 400} if isinstance(error, BadRequestError) else {}
            stream.put({"error": str(error), **code})
    finally:
        stream.end()


def _model_name(request: Mapping[str, Any]) -> Name | None:
    text = request.get("model") or request.get("name")
    return Name.parse(text.strip()) if isinstance(text, str) and text.strip() else None


def _or_bad_request(name: Name) -> Name:
    try:
        return existing_name(name)
    except EngineError as error:
        raise BadRequestError(str(error)) from error


# The process


def end_downloads(server: Server) -> None:
    """What SIGTERM does to downloads: their requests end, and with them they do."""
    how = setting("DEMO_EXIT") or "well"
    if how == "lost":
        return
    downloads = DOWNLOADS.all()
    writing = [part for download in downloads for part in download.writing]
    for context in list(server.requests):
        context.cancel()
    for download in downloads:
        download.give_up()
    until = time.monotonic() + 2
    while time.monotonic() < until and any(download.writing for download in downloads):
        time.sleep(0.005)
    if how == "torn" and writing:
        with open(writing[0].path, "wb"):
            pass


def serve() -> int:
    """Serve until SIGTERM or SIGINT; the exit code."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("ollama")
    try:
        with told("listen tcp", "{}:{}: bind".format(*listen_address())):
            server = Server(listen_address())
        start_store()
    except EngineError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    server.models.start()
    host, port = server.server_address[:2]
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    log(f"Listening on {host!s}:{port} (version {VERSION})")
    stopped.wait()
    server.socket.close()
    end_downloads(server)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`serve` is all it can do."""
    if list(sys.argv[1:] if argv is None else argv) != ["serve"]:
        sys.stderr.write("usage: engine serve\n")
        return 2
    return serve()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Threads that still wait for a retry must not keep the process.
    os._exit(code)

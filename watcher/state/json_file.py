"""JSON files of ours: replaced in one step, with a schema, set aside when damaged.

What several processes and threads change is changed under a short lock of the file's own, never
under the lock for acting. Whoever only reads needs no lock. Everything goes on without a damaged
file; one that can't be read is not written over.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import orjson

from watcher.errors import LockedError, NoPermissionError, WatchError
from watcher.ollama import names
from watcher.state import fs, state_folder
from watcher.system import advice

T = TypeVar("T")
_PATIENCE_SECONDS = 30.0  #: who waits longer waits for a process that was stopped
_NO_FILE = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EINVAL, errno.EISDIR})
#: What JSON of another shape makes Python raise.
NO_SENSE = (ValueError, TypeError, KeyError, AttributeError, WatchError)


class Loaded(NamedTuple, Generic[T]):
    """What a file holds, and why its content could not be used, if so."""

    value: T
    lost: str = ""


def document(raw: bytes, schema: str) -> dict[str, Any]:
    """The object that `raw` is, if it has that schema. Raises ValueError."""
    found = orjson.loads(raw)
    if not isinstance(found, dict) or found.get("schema") != schema:
        raise ValueError("an unknown schema")
    return found


def line(value: object) -> bytes:
    """A value as a line; a name in it that is no UTF-8 is escaped as words of ours are."""
    try:
        return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:
        sayable = names.everywhere(value, names.sayable)
        return orjson.dumps(sayable, option=orjson.OPT_APPEND_NEWLINE)


class File(Generic[T]):
    """A kind of file in our folder of a store: each kind is a class, with one instance a file."""

    schema = ""
    apart = ""  #: a folder for the lock alone, where somebody watches the one of the file
    limit = 64 * 1024 * 1024  #: a longer file is none of ours
    cached = False  #: whether what was read last is kept for whoever reads the same text again
    option = orjson.OPT_APPEND_NEWLINE  #: of orjson

    def __init__(self, name: str, empty: T, inside: str = "") -> None:
        self.name, self._empty, self._inside = name, empty, inside
        self._shown = "/".join(filter(None, (state_folder.FOLDER, inside, name)))
        self._last: tuple[bytes, T] | None = None

    def decode(self, found: Mapping[str, Any]) -> T:
        """What a document of the schema holds. Raises one of `NO_SENSE`."""
        raise NotImplementedError

    def encode(self, value: T) -> Mapping[str, object]:
        """The document, without its schema, that holds it; a tuple of ours is a list there."""
        raise NotImplementedError

    def is_durable(self, before: T, after: T) -> bool:  # noqa: ARG002
        """Whether a change has to be on the disk before anything else is done."""
        return True

    def let_go(self) -> None:
        self._last = None

    def from_bytes(self, raw: bytes) -> T:
        """What the text of a file holds. Raises one of `NO_SENSE`."""
        last = self._last  # once: threads of a daemon read the same file
        if last is not None and last[0] == raw:
            return last[1]
        value = self.decode(document(raw, self.schema))
        self._last = (raw, value) if self.cached else None
        return value

    def to_bytes(self, value: T) -> bytes:
        found = {"schema": self.schema, **self.encode(value)}
        return orjson.dumps(found, default=list, option=self.option)

    def load(self, store: int) -> Loaded[T]:
        """What is kept in the store behind a descriptor. Raises OSError where it can't be read."""
        try:
            with state_folder.opened(store, self._inside) as folder:
                raw = fs.read_ours(self.name, folder, self.limit)
        except FileNotFoundError:
            return Loaded(self._empty)
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            why = f"{self._shown} is not one of our files: {error.strerror}"
            return Loaded(self._empty, why)
        try:
            return Loaded(self.from_bytes(raw))
        except NO_SENSE as error:
            why = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return Loaded(self._empty, f"{self._shown} is damaged: {why}{error}")

    def read(self, store: int) -> T:
        """The same; `empty` where the file is damaged. Raises WatchError where it can't be read."""
        try:
            return self.load(store).value
        except OSError as error:
            raise self._failed("read", error, store) from None

    def write(self, store: int, value: T, lost: str = "") -> None:
        """Replace what is kept, under the lock for acting; `lost`: set it aside. Raises OSError."""
        with state_folder.made(store) as folder:
            if lost:
                fs.set_aside(self.name, folder)
            fs.save(self.name, folder, self.to_bytes(value))

    def change(self, store: int, changed: Callable[[T], T]) -> T:
        """Replace what is kept by what `changed` makes of it, and give that back.

        Nothing is written where `changed` gives back the very value that it got, or raises. Raises
        WatchError where it can't be read or written, and LockedError where the lock stays held.
        """
        return self.change_and_report(store, changed).value

    def change_and_report(self, store: int, changed: Callable[[T], T]) -> Loaded[T]:
        """The same, with a sentence where a damaged file was set aside."""
        with self._locked(store) as folder:
            try:
                before, lost = self.load(store)
            except OSError as error:
                raise self._failed("read", error, store) from None
            after = changed(before)
            if lost:
                fs.set_aside(self.name, folder)
                lost = f"{lost}; it was renamed to {self.name}.damaged"
            if lost or after is not before:
                durable = bool(lost) or self.is_durable(before, after)
                fs.save(self.name, folder, self.to_bytes(after), durable=durable)
            return Loaded(after, lost)

    @contextmanager
    def _locked(self, store: int) -> Iterator[int]:
        try:
            with (
                state_folder.made(store) as folder,
                state_folder.made(store, self.apart) as locks,
                fs.locked(f"{self.name}.lock", locks, seconds=_PATIENCE_SECONDS),
            ):
                yield folder
        except fs.BusyError as busy:
            since = f"for {_PATIENCE_SECONDS:.0f} s: {busy.owner}"
            why = f"another ollama-watch has been changing {self._shown} {since}"
            raise LockedError(why, "try again when it ends, or stop it") from None
        except OSError as error:
            raise self._failed("written", error, store) from None

    def _failed(self, what: str, error: OSError, store: int) -> WatchError:
        message = f"{self._shown} can't be {what}: {error.strerror}"
        path = advice.path_of(store)
        if isinstance(error, state_folder.ForeignError):
            return state_folder.refusal(path, error)
        if isinstance(error, PermissionError) and os.fstat(store).st_uid == os.geteuid():
            folder = os.path.join(path, state_folder.FOLDER)
            there = filter(os.path.lexists, (folder, os.path.join(folder, self.name)))
            if command := advice.line(*there):
                helps = "let its owner read and write it"
                return NoPermissionError(message, helps, f"chmod u+rwX {command}")
        return advice.cant_write(message, error, path)

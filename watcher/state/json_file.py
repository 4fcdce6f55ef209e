"""JSON files of ours that several processes and threads change, each change whole.

A change is made under a short lock of the file's own, never under the lock for acting: read,
changed, put into its place in one step. Who only reads needs no lock. A damaged file is set aside,
and everything goes on without it; one that can't be read is not written over.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import orjson

from watcher.errors import LockedError, NoPermissionError, WatchError
from watcher.state import fs, state_folder
from watcher.state.state_folder import FOLDER
from watcher.system import advice

T = TypeVar("T")
#: A change takes milliseconds; who waits longer waits for a process that was stopped.
_PATIENCE_SECONDS = 30.0
_READ_LIMIT = 64 * 1024 * 1024


class DamagedError(Exception):
    """What lies there is no document of ours; the text says why."""


def document(raw: bytes, schema: str) -> dict[str, Any]:
    """The object that `raw` is, if it has that schema. Raises DamagedError."""
    try:
        found = orjson.loads(raw)
    except ValueError as error:
        raise DamagedError(str(error)) from None
    if not isinstance(found, dict) or found.get("schema") != schema:
        raise DamagedError("an unknown schema")
    return found


@dataclass(frozen=True, slots=True)
class File(Generic[T]):
    """One such file in our folder of a store."""

    name: str
    #: Raises DamagedError for bytes that it can't make sense of.
    decode: Callable[[bytes], T]
    encode: Callable[[T], bytes]
    #: Where there is no file.
    empty: T
    #: A folder for its lock alone, in ours; who watches it hears of each change, and of nothing
    #: else. "" where nobody does.
    apart: str = ""

    def read(self, store: int) -> T:
        """What is kept in the store behind a descriptor; `empty` where the file is damaged.

        Raises WatchError where it can't be read.
        """
        return self._read(store)[0]

    def change(
        self,
        store: int,
        changed: Callable[[T], T],
        *,
        durable: Callable[[T, T], bool] = lambda _, __: True,
        tell: Callable[[str], None] = lambda _: None,
    ) -> T:
        """Replace what is kept by what `changed` makes of it, and give that back.

        It is on the disk when this returns if `durable(before, after)`. Nothing is written where
        `changed` gives back the very value that it got, or raises. `tell` gets a sentence where a
        damaged file was set aside. Raises WatchError where it can't be read or written, and
        LockedError where somebody else keeps the lock.
        """
        with self._locked(store) as folder:
            before, lost = self._read(store)
            after = changed(before)
            if after is before and not lost:
                return after
            if lost:
                fs.set_aside(self.name, folder)
                tell(f"{lost}; it is set aside")
            certain = bool(lost) or durable(before, after)
            fs.save(self.name, folder, self.encode(after), durable=certain)
            return after

    def _read(self, store: int) -> tuple[T, str]:
        """What is kept, and why it could not be used, if so."""
        try:
            with state_folder.opened(store) as folder:
                raw = fs.read_ours(self.name, folder, _READ_LIMIT)
        except FileNotFoundError:
            return self.empty, ""
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EINVAL, errno.EISDIR):
                return self.empty, f"{FOLDER}/{self.name} is no file of ours: {error.strerror}"
            raise self._failed("read", error, store) from None
        try:
            return self.decode(raw), ""
        except DamagedError as error:
            return self.empty, f"{FOLDER}/{self.name} is damaged: {error}"

    @contextmanager
    def _locked(self, store: int) -> Iterator[int]:
        owner = f"pid {os.getpid()}"
        try:
            with ExitStack() as held:
                folder = locks = held.enter_context(state_folder.made(store))
                if self.apart:
                    locks = held.enter_context(state_folder.made_in(self.apart, folder))
                lock = fs.locked(f"{self.name}.lock", locks, owner, seconds=_PATIENCE_SECONDS)
                held.enter_context(lock)
                yield folder
        except fs.BusyError as busy:
            raise LockedError(
                f"another ollama-watch has been changing {FOLDER}/{self.name} for"
                f" {_PATIENCE_SECONDS:.0f} s: {busy.owner}",
                "try again when it has ended, or end that process",
            ) from None
        except OSError as error:
            raise self._failed("written", error, store) from None

    def _failed(self, what: str, error: OSError, store: int) -> WatchError:
        told = f"{FOLDER}/{self.name} can't be {what}: {error.strerror}"
        if isinstance(error, state_folder.ForeignError):
            return state_folder.refusal(advice.path_of(store), error)
        if isinstance(error, PermissionError) and advice.is_owner(store):
            folder = os.path.join(advice.path_of(store), FOLDER)
            opened = ("chmod", "u+rwX", folder, os.path.join(folder, self.name))
            return NoPermissionError(told, "let its owner read and write it", advice.line(*opened))
        return advice.cant_write(told, error, advice.path_of(store))

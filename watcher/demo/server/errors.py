"""What goes wrong, in the words of the real server."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator


class EngineError(Exception):
    """What is told to a client or stops the server; its text is the real server's."""


class BadRequestError(EngineError):
    """What is answered with status 400, also in the middle of a handler."""


class NotExistError(EngineError):
    """A file or a tag that is not there."""

    def __init__(self, text: str = "file does not exist") -> None:
        super().__init__(text)


class CanceledError(EngineError):
    """The request or the download was given up."""

    def __init__(self) -> None:
        super().__init__("context canceled")


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


def reason(error: Exception) -> str:
    """Why a call failed, as Go says it."""
    if not isinstance(error, OSError):
        return str(error)
    text = os.strerror(error.errno) if error.errno else str(error)
    return text[:1].lower() + text[1:]


@contextlib.contextmanager
def told(operation: str, path: str) -> Iterator[None]:
    """Turn an OSError into the words of the real server: `<operation> <path>: <reason>`."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotExistError(f"{operation} {path}: {reason(error)}") from error
    except OSError as error:
        kind = NoSpaceError if error.errno == errno.ENOSPC else EngineError
        raise kind(f"{operation} {path}: {reason(error)}") from error

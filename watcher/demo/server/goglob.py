"""Globs as Go's filepath.Glob does them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from watcher.demo.server.errors import EngineError
from watcher.demo.server.files import names_in

_MAGIC = re.compile(r"[*?\[\\]")


def glob(pattern: str) -> list[str]:
    """Paths that match, folder by folder in lexical order; unreadable folders are passed over.

    Every component is a pattern, those of the store's own path too. Raises EngineError where the
    pattern is malformed.
    """
    folder, _, last = pattern.rpartition("/")
    matches = _matcher(last)
    if not _MAGIC.search(pattern):
        return [pattern] if os.path.lexists(pattern) else []
    folders = glob(folder) if _MAGIC.search(folder) else [folder or "/"]
    return [os.path.join(at, name) for at in folders for name in _readable(at) if matches(name)]


def _readable(folder: str) -> list[str]:
    try:
        return names_in(folder)
    except EngineError:
        return []


def _matcher(pattern: str) -> Callable[[str], bool]:
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
    """The expression of a class whose `[` is taken off, and what follows its `]`."""
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

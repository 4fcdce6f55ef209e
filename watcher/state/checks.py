"""Values in files of ours, which anybody may have written: of one kind each, and within bounds.

Each function gives back the value, or raises ValueError, with nothing of the value in its text.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from functools import partial
from typing import Any, TypeVar

from watcher.model import Ranges
from watcher.ollama import ranges
from watcher.ollama.sidecars import LARGEST_LAYER

T = TypeVar("T")
is_digest = re.compile(r"[0-9a-fA-F]{64}").fullmatch
_MOST_UNSIGNED, _MOST_SIGNED = (1 << 64) - 1, (1 << 63) - 1
#: Seconds since the epoch on any file system, and those that a calendar has, in every time zone.
_MOST_SECONDS = float(1 << 63)
LAST_DAY = 253402300800.0 - 2 * 86400.0


def whole(value: object, most: int = _MOST_SIGNED, least: int = 0) -> int:
    """A whole number; no truth value, and nothing that JSON has as a fraction."""
    if type(value) is int and least <= value <= most:
        return value
    raise ValueError(f"expected a whole number from {least} to {most}")


#: Bytes of a layer, or a place in it; an inode's number, or a device's; a time of a file, in ns.
size = partial(whole, most=LARGEST_LAYER)
identity = partial(whole, most=_MOST_UNSIGNED)
nanoseconds = partial(whole, least=-_MOST_SIGNED - 1)


def number(value: object, most: float = _MOST_SECONDS, least: float = 0.0) -> float:
    if type(value) in (int, float) and least <= value <= most:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    raise ValueError(f"expected a number from {least:g} to {most:g}")


#: A time, in seconds since the epoch, or a duration.
seconds = partial(number, least=-_MOST_SECONDS)
day = partial(number, most=LAST_DAY)  #: a time after 1970, in seconds, that every calendar has


def flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("expected true or false")


def text(value: object, longest: int = 1 << 16) -> str:
    if isinstance(value, str) and len(value) <= longest:
        return value
    raise ValueError(f"expected a text of {longest} characters at most")


boot = partial(text, longest=100)  #: the id of a start of the machine, or what stands for one


def file_name(value: object) -> str:
    """The name of a file in one folder, which leads nowhere else."""
    name = text(value, 4 * 255)
    if "/" in name or "\0" in name or name in ("", ".", ".."):
        raise ValueError("expected the name of a file")
    return name


def digest(value: object) -> str:
    found = text(value, 64)
    if not is_digest(found):
        raise ValueError("expected a digest of 64 hexadecimal digits")
    return found


def byte_ranges(value: Iterable[Iterable[object]]) -> Ranges:
    """Ranges of bytes in a layer; what is doubted may reach a little beyond its end."""
    most = 2 * LARGEST_LAYER
    return ranges.normal((whole(start, most), whole(end, most)) for start, end in value)


def row(make: Callable[..., T], *kinds: Callable[[Any], object]) -> Callable[[Any], T]:
    """What makes something of a list of values, each of its kind; the last ones may be missing."""

    def checked(values: list[object]) -> T:
        if len(values) > len(kinds):
            raise ValueError(f"expected {len(kinds)} values at most")
        return make(*(check(value) for check, value in zip(kinds, values, strict=False)))

    return checked


def optional(check: Callable[[Any], T]) -> Callable[[object], T | None]:
    return lambda value: None if value is None else check(value)


def kept(check: Callable[[Any], object], key: str = "", *, later: bool = False, **more: Any) -> Any:
    """A dataclass's field in a file (as `key`) and its check; `later`: old files may lack it."""
    return field(metadata={"check": check, "key": key, "later": later}, **more)


def from_keys(make: type[T], found: Mapping[str, Any]) -> T:
    """A dataclass of such fields, from an object in a file. Raises KeyError, too."""
    values = {}
    for each in fields(make):  # type: ignore[arg-type]
        key = each.metadata["key"] or each.name
        if key in found or not each.metadata["later"]:
            values[each.name] = each.metadata["check"](found[key])
    return make(**values)


def to_keys(made: Any) -> dict[str, object]:
    """The object in a file that holds a dataclass of such fields."""
    return {each.metadata["key"] or each.name: getattr(made, each.name) for each in fields(made)}

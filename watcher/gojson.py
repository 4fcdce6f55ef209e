"""JSON as leniently, and as strictly, as Go's ``json.Decoder`` reads it into a struct.

The server decodes the *first* JSON value of a file and ignores what follows; keys match without
regard to case; unknown keys are ignored; ``null`` leaves a field as it was; an integer field takes
neither ``1.0`` nor ``1e3`` nor a number beyond 64 bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import NoReturn

import orjson

_SPACE = b" \t\r\n"
_INT64 = range(-(1 << 63), 1 << 63)
#: Go refuses deeper nesting; Python's parsers give up earlier, and say so by RecursionError.
_DIGITS = re.compile(r"-?[0-9]{1,19}")


def first_value(raw: bytes) -> object:
    """The first JSON value in `raw`.

    Raises ValueError with a reason for people: "empty", "not JSON", "nested too deep".
    """
    text = raw.lstrip(_SPACE)
    if not text:
        raise ValueError("empty" if not raw else "nothing but white space")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass  # bytes after the value, bad UTF-8 or NUL bytes: the slower decoder tells them apart
    try:
        value, _ = _DECODER.raw_decode(text.decode("utf-8", "replace"))
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    return value


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def _integer(digits: str) -> int | float:
    # An absurdly long number must cost nothing, and is no 64-bit integer anyhow.
    return int(digits) if _DIGITS.fullmatch(digits) else float("inf")


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_int=_integer)


def lookup(value: Mapping[str, object], key: str) -> object:
    """The field `key` of an object, matched without regard to case; the last one given wins."""
    found = None
    for name, field in value.items():
        if (name == key or name.lower() == key.lower()) and field is not None:
            found = field
    return found


def int64(value: Mapping[str, object], key: str) -> int:
    """An integer field, 0 where it is absent or null. Raises ValueError where Go would fail."""
    field = lookup(value, key)
    if field is None:
        return 0
    if isinstance(field, bool) or not isinstance(field, int) or field not in _INT64:
        raise ValueError(f"{key} is no 64-bit integer")
    return field


def string(value: Mapping[str, object], key: str) -> str:
    """A string field, "" where it is absent or null. Raises ValueError where Go would fail."""
    field = lookup(value, key)
    if field is None:
        return ""
    if not isinstance(field, str):
        raise ValueError(f"{key} is no string")
    return field


def record(value: object, what: str) -> Mapping[str, object]:
    """An object; null counts as an empty one. Raises ValueError for anything else."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no object")
    return value

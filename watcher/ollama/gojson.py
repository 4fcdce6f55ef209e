"""JSON as leniently, and as strictly, as Go's ``json.Decoder`` reads it into a struct.

The server decodes the *first* JSON value of a file and ignores what follows; keys match without
regard to case, and of several the last one counts; unknown keys are ignored; ``null`` leaves a
field as it was; an integer field takes neither ``1.0`` nor ``1e3`` nor a number beyond 64 bits.
"""

import json
import re
from typing import NoReturn, TypeAlias

_SPACE = b" \t\r\n"
_INT64 = range(-(1 << 63), 1 << 63)
_DIGITS = re.compile(r"-?[0-9]{1,19}")

#: An object by its keys in lower case; what is null is left out.
Fields: TypeAlias = dict[str, object]


def first_value(raw: bytes) -> object:
    """The first JSON value; its objects are `Fields`. Raises ValueError with the reason."""
    text = raw.lstrip(_SPACE)
    if not text:
        raise ValueError("empty" if not raw else "nothing but white space")
    try:
        value, _ = _DECODER.raw_decode(text.decode("utf-8", "replace"))
    except RecursionError:
        # Go goes deeper, but not without bound; nothing real nests deeper than this either.
        raise ValueError("nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    return value


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def _integer(digits: str) -> int | float:
    # An absurdly long number must cost nothing, and is no 64-bit integer anyhow.
    return int(digits) if _DIGITS.fullmatch(digits) else float("inf")


def _fields(pairs: list[tuple[str, object]]) -> Fields:
    return {name.lower(): field for name, field in pairs if field is not None}


_DECODER = json.JSONDecoder(object_pairs_hook=_fields, parse_constant=_refuse, parse_int=_integer)


def int64(value: Fields, key: str) -> int:
    """An integer field, 0 where it is absent or null. Raises ValueError where Go would fail."""
    field = value.get(key.lower())
    if field is None:
        return 0
    if type(field) is not int or field not in _INT64:
        raise ValueError(f"{key} is no 64-bit integer")
    return field


def string(value: Fields, key: str) -> str:
    """A string field, "" where it is absent or null. Raises ValueError where Go would fail."""
    field = value.get(key.lower())
    if field is None:
        return ""
    if not isinstance(field, str):
        raise ValueError(f"{key} is no string")
    return field


def record(value: object, what: str) -> Fields:
    """An object; null counts as an empty one. Raises ValueError for anything else."""
    if value is None:
        return Fields()
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no object")
    return value

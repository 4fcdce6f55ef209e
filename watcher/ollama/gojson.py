"""JSON as leniently, and as strictly, as Go's ``json.Decoder`` reads it into a struct.

The server decodes the *first* JSON value of a file and ignores what follows; keys match without
regard to case, and of several the last one counts; unknown keys are ignored; ``null`` leaves a
field as it was; an integer field takes neither ``1.0`` nor ``1e3`` nor a number beyond 64 bits.
"""

import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeAlias

_SPACE = b" \t\r\n"
_INT64 = range(-(1 << 63), 1 << 63)
_LONGEST_INT64 = 20  #: digits, with the sign

#: Of a struct: the type of each field, by its key in lower case.
Struct: TypeAlias = Mapping[str, type]
_WORDS = {int: "64-bit integer", str: "string", list: "list", tuple: "object"}


def first_value(raw: bytes) -> object:
    """The first JSON value; objects are tuples of pairs. Raises ValueError with the reason."""
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
    return int(digits) if len(digits) <= _LONGEST_INT64 else float("inf")


_DECODER = json.JSONDecoder(object_pairs_hook=tuple, parse_constant=_refuse, parse_int=_integer)


def fields(value: object, what: str, struct: Struct) -> dict[str, Any]:
    """The fields that an object sets, by their keys in lower case; null counts as an empty one.

    Raises ValueError where Go would fail.
    """
    if value is None:
        return {}
    if not isinstance(value, tuple):
        raise ValueError(f"{what} is no object")
    found = {}
    for name, field in value:
        key = name.lower()
        kind = struct.get(key)
        if kind is None or field is None:
            continue
        if type(field) is not kind or (kind is int and field not in _INT64):
            raise ValueError(f"{name} is no {_WORDS[kind]}")
        found[key] = field
    return found

"""JSON as Go reads and writes it."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from watcher.demo.server.errors import EngineError

BLANK = " \t\r\n"
INT64 = range(-(2**63), 2**63)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(text)


# Python takes NaN and Infinity, Go doesn't.
_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def first_json(data: bytes) -> Any:
    """The first JSON value in `data`; what follows it is not looked at."""
    text = data.decode("utf-8", "replace").lstrip(BLANK)
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


def check_end(data: bytes) -> None:
    """Raise EngineError where anything but blanks follows the first value, which must be valid."""
    text = data.decode("utf-8", "replace").strip(BLANK)
    end = _DECODER.raw_decode(text)[1]
    if end != len(text):
        raise EngineError(f"invalid character {text[end]!r} after top-level value")


def json_fields(value: Any, *names: str) -> dict[str, Any]:
    """The named fields of an object; names match without regard to case, null counts as absent."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise EngineError(f"json: cannot unmarshal {type(value).__name__} into Go value")
    folded = {name.lower(): name for name in names}
    found = {}
    for key, item in value.items():
        name = folded.get(key.lower())
        if name and item is not None:
            found[name] = item
    return found


def json_int(value: Any) -> int:
    """A 64-bit integer, nothing else."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in INT64:
        raise EngineError(f"json: cannot unmarshal {value!r} into Go value of type int64")
    return value


def json_str(value: Any) -> str:
    """A string, nothing else."""
    if not isinstance(value, str):
        raise EngineError(f"json: cannot unmarshal {value!r} into Go value of type string")
    return value


def int64(value: int) -> int:
    """A sum as 64-bit arithmetic has it: too large a one turns negative."""
    return (value - INT64.start) % 2**64 + INT64.start


def go_json(value: Any) -> bytes:
    """JSON as the real server writes it: compact, and safe inside HTML."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "surrogateescape")

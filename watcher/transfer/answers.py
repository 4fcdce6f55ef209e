"""Is this what was asked for? An answer's head, judged before a byte of its body is written. Pure.

Ollama's server checks nothing of it, which is how error pages get into its files.
"""

from __future__ import annotations

import email.utils
import re
from collections.abc import Mapping
from typing import NamedTuple

import orjson

from watcher.errors import without_secrets
from watcher.ollama import ranges

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
_TAGS = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)
_WORDS = 120
#: So much of a body is looked at for them.
_LOOKED_AT = 4096
#: What opens something, as a body may quote it of the request.
_SECRET = re.compile(r"(\bbearer |(?:sig|signature|credential|token)=)\S+", re.IGNORECASE)
#: Nobody waits for longer because an answer says so.
_LONGEST_WAIT = 3600.0


class Head(NamedTuple):
    """The status of an answer, and its headers by their names in lower case."""

    status: int
    headers: Mapping[str, str]


def fault(head: Head, start: int, end: int, total: int) -> str:
    """Why this is not the answer to the range ``[start, end)`` of `total` bytes; "" where it is."""
    if head.status == 200:
        return "the whole file in place of a range"
    if head.status != 206:
        return f"status {head.status}"
    encoding = head.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        return f"an encoding ({encoding[:40]})"
    sent = head.headers.get("content-range", "")
    found = _CONTENT_RANGE.fullmatch(sent)
    if found is None:
        return "a range without its place"
    first, last, size = map(int, found.groups())
    if size != total:
        return "a file of {}, where the manifest says {}".format(*ranges.in_words(size, total))
    if (first, last + 1) != (start, end):
        return f"bytes {first}-{last} in place of {start}-{end - 1}"
    length = head.headers.get("content-length", str(end - start))
    if length != str(end - start):
        return f"{length[:20]} bytes in place of {end - start}"
    return ""


def total(head: Head) -> int | None:
    """The bytes of the whole file, as an answer with a range of it says."""
    found = _CONTENT_RANGE.fullmatch(head.headers.get("content-range", ""))
    return int(found[3]) if head.status == 206 and found is not None else None


def words(body: bytes) -> str:
    """The first words of a body, as an error quotes them; "" where it is no text."""
    text = body[:_LOOKED_AT].decode("utf-8", "replace")
    odd = sum(char == "\ufffd" or not (char.isprintable() or char.isspace()) for char in text)
    if odd > len(text) / 10:
        return ""
    text = _message(body) or _TAGS.sub(" ", text)
    text = text[:_LOOKED_AT]
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    text = _SECRET.sub(r"\1...", without_secrets(text))
    return text if len(text) <= _WORDS else f"{text[:_WORDS]}…"


def _message(body: bytes) -> str:
    """What a registry's own error says."""
    try:
        value = orjson.loads(body)
        errors = value.get("errors") or [value]
        found = errors[0].get("message") or errors[0].get("error") or errors[0].get("code")
    except (ValueError, AttributeError, LookupError, TypeError):
        return ""
    return found if isinstance(found, str) else ""


def retry_after(head: Head, now: float) -> float | None:
    """In how many seconds the next try is welcome, where the answer says so; now: the epoch's."""
    value = head.headers.get("retry-after", "").strip()
    try:
        if value.isdecimal() and len(value) < 10:
            seconds = float(value)
        else:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
    except (ValueError, OverflowError):
        return None
    # At once, or at a time that this clock has passed: without a wait all tries would be in vain.
    return min(seconds, _LONGEST_WAIT) if seconds > 0 else None

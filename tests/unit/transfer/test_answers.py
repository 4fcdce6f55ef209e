"""Is this the answer to the range that was asked for?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watcher.transfer import answers
from watcher.transfer.answers import Head

RIGHT = {"content-range": "bytes 10-19/100", "content-length": "10"}


def fault(status: int = 206, **headers: str) -> str:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return answers.fault(Head(status, {**RIGHT, **named}), 10, 20, 100)


def test_the_very_range_is_right() -> None:
    assert fault() == ""
    assert fault(content_encoding="identity") == ""
    assert answers.fault(Head(206, {"content-range": "bytes 10-19/100"}), 10, 20, 100) == ""


@pytest.mark.parametrize(
    "wrong",
    [
        fault(200),
        fault(416),
        fault(content_range="bytes 10-19/101"),
        fault(content_range="bytes 10-18/100"),
        fault(content_range="bytes 9-19/100"),
        fault(content_range="bytes 10-19/*"),
        fault(content_range="bytes */100"),
        fault(content_range="items 10-19/100"),
        fault(content_range=""),
        fault(content_range="bytes 10-19/100, bytes 10-19/100"),
        fault(content_encoding="gzip"),
        fault(content_length="11"),
        fault(content_length="nine"),
    ],
)
def test_anything_else_is_named(wrong: str) -> None:
    assert wrong


@given(st.text(max_size=60))
def test_no_text_of_a_header_makes_it_fail(text: str) -> None:
    assert fault(content_range=text)
    answers.retry_after(Head(429, {"retry-after": text}), 0.0)


def test_a_text_is_quoted_and_what_is_none_is_not() -> None:
    assert answers.words("Bitte schließen Sie".encode("latin-1")) == "Bitte schlie\ufffden Sie"
    assert answers.words(bytes(range(1, 256))) == ""


@given(st.binary(max_size=300))
def test_words_are_short_and_printable(body: bytes) -> None:
    words = answers.words(body)
    assert len(words) <= 121
    assert words.isprintable()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html><style>a{}</style><p>Please\n log <b>in</b></p>", "Please log in"),
        (b'{"errors":[{"code":"DENIED","message":"no access"}]}', "no access"),
        (b'{"errors":[{"code":"DENIED"}]}', "DENIED"),
        (b'{"error":"model not found"}', "model not found"),
        (b"<Error><Code>ExpiredRequest</Code></Error>", "ExpiredRequest"),
        (b"see https://cdn/x?X-Amz-Signature=abc", "see https://cdn/x?..."),
        (b"http://me:secret@proxy/ said no", "http://***@proxy/ said no"),
        (b"no /x?X-Amz-Signature=abc here", "no /x?X-Amz-Signature=... here"),
        (b"you sent Authorization: Bearer abc", "you sent Authorization: Bearer ..."),
        (b"", ""),
    ],
)
def test_the_first_words_of_a_body(body: bytes, words: str) -> None:
    assert answers.words(body) == words


@pytest.mark.parametrize("start", [b"", b'{"error":"'])
@pytest.mark.parametrize("word", [b"<script ", b"<", b"https://", b"http://a:"])
def test_a_huge_body_takes_no_longer_than_its_first_words(word: bytes, start: bytes) -> None:
    """Looked at as a whole, each would take longer than anybody waits."""
    body = start + word * (1 << 20) + b'"}' * bool(start)
    assert len(answers.words(body)) <= 121


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0),
        ("Thu, 01 Jan 1970 00:00:10 GMT", None),
        ("0", None),
        ("999999", 3600.0),
        ("-1", None),
        ("soon", None),
        ("", None),
    ],
)
def test_when_the_next_try_is_welcome(text: str, seconds: float | None) -> None:
    assert answers.retry_after(Head(429, {"retry-after": text}), 60.0) == seconds

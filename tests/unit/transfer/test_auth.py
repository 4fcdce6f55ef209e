"""Challenges and tokens as registries write them."""

from __future__ import annotations

import pytest

from watcher.transfer import auth
from watcher.transfer.auth import Challenge


@pytest.mark.parametrize(
    ("header", "asked"),
    [
        (
            'Bearer realm="https://r/token",service="r",scope="repository:a/b:pull x:y:z"',
            Challenge("https://r/token", "r", ("repository:a/b:pull", "x:y:z")),
        ),
        ('bearer REALM="https://r/t"', Challenge("https://r/t")),
        ('Basic realm="r"', None),
        ("Bearer", None),
        ("", None),
    ],
)
def test_the_challenge_of_a_401(header: str, asked: Challenge | None) -> None:
    assert auth.challenge(header) == asked


def test_each_scope_is_a_parameter_of_its_own() -> None:
    asked = Challenge("https://r/token?a=1", "r", ("x:y", "z"))
    assert asked.address(ts="5") == "https://r/token?a=1&service=r&scope=x%3Ay&scope=z&ts=5"
    assert Challenge("https://r/t").address() == "https://r/t"


@pytest.mark.parametrize(
    ("body", "token"),
    [
        (b'{"token":"abc"}', "abc"),
        (b'{"access_token":"abc"}', "abc"),
        (b'{"token":"a\\r\\nX: y"}', ""),
        (b'{"token":7}', ""),
        (b'["token"]', ""),
        (b"<html>", ""),
        (b'{"token":"%s"}' % (b"x" * 70_000), ""),
    ],
)
def test_the_token_in_an_answer(body: bytes, token: str) -> None:
    assert auth.token(body) == token

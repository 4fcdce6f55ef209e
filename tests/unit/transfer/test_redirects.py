"""Where redirects may lead, and what each answer of a registry means."""

from __future__ import annotations

import pytest

from watcher.transfer import redirects
from watcher.transfer.values import Cause, TryError


@pytest.mark.parametrize(
    ("url", "location", "target"),
    [
        ("https://r/v2/x", "https://cdn/y?s=1", "https://cdn/y?s=1"),
        ("https://r/v2/x", "/y", "https://r/y"),
        ("http://r/v2/x", "https://cdn/y", "https://cdn/y"),
        ("http://r/v2/x", "http://cdn/y", "http://cdn/y"),
        ("https://r/v2/x", "//cdn/y", "https://cdn/y"),
    ],
)
def test_a_redirect_leads_there(url: str, location: str, target: str) -> None:
    assert redirects.referred(url, location) == target


@pytest.mark.parametrize(
    ("url", "location", "why"),
    [
        ("https://r/x", "http://cdn/y", "r refers to http, which is not encrypted"),
        ("https://r/x", "file:///etc/passwd", "r refers to an unsupported protocol: file"),
        ("https://r/x", "ftp://cdn/y", "r refers to an unsupported protocol: ftp"),
        ("https://r/x", "https://cdn:port/y", "r refers to what is not an address"),
        ("https://r/x", "https://[cdn/y", "r refers to what is not an address"),
        ("https://r/x", "https://cdn/ÿ", "r refers to what is not an address"),
    ],
)
def test_a_redirect_leads_nowhere_else(url: str, location: str, why: str) -> None:
    with pytest.raises(TryError, match=why) as caught:
        redirects.referred(url, location)
    assert caught.value.cause is Cause.WRONG_ANSWER
    assert caught.value.final

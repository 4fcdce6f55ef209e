"""Where redirects may lead, and what each answer of a registry means."""

from __future__ import annotations

import pytest

from watcher.transfer import registry
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
    assert registry._redirected(url, location) == target


@pytest.mark.parametrize(
    ("url", "location"),
    [
        ("https://r/x", "http://cdn/y"),
        ("https://r/x", "file:///etc/passwd"),
        ("https://r/x", "ftp://cdn/y"),
        ("https://r/x", "https://cdn:port/y"),
        ("https://r/x", "https://[cdn/y"),
        ("https://r/x", "https://cdn/ÿ"),
    ],
)
def test_a_redirect_leads_nowhere_else(url: str, location: str) -> None:
    with pytest.raises(TryError, match="r redirects to") as caught:
        registry._redirected(url, location)
    assert caught.value.cause is Cause.WRONG_ANSWER

"""No credential of a URL is in what is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watcher.errors import WatchError, without_credentials, without_secrets
from watcher.ollama import environment

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "text",
    [
        f'Get "https://x/v2/": invalid proxy address "http://me:{SECRET}/a@proxy:1": parse: no',
        f'parse "http://me:{SECRET}/a b@proxy:1": invalid port ":{SECRET}" after host',
        f'invalid proxy address "me:{SECRET}@{SECRET}@proxy"',
        f'invalid proxy address "me:{SECRET} {SECRET}@proxy"',
        f"proxy me:{SECRET}/x@proxy:1 refused",
        f"HTTPS_PROXY=me:{SECRET}@proxy",
        f"http://{SECRET}@host/x gives nothing",
        f"socks5h://a:{SECRET}?#@host: no",
        f"Get https://cdn.example/data?X-Signature={SECRET}&x={SECRET}: EOF",
    ],
)
def test_secrets_that_a_server_quotes_are_removed(text: str) -> None:
    told = without_secrets(text)
    assert SECRET not in told
    assert without_secrets(told) == told


@given(st.text(st.characters(codec="ascii", exclude_categories=["C"], exclude_characters=' "')))
def test_a_password_of_any_characters_is_taken_out_of_texts(odd: str) -> None:
    for text in (f"see http://me:{odd}{SECRET}{odd}@host:1/x", f'"http://me:{SECRET} {odd}@host"'):
        assert SECRET not in without_secrets(text)
    assert SECRET not in without_credentials(f"see http://me:{odd}{SECRET}{odd}@host:1/x")


@pytest.mark.parametrize(
    "text",
    [
        "open /m/a@b/blobs/sha256-31: file too large",
        "dial tcp [::1]:443: connect: connection refused",
        "localhost:5000/library/demo:1b has not arrived",
        "http://localhost:5000/library/demo:1b",
    ],
)
def test_a_text_without_secrets_stays(text: str) -> None:
    assert without_secrets(text) == without_credentials(text) == text


def test_our_own_errors_have_none() -> None:
    error = WatchError(f"no model: http://me:{SECRET}/x@host/m", f"try http://{SECRET}@host")
    assert SECRET not in f"{error} {error.message} {error.next_step}"


@pytest.mark.parametrize("host", [f"http://me:{SECRET}@host:1", f"{SECRET}@host"])
def test_a_server_s_address_has_none(host: str) -> None:
    with pytest.raises(ValueError, match="without a user") as raised:
        environment.server_url(host)
    assert SECRET not in str(raised.value)


def test_a_text_of_megabytes_takes_no_longer_than_its_beginning() -> None:
    """As a registry may send one, and a server pass it on. All of it would take hours."""
    assert SECRET not in without_secrets(f"no: http://me:{SECRET}@host " + "https://" * (1 << 20))

"""The server's variables, read as the server reads them."""

from __future__ import annotations

import pytest

from watcher.ollama import environment


@pytest.mark.parametrize(
    ("setting", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("  '127.0.0.1:8080' ", "http://127.0.0.1:8080"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:1234", "http://127.0.0.1:1234"),
        (":1234", "http://127.0.0.1:1234"),
        ("example.com", "http://example.com:11434"),
        ("example.com:", "http://example.com:11434"),
        ("example.com:99999", "http://example.com:11434"),
        ("example.com:x", "http://example.com:11434"),
        ("http://example.com", "http://example.com:80"),
        ("https://example.com", "https://example.com:443"),
        ("https://example.com:99999/", "https://example.com:443"),
        ("https://example.com/behind/a/proxy/", "https://example.com:443/behind/a/proxy"),
        ("::", "http://[::1]:11434"),
        ("[::]:1234", "http://[::1]:1234"),
        ("http://[::1", "http://[::1]:80"),
        ("fe80::1", "http://[fe80::1]:11434"),
    ],
)
def test_an_address_is_read_as_the_server_reads_it(setting: str, url: str) -> None:
    assert environment.server_url(setting) == url


@pytest.mark.parametrize(
    "setting", ["ftp://x", "http://[x", "a b", "http://[[", "x\0y", "a..b", f"{'x' * 64}.org"]
)
def test_an_invalid_address_of_a_server_is_an_error(setting: str) -> None:
    with pytest.raises(ValueError, match="want"):
        environment.server_url(setting)


@pytest.mark.parametrize("value", ["1", "true", "yes", "2", " 'T' "])
def test_any_value_but_a_false_one_keeps_the_server_from_deleting(value: str) -> None:
    assert environment.no_prune({"OLLAMA_NOPRUNE": value})


@pytest.mark.parametrize("value", ["", "0", "false", "F", " '0' "])
def test_a_false_one_does_not(value: str) -> None:
    assert not environment.no_prune({"OLLAMA_NOPRUNE": value})


def test_the_models_folder_is_the_named_one_or_in_the_home() -> None:
    assert environment.models_folder({"OLLAMA_MODELS": ' "/m" ', "HOME": "/h"}) == "/m"
    assert environment.models_folder({"HOME": "/h"}) == "/h/.ollama/models"
    assert environment.models_folder({}) is None

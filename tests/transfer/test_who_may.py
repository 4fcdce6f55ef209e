"""Tokens and signatures: given to whom they are for, and to nobody else; in no text, in no file."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from watcher.demo.registry import Fault, Manners
from watcher.transfer import values as transfer
from watcher.transfer.values import Cause

from .driven import Here, with_options


def test_a_token_is_got_for_whoever_asks_for_one(here: Here) -> None:
    here.registry.manners = Manners(wants="bearer")
    here.pull()
    asked = next(path for path, _ in here.registry.asked if path.startswith("/token"))
    assert "scope=repository%3Ax%3Apull&scope=a%3Ab%3Ac" in asked


@pytest.mark.parametrize("plain", [False, True])
def test_a_token_that_expires_is_renewed(here: Here, plain: bool) -> None:
    here.registry.manners = Manners(wants="bearer", uses=3, plain=plain)
    here.pull(with_options(connections=1))
    assert len(here.registry._tokens) > 1


def test_no_credential_goes_along_a_redirect(here: Here) -> None:
    here.registry.manners = Manners(wants="bearer")
    here.pull()
    at_the_data = [headers for path, headers in here.registry.asked if path.startswith("/data/")]
    assert at_the_data
    assert not any("Authorization" in headers for headers in at_the_data)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A key as Ollama makes it."""
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    from cryptography.hazmat.primitives import serialization as form

    made = ed25519.Ed25519PrivateKey.generate()
    path = tmp_path / "id_ed25519"
    path.write_bytes(
        made.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
    )
    public = made.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public + b" somebody\n")
    return path


#: base64 of the hexadecimal sha256 of nothing, as the facts have it.
NOTHING = "ZTNiMGM0NDI5OGZjMWMxNDlhZmJmNGM4OTk2ZmI5MjQyN2FlNDFlNDY0OWI5MzRjYTQ5NTk5MWI3ODUyYjg1NQ=="


def is_signed(authorization: str, url: str, key: Path) -> bool:
    """Whether a signature is the key's, for this very URL."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    public, _, signature = authorization.partition(":")
    if public != key.with_suffix(".pub").read_text().split()[1]:
        return False
    try:
        load_ssh_public_key(key.with_suffix(".pub").read_bytes()).verify(  # type: ignore[call-arg]
            base64.b64decode(signature), f"GET,{url},{NOTHING}".encode()
        )
    except InvalidSignature:
        return False
    return "ts=" in url and "nonce=" in url


def test_a_realm_that_wants_a_signature_gets_the_keys(here: Here, key: Path) -> None:
    here.registry.manners = Manners(wants="signed", signs=lambda a, url: is_signed(a, url, key))
    here.pull(key=str(key))


def test_a_registry_that_wants_a_signature_is_refused_without_a_key(here: Here) -> None:
    here.registry.manners = Manners(wants="signed")
    with pytest.raises(transfer.TransferError, match="no key to sign with") as caught:
        here.fetch()
    assert caught.value.cause is Cause.NOT_ALLOWED


def test_a_wrong_key_is_refused_with_the_registrys_words(here: Here, key: Path) -> None:
    here.registry.manners = Manners(wants="signed", signs=lambda _, __: False)
    with pytest.raises(transfer.TransferError, match="401") as caught:
        here.fetch(key=str(key))
    assert "add your key" in caught.value.next_step


def test_a_file_that_is_no_key_is_named_and_not_quoted(here: Here, tmp_path: Path) -> None:
    here.registry.manners = Manners(wants="signed")
    broken = tmp_path / "broken"
    broken.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n")
    with pytest.raises(transfer.TransferError, match="broken") as caught:
        here.fetch(key=str(broken))
    assert "secret" not in str(caught.value)


def test_a_signature_is_only_for_the_registrys_own_realm(here: Here, key: Path) -> None:
    # The realm is under the other name of this machine.
    other = here.registry.host.replace("localhost", "127.0.0.1")
    here.registry.manners = Manners(wants="signed", realm=f"http://{other}/token")
    with pytest.raises(transfer.TransferError) as caught:
        here.fetch(key=str(key))
    assert caught.value.cause is Cause.NOT_ALLOWED
    realms = [headers for path, headers in here.registry.asked if path.startswith("/token")]
    assert realms
    assert not any("Authorization" in headers for headers in realms)


@pytest.mark.parametrize("realm", ["ftp://localhost/token", "file:///token", "http://["])
def test_a_realm_that_can_not_be_asked_ends_it_at_once(here: Here, realm: str) -> None:
    here.registry.manners = Manners(wants="bearer", realm=realm)
    with pytest.raises(transfer.TransferError, match="localhost refers to ") as caught:
        here.fetch(with_options(tries=3))
    assert caught.value.cause is Cause.WRONG_ANSWER
    assert not here.waits()


def test_no_secret_is_in_an_event_an_error_or_a_file(here: Here, key: Path) -> None:
    here.registry.manners = Manners(
        wants="signed", signs=lambda a, url: is_signed(a, url, key), lifetime=2, uses=3
    )
    here.registry.add_fault(Fault("page", status=400, begin=6_000_000))
    with pytest.raises(transfer.TransferError) as caught:
        here.fetch(with_options(tries=2, connections=2), key=str(key))
    texts = [str(caught.value), repr(caught.value), *map(repr, here.events)]
    files = [path for path in here.path.rglob("*") if path.is_file() and path.name != "data"]
    texts += [path.read_bytes().decode("latin-1") for path in files]
    secrets = [*here.registry._tokens, *here.registry._leases, "ts=", "nonce="]
    secrets += [h["Authorization"] for _, h in here.registry.asked if "Authorization" in h]
    assert len(secrets) > 4
    for secret in secrets:
        assert not any(secret in text for text in texts)

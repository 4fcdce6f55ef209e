"""Who may: a registry's challenge, the address of its tokens, and the signature that asks for one.

The realm of registry.ollama.ai wants a signature of the user's ed25519 key; that of a plain OCI
registry does not. Tokens and signatures stay in memory.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import netrc
import os
import pwd
import re
import secrets
import time
from typing import NamedTuple
from urllib.parse import urlencode, urlsplit

import orjson

from watcher.ollama import server
from watcher.transfer.values import Cause, TryError

_PARAMETER = re.compile(r'([A-Za-z]+)="([^"]*)"')
_LONGEST_TOKEN = 64 * 1024
_LONGEST_KEY = 64 * 1024
#: What a signature covers of a body; there is none.
_NOTHING = base64.b64encode(hashlib.sha256(b"").hexdigest().encode()).decode()


class Challenge(NamedTuple):
    """What a 401 says: where tokens are handed out, for which service and which scopes."""

    realm: str
    service: str = ""
    scopes: tuple[str, ...] = ()

    def address(self, **more: str) -> str:
        """The URL that answers with a token."""
        query = [("service", self.service)] if self.service else []
        query += [("scope", scope) for scope in self.scopes]
        query += more.items()
        mark = "&" if urlsplit(self.realm).query else "?"
        return f"{self.realm}{mark}{urlencode(query)}" if query else self.realm


def usual_key() -> str:
    """The path of this user's key, whether it is there or not."""
    homes = [os.path.expanduser("~")]
    with contextlib.suppress(KeyError):
        homes.append(pwd.getpwuid(os.geteuid()).pw_dir)
    paths = [os.path.join(home, ".ollama", "id_ed25519") for home in homes]
    readable = (path for path in paths if os.access(path, os.R_OK, effective_ids=True))
    return next(readable, paths[-1])


def usual_logins() -> str:
    """The path of this user's file of logins, whether it is there or not."""
    return os.environ.get("NETRC") or os.path.expanduser("~/.netrc")


def login(url: str, logins: str) -> str:
    """The ``Authorization`` that a file of logins (netrc) has for the host of a URL; "" for none.

    Only for https and for this machine: anybody on the way could read it. Raises TryError.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if not logins or (parts.scheme != "https" and not server.is_loopback(host)):
        return ""
    try:
        found = netrc.netrc(logins).authenticators(host)
    except FileNotFoundError:
        return ""
    except (OSError, netrc.NetrcParseError) as error:
        # Its own words could quote a password.
        why = f"line {error.lineno}" if isinstance(error, netrc.NetrcParseError) else error.strerror
        text = f"{host} wants a login, and {logins} can't be read: {why}"
        raise TryError(text, Cause.NOT_ALLOWED, final=True) from None
    if found is None:
        return ""
    word = f"{found[0]}:{found[2]}"
    return f"Basic {base64.b64encode(word.encode()).decode()}"


class NoKeyError(Exception):
    """A token has to be signed for, and can't be; the text says why."""


def challenge(header: str) -> Challenge | None:
    """What a ``WWW-Authenticate`` header asks for; None where it is no Bearer token."""
    kind, _, rest = header.strip().partition(" ")
    if kind.lower() != "bearer":
        return None
    found = {name.lower(): value for name, value in _PARAMETER.findall(rest)}
    if not found.get("realm"):
        return None
    return Challenge(
        found["realm"], found.get("service", ""), tuple(found.get("scope", "").split())
    )


def token(body: bytes) -> str:
    """The token in a realm's answer; "" where there is none."""
    try:
        value = orjson.loads(body)
        found = value.get("token") or value.get("access_token")
    except (ValueError, AttributeError):
        return ""
    if not isinstance(found, str) or len(found) > _LONGEST_TOKEN or not found.isprintable():
        return ""
    return found


def signed(asked: Challenge, key: str) -> tuple[str, str]:
    """The URL that asks for a token, and the ``Authorization`` that signs it. Raises NoKeyError.

    `key`: the path of an OpenSSH private key (ed25519).
    """
    nonce = base64.urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")
    url = asked.address(ts=str(int(time.time())), nonce=nonce)
    return url, _authorization(f"GET,{url},{_NOTHING}".encode(), key)


def _authorization(text: bytes, path: str) -> str:
    if not path:
        raise NoKeyError("there is no key to sign with")
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError:
        raise NoKeyError("private models need: pip install 'ollama-watchd[private]'") from None
    try:
        with open(path, "rb") as file:
            key = serialization.load_ssh_private_key(file.read(_LONGEST_KEY), None)
    except OSError as error:
        raise NoKeyError(f"the key {path} can't be read: {error.strerror}") from None
    except Exception:
        raise NoKeyError(f"{path} is not an OpenSSH private key without a passphrase") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise NoKeyError(f"{path} is not an ed25519 key")
    openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    public = key.public_key().public_bytes(*openssh).decode().split()[1]
    return f"{public}:{base64.b64encode(key.sign(text)).decode()}"

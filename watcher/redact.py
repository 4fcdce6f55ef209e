"""No user, password or token of a URL is shown, kept or logged, whatever characters it has. Pure.

What a URL has before its last ``@`` is its credential. Passwords that should have been escaped hold
slashes, colons and blanks, and whoever reads such a URL quotes it in the error.
"""

from __future__ import annotations

import re

_HIDDEN = "***@"
_SCHEME = "[A-Za-z][A-Za-z0-9+.-]*://"
#: Up to the last ``@`` of the same word: a password may have one of its own.
_IN_WORD = re.compile(rf"({_SCHEME})\S*@")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
#: An address without a scheme, as a proxy's may be.
_BARE = re.compile(r"(?<![^\s\"'(=])[^\s\"':@/]+:(?!//)[^\s\"']*@")
#: What Go and Python take for the port of such an address is a piece of its password.
_FRAGMENT = re.compile(
    r"((?:invalid port|invalid URL escape|integer value as|nonnumeric port:) ?)"
    r"""(?:"[^"]*"|'[^']*'|\S+)"""
)
#: What stands behind the ``?`` of a URL may be a signature that opens it.
_QUERY = re.compile(rf"({_SCHEME}[^\s\"'?]*\?)[^\s\"']+")


def urls(text: str) -> str:
    """A text of ours, which may name URLs that people have given."""
    return _IN_WORD.sub(rf"\1{_HIDDEN}", text) if "@" in text else text


def foreign(text: str) -> str:
    """A text of a server or a registry, which may quote any of their addresses, and how."""
    text = _FRAGMENT.sub(r"\1...", text)
    if "@" in text:
        text = _BARE.sub(_HIDDEN, urls(_QUOTED.sub(_inside, text)))
    return _QUERY.sub(r"\1...", text)


def _inside(quoted: re.Match[str]) -> str:
    """What is quoted is one address as a whole, blanks and all, where it has an ``@``."""
    text = quoted[1]
    if "@" not in text:
        return quoted[0]
    scheme = re.match(_SCHEME, text)
    return f'"{scheme[0] if scheme else ""}{_HIDDEN}{text.rpartition("@")[2]}"'

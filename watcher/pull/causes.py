"""Why a pull failed, told by the server's words, and what helps. Pure.

The words are those of Ollama's ``server/download.go`` and ``server/images.go``, and of Go's ``net``
and ``syscall``, as the server streams them in ``{"error": …}``.
"""

from __future__ import annotations

import enum
import re


class Cause(enum.StrEnum):
    """What is in the way."""

    NO_MODEL = "no_model"
    NO_PERMISSION = "no_permission"
    INSECURE = "insecure"
    STORE = "store"
    DISK_FULL = "disk_full"
    NO_NETWORK = "no_network"
    OVERLOADED = "overloaded"
    RESETS = "resets"
    MISMATCH = "mismatch"
    BLOCKED = "blocked"
    CANCELLED = "cancelled"
    SERVER_GONE = "server_gone"
    SILENCE = "silence"
    INTERRUPTED = "interrupted"
    UNKNOWN = "unknown"

    @property
    def passes(self) -> bool:
        """Whether another try may end well by itself."""
        return self not in _LASTING

    @property
    def step(self) -> str:
        """What helps."""
        return _STEPS[self]


_LASTING = frozenset(
    {
        Cause.NO_MODEL,
        Cause.NO_PERMISSION,
        Cause.INSECURE,
        Cause.STORE,
        Cause.DISK_FULL,
        Cause.INTERRUPTED,
    }
)

_STEPS = {
    Cause.NO_MODEL: "look at its spelling and its tag; what there is: https://ollama.com/search",
    Cause.INSECURE: "its registry has no valid certificate, or none at all: --insecure",
    Cause.NO_PERMISSION: "sign in (ollama signin), or ask its owner for access",
    Cause.STORE: "the server's user must own the store: see ollama-watch audit",
    Cause.DISK_FULL: "make room: ollama-watch df, ollama-watch clean, ollama rm",
    Cause.NO_NETWORK: "check the network and the proxy of the server",
    Cause.OVERLOADED: "try again later: the registry has too much to do",
    Cause.RESETS: "the network breaks connections off: --until-done tries on and on",
    Cause.MISMATCH: "what had come was damaged and is thrown away; pull it again",
    Cause.BLOCKED: "ollama-watch repair, then pull it again",
    Cause.CANCELLED: "pull it again",
    Cause.SERVER_GONE: "start the server: systemctl start ollama, or ollama serve",
    Cause.SILENCE: "nothing came for long: check the network, and pull it again",
    Cause.INTERRUPTED: "pull it again to go on",
    Cause.UNKNOWN: "see the server's log: journalctl -u ollama",
}

#: What stands before an HTTP status; paths and ports may have the same digits.
_STATUS = "(^|: |status code |answers )"

#: In this order: the first that is found is the cause.
_WORDS = (
    (Cause.DISK_FULL, "no space left on device|disk quota exceeded"),
    (Cause.MISMATCH, "digest mismatch"),
    (
        Cause.INSECURE,
        "server gave HTTP response to HTTPS client|insecure protocol http|x509|certificate",
    ),
    (Cause.NO_MODEL, "manifest: file does not exist|manifest unknown|model .* not found|: 404:"),
    (
        Cause.NO_PERMISSION,
        f"unauthorized|access denied|{_STATUS}40[13](:|$)|forbidden|signed in|signin",
    ),
    (Cause.STORE, "(open|create|chmod|rename|remove|mkdir) .*: (permission denied|read-only)"),
    (
        Cause.NO_NETWORK,
        (
            "no such host|dial tcp|network is unreachable|no route to host|TLS handshake"
            "|server misbehaving|proxyconnect"
        ),
    ),
    (Cause.OVERLOADED, f"{_STATUS}(429|50[0234])(:|$)|too many requests|service unavailable"),
    (
        Cause.RESETS,
        (
            "max retries exceeded|connection reset|broken pipe|unexpected EOF|part stalled"
            "|i/o timeout|deadline exceeded|INTERNAL_ERROR|stream error"
        ),
    ),
    (Cause.BLOCKED, "^(Error: )?EOF$|no such file or directory|invalid character|cannot unmarshal"),
    (Cause.CANCELLED, "context canceled"),
)


def of_error(text: str) -> Cause:
    """The cause that the server's error tells."""
    for cause, words in _WORDS:
        if re.search(words, text, re.IGNORECASE):
            return cause
    return Cause.UNKNOWN

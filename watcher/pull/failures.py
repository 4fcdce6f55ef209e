"""Why a pull failed, told by the server's words, what helps, and whether another try can.

The words are those of Ollama's ``server/download.go``, ``server/images.go``, ``server/auth.go`` and
``x/transfer``, and of Go's ``net``, ``os`` and ``syscall``, as the server streams them in
``{"error": …}``.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple
from urllib.parse import urlsplit

from watcher.observe import unit
from watcher.ollama import names, server
from watcher.system import advice


class Again(enum.Enum):
    """When another try may end better by itself."""

    SOON = "soon"
    #: Not before somebody does something about the network; nobody tells us of that.
    HOURLY = "hourly"
    NEVER = "never"


class Asked(NamedTuple):
    """What was pulled, where and how, as a command for it needs that."""

    model: str
    #: The server's address; "" for the usual one.
    url: str = ""
    #: The store that was named or found here; "" where there is none.
    store: str = ""
    #: How it was found; see `observe.place`.
    found_by: str = ""
    #: Options of `pull`.
    options: tuple[str, ...] = ()
    #: It is that server's store.
    is_its: bool = True


class Cause(enum.StrEnum):
    """What is in the way."""

    NO_MODEL = "no_model"
    NO_LAYER = "no_layer"
    BAD_NAME = "bad_name"
    BAD_MANIFEST = "bad_manifest"
    OLD_SERVER = "old_server"
    UNSUPPORTED = "unsupported"
    REFUSED = "refused"
    LEGAL = "legal"
    REALM = "realm"
    BAD_ADDRESS = "bad_address"
    NO_PERMISSION = "no_permission"
    SERVER_KEY = "server_key"
    INSECURE = "insecure"
    CERTIFICATE = "certificate"
    PORTAL = "portal"
    PROXY = "proxy"
    STORE = "store"
    DISK_FULL = "disk_full"
    FILE_TOO_LARGE = "file_too_large"
    READ_ONLY = "read_only"
    NOT_PERMITTED = "not_permitted"
    DISK_FAILS = "disk_fails"
    FILE_SYSTEM = "file_system"
    NO_NETWORK = "no_network"
    OVERLOADED = "overloaded"
    RESETS = "resets"
    MISMATCH = "mismatch"
    BLOCKED = "blocked"
    CANCELLED = "cancelled"
    SERVER_GONE = "server_gone"
    SILENCE = "silence"
    #: A layer is not what its name says, and could not be replaced.
    DAMAGED = "damaged"
    #: The model is here; whether it is right could not be told.
    UNVERIFIED = "unverified"
    INTERRUPTED = "interrupted"
    FAULT = "fault"
    UNKNOWN = "unknown"

    @property
    def again(self) -> Again:
        """When another try may end well by itself."""
        return _ROWS[self].again

    @property
    def passes(self) -> bool:
        """Whether a try a little later may end well by itself."""
        return self.again is Again.SOON

    @property
    def step(self) -> str:
        """What helps."""
        return _ROWS[self].step

    def command(self, asked: Asked) -> str:
        """The step as a command for who called this process; "" where none helps by itself."""
        if self in _PULLED_AGAIN:
            return _pull(asked, *_PULLED_AGAIN[self])
        if self is Cause.OLD_SERVER:
            return _INSTALLS if _is_here(asked) else ""
        if self is Cause.NO_PERMISSION:
            return _sign_in(asked)
        if not _is_here(asked):
            return ""
        has_store = asked.is_its and bool(asked.store)
        if self is Cause.NOT_PERMITTED:
            return advice.as_root("lsattr", "-R", asked.store) if has_store else ""
        if self in _ON_THE_STORE:
            does = _ON_THE_STORE[self]
            return advice.on(asked.store, asked.found_by, does) if has_store else ""
        by_unit = self not in _OF_UNIT or unit.serves(asked.url)
        return advice.as_root(*_BY_ROOT[self]) if self in _BY_ROOT and by_unit else ""

    @property
    def awaited(self) -> str:
        """What another try waits for; "" where there is none."""
        return _ROWS[self].awaited


class _Row(NamedTuple):
    again: Again
    step: str
    awaited: str = ""


_SOON, _HOURLY, _NEVER = Again
_ROWS = {
    Cause.NO_MODEL: _Row(
        _NEVER, "look at its spelling and its tag; what there is: https://ollama.com/search"
    ),
    Cause.NO_LAYER: _Row(
        _NEVER, "its registry lacks a part of it: choose another tag of the model"
    ),
    Cause.BAD_NAME: _Row(_NEVER, "write the name as https://ollama.com/search shows it"),
    Cause.BAD_MANIFEST: _Row(
        _HOURLY, "the registry's manifest of it is wrong: choose another tag of the model"
    ),
    Cause.OLD_SERVER: _Row(_NEVER, "the model needs a newer Ollama: update the server"),
    Cause.UNSUPPORTED: _Row(_NEVER, "this server can't run it: choose another tag of the model"),
    Cause.REFUSED: _Row(_NEVER, "the registry does not accept the request: check the model's name"),
    Cause.LEGAL: _Row(_NEVER, "the registry may not hand it out here: choose another model"),
    Cause.REALM: _Row(
        _NEVER, "name the registry by the host that it hands out its tokens at (its realm)"
    ),
    Cause.BAD_ADDRESS: _Row(
        _NEVER, "check the registry's address in the name, and HTTPS_PROXY of the server"
    ),
    Cause.NO_PERMISSION: _Row(_NEVER, "sign in, or ask the model's owner for access"),
    Cause.SERVER_KEY: _Row(
        _NEVER, "restart the server, which makes a missing key; one it can't read, remove"
    ),
    Cause.INSECURE: _Row(_NEVER, "its registry speaks plain http: allow that"),
    Cause.CERTIFICATE: _Row(
        _NEVER, "have the server's machine trust who signed the registry's certificate"
    ),
    Cause.PORTAL: _Row(
        _HOURLY, "a web page answers: sign in to the network, or check the server's proxy"
    ),
    Cause.PROXY: _Row(_HOURLY, "set the proxy's user and password in HTTPS_PROXY of the server"),
    Cause.STORE: _Row(
        _NEVER, "the server's user must own the store; the audit says what is not so"
    ),
    Cause.DISK_FULL: _Row(_NEVER, "make room: see where the space is, clean up, or remove a model"),
    Cause.FILE_TOO_LARGE: _Row(
        _NEVER, "move the store to ext4 or xfs, or raise LimitFSIZE of the server's unit"
    ),
    Cause.READ_ONLY: _Row(_NEVER, "mount it for writing; the kernel's log says why it is not"),
    Cause.NOT_PERMITTED: _Row(
        _NEVER, "find what is immutable in the store, an i beside it, and take that off (chattr)"
    ),
    Cause.DISK_FAILS: _Row(
        _NEVER, "the disk fails: see the kernel's log, and copy what is there elsewhere"
    ),
    Cause.FILE_SYSTEM: _Row(_NEVER, "its file system can't do that: move the store to ext4 or xfs"),
    Cause.NO_NETWORK: _Row(_SOON, "check the network and the proxy of the server", "the network"),
    Cause.OVERLOADED: _Row(
        _SOON, "try again later: the registry has too much to do", "the registry"
    ),
    Cause.RESETS: _Row(_SOON, "the network breaks connections off: try on and on", "the network"),
    Cause.MISMATCH: _Row(
        _SOON, "what had come was damaged and is thrown away; pull it again", "the registry"
    ),
    Cause.BLOCKED: _Row(_SOON, "repair it, then pull it again", "the server"),
    Cause.CANCELLED: _Row(_SOON, "pull it again", "the server"),
    Cause.SERVER_GONE: _Row(_SOON, "start the server", "the server"),
    Cause.SILENCE: _Row(
        _SOON, "nothing came for long: check the network, and pull it again", "the network"
    ),
    Cause.DAMAGED: _Row(_NEVER, "the repair says what would have it fetched again"),
    Cause.UNVERIFIED: _Row(
        _NEVER, "verify it on the machine and as the user that can read the store"
    ),
    Cause.INTERRUPTED: _Row(_NEVER, "pull it again to go on"),
    Cause.FAULT: _Row(_SOON, "a fault of ollama-watch: pull it again with -v", "a retry"),
    Cause.UNKNOWN: _Row(_SOON, "see the server's log", "the server"),
}

#: What is done about the store.
_ON_THE_STORE = {
    Cause.STORE: "audit",
    Cause.DISK_FULL: "df",
    Cause.BLOCKED: "repair",
    Cause.DAMAGED: "repair",
    Cause.UNVERIFIED: "verify",
}
#: What only root may run.
_BY_ROOT = {
    Cause.SERVER_KEY: ("systemctl", "restart", "ollama"),
    Cause.SERVER_GONE: ("systemctl", "start", "ollama"),
    Cause.READ_ONLY: ("dmesg",),
    Cause.DISK_FAILS: ("dmesg",),
    Cause.UNKNOWN: ("journalctl", "-u", "ollama"),
}
_OF_UNIT = frozenset({Cause.SERVER_KEY, Cause.SERVER_GONE, Cause.UNKNOWN})
#: What is pulled once more, with which options besides.
_PULLED_AGAIN: dict[Cause, tuple[str, ...]] = {
    Cause.INSECURE: ("--insecure",),
    Cause.RESETS: ("--until-done",),
    Cause.OVERLOADED: (),
    Cause.MISMATCH: (),
    Cause.CANCELLED: (),
    Cause.SILENCE: (),
    Cause.INTERRUPTED: (),
}
_INSTALLS = "curl -fsSL https://ollama.com/install.sh | sh"


def _is_here(asked: Asked) -> bool:
    return not asked.url or server.is_loopback(urlsplit(asked.url).netloc)


def _pull(asked: Asked, *more: str) -> str:
    """The command that pulls it again, with these options besides."""
    options = dict.fromkeys((*asked.options, *more))
    host = ("--host", asked.url) if asked.url else ()
    store = "" if asked.found_by in advice.FOUND_AGAIN else asked.store
    return advice.ours("pull", *options, *host, asked.model, store=store)


def _sign_in(asked: Asked) -> str:
    """The command that gives the server's key to an account; other registries have their ways."""
    model = names.parse_model(asked.model)
    if model is None or model.host.lower() != names.DEFAULT_HOST:
        return ""
    where = f"OLLAMA_HOST={advice.quoted(asked.url)} " if asked.url else ""
    return f"{where}ollama signin"


#: Go wraps an error in what was being done. What stands in a registry's own text tells nothing.
_WRAPPED = r"^(?:error: |pull model manifest: |max retries exceeded: )*"
#: ``412: <body>``; the transfer path says ``status 412``, and our own stream what a server answers.
_STATUS = re.compile(
    _WRAPPED
    + r"(?:(?:unexpected )?status (?:code )?|(?:the server|\S+) answers )?"
    + r"(?P<status>[1-5][0-9]{2})(?:$|:|(?P<layer> for layer ))",
    re.IGNORECASE,
)
_OF_STATUS = {
    401: Cause.NO_PERMISSION,
    403: Cause.NO_PERMISSION,
    404: Cause.NO_MODEL,
    407: Cause.PROXY,
    408: Cause.OVERLOADED,
    410: Cause.NO_MODEL,
    412: Cause.OLD_SERVER,
    425: Cause.OVERLOADED,
    429: Cause.OVERLOADED,
    451: Cause.LEGAL,
    511: Cause.PORTAL,
}

#: What goes over the network has the same reasons as the disk: a firewall says that an operation is
#: not permitted, too.
_NETWORK = re.compile(r'\b(?:dial|read|write) (?:tcp|udp|unix)|\blookup |"https?://|\bconnect: ')
_TRAVERSABLE = ": ensure path elements are traversable"
#: The reasons of the disk as the kernel gives them, in the words of Go's ``syscall``.
_DISK = {
    "no space left on device": Cause.DISK_FULL,
    "disk quota exceeded": Cause.DISK_FULL,
    "file too large": Cause.FILE_TOO_LARGE,
    "read-only file system": Cause.READ_ONLY,
    "operation not permitted": Cause.NOT_PERMITTED,
    "input/output error": Cause.DISK_FAILS,
    "structure needs cleaning": Cause.DISK_FAILS,
    "bad message": Cause.DISK_FAILS,
    "no such device": Cause.DISK_FAILS,
    "no such device or address": Cause.DISK_FAILS,
    "remote i/o error": Cause.DISK_FAILS,
    "stale file handle": Cause.DISK_FAILS,
    "stale nfs file handle": Cause.DISK_FAILS,
    "transport endpoint is not connected": Cause.DISK_FAILS,
    "key has expired": Cause.STORE,
    "required key not available": Cause.STORE,
    "invalid argument": Cause.FILE_SYSTEM,
    "operation not supported": Cause.FILE_SYSTEM,
    "not supported": Cause.FILE_SYSTEM,
    "function not implemented": Cause.FILE_SYSTEM,
    "value too large for defined data type": Cause.FILE_SYSTEM,
    "invalid cross-device link": Cause.FILE_SYSTEM,
    "file name too long": Cause.FILE_SYSTEM,
    "permission denied": Cause.STORE,
    "not a directory": Cause.STORE,
    "is a directory": Cause.STORE,
    "file exists": Cause.STORE,
    "directory not empty": Cause.STORE,
    "too many levels of symbolic links": Cause.STORE,
    "syntax error in pattern": Cause.STORE,
}

#: In this order: the first that is found is the cause.
_WORDS = tuple(
    (cause, re.compile(words, re.IGNORECASE | re.DOTALL))
    for cause, words in (
        # Our own words, as they stand in records.
        (Cause.PORTAL, "answers with a web page"),
        (Cause.DISK_FULL, "are missing, and the disk has"),
        (Cause.FILE_TOO_LARGE, "than this file system lets a file have|LimitFSIZE of the server"),
        (Cause.READ_ONLY, "is mounted read-only$"),
        (Cause.SERVER_GONE, "^the server at \\S+: "),
        (Cause.SILENCE, "^nothing came for "),
        (Cause.RESETS, "were lost with a broken connection"),
        (Cause.MISMATCH, "digest mismatch"),
        (Cause.REALM, "realm host .* does not match"),
        (
            Cause.SERVER_KEY,
            "id_ed25519: |ssh: no key found|malformed public key|ssh: (cannot|unsupported)",
        ),
        (
            Cause.INSECURE,
            (
                "server gave HTTP response to HTTPS client|insecure protocol http"
                "|tls: first record does not look like"
            ),
        ),
        (Cause.CERTIFICATE, "x509|certificate|remote error: tls"),
        # What a proxy says to CONNECT stands bare behind the address.
        (
            Cause.PROXY,
            (
                "Proxy Authentication Required"
                '|[a-z]+ "https?://[^"]*": (Forbidden|Method Not Allowed|Not Found|Bad Request)$'
            ),
        ),
        (
            Cause.BAD_ADDRESS,
            (
                "unsupported protocol|missing protocol scheme|malformed HTTP|invalid port"
                "|invalid URL|no Host in request URL|invalid control character in URL"
                "|maximum redirects exceeded"
                r"|stopped after \d+ redirects|too many redirects|no Location header|no such port"
                "|first path segment in URL|unknown port"
            ),
        ),
        (Cause.PORTAL, "^(error: )?pull model manifest: invalid character '<'"),
        (
            Cause.BAD_MANIFEST,
            (
                "^(error: )?pull model manifest: (invalid character|json: |unexpected end of JSON)"
                "|digest is empty|invalid digest format|size mismatch|^its manifest is wrong: "
            ),
        ),
        (
            Cause.NO_MODEL,
            "manifest: file does not exist|manifest unknown|model .* not found",
        ),
        (Cause.NO_LAYER, _WRAPPED + "file does not exist$"),
        (
            Cause.BAD_NAME,
            (
                "invalid model name|unqualified name|model is required|missing request body"
                "|either :local or :cloud|invalid name"
            ),
        ),
        (Cause.UNSUPPORTED, "requires MLX|MLX runtime|cloud is disabled"),
        (Cause.NO_PERMISSION, "unauthorized|access denied|forbidden|signed in|signin"),
        (
            Cause.NO_NETWORK,
            (
                "no such host|dial tcp|network is unreachable|no route to host|TLS handshake"
                "|server misbehaving|proxyconnect|socks connect|name resolution"
            ),
        ),
        (
            Cause.OVERLOADED,
            "too many requests|service unavailable|bad gateway|gateway timeout",
        ),
        (
            Cause.RESETS,
            (
                "max retries exceeded|connection reset|broken pipe|unexpected EOF|part stalled"
                "|i/o timeout|deadline exceeded|INTERNAL_ERROR|stream error"
                "|download (stalled|too slow)|transport connection broken"
                "|server closed idle connection|GOAWAY"
                "|Client.Timeout|use of closed network connection"
                '|^(error: |pull model manifest: )*[a-z]+ "https?://[^"]*": EOF$'
            ),
        ),
        (
            Cause.BLOCKED,
            (
                "^(Error: )?EOF$|no such file or directory|invalid character|cannot unmarshal"
                "|unexpected end of JSON"
            ),
        ),
        (Cause.CANCELLED, "context canceled"),
    )
)


def of_error(text: str) -> Cause:
    """The cause that the server's error tells."""
    if told := _STATUS.match(text):
        of_layer = bool(told["layer"]) or "max retries exceeded" in told[0].lower()
        return of_status(int(told["status"]), of_layer=of_layer)
    if "id_ed25519" not in text and not _NETWORK.search(text):
        # As in ``write /m/blobs/…: file too large``; the path may be anything.
        on_disk = _DISK.get(text.removesuffix(_TRAVERSABLE).rpartition(": ")[2].lower())
        if on_disk is not None:
            return on_disk
    for cause, words in _WORDS:
        if words.search(text):
            return cause
    return Cause.UNKNOWN


def of_status(status: int, *, of_layer: bool) -> Cause:
    """The cause that an HTTP status of a registry tells, asked for a layer or for the manifest."""
    if of_layer and status in (404, 410):
        return Cause.NO_LAYER
    usual = Cause.OVERLOADED if status >= 500 else Cause.REFUSED
    return _OF_STATUS.get(status, usual)


def hides_why(text: str) -> bool:
    """Whether the server has given up without saying what the registry answers.

    It asks for a layer's address again for 30 s whatever the answer is, and takes an error page for
    data that ends too soon (``server/download.go``).
    """
    return bool(_HIDES.match(text))


_HIDES = re.compile(_WRAPPED + "(context deadline exceeded|EOF|unexpected EOF)$", re.IGNORECASE)

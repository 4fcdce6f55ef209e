"""Why a pull failed, by the words of the server's error, what helps, and whether a retry can.

The words are those of Ollama's ``server/download.go``, ``server/images.go``, ``server/auth.go`` and
``x/transfer``, and of Go's ``net``, ``os`` and ``syscall``, as the server streams them in
``{"error": …}``; and our own, as they stand in records.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

from watcher.observe import unit
from watcher.ollama import names, server
from watcher.system import advice


class Asked(NamedTuple):
    """What was pulled, where and how: what a command for it needs."""

    model: str
    url: str = ""  #: the server's address; "" for the usual one
    store: str = ""  #: the store that was named or found; "" for none
    found_by: str = ""  #: how it was found; see `observe.place`
    options: tuple[str, ...] = ()  #: options of `pull`
    is_its: bool = True  #: it is that server's store

    @property
    def is_here(self) -> bool:
        return not self.url or server.is_loopback(urlsplit(self.url).netloc)

    @property
    def its_store(self) -> str:
        """The store, where it is that of a server on this machine; else ""."""
        return self.store if self.is_here and self.is_its else ""

    def pull_again(self, *more: str) -> str:
        """The command that pulls it again, with these options besides."""
        options = dict.fromkeys((*self.options, *more))
        host = ("--host", self.url) if self.url else ()
        store = "" if self.found_by in advice.FOUND_AGAIN else self.store
        return advice.ours("pull", *options, *host, self.model, store=store)

    def on_store(self, *words: str) -> str:
        """A command of ours on the store of a server on this machine."""
        return advice.on(self.its_store, self.found_by, *words) if self.its_store else ""

    def by_root(self, *words: str, of_unit: bool = False) -> str:
        """What root runs on that machine; `of_unit`: where systemd's unit is the server."""
        works = self.is_here and (not of_unit or unit.serves(self.url))
        return advice.as_root(*words) if works else ""

    def install(self) -> str:
        return "curl -fsSL https://ollama.com/install.sh | sh" if self.is_here else ""

    def sign_in(self) -> str:
        model = names.parse_model(self.model)
        if model is None or model.host.lower() != names.DEFAULT_HOST:
            return ""
        where = f"OLLAMA_HOST={advice.quoted(self.url)} " if self.url else ""
        return f"{where}ollama signin"


Command = Callable[[Asked], str]


class _Row(NamedTuple):
    #: What helps, and the command for it.
    step: str
    command: Command = lambda _: ""
    #: What another attempt a little later waits for; "" where none ends better by itself.
    awaited: str = ""
    #: It may end better once somebody changes something about the network; no event reports that.
    hourly: bool = False
    statuses: tuple[int, ...] = ()  #: HTTP statuses of a registry
    #: Reasons of the kernel at the end of an error, in the words of Go's ``syscall``.
    disk: tuple[str, ...] = ()
    words: tuple[str, ...] = ()  #: patterns that an error may match


#: Go wraps an error in what was being done. The text of a registry itself means nothing.
_WRAPPED = r"^(?:error: |pull model manifest: |max retries exceeded: )*"


class Cause(_Row, enum.Enum):
    """The kinds of failure. The first whose words match an error is its cause."""

    @property
    def code(self) -> str:
        """Its name in records, events and errors."""
        return self.name.lower()

    SERVER_GONE = _Row(
        "start the server",
        lambda asked: asked.by_root("systemctl", "start", "ollama", of_unit=True),
        "the server",
        words=(r"^the server at \S+: ",),
    )
    PORTAL = _Row(
        "a web page answers: sign in to the network, or check the server's proxy",
        hourly=True,
        statuses=(511,),
        words=(
            "answer(s|ed) with a web page",
            "^(error: )?pull model manifest: invalid character '<'",
        ),
    )
    DISK_FULL = _Row(
        "free space: run df, clean, or remove a model",
        lambda asked: asked.on_store("df"),
        disk=("no space left on device", "disk quota exceeded"),
        words=("and the disk has", "but the disk has only"),
    )
    FILE_TOO_LARGE = _Row(
        "move the store to ext4 or xfs, or raise LimitFSIZE of the server's unit",
        disk=("file too large",),
        words=("than this file system (allows for|lets) a file", "LimitFSIZE of the server"),
    )
    READ_ONLY = _Row(
        "mount it writable; the kernel's log says why it is not",
        lambda asked: asked.by_root("dmesg"),
        disk=("read-only file system",),
        words=("is mounted read-only$",),
    )
    SILENCE = _Row(
        "no bytes arrive: check the network, and pull it again",
        Asked.pull_again,
        "the network",
        words=("^(nothing came|no bytes|the connection was silent) for ",),
    )
    #: They came twice.
    OTHER_BYTES = _Row(
        "choose another tag of the model, or report it to its publisher; reset it",
        lambda asked: asked.on_store("reset", asked.model),
        words=("serves other bytes than its manifest names",),
    )
    MISMATCH = _Row(
        "the received data was damaged and discarded: pull it again",
        Asked.pull_again,
        "the registry",
        words=("(digest|checksum) mismatch",),
    )
    REALM = _Row(
        "name the registry by the host of its realm, which hands out its tokens",
        words=('realm host "[^"]+" does not match',),
    )
    SERVER_KEY = _Row(
        "restart the server, which makes a missing key; remove one that it can't read",
        lambda asked: asked.by_root("systemctl", "restart", "ollama", of_unit=True),
        words=("id_ed25519: |ssh: no key found|malformed public key|ssh: (cannot|unsupported)",),
    )
    INSECURE = _Row(
        "the registry speaks plain http: use --insecure to allow it",
        lambda asked: asked.pull_again("--insecure"),
        words=(
            "server gave HTTP response to HTTPS client",
            "insecure protocol http",
            "tls: first record does not look like",
        ),
    )
    CERTIFICATE = _Row(
        "make the server's machine trust the signer of the registry's certificate",
        words=("x509|certificate|remote error: tls",),
    )
    PROXY = _Row(
        "set the proxy's user and password in https_proxy (or http_proxy) of who pulls",
        hourly=True,
        statuses=(407,),
        words=(
            "Proxy Authentication Required|response 407",
            # A proxy's answer to CONNECT stands bare behind the address.
            '[a-z]+ "https?://[^"]*": (Forbidden|Method Not Allowed|Not Found|Bad Request)$',
        ),
    )
    BAD_ADDRESS = _Row(
        "check the registry's address in the name, and HTTPS_PROXY of the server",
        words=(
            "unsupported protocol|missing protocol scheme|malformed HTTP|invalid port",
            "invalid URL|no Host in request URL|invalid control character in URL",
            r"maximum redirects exceeded|stopped after \d+ redirects|too many redirects",
            "no Location header|no such port|first path segment in URL|unknown port",
            r"^\S+ refers to ",
        ),
    )
    BAD_MANIFEST = _Row(
        "the registry's manifest of it is invalid: choose another tag of the model",
        hourly=True,
        words=(
            "^(error: )?pull model manifest: (invalid character|json: |unexpected end of JSON)",
            "digest is empty|invalid digest format|size mismatch",
            "^its manifest is (wrong|invalid): ",
        ),
    )
    NO_MODEL = _Row(
        "check its spelling and tag: https://ollama.com/search",
        statuses=(404, 410),
        words=("manifest: file does not exist|manifest unknown|model .* not found",),
    )
    NO_LAYER = _Row(
        "the registry lacks a layer of it: choose another tag of the model",
        words=(_WRAPPED + "file does not exist$",),
    )
    #: A server keeps to the length that it has heard first, also when the registry is mended.
    WRONG_LENGTH = _Row(
        "the registry announces a wrong length: forget the download, pull it later",
        lambda asked: asked.on_store("reset", asked.model),
        words=(r"^\S+ (announces|has) [\d,]+ bytes of layer ",),
    )
    BAD_NAME = _Row(
        "write the name as https://ollama.com/search shows it",
        words=(
            "invalid model name|unqualified name|model is required|missing request body",
            "either :local or :cloud|invalid name",
        ),
    )
    UNSUPPORTED = _Row(
        "this server can't run it: choose another tag of the model",
        words=("requires MLX|MLX runtime|cloud is disabled",),
    )
    NO_PERMISSION = _Row(
        "sign in, or ask the model's owner for access",
        Asked.sign_in,
        statuses=(401, 403),
        # A registry that refuses without a word on where its tokens are has the realm "".
        words=(
            'realm host ""|unauthorized|access denied|forbidden|signed in|signin',
            "wants a signature",
        ),
    )
    NO_NETWORK = _Row(
        "check the network and the proxy of the server",
        awaited="the network",
        words=(
            "no such host|dial tcp|network is unreachable|no route to host|TLS handshake",
            "server misbehaving|proxyconnect|socks connect|name resolution",
            "could not resolve|could(n't| not) connect|failed to connect|connection timed out",
        ),
    )
    OVERLOADED = _Row(
        "the registry is overloaded: try again later",
        Asked.pull_again,
        "the registry",
        statuses=(408, 425, 429),
        words=("too many requests|service unavailable|bad gateway|gateway timeout",),
    )
    RESETS = _Row(
        "the network resets connections: retry without limit",
        lambda asked: asked.pull_again("--until-done"),
        "the network",
        words=(
            "lost with a broken connection|a broken connection lost",
            "max retries exceeded|connection reset|broken pipe|unexpected EOF|part stalled",
            "i/o timeout|deadline exceeded|INTERNAL_ERROR|stream error",
            "download (stalled|too slow)|transport connection broken",
            "server closed idle connection|GOAWAY",
            "Client.Timeout|use of closed network connection",
            '^(error: |pull model manifest: )*[a-z]+ "https?://[^"]*": EOF$',
        ),
    )
    BLOCKED = _Row(
        "repair it, then pull it again",
        lambda asked: asked.on_store("repair"),
        "the server",
        words=(
            "^(Error: )?EOF$|no such file or directory|invalid character|cannot unmarshal",
            "unexpected end of JSON",
        ),
    )
    CANCELLED = _Row("pull it again", Asked.pull_again, "the server", words=("context canceled",))
    OLD_SERVER = _Row(
        "the model needs a newer Ollama: update the server", Asked.install, statuses=(412,)
    )
    REFUSED = _Row("the registry does not accept the request: check the model's name")
    LEGAL = _Row("the registry may not provide it here: choose another model", statuses=(451,))
    STORE = _Row(
        "the server's user must own the store: the audit shows what is wrong",
        lambda asked: asked.on_store("audit"),
        disk=(
            *("key has expired", "required key not available", "permission denied"),
            *("not a directory", "is a directory", "file exists", "directory not empty"),
            *("too many levels of symbolic links", "syntax error in pattern"),
        ),
    )
    NOT_PERMITTED = _Row(
        "files of the store are immutable (an i beside them): remove that flag (chattr)",
        lambda asked: asked.its_store and asked.by_root("lsattr", "-R", asked.its_store),
        disk=("operation not permitted",),
    )
    DISK_FAILS = _Row(
        "the disk is failing: check dmesg, and copy your data elsewhere",
        lambda asked: asked.by_root("dmesg"),
        disk=(
            *("input/output error", "structure needs cleaning", "bad message"),
            *("no such device", "no such device or address", "remote i/o error"),
            *("stale file handle", "stale nfs file handle"),
            "transport endpoint is not connected",
        ),
    )
    FILE_SYSTEM = _Row(
        "its file system can't do that: move the store to ext4 or xfs",
        disk=(
            *("invalid argument", "operation not supported", "not supported"),
            *("function not implemented", "value too large for defined data type"),
            *("invalid cross-device link", "file name too long"),
        ),
    )
    #: A layer does not match its name, and can't be replaced.
    DAMAGED = _Row(
        "see what the repair reports; if nothing, choose another tag of the model",
        lambda asked: asked.on_store("repair"),
    )
    #: The model is complete, but not every layer could be hashed.
    UNVERIFIED = _Row(
        "verify it on the server's machine, as a user who can read the store",
        lambda asked: asked.on_store("verify"),
    )
    INTERRUPTED = _Row("pull it again to resume", Asked.pull_again)
    FAULT = _Row("a bug in ollama-watch: pull it again with -v", awaited="a retry")
    UNKNOWN = _Row(
        "see the server's log",
        lambda asked: asked.by_root("journalctl", "-u", "ollama", of_unit=True),
        "the server",
    )

    @property
    def passes(self) -> bool:
        """Whether an attempt a little later may end well by itself."""
        return bool(self.awaited)


_OF_STATUS = {status: cause for cause in Cause for status in cause.statuses}
#: What a status means for a layer, where that is something else.
_OF_LAYER = {404: Cause.NO_LAYER, 410: Cause.NO_LAYER, 416: Cause.DAMAGED}
_ON_DISK = {reason: cause for cause in Cause for reason in cause.disk}
_WORDS = {
    cause: re.compile("|".join(cause.words), re.IGNORECASE | re.DOTALL)
    for cause in Cause
    if cause.words
}


class End(NamedTuple):
    """How a request, or the whole pull, ended; no cause where the model is complete."""

    cause: Cause | None = None
    text: str = ""
    step: str = ""  #: what helps, where that is more than its cause's own step


#: ``412: <body>`` of a layer, and behind ``pull model manifest:`` of the manifest; the transfer
#: path has ``status 412``; ours are ``… answered 412 for layer …`` and ``the server answers 412``.
_STATUS = re.compile(
    _WRAPPED
    + r"(?:(?:unexpected )?status (?:code )?|(?P<by>the server|\S+) answer(?:s|ed) )?"
    + r"(?P<status>[1-5][0-9]{2})(?:$|:| for layer )",
    re.IGNORECASE,
)
#: The network has the same reasons as the disk: a firewall's is "operation not permitted", too.
_NETWORK = re.compile(r'\b(?:dial|read|write) (?:tcp|udp|unix)|\blookup |"https?://|\bconnect: ')
_TRAVERSABLE = ": ensure path elements are traversable"


def of_error(text: str) -> Cause:
    """The cause of an error of the server's, or of ours."""
    if found := _STATUS.match(text):
        before = found[0].lower()
        of_layer = "pull model manifest: " not in before and found["by"] != "the server"
        return of_status(int(found["status"]), of_layer=of_layer)
    if "id_ed25519" not in text and not _NETWORK.search(text):
        # As in ``write /m/blobs/…: file too large``; the path may be anything.
        reason = text.removesuffix(_TRAVERSABLE).rpartition(": ")[2].lower()
        if reason in _ON_DISK:
            return _ON_DISK[reason]
    matching = (cause for cause, words in _WORDS.items() if words.search(text))
    return next(matching, Cause.UNKNOWN)


def of_status(status: int, *, of_layer: bool) -> Cause:
    """The cause of an HTTP status of a registry, for a layer or for the manifest."""
    if of_layer and status in _OF_LAYER:
        return _OF_LAYER[status]
    usual = Cause.OVERLOADED if status >= 500 else Cause.REFUSED
    return _OF_STATUS.get(status, usual)

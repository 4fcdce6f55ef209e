"""File and model names, both ways.

The shapes of file names are the server's own (`docs/store.md`, Layout). Model names follow its
``types/model`` rules: four parts, each with its own alphabet and length.
"""

import enum
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from watcher.errors import TargetError

if TYPE_CHECKING:
    from watcher.model import ForeignLink

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

_DIGEST = re.compile(r"sha256-([0-9a-fA-F]{64})(.*)", re.DOTALL)
_UPLOAD = re.compile(r"sha256-[0-9]{1,20}")
#: ``ollama create`` names these after what it makes, with random digits behind (Go's CreateTemp).
_CREATE = re.compile(
    r"(split-copy|projector-metadata|compat-tensors|COPY|B?F16|F32|T?I?Q\d\w*|MXFP\d\w*|NVFP\d\w*)\d+"
)
_LONGEST_FILE_NAME = 180  #: leaves room for what logs put behind it
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")
#: A digest as a manifest spells it: colon or dash, and its 64 digits.
SPELLED_DIGEST = re.compile(r"sha256([:-])([0-9a-fA-F]{64})")

#: The host, the namespace, the model and the tag, in a path.
_MODEL_PATH = re.compile(r"\w[\w.:-]{0,349}/\w[\w-]{0,79}/\w[\w.-]{0,79}/\w[\w.-]{0,79}", re.ASCII)


class Role(enum.StrEnum):
    """What a name under ``blobs/`` stands for."""

    BLOB = "blob"
    DATA = "data"
    SIDECAR = "sidecar"
    TRANSFER = "transfer"
    OLD = "old"
    UPLOAD = "upload"
    CREATE = "create"
    FOREIGN = "foreign"


_ROLES = {"": Role.BLOB, "-partial": Role.DATA, ".tmp": Role.TRANSFER}


class BlobName(NamedTuple):
    """A name under ``blobs/``, distinguished."""

    role: Role
    digest: str = ""
    #: N of a sidecar; None where what stands behind ``-partial-`` is no plain number.
    number: int | None = None


def parse_blob(name: str) -> BlobName:
    """Tell a name under ``blobs/`` apart by its spelling alone."""
    if match := _DIGEST.fullmatch(name):
        digest, rest = match.groups()
        if rest in _ROLES:
            return BlobName(_ROLES[rest], digest)
        if rest.startswith("-partial-"):
            # The server's glob takes whatever follows, so a foreign tail is a sidecar, too.
            tail = rest.removeprefix("-partial-")
            return BlobName(Role.SIDECAR, digest, int(tail) if _NUMBER.fullmatch(tail) else None)
    elif name.startswith("sha256:"):
        return BlobName(Role.OLD)
    elif _UPLOAD.fullmatch(name):
        return BlobName(Role.UPLOAD)
    elif _CREATE.fullmatch(name):
        return BlobName(Role.CREATE)
    return BlobName(Role.FOREIGN)


def is_blob(name: str) -> bool:
    """Whether a name under ``blobs/`` is that of a finished blob, in the spelling of today."""
    return parse_blob(name).role is Role.BLOB


def blob(digest: str) -> str:
    return f"sha256-{digest}"


def data(digest: str) -> str:
    """The data file of an unfinished layer."""
    return f"sha256-{digest}-partial"


def new_spelling(name: str) -> str:
    """The name that the server's start gives to a ``sha256:…``; others keep theirs."""
    return f"sha256-{name.removeprefix('sha256:')}" if name.startswith("sha256:") else name


def transfer(digest: str) -> str:
    """The file of a layer on the newer transfer path."""
    return f"sha256-{digest}.tmp"


def sidecar(digest: str, number: int) -> str:
    return f"sha256-{digest}-partial-{number}"


def short(digest: str) -> str:
    """How a digest is shown to people: ``sha256-<12 hex>``."""
    return f"sha256-{digest[:12]}"


def known_as(models: tuple[str, ...], digest: str) -> str:
    """What people know a download by: its first model by name, else its digest's first digits."""
    return models[0] if models else short(digest)


class ModelName(NamedTuple):
    """A model's full name, as its manifest's path spells it."""

    host: str
    namespace: str
    model: str
    tag: str

    @property
    def path(self) -> str:
        """Path below ``manifests/``."""
        return "/".join(self)

    @property
    def shown(self) -> str:
        """As ``ollama list`` shows it."""
        name = f"{self.model}:{self.tag}"
        if self.host.lower() != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{name}"
        if self.namespace.lower() != DEFAULT_NAMESPACE:
            return f"{self.namespace}/{name}"
        return name

    @property
    def key(self) -> str:
        """The same for all spellings of one model: the server does not regard case."""
        return self.shown.lower()


def model_from_path(parts: tuple[str, ...]) -> ModelName | None:
    """The model whose manifest lies at these path parts below ``manifests/``, or None."""
    path = "/".join(parts)
    return ModelName(*parts) if len(parts) == 4 and _MODEL_PATH.fullmatch(path) else None


def parse_model(text: str) -> ModelName | None:
    """A model as people write it (``llama3``, ``me/llama3:8b``, ``hf.co/org/repo:Q4``), or None."""
    rest = text.split("://", 1)[-1]
    tag = DEFAULT_TAG
    if rest.rfind(":") > rest.rfind("/"):
        rest, _, tag = rest.rpartition(":")
    parts = rest.split("/")
    if len(parts) > 3:
        return None
    defaults = (DEFAULT_HOST, DEFAULT_NAMESPACE)
    return model_from_path((*defaults[: 3 - len(parts)], *parts, tag))


def to_model(text: str) -> ModelName:
    """The same, where it must be one. Raises TargetError."""
    model = parse_model(text)
    if model is None:
        why = f"no name of a model: '{printable(text)}'"
        raise TargetError(why, "such as llama3, me/llama3:8b, hf.co/me/it:Q4")
    return model


#: No command has this: pasted unread, it would lead us to wherever the link leads.
TRUST_LINK = "look at where it leads; if that is meant, let root own the symlink, else remove it"


def of_link(link: "ForeignLink") -> str:
    """Whose symlink leads to whose folder, for people."""
    whose = f"a symlink of user id {link.uid} leads to a folder of user id {link.target_uid}"
    return f"{printable(link.path)}: {whose}"


def printable(name: str) -> str:
    """A name that is safe to show: what is no UTF-8 or no printable character becomes ``\\xNN``."""
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(char if char.isprintable() and char != "\\" else _escaped(char) for char in name)


#: In JSON a byte that is no UTF-8 is U+0000 and two hexadecimal digits: no name has a NUL in it.
_NO_UTF8 = re.compile("[\ud800-\udfff]")
_ESCAPED = re.compile("\0(?:([0-9a-f]{2})|u([0-9a-f]{4}))")


def exact(name: str) -> str:
    """A name for JSON: UTF-8 as it is, each other byte as U+0000 and its two hexadecimal digits."""

    def escape(found: re.Match[str]) -> str:
        code = ord(found[0])
        # Half a pair, as JSON can spell it, is no byte of a name.
        return f"\0{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\0u{code:04x}"

    return name if name.isascii() else _NO_UTF8.sub(escape, name)


def from_exact(text: str) -> str:
    """The name that `exact` has made a text of."""

    def char(found: re.Match[str]) -> str:
        return chr(0xDC00 + int(found[1], 16)) if found[1] else chr(int(found[2], 16))

    return _ESCAPED.sub(char, text) if "\0" in text else text


def sayable(text: str) -> str:
    """Words of ours with whatever they quote made valid UTF-8, escaped as by `printable`."""
    return "".join(_escaped(char) if "\ud800" <= char <= "\udfff" else char for char in text)


def everywhere(value: object, made: Callable[[str], str]) -> object:
    """A JSON value with each text in it made, by `exact` for one; keys stay."""
    if isinstance(value, str):
        return made(value)
    if isinstance(value, Mapping):
        return {key: everywhere(each, made) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [everywhere(each, made) for each in value]
    return value


def _escaped(char: str) -> str:
    if "\ud800" <= char <= "\udfff" and not "\udc80" <= char <= "\udcff":
        return f"\\u{ord(char):04x}"  # half a pair, as JSON can spell it
    return "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape"))


def file_safe(name: str) -> str:
    """A model's name as a file name: ``%NN`` for what is odd, and a hash for what is too long."""
    from urllib.parse import quote  # not needed for help

    safe = quote(name, "", errors="surrogatepass").replace("~", "%7E")
    safe = f"%2E{safe[1:]}" if safe.startswith(".") else safe
    if len(safe) <= _LONGEST_FILE_NAME:
        return safe
    import hashlib  # it loads OpenSSL, and few names are so long

    return f"{safe[:_LONGEST_FILE_NAME]}-{hashlib.sha256(safe.encode()).hexdigest()[:16]}"

"""What a transfer is given, what it reports, and how it can end."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from watcher.errors import WatchError
from watcher.model import MIB, Ranges
from watcher.ollama.names import ModelName
from watcher.state import sums
from watcher.transfer.rate import Limit


class Layer(NamedTuple):
    """A layer to fetch: the 64 digits of its digest as the manifest spells them, and its bytes."""

    digest: str
    size: int


@dataclass(slots=True)
class Budget:
    """What several transfers, one after the other, may bring, and what they have brought."""

    most: int | None = None  #: bytes; None: whatever it takes
    came: int = 0


@dataclass(frozen=True, slots=True)
class Options:
    """How to fetch. Sizes in bytes, times in seconds."""

    #: How many; or at first, and at most where more bring more.
    connections: int | tuple[int, int] = (8, 16)
    #: A connection that is silent for so long gives its rest to another one.
    stall: float = 30.0
    #: So often in a row a try may bring nothing before the transfer ends; None: for ever.
    tries: int | None = 6
    #: The wait after the first such try, doubled each time up to the longest.
    first_pause: float = 1.0
    longest_pause: float = 30.0
    #: What one request asks for at most.
    piece: int = 16 * MIB
    #: Nothing further than this behind the first byte that is not hashed yet is asked for.
    ahead: int = 256 * MIB
    #: What has arrived is brought to the disk whenever it is so much, or so old.
    sync_bytes: int = 64 * MIB
    sync_seconds: float = 5.0
    #: A connection below a quarter of the median for so long gives its rest to a fresh one.
    slow_seconds: float = 10.0
    #: So much of the disk stays free.
    reserve: int = 512 * MIB
    #: Layers from this size on are worth sums of their chunks.
    sums_from: int = sums.FROM
    #: What all transfers of the store may fetch in a second.
    limit: Limit = field(default_factory=Limit)
    budget: Budget = field(default_factory=Budget)


class Partial(NamedTuple):
    """What a server has left of a layer, which nobody holds: the trusted ranges of its data."""

    digest: str
    #: Which file ``blobs/sha256-<digest>-partial`` must be.
    device: int
    inode: int
    trusted: Ranges
    #: It is the blob itself, which is damaged and counts as not there.
    is_blob: bool = False
    #: Its name in quarantine, if it is a damaged blob that lies there.
    label: str = ""


class Order(NamedTuple):
    """What to fetch, and for which store."""

    #: The store's folder.
    store: str
    model: ModelName
    #: The id of this start of the machine; "" where that can't be told.
    boot: str
    #: Take unknown certificates, and with `plain` http.
    insecure: bool = False
    plain: bool = False
    #: The private key (OpenSSH, ed25519) that signs for tokens; "" for none.
    key: str = ""
    #: Of the model these alone; () for all that its manifest names.
    layers: tuple[Layer, ...] = ()
    #: Digests that are not fetched: their blobs are there, whatever size the manifest gives them.
    given: frozenset[str] = frozenset()
    #: The bytes of layers of which the manifest gives other ones; their hashes decide.
    sizes: Mapping[str, int] = MappingProxyType({})
    #: To copy instead of fetching.
    partials: tuple[Partial, ...] = ()
    #: The addresses of mirrors, which are asked first.
    mirrors: tuple[str, ...] = ()
    #: The manifest as it was asked for before; none: it is asked for now.
    manifest: bytes = b""


class Address(NamedTuple):
    """Where a layer's bytes are."""

    url: str
    #: The registry's own: a token goes with it.
    is_own: bool
    #: Which mirror it was asked of; "" for none.
    mirror: str = ""


# ---------------------------------------------------------------- what is reported


class Progress(NamedTuple):
    """How far a layer is. Each is a number of bytes."""

    digest: str
    total: int
    arrived: int
    hashed: int
    #: Another process fetches it, and this one waits.
    shared: bool = False
    #: What arrived just now was copied from a server's download.
    copied: bool = False


class Waiting(NamedTuple):
    """A wait begins: what for, which try failed, and in how many seconds the next one begins."""

    digest: str
    reason: str
    attempt: int
    seconds: float


class Noticed(NamedTuple):
    """Something that a reader of a log wants to know and that stops nothing."""

    digest: str
    text: str


Event: TypeAlias = Progress | Waiting | Noticed
Emit: TypeAlias = Callable[[Event], None]


# ---------------------------------------------------------------- how it ends


class Cause(enum.StrEnum):
    """Why a transfer failed."""

    UNAVAILABLE = "unavailable"
    NO_SUCH_MODEL = "no_such_model"
    NEWER_OLLAMA = "newer_ollama"
    NOT_ALLOWED = "not_allowed"
    CERTIFICATE = "certificate"
    NETWORK = "network"
    WRONG_ANSWER = "wrong_answer"
    BAD_MANIFEST = "bad_manifest"
    WRONG_SIZE = "wrong_size"
    MISMATCH = "mismatch"
    DISK = "disk"
    OTHER_DISK = "other_disk"
    DAMAGED_BLOB = "damaged_blob"


class TransferError(WatchError):
    """A transfer ended without what it was for. What has arrived is kept."""

    def __init__(self, message: str, next_step: str, cause: Cause) -> None:
        super().__init__(message, next_step)
        self.cause = cause


class OverBudgetError(TransferError):
    """More would have to come than was agreed to."""


class StoppedError(Exception):
    """Somebody asked the transfer to stop. What has arrived is kept."""


class TryError(Exception):
    """One try failed. The text says why, without any address's secrets."""

    def __init__(self, text: str, cause: Cause = Cause.NETWORK, *, final: bool = False) -> None:
        super().__init__(text)
        self.cause = cause
        #: No further try can succeed.
        self.final = final
        #: Nobody has answered.
        self.is_unreached = False


class BusyError(TryError):
    """The registry wants to be asked later (429, 503), and less."""

    def __init__(self, text: str, seconds: float | None) -> None:
        super().__init__(text)
        #: When, as far as it says so.
        self.seconds = seconds

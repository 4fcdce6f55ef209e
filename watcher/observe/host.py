"""Everything outside that a cycle touches; tests hand in another one."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from watcher.errors import EndedError
from watcher.model import Action, Caller, Entry, ForeignLink
from watcher.ollama import server
from watcher.ollama.names import ModelName
from watcher.state import registry_cache
from watcher.state.event_log import Event
from watcher.system import advice


@dataclass(frozen=True, slots=True)
class Host:
    """One store and the machine around it."""

    store: str
    found_by: str = "--store"
    foreign: ForeignLink | None = None  #: the link for whose sake nothing may be changed
    proc: str = "/proc"  #: where the kernel shows its processes
    parent: int | None = None  #: only its children count; None: all processes do
    system: str = ""  #: the root folder of the system whose unit the server has; "" for this one
    clock: Callable[[], float] = time.time
    uptime: Callable[[], float] = time.monotonic  #: seconds awake; no clock moves them
    #: Seconds since its start, those that it has slept included.
    counted: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
    sleep: Callable[[float], None] = time.sleep  #: the wait under a guard
    version: Callable[[str], str | None] = server.version  #: by URL; None where nobody answers
    #: Bytes that a model's registry has of a digest; None: it does not report that. OSError.
    registry_length: Callable[[ModelName, str], int | None] | None = None
    #: A model's manifest from its registry, kept in the store behind a descriptor, if any is given.
    registry_manifest: Callable[[int | None, ModelName], registry_cache.Answer] | None = None
    #: What is known of layers that no manifest of the store behind a descriptor names.
    known_layers: Callable[[int], registry_cache.KnownLayers] = registry_cache.known_layers
    #: Fetches what an action is about beside it; the file that then holds it, and how many bytes
    #: came. Raises WatchError, EndedError, and OSError.
    fetch: Callable[[Action], tuple[Entry, int]] | None = None
    #: Has the sums of a layer's chunks kept, where one of its registries serves them. Raises alike.
    sums: Callable[[Action], None] | None = None
    ends: Callable[[], bool] = lambda: False  #: whether to give a look up: an end was asked for
    reads_until: float = math.inf  #: by `uptime`: data is read for blocks of zeros until then
    stops: Callable[[], bool] = lambda: False  #: whether to hash no more and begin no further act
    report: Callable[[Event], None] = lambda _: None  #: takes events besides the logs
    watch: Callable[[int, int], None] = lambda _, __: None  #: bytes hashed, and bytes to hash
    caller: Caller = field(default_factory=advice.caller)  #: printed commands are for that user

    def reads_no_more(self) -> bool:
        return self.ends() or self.uptime() >= self.reads_until

    def go_on(self) -> None:
        """Raise EndedError where a look is to be given up."""
        if self.ends():
            raise EndedError

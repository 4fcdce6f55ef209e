"""Everything outside that a cycle touches; tests hand in another one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from watcher.errors import EndedError
from watcher.model import Caller, ForeignLink
from watcher.ollama import registry, server
from watcher.ollama.names import ModelName
from watcher.state import registry_cache
from watcher.state.event_log import Event
from watcher.system import advice


@dataclass(frozen=True, slots=True)
class Host:
    """One store and the machine around it."""

    store: str
    found_by: str = "--store"
    #: The symlink for whose sake nothing may be changed there.
    foreign: ForeignLink | None = None
    proc: str = "/proc"  #: where the kernel shows its processes
    #: The process whose children alone count among them; None where any may write to the store.
    parent: int | None = None
    system: str = ""  #: the root folder of the system whose unit the server has; "" for this one
    clock: Callable[[], float] = time.time
    #: Seconds that the machine has been awake since its start; setting the clock moves nothing.
    uptime: Callable[[], float] = time.monotonic
    #: Seconds since its start, those that it has slept included.
    counted: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
    #: Waits so many seconds: the guard's wait while a server runs.
    sleep: Callable[[float], None] = time.sleep
    #: A server's version by its URL, or None where nobody answers.
    version: Callable[[str], str | None] = server.version
    #: Bytes that a model's registry has of a digest, or None where it does not report that; OSError
    #: where it does not answer.
    registry_length: Callable[[ModelName, str], int | None] = registry.length
    #: A model's manifest from its registry, kept in the store behind a descriptor, if any is given.
    registry_manifest: Callable[[int | None, ModelName], registry_cache.Answer] = (
        registry_cache.manifest
    )
    #: What is known of layers that no manifest of the store behind a descriptor names.
    known_layers: Callable[[int], Mapping[str, registry_cache.KnownLayer]] = (
        registry_cache.known_layers
    )
    #: Whether this process was asked to end, so that a look is given up: nobody waits for it.
    ends: Callable[[], bool] = lambda: False
    #: Data is read for blocks of zeros until then, by `uptime`; what is not read stays doubted.
    reads_until: float = math.inf
    #: Whether to hash no more and to begin no further act; what was done by then is remembered.
    stops: Callable[[], bool] = lambda: False
    #: Hands an event on to who listens, besides the logs.
    report: Callable[[Event], None] = lambda _: None
    #: Is called with the bytes hashed so far, and the bytes to hash.
    watch: Callable[[int, int], None] = lambda _, __: None
    #: Who has called us; printed commands are for that user.
    caller: Caller = field(default_factory=advice.caller)

    def reads_no_more(self) -> bool:
        """Whether nothing more is to be read for blocks of zeros."""
        return self.ends() or self.uptime() >= self.reads_until

    def go_on(self) -> None:
        """Raise EndedError where a look is to be given up."""
        if self.ends():
            raise EndedError

"""A model from its manifest to its publication."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from watcher.ollama import manifests
from watcher.transfer import store
from watcher.transfer.store import Store, Verified
from watcher.transfer.values import (
    Cause,
    Emit,
    Layer,
    Noticed,
    Options,
    Order,
    StoppedError,
    TransferError,
)

if TYPE_CHECKING:
    from watcher.transfer.connections import Connections
    from watcher.transfer.registry import Registry

T = TypeVar("T")
#: A tag that moves more often than this while its model is fetched has something wrong with it.
_MOST_MOVES = 5


class Fetched(NamedTuple):
    """A model whose layers are all here, with or without their names."""

    #: The manifest's bytes; none where only some layers were wanted.
    manifest: bytes
    #: Those that wait for their names.
    verified: tuple[Verified, ...]


class Transfer:
    """One model's transfer: `manifest` or `run`, once; `stop` at any time, from anywhere."""

    def __init__(self, order: Order, options: Options, emit: Emit) -> None:
        """`emit` is called in the thread of `run`; what it raises ends the transfer."""
        self._order, self._options, self._emit = order, options, emit
        self._is_stopped = False
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Future[Any]] | None = None

    def stop(self) -> None:
        """End soon; what has arrived is kept. Safe in a signal handler."""
        self._is_stopped = True
        running = self._running
        if running is not None:
            with contextlib.suppress(RuntimeError):  # it has just ended
                running[0].call_soon_threadsafe(running[1].cancel)

    def manifest(self) -> bytes:
        """The registry's manifest, byte for byte. Raises as `run` does."""
        return self._ended(self._manifest)

    def sums(self) -> bool:
        """Have the sums of the order's layers kept; whether the registry serves all. As `run`."""
        return self._ended(self._sums)

    def run(self) -> Fetched:
        """Fetch and verify all that the store lacks of the order. Names come later.

        Raises TransferError, StoppedError where `stop` was called, and OSError where the store
        can't be opened.
        """
        return self._ended(self._fetched)

    def _ended(self, work: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
        with store.opened(self._order.store) as target, asyncio.Runner() as runner:
            damaged = (each for each in self._order.partials if each.is_blob)
            target.damaged = {each.digest: (each.device, each.inode) for each in damaged}
            try:
                return runner.get_loop().run_until_complete(self._stoppable(work(target)))
            except asyncio.CancelledError:
                raise StoppedError from None

    async def _stoppable(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.ensure_future(work)
        self._running = asyncio.get_running_loop(), task
        if self._is_stopped:
            task.cancel()
        try:
            return await task
        finally:
            self._running = None

    @contextlib.contextmanager
    def _asking(self, target: Store) -> Iterator[tuple[Connections, Registry]]:
        """What asks the registry, and fetches from it. Raises TransferError without pycurl."""
        try:
            from watcher.transfer.asking import Access
            from watcher.transfer.client import Client
            from watcher.transfer.connections import Connections
            from watcher.transfer.growth import bounds
            from watcher.transfer.registry import Registry
        except ImportError as error:
            raise TransferError(
                f"pycurl can't be loaded: {error}",
                "install it: pip install pycurl, or the package python3-pycurl",
                Cause.UNAVAILABLE,
            ) from None
        order, options = self._order, self._options
        with Client(bounds(options.connections)[1]) as client:
            access = Access(order.insecure, order.plain, order.key, options.stall, order.mirrors)
            registry = Registry(client, order.model, access, self._emit)
            yield Connections(client, registry, target, options, self._emit), registry

    async def _manifest(self, target: Store) -> bytes:
        with self._asking(target) as (connections, registry):
            return await connections.patiently(registry.manifest)

    async def _sums(self, target: Store) -> bool:
        with self._asking(target) as (_, registry):
            found = [(layer, await registry.sums(layer)) for layer in self._order.layers]
        for layer, raw in found:
            if raw:
                target.keep_sums(layer, raw)
        return all(raw for _, raw in found)

    async def _fetched(self, target: Store) -> Fetched:
        with self._asking(target) as (connections, registry):
            from watcher.transfer.engine import Engine

            order = self._order
            engine = Engine(connections, registry, target, order, self._options)
            if order.layers:
                missing = self._missing(target, order.layers)
                return Fetched(b"", tuple(await engine.fetch(missing)))
            raw = order.manifest or await connections.patiently(registry.manifest)
            for _ in range(_MOST_MOVES):
                layers = [Layer(*each) for each in manifests.sizes(raw, order.sizes).items()]
                wanted = [each for each in layers if each.digest not in order.given]
                verified = await engine.fetch(self._missing(target, wanted))
                now = await connections.patiently(registry.manifest)
                if now == raw:
                    return Fetched(raw, tuple(verified))
                self._emit(Noticed("", "the tag has moved: downloading its new layers"))
                raw = now
            raise TransferError(
                f"{order.model.shown}: its tag keeps moving",
                "try again later",
                Cause.WRONG_ANSWER,
            )

    @staticmethod
    def _missing(target: Store, layers: Sequence[Layer]) -> list[Layer]:
        """The layers without a name; of the others nothing is left over."""
        missing = [layer for layer in layers if not target.has(layer)]
        for layer in {*layers} - {*missing}:
            target.tidy(layer)
        return missing

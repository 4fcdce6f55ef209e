"""What connections do at the worst instant."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from watcher.transfer import connections as module
from watcher.transfer import store
from watcher.transfer.connections import Connections
from watcher.transfer.fetch import Fetch
from watcher.transfer.rate import Limit
from watcher.transfer.values import Address, Event, Layer, Options, TryError

LAYER = Layer("a" * 64, 1000)
SECONDS = 30.0


class Silent:
    """A registry, and its client, that never answer."""

    async def address(self, layer: Layer) -> Address:
        return Address("http://silent", is_own=True)

    def request(self, *_: Any, **__: Any) -> None:
        pass

    async def ask(self, *_: Any) -> None:
        await asyncio.Event().wait()


def test_a_stop_in_the_instant_in_which_a_connection_is_given_up_is_heard(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    events: list[Event] = []

    async def go() -> None:
        silent: Any = Silent()
        with store.opened(str(tmp_path)) as opened, opened.ledger(LAYER, "boot") as ledger:
            options = Options(connections=1, reserve=0)
            all_of_them = Connections(silent, silent, opened, options, events.append)
            all_of_them.open.append(Fetch(ledger, options, all_of_them.wakeup))
            running = asyncio.ensure_future(all_of_them.run())
            (connection,) = all_of_them._all
            async with asyncio.timeout(SECONDS):
                for _ in range(10):
                    await asyncio.sleep(0)
                assert connection.asked is not None
                module._give_up(connection, TryError("silent"))
                running.cancel()
                await asyncio.wait([running])

    asyncio.run(go())
    assert not events


def test_before_the_first_layer_is_open_the_rate_is_limited_as_well(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    looked = asyncio.Event()

    async def go() -> None:
        silent: Any = Silent()
        with store.opened(str(tmp_path)) as opened:
            options = Options(connections=1, limit=Limit(1000))
            found = Connections(silent, silent, opened, options, lambda _: None)
            loop = asyncio.get_running_loop()
            real = opened.running

            def running() -> int:
                loop.call_soon_threadsafe(looked.set)
                return real()

            opened.running = running  # type: ignore[method-assign]
            work = asyncio.ensure_future(found.run())
            async with asyncio.timeout(SECONDS):
                for _ in range(2):
                    await looked.wait()
                    looked.clear()
            work.cancel()
            await asyncio.wait([work])
            assert found._bucket.share == 1.0

    asyncio.run(go())

"""What threads of a transfer do when it is canceled."""

from __future__ import annotations

import asyncio
import threading

import pytest

from watcher.transfer.tasks import in_thread

SECONDS = 30.0


@pytest.mark.parametrize("cancels", [1, 2, 3])
def test_whoever_waits_for_a_thread_outlasts_it_however_often_it_is_canceled(cancels: int) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(SECONDS)
        ended.set()
        raise OSError("dropped")

    async def go() -> None:
        waiting = asyncio.ensure_future(in_thread(work))
        await asyncio.to_thread(begun.wait, SECONDS)
        for _ in range(cancels):
            waiting.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
        assert not waiting.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert ended.is_set()

    asyncio.run(go())

"""What asyncio lacks: a wakeup, tasks that run beside another, threads that are waited for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Wakeup:
    """Wakes everyone who waits; each looks whether it was for them."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def send(self) -> None:
        """Wake those who wait by now."""
        self._event.set()
        self._event.clear()

    async def wait(self) -> None:
        """Wait for the next one."""
        await self._event.wait()


async def beside(main: Coroutine[Any, Any, T], *helpers: Coroutine[Any, Any, None]) -> T:
    """Run `main` to its end, and until then `helpers`, which have none. Any failure ends all."""
    tasks = [asyncio.ensure_future(main)]
    others = [asyncio.ensure_future(helper) for helper in helpers]
    try:
        await asyncio.wait([*tasks, *others], return_when=asyncio.FIRST_COMPLETED)
        for helper in others:
            if helper.done():
                helper.result()
        return await tasks[0]
    finally:
        await _end([*tasks, *others])


async def all_of(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all to their ends. Any failure ends all."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def in_thread(call: Callable[..., T], *given: Any) -> T:
    """Call it in a thread. Canceled, it ends when the call has: what that uses may be closed then.

    What it raises in that case is dropped.
    """
    job = asyncio.ensure_future(asyncio.to_thread(call, *given))
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        while not job.done():  # a second cancel must not cut the wait short
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([job])
        job.exception()
        raise

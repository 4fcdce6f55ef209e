"""Whether this process was asked to end: a wait for somebody else asks, and ends soon after."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

GRACE_SECONDS = 2.0  #: so long writing down the end may wait for another process
_asked_at: list[float] = []


def ask() -> None:
    """End soon. Safe in a signal handler."""
    if not _asked_at:
        _asked_at.append(time.monotonic())


def asked() -> bool:
    return bool(_asked_at)


def withdraw() -> None:
    """Nobody asks any more: whoever handled the signal has ended what it was for."""
    _asked_at.clear()


@contextlib.contextmanager
def handling(
    handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], object]],
) -> Iterator[None]:
    """Handle signals so in the block, and as before after it."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def no_later(until: float) -> float:
    """When a wait that may last until then ends, on the monotonic clock."""
    return min([until, *(at + GRACE_SECONDS for at in _asked_at[:1])])

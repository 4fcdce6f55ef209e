"""Giving something up, and all that hangs on it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from watcher.demo.server.errors import CanceledError, EngineError


class Context:
    """Whether something is given up, and why; its children are given up with it."""

    def __init__(self, parent: Context | None = None, timeout: float | None = None) -> None:
        self._lock = threading.Lock()
        self._error: EngineError | None = None
        self._callbacks: dict[object, Callable[[], None]] = {}
        self._leave: Callable[[], None] | None = None
        self._timer: threading.Timer | None = None
        if parent:
            self._leave = parent.on_cancel(lambda: self.cancel(parent._error))
        if timeout is not None:
            late = EngineError("context deadline exceeded")
            self._timer = threading.Timer(timeout, self.cancel, (late,))
            self._timer.daemon = True
            self._timer.start()

    def cancel(self, cause: EngineError | None = None) -> None:
        """Give up now; doing it twice changes nothing. Who is waiting is told the cause."""
        with self._lock:
            if self._error:
                return
            self._error = cause or CanceledError()
            callbacks = list(self._callbacks.values())
            self._callbacks.clear()
        for callback in callbacks:
            callback()

    def close(self) -> None:
        """Give up and leave the parent."""
        self.cancel()
        if self._leave:
            self._leave()
        if self._timer:
            self._timer.cancel()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def canceled(self) -> bool:
        """Whether it is given up."""
        return self._error is not None

    def check(self) -> None:
        """Raise the cause where it is given up: a CanceledError where none was named."""
        if self._error:
            raise self._error

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back once when given up, at once where it already is; returns how to undo that."""
        key = object()
        with self._lock:
            late = self.canceled
            if not late:
                self._callbacks[key] = callback
        if late:
            callback()
        return lambda: self._forget(key)

    def _forget(self, key: object) -> None:
        with self._lock:
            self._callbacks.pop(key, None)

    def wait(self, duration: float) -> None:
        """Wait; raises as `check` does when given up meanwhile."""
        event = threading.Event()
        take_back = self.on_cancel(event.set)
        event.wait(duration)
        take_back()
        self.check()

"""Work in the background: one thread at most, begun when there is something to do."""

import threading
from collections.abc import Callable


class Worker:
    """Calls `work` in a thread of its own, once more for whoever wakes it meanwhile."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._name, self._work = name, work
        self._stopped = threading.Event()
        self.is_stopped = self._stopped.is_set  #: whether what is under way is to end
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_wanted = False

    def wake(self) -> None:
        """Begin, or once more after what is under way. Raises RuntimeError where it can't."""
        with self._lock:
            self._is_wanted = True
            if self._thread is None and not self._stopped.is_set():
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()
                self._thread = thread

    def stop(self) -> None:
        """Wait for the end of what is under way, and begin nothing more."""
        self._stopped.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._is_wanted or self._stopped.is_set():
                    self._thread = None
                    return
                self._is_wanted = False
            self._work()

"""The page of ``web``, served by a process of its own while a daemon runs."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from watcher.system import advice, leash

#: The pause after its end; doubled each time up to the longest, unless it has lasted for so long.
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 600.0
_END_SECONDS = 5.0


class WebProcess:
    """Runs from now on, and is started again whenever it ends, until `stop`.

    `run` is the command line, or starts it in another way. `warn` is called in a thread of ours
    where it does not run as it should.
    """

    def __init__(self, run: Sequence[str] | leash.Starter, warn: Callable[[str], None]) -> None:
        self._start, self._warn = leash.starter(run), warn
        self._ended = threading.Event()
        self._lock = threading.Lock()  #: over a process that begins, and the end that is asked for
        self._process: leash.Started | subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="web")
        self._thread.start()

    def stop(self) -> None:
        """End it: it has nothing to finish."""
        self._ended.set()
        with self._lock:
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.close()
        self._thread.join(_END_SECONDS)
        with self._lock:
            if self._process is not None:
                self._process.kill()
        self._thread.join()

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._ended.is_set():
            begun = time.monotonic()
            try:
                why = f"ended with {self._see()}"
            except OSError as error:
                why = f"did not start: {error.strerror}"
            if time.monotonic() - begun > _LONGEST_PAUSE:
                pause = _FIRST_PAUSE
            if not self._ended.is_set():
                again = advice.duration(pause)
                self._warn(f"the process that serves the page {why}; restarting in {again}")
            self._ended.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _see(self) -> int:
        with self._lock:
            if self._ended.is_set():
                return 0
            self._process = process = self._start()
        with process:
            code = process.wait()
        with self._lock:
            self._process = None
        return code

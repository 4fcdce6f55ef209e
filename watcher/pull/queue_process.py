"""The queue, run by a process of its own whenever an item of it is due.

A daemon must survive whatever a pull meets, stay small while nothing is pulled, and end in time
whatever a server does. So it drives nothing itself: a thread waits for a change of the queue or for
the next item's time, and starts ``queue run``. That process ends with its stdin: when that closes,
because the daemon wants it or is dead, the item that it drives is put back. Its stdout has events.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from watcher.errors import WatchError
from watcher.observe.host import Host
from watcher.pull import queue, running
from watcher.state import event_log, folders, state_folder
from watcher.system import advice, leash

#: The pause after a process that died or did nothing; doubled each time up to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 600.0
_END_SECONDS = 75.0  #: a unit's TimeoutStopSec is longer
_LONGEST_WAIT = 24 * 3600.0  #: waiting for a time of the wall clock, it is read this often


class QueueProcess:
    """Runs the queue after `turn`, one process at a time: `run` is its command, or a starter."""

    def __init__(
        self, host: Host, run: Sequence[str] | leash.Starter, warn: Callable[[str], None]
    ) -> None:
        self._host, self._warn = host, warn
        self._start = leash.starter(run)
        self._thread: threading.Thread | None = None
        self._wakeup = threading.Event()
        self._lock = threading.Lock()  #: over a process that begins, and its end that is asked for
        self._on = self._ended = False
        self._process: leash.Started | subprocess.Popen[bytes] | None = None
        #: The lock by which others see that somebody runs the queue.
        self._seen = state_folder.LongLock(state_folder.QUEUE_LOCK)
        self._anew = False
        self._rate: int | None = None
        self._pause, self._not_before = 0.0, 0.0

    def turn(self, on: bool, *, anew: bool = False) -> None:
        """Run the queue, or no more, and read it. `anew`: the store is another folder now."""
        with self._lock:
            self._on, self._anew = on, self._anew or anew
            if not on:
                self._cut()
        if on and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="queue")
            self._thread.start()
        self._wakeup.set()

    def limit(self, rate: int) -> None:
        """The setting `rate` from now on, also for a process that runs."""
        with self._lock:
            if rate != self._rate:
                self._rate = rate
                self._tell_rate()

    def watched_folder(self) -> str:
        """The folder in which only changes of the queue close a file; made where it can be."""
        path = os.path.join(self._host.store, state_folder.FOLDER, queue.FILE.apart)
        if not os.path.lexists(path):
            with (
                contextlib.suppress(OSError, WatchError),
                folders.opened_store(self._host.store) as store,
            ):
                queue.FILE.change(store, lambda kept: kept)
        return path

    def nudge(self, _: object = None) -> None:
        """The queue changed. Safe in any thread."""
        self._wakeup.set()

    def end(self) -> None:
        """Start nothing more. Safe in a signal handler."""
        self._ended = True

    def stop(self) -> None:
        """End in order: the item that runs waits again, and its data is resumable."""
        self._ended = True
        with self._lock:
            self._cut()
        self._wakeup.set()
        if self._thread is not None:
            self._thread.join(_END_SECONDS)
            with self._lock:
                if self._process is not None:
                    self._process.kill()  # the next start finds it as after any kill
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._wakeup.clear()
            if self._ended:
                self._seen.release()
                return
            try:
                wait = self._step()
            except Exception as error:
                # It survives whatever a strange machine brings up, as the daemon does.
                self._warn(f"running the queue failed: {error}")
                wait = _LONGEST_PAUSE
            self._wakeup.wait(wait)

    def _step(self) -> float | None:
        """Do what is due; seconds until the next step, None: until something changes."""
        if self._anew or not self._on:
            self._anew = False
            self._seen.release()
        if not self._on:
            return None
        with contextlib.suppress(OSError), folders.opened_store(self._host.store) as store:
            # Be seen to run it; another process that does so ends sooner or later.
            running.hold(self._seen, store)
        before = self._read()
        due = queue.next_due(before)
        if due is None:
            return None
        wait = max(due - time.time(), self._not_before - time.monotonic())
        if wait > 0:
            return min(wait, _LONGEST_WAIT)
        self._drive(before)
        return 0.0

    def _read(self) -> queue.Queue:
        """The queue; items of processes that are gone wait in it. Empty where it can't be read."""
        try:
            with folders.opened_store(self._host.store) as store:
                return queue.revived(queue.FILE.read(store), running.driven_by(store), time.time())
        except OSError:
            return queue.Queue()  # the store is gone, which the daemon reports
        except WatchError as error:
            self._warn(error.message)
            return queue.Queue()

    def _drive(self, before: queue.Queue) -> None:
        """Start a process, and see it to its end. `before`: the queue as it was then."""
        try:
            with self._lock:
                self._process = process = self._start()
                self._tell_rate()
                if self._ended or not self._on:
                    self._cut()
            code = self._see(process)
        except OSError as error:
            why = f"did not start: {error.strerror}"
        else:
            why = f"ended with {code}" if code else "did nothing"
            now = {item.model: item for item in self._read().line}
            due = [item for item in before.line if item.due(time.time())]
            if not code and any(now.get(item.model) != item for item in due):
                self._pause = 0.0
                return
        if self._on and not self._ended:
            self._pause = min(max(_FIRST_PAUSE, 2 * self._pause), _LONGEST_PAUSE)
            self._not_before = time.monotonic() + self._pause
            pause = advice.duration(self._pause)
            self._warn(f"the queue process {why}; restarting in {pause}")

    def _see(self, process: leash.Started | subprocess.Popen[bytes]) -> int:
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                logged = event_log.parse(line)  # the process has logged it already
                if logged is not None:
                    self._host.report(logged)
            code = process.wait()
        with self._lock:
            self._process = None
        return code

    def _tell_rate(self) -> None:
        """Send it to the process, which can't always read the settings; under the lock."""
        if self._process is None or self._process.stdin is None or self._rate is None:
            return
        with contextlib.suppress(OSError, ValueError):  # it has ended, or is to end
            os.write(self._process.stdin.fileno(), b"%d\n" % self._rate)

    def _cut(self) -> None:
        """End the process in order, if there is one; under the lock."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

"""One thread at most in the background: it ends, and it begins again."""

from __future__ import annotations

import threading

import pytest

from tests.support.servers import wait_until
from watcher.system.worker import Worker


def test_a_worker_that_can_start_no_thread_tries_again_and_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[int] = []
    worker = Worker("test", lambda: done.append(1))

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            worker.wake()
    assert worker._thread is None
    worker.wake()
    wait_until(lambda: bool(done) and worker._thread is None, "the work")
    worker.stop()
    worker.wake()
    assert done == [1]

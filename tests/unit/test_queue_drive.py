"""What drives an item of the queue for a daemon."""

from __future__ import annotations

import pytest

from watcher.commands import queue_drive
from watcher.commands.context import Context
from watcher.model import Policy
from watcher.pull import site
from watcher.pull.queue import Result
from watcher.pull.site import Site
from watcher.world import World

ELSEWHERE = "the server at http://127.0.0.1:11434 has another store than /models"


def test_nothing_is_pulled_into_a_store_that_nobody_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of the store is stopped, and a user runs one of his own at the usual address."""
    found = Site("http://127.0.0.1:11434", Policy(), None, ELSEWHERE)
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    monkeypatch.setattr(site, "url_of_store", lambda *_: found.url)
    monkeypatch.setattr(site, "find", lambda *_: found)
    drive = queue_drive.leashed(Context(Policy()), World("/models"), lambda: False)
    driven = drive("llama3", lambda: "")
    assert (driven.result, driven.retry) == (Result.FAILED, True)
    assert ELSEWHERE in driven.why

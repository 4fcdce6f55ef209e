"""What drives an item of the queue for a daemon."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path

import pytest

from tests.support.runs import rules
from tests.support.servers import EngineServer
from watcher.commands import queueing
from watcher.commands.context import Context
from watcher.demo.registry import Fault, Layer, Registry
from watcher.observe.host import Host
from watcher.pull import queue, running, target
from watcher.pull.account import Options
from watcher.pull.failures import of_error
from watcher.pull.queue import Result
from watcher.pull.target import Target
from watcher.state import fs
from watcher.transfer.rate import Limit

ELSEWHERE = "the server at http://127.0.0.1:11434 has another store than /models"


def test_nothing_is_pulled_into_a_store_that_nobody_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of the store is stopped, and a user runs one of his own at the usual address."""
    found = Target("http://127.0.0.1:11434", rules().settings, None, ELSEWHERE)
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    monkeypatch.setattr(target, "url_of_store", lambda *_: found.url)
    monkeypatch.setattr(target, "find", lambda *_: found)
    drive = queueing.leashed(Context(rules().settings), Host("/models"), Limit(), lambda: False)
    driven = drive("llama3", lambda: "")
    assert (driven.result, driven.retry) == (Result.FAILED, True)
    assert ELSEWHERE in driven.why


@pytest.mark.parametrize(
    ("fault", "hourly"),
    [
        (Fault("page", on="manifest", status=412), None),
        (Fault("page", on="manifest", status=451), None),
        (Fault("page", on="manifest", status=200), True),
        (Fault("page", on="manifest", status=407), True),
    ],
    ids=lambda each: str(each.status) if isinstance(each, Fault) else "",
)
def test_a_failure_that_no_retry_cures_is_given_up_or_retried_hourly(
    tmp_path: Path, registry: Registry, fault: Fault, hourly: bool | None
) -> None:
    model = registry.add_model("demo", "1b", [Layer(1000)]).name
    registry.add_fault(Fault(**vars(fault)))
    store = tmp_path / "models"
    with EngineServer(store) as server, contextlib.redirect_stdout(io.StringIO()):
        server.start().wait_ready()
        found = Target(server.url, rules().settings, Host(str(store)))
        options = Options(insecure=True)
        drive = queueing._driver(
            Context(rules().settings, quiet=True), found, lambda _: options, lambda: False
        )
        with fs.opened_folder(str(store)) as folder:
            now = time.time()
            queue.FILE.change(folder, lambda before: queue.add(before, model, 0, 0.0, now))
            item = running.run_next(folder, drive)
    assert item is not None
    assert item.state is queue.ItemState.FAILED
    assert item.so_far.tries == 1
    cause = of_error(item.so_far.reasons[-1].why.partition(";")[0])
    assert cause.step in item.so_far.reasons[-1].why
    if hourly is None:
        assert item.ready_at is None
    else:
        assert item.ready_at is not None
        assert 3300 < item.ready_at - now < 3900

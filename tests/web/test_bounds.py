"""What clients and looks can cost: so many connections, each for so long, and one look for all."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.driving import HealthyStore, host
from tests.support.runs import rules
from tests.support.servers import wait_until
from watcher.errors import WatchError
from watcher.web import looks, server
from watcher.web.app import App
from watcher.web.looks import Lately, Looks, Made

REQUEST = b"GET /page.css HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Work:
    """Something that is made, as long as it is held, and how often it was."""

    def __init__(self) -> None:
        self.count = 0
        self.go_on = threading.Event()
        self.fails = False

    def __call__(self) -> Made:
        self.count += 1
        self.go_on.wait(120)
        if self.fails:
            raise FileNotFoundError(2, "No such file or directory", "/store")
        return Made(str(self.count), {})


@pytest.fixture
def work() -> Iterator[Work]:
    made = Work()
    yield made
    made.go_on.set()


def test_however_many_ask_one_looks(work: Work) -> None:
    lately = Lately(work, 60.0)
    with ThreadPoolExecutor(20) as clients:
        asked = [clients.submit(lately.get) for _ in range(40)]
        wait_until(lambda: work.count, "the look")
        work.go_on.set()
        assert {each.result(120).tag for each in asked} == {"1"}
    assert work.count == 1


def test_a_look_that_hangs_keeps_nobody_waiting(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the limit of the wait this takes as long as the look."""
    monkeypatch.setattr(looks, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(looks, "_REST", 0)
    lately = Lately(work, 0.0)
    for _ in range(50):
        with pytest.raises(WatchError, match="takes long"):
            lately.get()
    work.go_on.set()
    wait_until(lambda: work.count == 1 and not lately._begun, "its end")
    work.go_on.clear()
    before = lately.get()  # it has begun the next one, which hangs
    assert (before.tag, work.count) == ("1", 2)
    assert lately.get() is before
    monkeypatch.setattr(looks, "_LATE_SECONDS", 0)
    with pytest.raises(WatchError, match="takes long"):
        lately.get()  # it may be otherwise by now


def test_a_look_that_fails_is_said_and_tried_again(work: Work) -> None:
    work.go_on.set()
    work.fails = True
    lately = Lately(work, 0.0)
    with pytest.raises(WatchError, match="/store: No such file or directory"):
        lately.get()
    work.fails = False
    wait_until(lambda: time.monotonic() >= lately._fresh_until, "the rest")
    assert lately.get().tag == "2"


def test_what_takes_long_is_made_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Lately(lambda: time.sleep(0.05) or Made("", {}), 0.0)  # type: ignore[func-returns-value]
    begun = time.monotonic()
    made.get()
    assert made._fresh_until - begun > 0.05 + 0.1


# ---------------------------------------------------------------- connections


@pytest.fixture
def port(models: HealthyStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A page that takes four clients, and has patience with them."""
    monkeypatch.setattr(server, "_MOST_CONNECTIONS", 4)
    monkeypatch.setattr(server, "_IDLE_SECONDS", 3600)
    app = App(Looks(host(models), rules().settings))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        made = server.made(app, bound)
        thread = threading.Thread(target=made.run)
        thread.start()
        yield bound.getsockname()[1]

        def end() -> None:
            for each in [*made.active_channels.values()]:
                each.handle_close()  # its thread may wait for it
            made.asyncore.close_all(made._map, ignore_all=True)

        made.trigger.pull_trigger(end)
        thread.join()
        made.task_dispatcher.shutdown()


@pytest.mark.parametrize(
    "said", [b"", b"GET /pa", REQUEST * 200], ids=["nothing", "half", "reads no answer"]
)
def test_slow_clients_are_closed_for_the_next_one(port: int, said: bytes) -> None:
    """With waitress's own limits alone they would keep the others waiting."""
    with contextlib.ExitStack() as opened:

        def connected() -> socket.socket:
            client = opened.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.settimeout(120)
            client.connect(("127.0.0.1", port))
            return client

        for _ in range(8):
            connected().sendall(said)
        client = connected()
        client.sendall(REQUEST)
        assert client.recv(12) == b"HTTP/1.1 200"

"""Pulls through servers that die, that others use too, and that are far away."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import pytest

from tests.support.servers import Server, wait_until
from watcher.demo.registry import Fault, Registry
from watcher.observe.host import Host
from watcher.pull.account import Options, Update
from watcher.pull.driver import Pull
from watcher.pull.failures import Cause
from watcher.pull.target import Target, url_of_store
from watcher.state.records import State

from .driven import MB, POLICY, Seen, add, arrived, drive, site

RATE = 40 * MB


class Killer:
    """Kills the server when so many bytes are here, and starts it again a second later."""

    def __init__(self, server: Server, *at: int) -> None:
        self._server, self._at = server, list(at)
        self.kills = 0
        self._starting: list[threading.Timer] = []

    def __call__(self, update: Update) -> None:
        if any(each.is_alive() for each in self._starting):
            return
        if self._at and update.record.downloaded_bytes >= self._at[0]:
            self._at.pop(0)
            self.kills += 1
            self._server.kill()
            self._starting.append(threading.Timer(1.0, self._server.start))
            self._starting[-1].start()

    def join(self) -> None:
        for each in self._starting:
            each.join()


MORE = pytest.mark.slow("other bytes to be killed at")


@pytest.mark.parametrize(
    "at",
    [
        pytest.param((1, 2, 3), marks=MORE),
        (20 * MB, 60 * MB, 100 * MB),
        pytest.param((37 * MB, 41 * MB), marks=MORE),
    ],
)
def test_a_server_that_is_killed_and_comes_back(
    server: Server, registry: Registry, at: tuple[int, ...]
) -> None:
    model = add(registry, server)
    registry.throttle(RATE)
    server.start().wait_ready()
    killer = Killer(server, *at)
    seen = drive(site(server), model, on_update=killer)
    killer.join()
    assert seen.end.cause is None, (seen.notes, seen.end)
    assert killer.kills == len(at)
    assert arrived(server, model)


def test_the_server_of_a_store_is_found_by_its_process(server: Server) -> None:
    (server.store / "blobs").mkdir(parents=True)
    host = Host(str(server.store))
    assert url_of_store(host, {}) == "http://127.0.0.1:11434"
    server.start().wait_ready()
    assert url_of_store(host, {}) == server.url
    other = Host(str(server.store.parent))
    assert url_of_store(other, {}) == "http://127.0.0.1:11434"
    assert not url_of_store(other, {"OLLAMA_HOST": server.url})
    assert url_of_store(host, {"OLLAMA_HOST": "127.0.0.1:1"}) == "http://127.0.0.1:1"


def test_while_a_server_is_away_no_byte_is_awaited(server: Server, registry: Registry) -> None:
    """That is no stall, and no time in which bytes came slowly."""
    model = add(registry, server)
    registry.throttle(RATE)
    server.start().wait_ready()
    back = threading.Timer(8.0, server.start)

    def kill(update: Update) -> None:
        if back.ident is None and update.record.downloaded_bytes >= 20 * MB:
            server.kill()
            back.start()

    pull = Pull(site(server), model.name, Options(insecure=True, stall_seconds=6.0))
    began = time.monotonic()
    for update in pull.updates():
        kill(update)
    back.join()
    assert (pull.end.cause, pull.meter.stalls) == (None, 0)
    assert pull.meter.seconds <= time.monotonic() - began - 8.0
    (log,) = (server.store / ".ollama-watch/logs").glob("events.jsonl")
    last = json.loads(log.read_bytes().splitlines()[-1])
    assert last["event_type"] == "pull_completed"
    assert last["details"].items() >= pull.meter.facts.items()


def test_a_server_that_stays_away_is_waited_for_once(server: Server, registry: Registry) -> None:
    model = add(registry, server)
    seen = drive(site(server), model, Options(insecure=True, server_seconds=0.5))
    assert seen.end.cause is Cause.SERVER_GONE
    assert server.url in seen.end.text
    assert seen.states.count(State.STARTING) == 1


def test_a_server_that_is_started_later(server: Server, registry: Registry) -> None:
    model = add(registry, server, MB)
    late = threading.Timer(1.0, server.start)
    late.start()
    seen = drive(site(server), model)
    late.join()
    assert seen.end.cause is None, (seen.notes, seen.end)
    assert arrived(server, model)


# ---------------------------------------------------------------- cancelled


@pytest.mark.parametrize("state", [s for s in State if s.active])
def test_cancelled_in_any_state(server: Server, registry: Registry, state: State) -> None:
    model = add(registry, server, 30 * MB)
    server.start().wait_ready()
    reached: list[State] = []
    seen = drive(
        site(server),
        model,
        cancelled=lambda: state in reached,
        on_update=lambda update: reached.append(update.record.state),
    )
    assert seen.end.cause in (None, Cause.INTERRUPTED)
    assert drive(site(server), model).end.cause is None
    assert arrived(server, model)


def test_cancelled_while_the_registry_is_silent(server: Server, registry: Registry) -> None:
    model = add(registry, server)
    server.start().wait_ready()
    drive(site(server), add(registry, server, MB, "other"))
    registry.add_fault(Fault("hang", on="head"))
    asked: list[Update] = []

    def cancelled() -> bool:
        return bool(registry.stats()["requests"].get("head", 0) > 2)

    seen = drive(site(server), model, cancelled=cancelled, on_update=asked.append)
    assert seen.end.cause is Cause.INTERRUPTED


# ---------------------------------------------------------------- not alone


def joined(pull: Pull) -> tuple[Seen, threading.Thread]:
    """A pull in a thread of its own that waits for a layer which another client prepares."""
    seen = Seen()

    def follow() -> None:
        for update in pull.updates():
            seen.add(update)

    thread = threading.Thread(target=follow)
    thread.start()
    wait_until(lambda: seen.states[-1:] == [State.DOWNLOADING], "our stream")
    return seen, thread


# ---------------------------------------------------------------- far away


def test_without_the_store_it_arrives_and_names_what_it_can_not_do(
    server: Server, registry: Registry
) -> None:
    model = add(registry, server)
    registry.throttle(RATE)
    registry.add_fault(Fault("reset", after=30 * MB, times=1))
    server.start().wait_ready()
    far = Target(server.url, POLICY.settings, None, "it is far away")
    seen = drive(far, model)
    assert seen.end.cause is None, (seen.notes, seen.end)
    assert seen.notes[0].startswith("the server downloads it: ")
    assert not any("broken connection" in note for note in seen.notes)
    assert arrived(server, model)


def test_a_far_server_that_is_killed(server: Server, registry: Registry) -> None:
    model = add(registry, server)
    registry.throttle(RATE)
    server.start().wait_ready()
    killer = Killer(server, 30 * MB)
    seen = drive(
        Target(server.url, POLICY.settings, None, "it is far away"), model, on_update=killer
    )
    killer.join()
    assert seen.end.cause is None, (seen.notes, seen.end)
    assert arrived(server, model)


def test_no_permission_far_away_is_not_tried_again(server: Server, registry: Registry) -> None:
    model = add(registry, server)
    registry.add_fault(Fault("page", on="manifest", status=403))
    server.start().wait_ready()
    seen = drive(replace(site(server), host=None), model)
    assert seen.end.cause is Cause.NO_PERMISSION
    assert registry.stats()["requests"]["manifest"] == 2

"""The daemon that runs the queue: what is added arrives, whoever dies, and nothing runs twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SERVERS
from tests.support.driving import Daemon, HealthyStore, command, environment, is_right, run
from tests.support.notation import age
from tests.support.servers import Server, blob, wait_until, wait_written
from watcher.demo.registry import Layer, Model, Registry
from watcher.model import HOUR, MIB
from watcher.pull import queue
from watcher.state import fs

MB = 1_000_000
ON = {"OLLAMA_WATCH_QUEUE": "true"}
Add = Callable[..., Model]


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, store: HealthyStore) -> Iterator[Server]:
    with request.param(store.path) as made:
        yield made


@pytest.fixture
def add(store: HealthyStore, server: Server, registry: Registry) -> Iterator[Add]:
    """Adds a model of one layer to the queue of a store whose server runs."""
    server.start().wait_ready()

    def call(name: str = "demo", size: int = 8 * MB, held: int | None = None) -> Model:
        seed = int(store.digest(name)[:7], 16)
        model = registry.add_model(name, "1b", [Layer(size, seed=seed)])
        if held is not None:
            registry.hold(model.digests[0], after=held)
        done = run(store.path, "queue", "add", model.name)
        assert done.returncode == 0, done.stderr
        return model

    yield call
    registry.release()


def listed(store: HealthyStore) -> dict[str, Any]:
    return dict(json.loads(run(store.path, "queue", "ls", "--json").stdout))


def states(store: HealthyStore) -> list[str]:
    return [item["state"] for item in listed(store)["items"]]


def children(daemon: Daemon) -> list[int]:
    """The processes that the daemon has started and that still run."""
    found = Path(f"/proc/{daemon.pid}/task").glob("*/children")
    return [int(pid) for each in found for pid in each.read_text().split()]


def gone(pid: int) -> Callable[[], bool]:
    def is_gone() -> bool:
        try:
            return b") Z" in Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return True

    return is_gone


def wait_child(daemon: Daemon) -> int:
    wait_until(lambda: children(daemon), "a child")
    (child,) = children(daemon)
    return child


# ---------------------------------------------------------------- it runs


def test_an_added_model_arrives_and_is_reported_like_any_pull(
    store: HealthyStore, server: Server, add: Add
) -> None:
    with Daemon(store.path, ON) as daemon:
        assert daemon.of("service_started")[0]["details"]["queue"] is True
        model = add()
        shown = model.name.removeprefix("http://")
        told = daemon.wait_event("pull_completed")
        assert told["model_name"] == shown
        wait_until(lambda: not states(store), "the queue to be empty")
        assert is_right(store.path, model.digests[0])
        found = listed(store)
        assert [item["model"] for item in found["done"]] == [shown]
        assert found["run_by"] == {"pid": daemon.pid, "daemon": True}
        wait_until(lambda: not children(daemon), "its end")
        daemon.wait_idle()
        assert daemon.kill(signal.SIGTERM) == 0
        assert daemon.events == store.events()
    assert listed(store)["run_by"] is None


def test_items_added_before_the_daemon_and_without_a_server_arrive(
    store: HealthyStore, server: Server, add: Add
) -> None:
    one, two = add("one"), add("two")
    with Daemon(store.path, ON) as daemon:
        daemon.wait_event("pull_completed", 2)
    assert all(is_right(store.path, each.digests[0]) for each in (one, two))


def test_what_a_server_has_left_becomes_the_queues(
    store: HealthyStore, server: Server, registry: Registry, add: Add
) -> None:
    model = add(held=5 * MB)
    digest = model.digests[0]
    with contextlib.closing(server.start_pull(model.name)):
        registry.wait_held(digest, 1)
        wait_written(blob(store.path, digest, "-partial"), [5 * MB])
        server.kill()
    registry.release()
    for path in store.blobs.glob(f"{blob(store.path, digest).name}-partial*"):
        age(path, 2 * HOUR)
    inode = blob(store.path, digest, "-partial").stat().st_ino
    with Daemon(store.path, ON) as daemon:
        daemon.wait_event("pull_completed")
    assert "take_over" in [each["details"].get("verb") for each in store.events()]
    assert is_right(store.path, digest)
    assert blob(store.path, digest).stat().st_ino == inode
    assert registry.bytes_served(digest) < 8 * MB + 2 * MIB


def test_nothing_begins_before_its_time(store: HealthyStore, registry: Registry, add: Add) -> None:
    with Daemon(store.path, ON) as daemon:
        model = registry.add_model("later", "1b", [Layer(MB)])
        now = time.time()
        with fs.opened_folder(str(store.path)) as folder:
            queue.FILE.change(folder, lambda kept: queue.add(kept, model.name, 0, now + 2, now))
        daemon.wait_event("pull_completed")
        wait_until(lambda: not states(store), "the queue to be empty")
        assert daemon.of("error") == [], "nothing was begun that had nothing to do"
    with fs.opened_folder(str(store.path)) as folder:
        (item,) = queue.FILE.read(folder).done
    (line,) = [each for each in store.events() if each["event_type"] == "pull_completed"]
    assert item.so_far.since >= now + 2
    assert line["timestamp"] > time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now + 1))


def test_without_the_setting_nobody_runs_it_and_both_commands_report_it(
    store: HealthyStore, add: Add
) -> None:
    with Daemon(store.path) as daemon:
        add()
        daemon.wait_idle()
        assert (states(store), children(daemon)) == (["waiting"], [])
        for words in (("queue", "ls"), ("status",)):
            told = " ".join(run(store.path, *words).stdout.split())
            assert "nothing runs it; set queue = true for the daemon" in told
            assert f"--store {store.path} queue run" in told
        status = json.loads(run(store.path, "status", "--json").stdout)
        assert status["queue"] == {"waiting": 1, "paused": False, "run_by": None}


def test_an_item_without_a_file_event_is_found_by_the_next_scan(
    store: HealthyStore, registry: Registry, add: Add
) -> None:
    """Models that are not there: of what arrives, all is watched anew."""
    with Daemon(store.path, ON) as daemon:
        (store.ours / "queue").rename(store.ours / "moved")
        run(store.path, "queue", "add", f"{registry.url}/library/unheard:1b")
        os.kill(daemon.pid, signal.SIGHUP)
        daemon.wait_event("pull_failed")
        wait_until(lambda: not children(daemon), "its end")
        daemon.wait_idle()
        run(store.path, "queue", "add", f"{registry.url}/library/heard:1b")
        daemon.wait_event("pull_failed", 2)


def test_a_failed_download_is_reported_and_the_next_one_begins(
    store: HealthyStore, registry: Registry, add: Add
) -> None:
    run(store.path, "queue", "add", f"{registry.url}/library/nothing:1b")
    add("there")
    with Daemon(store.path, ON) as daemon:
        daemon.wait_event("pull_failed")
        daemon.wait_event("pull_completed")
        wait_until(lambda: states(store) == ["failed"], "its end")
        wait_until(lambda: not children(daemon), "its end")
        assert daemon.of("error") == []


# ---------------------------------------------------------------- pause, and the setting


def test_a_paused_queue_stops_and_goes_on(
    store: HealthyStore, registry: Registry, add: Add
) -> None:
    with Daemon(store.path, ON) as daemon:
        model = add(held=4 * MB)
        registry.wait_held(model.digests[0], 1)
        told = " ".join(run(store.path, "queue", "ls").stdout.split())
        assert f"run by the daemon (pid {daemon.pid})" in told
        run(store.path, "queue", "pause")
        wait_until(lambda: states(store) == ["waiting"], "the pause")
        wait_until(lambda: not children(daemon), "its end")
        registry.release()
        before = registry.bytes_served(model.digests[0])
        daemon.wait_idle()
        assert registry.bytes_served(model.digests[0]) == before
        run(store.path, "queue", "resume")
        daemon.wait_event("pull_completed")
    assert is_right(store.path, model.digests[0])


def test_sighup_changes_the_rate_of_a_pull_that_runs(
    store: HealthyStore, registry: Registry, add: Add, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("queue = true\nrate = '1KB/s'\n")
    with Daemon(store.path, settings=settings) as daemon:
        model = add()
        wait_until(lambda: registry.bytes_served(model.digests[0]) > 1, "its first bytes")
        daemon.wait_idle()
        settings.write_text("queue = true\n")
        os.kill(daemon.pid, signal.SIGHUP)
        daemon.wait_event("pull_completed")
    assert is_right(store.path, model.digests[0])


def test_sighup_turns_it_on_and_off(
    store: HealthyStore, registry: Registry, add: Add, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("")
    with Daemon(store.path, settings=settings) as daemon:
        model = add(held=4 * MB)
        settings.write_text("queue = true\n")
        os.kill(daemon.pid, signal.SIGHUP)
        registry.wait_held(model.digests[0], 1)
        child = wait_child(daemon)
        settings.write_text("queue = false\n")
        os.kill(daemon.pid, signal.SIGHUP)
        wait_until(gone(child), "its end")
        wait_until(lambda: states(store) == ["waiting"], "it to wait again")
        wait_until(lambda: listed(store)["run_by"] is None, "nobody to run it")
        assert children(daemon) == []
        registry.release()
        settings.write_text("queue = true\n")
        os.kill(daemon.pid, signal.SIGHUP)
        daemon.wait_event("pull_completed")
        assert [e["details"]["queue"] for e in daemon.of("settings_read")] == [True, False, True]


# ---------------------------------------------------------------- ends


def resumable(store: HealthyStore, model: Model) -> bool:
    """Whether an audit takes what has come for something that the next pull goes on with."""
    found = json.loads(run(store.path, "audit", "--json").stdout)["downloads"]
    return [each["condition"] for each in found if each["digest"] == model.digests[0]] == [
        "transfer"
    ]


def test_sigterm_in_the_middle_leaves_it_resumable_and_waiting(
    store: HealthyStore, server: Server, registry: Registry, add: Add
) -> None:
    with Daemon(store.path, ON) as daemon:
        model = add(held=4 * MB)
        registry.wait_held(model.digests[0], 1)
        child = wait_child(daemon)
        assert daemon.kill(signal.SIGTERM) == 0
        assert gone(child)()
        assert daemon.events[-1]["event_type"] == "service_stopped"
    assert states(store) == ["waiting"]
    server.kill()  # while one runs, what has changed just now may be live
    assert resumable(store, model)
    server.start().wait_ready()
    registry.release()
    before = registry.bytes_served(model.digests[0])
    with Daemon(store.path, ON) as daemon:
        daemon.wait_event("pull_completed")
    assert is_right(store.path, model.digests[0])
    assert registry.bytes_served(model.digests[0]) - before <= 6 * MB


def test_sigkill_in_the_middle_and_the_next_life_goes_on(
    store: HealthyStore, registry: Registry, add: Add
) -> None:
    with Daemon(store.path, ON) as daemon:
        model = add(held=4 * MB)
        registry.wait_held(model.digests[0], 1)
        child = wait_child(daemon)
        daemon.kill()
    # Nobody is there any more whom it could run for.
    with Daemon(store.path, ON) as daemon:
        wait_until(gone(child), "the orphan's end")
        registry.release()
        daemon.wait_event("pull_completed")
        wait_until(lambda: not states(store), "the queue to be empty")
    assert is_right(store.path, model.digests[0])
    assert registry.bytes_served(model.digests[0]) <= 10 * MB


def test_a_download_goes_on_after_its_whole_unit_was_killed(
    store: HealthyStore, registry: Registry, add: Add
) -> None:
    with Daemon(store.path, ON) as daemon:
        model = add(held=4 * MB)
        registry.wait_held(model.digests[0], 1)
        child = wait_child(daemon)
        os.kill(child, signal.SIGKILL)
        daemon.kill()
    registry.release()
    with Daemon(store.path, ON) as daemon:
        daemon.wait_event("pull_completed")
        wait_until(lambda: not states(store), "the queue to be empty")
    assert is_right(store.path, model.digests[0])
    (item,) = listed(store)["done"]
    assert [each["why"] for each in item["reasons"]] == ["its process is gone"]


def test_a_unit_s_sigterm_to_all_of_its_processes(
    store: HealthyStore, registry: Registry, add: Add
) -> None:
    with Daemon(store.path, ON) as daemon:
        model = add(held=4 * MB)
        registry.wait_held(model.digests[0], 1)
        os.kill(wait_child(daemon), signal.SIGTERM)
        assert daemon.kill(signal.SIGTERM) == 0
        assert daemon.of("error") == []
    assert states(store) == ["waiting"]


def test_a_child_that_dies_is_started_again(
    store: HealthyStore, registry: Registry, add: Add
) -> None:
    with Daemon(store.path, ON) as daemon:
        model = add(held=4 * MB)
        registry.wait_held(model.digests[0], 1)
        os.kill(wait_child(daemon), signal.SIGKILL)
        told = daemon.wait_event("error")
        assert told["message"] == "the queue process ended with -9; restarting in 5 s"
        registry.release()
        daemon.wait_event("pull_completed")
    assert is_right(store.path, model.digests[0])


# ---------------------------------------------------------------- side by side, and at rest


def test_beside_a_queue_run_nothing_is_driven_twice(
    store: HealthyStore, server: Server, registry: Registry, add: Add
) -> None:
    models = [add(f"m{number}", MB) for number in range(4)]
    words = command(store.path, "queue", "run", "--insecure", "--host", server.url)
    with Daemon(store.path, ON) as daemon:
        beside = subprocess.run(
            words, env=environment(store.path), capture_output=True, timeout=120, check=False
        )
        assert beside.returncode == 0, beside.stderr
        wait_until(lambda: not states(store), "the queue to be empty")
        wait_until(lambda: not children(daemon), "its end")
    assert all(is_right(store.path, each.digests[0]) for each in models)
    for each in models:
        assert registry.bytes_served(each.digests[0]) <= MB + 1  # a byte finds out the address
    done = [e["model_name"] for e in store.events() if e["event_type"] == "pull_completed"]
    assert len(done) == len(set(done)) == len(models)


def test_while_nothing_is_due_nothing_wakes_it(
    store: HealthyStore, registry: Registry, add: Add
) -> None:
    later = registry.add_model("later", "1b", [Layer(MB)])
    with Daemon(store.path, ON) as daemon:
        add()
        daemon.wait_event("pull_completed")
        wait_until(lambda: not (states(store) or children(daemon)), "its end")
        now = time.time()
        with fs.opened_folder(str(store.path)) as folder:
            queue.FILE.change(folder, lambda kept: queue.add(kept, later.name, 0, now + 3600, now))
        daemon.wait_idle()
        before = daemon.work()
        # What is written beside the queue is none of its business.
        for name in ("state.json", "logs/other.jsonl", "models.json.lock"):
            (store.ours / name).open("ab").close()
        run(store.path, "queue", "ls")
        daemon.wait_idle()
        assert daemon.work() - before <= 1

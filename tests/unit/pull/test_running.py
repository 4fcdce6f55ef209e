"""Driving what is in the queue: with drives that end in every way, and processes that die."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.conftest import NOBODY, needs_root
from watcher.errors import WatchError
from watcher.pull import queue, running
from watcher.pull.queue import Driven, Item, ItemState, Queue, Result, Runner
from watcher.pull.running import Why
from watcher.state import fs

DONE, FAILED = Driven(Result.DONE), Driven(Result.FAILED, "no network")


class Clock:
    """A time that goes on only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now

    time = __call__

    def sleep(self, seconds: float) -> None:
        assert 0 <= seconds <= 1
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(running, "time", made)
    return made


def fill(store: int, clock: Clock, *models: str, level: int = 0) -> None:
    for model in models:
        change(store, lambda kept, each=model: queue.add(kept, each, level, 0.0, clock()))  # type: ignore[misc]


def change(store: int, do: Callable[[Queue], Queue]) -> Queue:
    return queue.FILE.change(store, do)


def run(store: int, drive: running.Drive) -> Queue:
    """Drive all of it; the queue as it is then."""
    for _ in running.run(store, drive):
        pass
    return queue.FILE.read(store)


def state(store: int, model: str) -> ItemState:
    kept = queue.FILE.read(store)
    return kept.line[queue.position(kept, f"{model}:latest")].state


def test_one_after_the_other_and_what_it_is_while_it_runs(folder: int, clock: Clock) -> None:
    fill(folder, clock, "a", "b")
    driven: list[str] = []

    def drive(model: str, why: Why) -> Driven:
        driven.append(model)
        assert state(folder, model.removesuffix(":latest")) is ItemState.RUNNING
        assert why() == ""
        return DONE

    told: list[Item] = list(running.run(folder, drive))
    left = queue.FILE.read(folder)
    assert driven == ["a:latest", "b:latest"]
    assert [(item.model, item.state) for item in told] == [
        (each, ItemState.DONE) for each in driven
    ]
    assert (left.line, len(left.done)) == ((), 2)


def test_an_empty_queue_drives_nothing(folder: int) -> None:
    assert running.run_next(folder, lambda *_: pytest.fail("driven")) is None


def test_a_failed_model_is_retried_after_the_others_had_their_turn(
    folder: int, clock: Clock
) -> None:
    fill(folder, clock, "a", "b")
    driven: list[tuple[str, float]] = []
    began = clock()

    def drive(model: str, _: Why) -> Driven:
        driven.append((model[0], clock() - began))
        return FAILED if len(driven) in (1, 3) else DONE

    left = run(folder, drive)
    assert [model for model, _ in driven] == ["a", "b", "a", "a"]
    assert [item.so_far.tries for item in left.done] == [0, 2]
    (_, first), (_, other), (_, second), (_, third) = driven
    assert other == first
    assert 15 <= second - first <= 45
    assert 30 <= third - second <= 90


def test_a_permanent_failure_stays_in_the_queue_with_its_reason(folder: int, clock: Clock) -> None:
    fill(folder, clock, "a")
    ends = Driven(Result.FAILED, "no such model", retry=False)
    left = run(folder, lambda *_: ends)
    (item,) = left.line
    assert (item.state, item.ready_at) == (ItemState.FAILED, None)
    assert item.so_far.reasons[-1].why == "no such model"


def test_an_error_of_ours_is_a_failed_try(folder: int, clock: Clock) -> None:
    fill(folder, clock, "a")

    def drive(*_: object) -> Driven:
        raise WatchError("the disk is full", "make room")

    item = running.run_next(folder, drive)
    assert item is not None
    assert (item.state, item.so_far.tries) == (ItemState.FAILED, 1)
    assert "the disk is full" in item.so_far.reasons[-1].why


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
def test_whatever_else_breaks_a_drive_off_the_item_waits_again(
    folder: int, clock: Clock, error: type[BaseException]
) -> None:
    fill(folder, clock, "a")

    def drive(*_: object) -> Driven:
        raise error

    with pytest.raises(error):
        running.run_next(folder, drive)
    assert state(folder, "a") is ItemState.WAITING


def test_a_drive_learns_within_a_second_why_to_stop(folder: int, clock: Clock) -> None:
    fill(folder, clock, "a")
    driven: list[str] = []

    def drive(model: str, why: Why) -> Driven:
        driven.append(model[0])
        if len(driven) > 1:
            return DONE
        assert why() == ""
        fill(folder, clock, "urgent", level=10)
        assert why() == ""  # the file is not read each time
        clock.now += 1
        assert why() == "urgent:latest is more urgent"
        return Driven(Result.STOPPED, why())

    run(folder, drive)
    assert driven == ["a", "u", "a"]


def test_a_model_paused_while_it_runs_stays_paused(folder: int, clock: Clock) -> None:
    fill(folder, clock, "a")

    def drive(model: str, why: Why) -> Driven:
        change(folder, lambda kept: queue.pause(kept, [model], clock()))
        assert why() == "it was paused"
        return Driven(Result.STOPPED, why())

    left = run(folder, drive)
    assert [item.state for item in left.line] == [ItemState.PAUSED]


def test_a_model_removed_while_it_runs_is_gone(folder: int, clock: Clock) -> None:
    fill(folder, clock, "a")

    def drive(model: str, why: Why) -> Driven:
        change(folder, lambda kept: queue.remove(kept, [model]))
        assert why() == "it was removed from the queue"
        return DONE

    item = running.run_next(folder, drive)
    assert item is not None
    assert item.model == "a:latest"
    assert queue.FILE.read(folder) == Queue()


def test_the_runner_waits_for_a_model_with_a_later_start(folder: int, clock: Clock) -> None:
    began = clock()
    change(folder, lambda kept: queue.add(kept, "night", 0, began + 100, began))
    at: list[float] = []

    def drive(*_: object) -> Driven:
        at.append(clock() - began)
        return DONE

    run(folder, drive)
    assert at == [100]


def test_a_model_added_while_the_runner_waits_starts_at_once(
    folder: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = clock()
    change(folder, lambda kept: queue.add(kept, "night", 0, began + 100, began))
    driven: list[str] = []

    def sleep(seconds: float) -> None:
        Clock.sleep(clock, seconds)
        if clock() == began + 10:
            fill(folder, clock, "day")

    monkeypatch.setattr(clock, "sleep", sleep)

    def drive(model: str, _: Why) -> Driven:
        driven.append(f"{model} {clock() - began:.0f}")
        return DONE

    run(folder, drive)
    assert driven == ["day:latest 10", "night:latest 100"]


# ---------------------------------------------------------------- who runs

TAKE = """
import os, sys
from watcher.pull import running
folder = os.open(sys.argv[1], os.O_RDONLY)
def drive(model, why):
    print(model, flush=True)
    sys.stdin.read()
running.run_next(folder, drive)
"""


def test_the_model_of_a_killed_runner_is_driven_again(folder: int, clock: Clock) -> None:
    fill(folder, clock, "a")
    store = os.readlink(f"/proc/self/fd/{folder}")
    with subprocess.Popen(
        [sys.executable, "-c", TAKE, store],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "a:latest\n"
        (item,) = queue.FILE.read(folder).line
        runner = item.so_far.runner
        assert runner is not None
        assert runner.pid == process.pid
        assert running.alive(runner)
        assert running.run_next(folder, lambda *_: DONE) is None
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not running.alive(runner)  # a zombie drives nothing
    item_again = running.run_next(folder, lambda *_: DONE)
    assert item_again is not None
    assert item_again.state is ItemState.DONE
    assert item_again.so_far.reasons[0].why == "its process is gone"


def test_a_model_whose_end_could_not_be_saved_is_driven_again_by_the_same_process(
    folder: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(folder, clock, "a")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def drive(*_: object) -> Driven:
        # Nobody else of this process takes it meanwhile.
        assert running.run_next(folder, lambda *_: pytest.fail("driven twice")) is None
        monkeypatch.setattr(fs, "save", full)
        return DONE

    with pytest.raises(WatchError, match="can't be written: No space left"):
        running.run_next(folder, drive)
    monkeypatch.undo()
    assert state(folder, "a") is ItemState.RUNNING
    item = running.run_next(folder, lambda *_: DONE)
    assert item is not None
    assert item.state is ItemState.DONE


def test_another_process_with_the_same_number_is_another_one() -> None:
    me = running.me()
    assert running.alive(me)
    assert not running.alive(me._replace(born=me.born - 1))


@pytest.mark.parametrize("pid", [0, -1, 1 << 22, 1 << 40, 1 << 70])
def test_numbers_of_no_process(pid: int) -> None:
    assert not running.alive(Runner(pid, 1))


@needs_root
def test_a_process_that_is_hidden_counts_as_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "born", lambda _: None)
    assert running.alive(running.me())
    pid = os.fork()
    if pid == 0:
        os.setuid(NOBODY)
        os._exit(0 if running.alive(Runner(os.getppid(), 1)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_reader_of_the_lock_does_not_hide_the_runner(
    folder: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs.ensure_folder(".ollama-watch", folder)
    with fs.opened_folder(".ollama-watch", folder) as ours:
        looking = os.open("queue.lock", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=ours)
    fcntl.flock(looking, fcntl.LOCK_SH)
    with monkeypatch.context() as waiting:
        waiting.setattr("time.sleep", lambda _: os.close(looking))
        seen = running.seen_to_run(folder)
        assert seen.__enter__()
    with running.seen_to_run(folder) as twice:
        assert not twice
    seen.__exit__(None, None, None)

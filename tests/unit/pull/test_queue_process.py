"""The process that runs the queue for a daemon: when it begins, and how its troubles are told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.notation import Store
from tests.support.servers import wait_until
from watcher.observe.host import Host
from watcher.pull import queue
from watcher.pull.queue_process import QueueProcess
from watcher.state import fs


class Run:
    """A process that runs a script, and what was told of it."""

    def __init__(self, store: Path, script: str, python: str = sys.executable) -> None:
        self.told: list[str] = []
        self.warnings: list[str] = []
        host = Host(str(store), report=lambda event: self.told.append(event.message))
        self.process = QueueProcess(host, [python, "-c", SAY + script], self.warnings.append)


#: Prints an event, as the queue's process does.
SAY = """
from watcher.state.event_log import Event
def say(text):
    print(Event(1.0, "error", text, None, {}).line.decode(), end="", flush=True)
"""


@pytest.fixture
def runs(models: Store) -> Iterator[list[Run]]:
    made: list[Run] = []
    with fs.opened_folder(str(models.path)) as folder:
        queue.FILE.change(folder, lambda kept: queue.add(kept, "a", 0, 0.0, 1.0))
    yield made
    for each in made:
        each.process.stop()


def test_the_output_of_the_child_is_handed_on_line_by_line(models: Store, runs: list[Run]) -> None:
    runs.append(Run(models.path, "say('one'); print('none'); say('two')"))
    runs[0].process.turn(True)
    wait_until(lambda: runs[0].warnings, "its end")
    assert runs[0].told == ["one", "two"]


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("pass", "the queue process did nothing; restarting in 5 s"),
        ("raise SystemExit(4)", "the queue process ended with 4; restarting in 5 s"),
        ("import os; os.kill(os.getpid(), 9)", "ended with -9; restarting in 5 s"),
    ],
)
def test_one_that_brings_nothing_is_not_started_over_and_over(
    models: Store, runs: list[Run], script: str, told: str
) -> None:
    runs.append(Run(models.path, f"say('begun'); {script}"))
    runs[0].process.turn(True)
    wait_until(lambda: runs[0].warnings, "its end")
    for _ in range(20):
        runs[0].process.nudge()
    runs[0].process.stop()
    assert [each[-len(told) :] for each in runs[0].warnings] == [told]
    assert runs[0].told == ["begun"]


def test_once_it_ends_nothing_begins_any_more(models: Store, runs: list[Run]) -> None:
    """What a signal's handler says counts before the look under way has come to its end."""
    runs.append(Run(models.path, "say('begun')"))
    runs[0].process.end()
    runs[0].process.turn(True)
    thread = runs[0].process._thread
    assert thread is not None
    thread.join(120)
    assert (thread.is_alive(), runs[0].told, runs[0].warnings) == (False, [], [])


def test_the_child_ends_when_its_stdin_closes(models: Store, runs: list[Run]) -> None:
    runs.append(Run(models.path, "import sys; say('begun'); sys.stdin.read()"))
    runs[0].process.turn(True)
    wait_until(lambda: runs[0].told, "its beginning")
    runs[0].process.turn(False)
    wait_until(lambda: runs[0].process._process is None, "its end")
    assert runs[0].warnings == []


def test_a_process_that_can_not_be_started_is_reported(models: Store, runs: list[Run]) -> None:
    runs.append(Run(models.path, "", "/nowhere/python"))
    runs[0].process.turn(True)
    wait_until(lambda: runs[0].warnings, "its end")
    assert "did not start: No such file or directory" in runs[0].warnings[0]

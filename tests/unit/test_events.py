"""The event log: five keys, a log for each model, rotated by size, removed by age."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import environment
from tests.support.driving import KEYS
from tests.support.runs import rules
from tests.support.servers import wait_until
from watcher.model import DAY
from watcher.state import event_log
from watcher.state.event_log import Event

NOW = 1_764_000_000.1234


@pytest.fixture
def logs(folder: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{folder}")) / ".ollama-watch" / "logs"


def event(number: int = 0, *models: str, at: float = NOW) -> Event:
    who = models[0] if models else None
    return Event(at, "partial_found", f"number {number}", who, {"models": list(models)})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_a_line_has_exactly_the_five_keys(folder: int, logs: Path) -> None:
    event_log.write(folder, [event(1, "llama3:latest")], rules().settings)
    assert lines(logs / "events.jsonl") == [
        {
            "timestamp": "2025-11-24T16:00:00.123Z",
            "model_name": "llama3:latest",
            "event_type": "partial_found",
            "message": "number 1",
            "details": {"models": ["llama3:latest"]},
        }
    ]


def test_times_have_milliseconds_and_are_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert event_log.rfc3339(0.0) == "1970-01-01T00:00:00.000Z"
        assert event_log.rfc3339(1.5) == "1970-01-01T00:00:01.500Z"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("at", [-(2.0**62), 1e15, 1e300, float("inf"), -1e300])
def test_any_time_that_a_file_may_have_can_be_shown(at: float) -> None:
    assert event_log.rfc3339(at)


def test_an_event_of_several_models_is_one_line_in_each_ones_log(folder: int, logs: Path) -> None:
    event_log.write(folder, [event(1, "a:latest", "hf.co/b/c:Q4")], rules().settings)
    assert sorted(os.listdir(logs)) == [
        "a%3Alatest.jsonl",
        "events.jsonl",
        "hf.co%2Fb%2Fc%3AQ4.jsonl",
    ]
    for name in os.listdir(logs):
        assert len(lines(logs / name)) == 1


def test_an_event_of_the_store_goes_only_to_the_common_log(folder: int, logs: Path) -> None:
    event_log.write(folder, [event()], rules().settings)
    assert os.listdir(logs) == ["events.jsonl"]
    assert lines(logs / "events.jsonl")[0]["model_name"] is None


def test_nothing_to_show_makes_nothing(folder: int, logs: Path) -> None:
    event_log.write(folder, [], rules().settings)
    assert not logs.parent.exists()


def test_bytes_that_are_no_utf_8_are_escaped_in_an_event() -> None:
    odd = os.fsdecode(b"/models\xff")
    line = replace(event(), message=odd, details={"path": odd, "deep": [odd]}).line
    assert b"\\xff" in line.replace(b"\\\\", b"\\")


def test_the_longest_model_name_has_a_log(folder: int, logs: Path) -> None:
    longest = "/".join(("h" * 250, "n" * 80, f"{'m' * 80}:{'t' * 80}"))
    event_log.write(folder, [event(1, longest)], rules().settings)
    assert len(os.listdir(logs)) == 2


def test_a_full_log_is_set_aside_whole(folder: int, logs: Path) -> None:
    policy = rules(log_max_bytes=400)
    for number in range(20):
        event_log.write(folder, [event(number, at=NOW + number)], policy.settings)
    found = sorted(logs.glob("events*"))
    assert len(found) > 3
    assert all(path.stat().st_size < 600 for path in found)
    told = [line["message"] for path in found for line in lines(path)]
    assert sorted(told) == sorted(f"number {number}" for number in range(20))


def test_no_line_is_lost_when_a_log_is_full_twice_at_the_same_instant(
    folder: int, logs: Path
) -> None:
    policy = rules(log_max_bytes=200)
    for number in range(10):
        event_log.write(folder, [event(number)], policy.settings)
    told = [line["message"] for path in logs.iterdir() for line in lines(path)]
    assert sorted(told) == sorted(f"number {number}" for number in range(10))


def test_many_events_at_once_are_all_kept_and_a_log_stays_within_bounds(
    folder: int, logs: Path
) -> None:
    told = [event(number, "m:1b") for number in range(1000)]
    event_log.write(folder, told, rules(log_max_bytes=50_000).settings)
    assert len(list(logs.glob("events@*"))) > 1
    assert all(path.stat().st_size < 75_000 for path in logs.iterdir())
    for log in ("events", "m%3A1b"):
        kept = [line["message"] for path in logs.glob(f"{log}*") for line in lines(path)]
        assert sorted(kept) == sorted(each.message for each in told)


def test_old_logs_go_and_young_ones_stay(folder: int, logs: Path) -> None:
    """Those of models that are no more as well; what is no log of ours is left alone."""
    event_log.write(folder, [event()], rules().settings)
    for name, days in (
        ("events@old.jsonl", 100),
        ("events@young.jsonl", 10),
        ("gone.jsonl", 100),
        ("there.jsonl", 10),
        ("notes.txt", 100),
    ):
        path = logs / name
        path.touch()
        os.utime(path, (NOW - days * DAY,) * 2)
    (logs / "folder.jsonl").mkdir()
    (logs / "link.jsonl").symlink_to(logs / "notes.txt")
    event_log.expire(folder, NOW, rules(log_keep_days=90).settings)
    kept = ["events.jsonl", "events@young.jsonl", "notes.txt", "there.jsonl"]
    assert sorted(os.listdir(logs)) == sorted([*kept, "folder.jsonl", "link.jsonl"])


def test_where_there_are_no_logs_none_are_removed_and_no_folder_is_made(folder: int) -> None:
    event_log.expire(folder, NOW, rules().settings)
    assert os.listdir(folder) == []


def test_a_log_that_somebody_writes_to_just_now_stays(folder: int, logs: Path) -> None:
    event_log.write(folder, [event()], rules().settings)
    with (logs.parent / "logs.lock").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        event_log.expire(folder, NOW + 1e9, rules().settings)
        assert os.listdir(logs) == ["events.jsonl"]
    event_log.expire(folder, NOW + 1e9, rules().settings)
    assert os.listdir(logs) == []


def test_a_line_for_a_log_that_is_removed_meanwhile_goes_to_a_new_one(
    folder: int, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was opened before, and its lock is had only after it was removed."""
    event_log.write(folder, [event(1)], rules().settings)
    real = fcntl.flock
    removing = [(logs / "events.jsonl").unlink]

    def flock(fd: int, operation: int) -> None:
        if removing:
            removing.pop()()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    event_log.write(folder, [event(2)], rules().settings)
    assert [line["message"] for line in lines(logs / "events.jsonl")] == ["number 2"]


WRITES_FOREVER = """
import os, sys
from watcher.state import event_log
from watcher.state.event_log import Event
from watcher.model import Settings
store = os.open(sys.argv[1], os.O_RDONLY)
for number in range(10**9):
    text = f"{number} " + "x" * (number % 5000)
    event = Event(number, "error", text, "a:latest")
    event_log.write(store, [event], Settings(log_max_bytes=100_000))
"""


def test_killed_while_it_writes_it_leaves_lines_and_no_half_line_joins_the_next(
    tmp_path: Path,
) -> None:
    """A half line at the end is what a kill may leave; the next line stands by itself."""
    logs = tmp_path / ".ollama-watch/logs"
    for _ in range(8):
        command = [sys.executable, "-c", WRITES_FOREVER, str(tmp_path)]
        with subprocess.Popen(command, env=environment(tmp_path)) as writer:
            before = len(list(logs.glob("*.jsonl")))
            wait_until(lambda b=before: len(list(logs.glob("*.jsonl"))) > b + 4, "rotated logs")  # type: ignore[misc]
            writer.kill()
        with (logs / "events.jsonl").open("ab") as log:
            log.write(b'{"timestamp": "half a li')
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        event_log.write(fd, [event(1, "a:latest")], rules().settings)
    finally:
        os.close(fd)
    for path in logs.iterdir():
        assert all(list(line) == KEYS for line in lines(path))
    assert lines(logs / "events.jsonl")[-1]["message"] == "number 1"


@pytest.mark.parametrize("length", [10, (1 << 20) + 10, 3 << 20])
def test_a_half_line_of_any_length_is_cut_off(folder: int, logs: Path, length: int) -> None:
    event_log.write(folder, [event(1)], rules().settings)
    with (logs / "events.jsonl").open("ab") as log:
        log.write(b"x" * length)
    event_log.write(folder, [event(2)], rules().settings)
    told = [line["message"] for line in lines(logs / "events.jsonl")]
    assert told == ["number 1", "number 2"]


def test_a_line_that_finds_no_room_is_taken_back_whole(folder: int, logs: Path) -> None:
    """A limit on the file's size stands for the full disk: half of the line was written."""
    event_log.write(folder, [event(1)], rules().settings)
    size = (logs / "events.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
        with pytest.raises(OSError, match="File too large"):
            event_log.write(folder, [event(2)], rules().settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (logs / "events.jsonl").stat().st_size == size
    event_log.write(folder, [event(3)], rules().settings)
    told = [line["message"] for line in lines(logs / "events.jsonl")]
    assert told == ["number 1", "number 3"]


def test_missing_events_are_searched_with_one_listing_of_the_logs(
    folder: int, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [event(number, f"m{number}") for number in range(20)]
    event_log.write(folder, told[::2], rules().settings)
    listed, listdir = [], os.listdir

    def listing(path: Any = ".") -> list[str]:
        listed.append(path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", listing)
    event_log.write_missing(folder, told)
    assert len(listed) == 1
    assert sorted(each["message"] for each in lines(logs / "events.jsonl")) == sorted(
        each.message for each in told
    )
    assert all(len(lines(logs / f"m{number}.jsonl")) == 1 for number in range(20))


def test_a_huge_log_without_lines_is_set_aside_and_not_read(folder: int, logs: Path) -> None:
    logs.mkdir(parents=True)
    with (logs / "events.jsonl").open("wb") as huge:
        huge.truncate(1 << 40)
    event_log.write(folder, [event()], rules().settings)
    assert [each["message"] for each in lines(logs / "events.jsonl")] == ["number 0"]
    assert [path.stat().st_size for path in logs.glob("events@*")] == [1 << 40]

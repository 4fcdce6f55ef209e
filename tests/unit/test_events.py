"""The event log: five keys, a log for each model, rotated by size, removed by age."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from watcher import events
from watcher.events import Event
from watcher.model import DAY, Policy

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
    events.write(folder, [event(1, "llama3:latest")], Policy())
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
        assert events.rfc3339(0.0) == "1970-01-01T00:00:00.000Z"
        assert events.rfc3339(1.5) == "1970-01-01T00:00:01.500Z"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("at", [-(2.0**62), 1e15, 1e300, float("inf"), -1e300])
def test_any_time_that_a_file_may_have_can_be_shown(at: float) -> None:
    assert events.rfc3339(at)


def test_an_event_of_several_models_is_one_line_in_each_ones_log(folder: int, logs: Path) -> None:
    events.write(folder, [event(1, "a:latest", "hf.co/b/c:Q4")], Policy())
    assert sorted(os.listdir(logs)) == [
        "a%3Alatest.jsonl",
        "events.jsonl",
        "hf.co%2Fb%2Fc%3AQ4.jsonl",
    ]
    for name in os.listdir(logs):
        assert len(lines(logs / name)) == 1


def test_an_event_of_the_store_goes_only_to_the_common_log(folder: int, logs: Path) -> None:
    events.write(folder, [event()], Policy())
    assert os.listdir(logs) == ["events.jsonl"]
    assert lines(logs / "events.jsonl")[0]["model_name"] is None


def test_nothing_to_tell_makes_nothing(folder: int, logs: Path) -> None:
    events.write(folder, [], Policy())
    assert not logs.parent.exists()


def test_what_is_no_utf_8_is_shown_escaped() -> None:
    odd = os.fsdecode(b"/models\xff")
    line = replace(event(), message=odd, details={"path": odd, "deep": [odd]}).line
    assert b"\\xff" in line.replace(b"\\\\", b"\\")


def test_the_longest_model_name_has_a_log(folder: int, logs: Path) -> None:
    longest = "/".join(("h" * 250, "n" * 80, f"{'m' * 80}:{'t' * 80}"))
    events.write(folder, [event(1, longest)], Policy())
    assert len(os.listdir(logs)) == 2


def test_a_full_log_is_set_aside_whole(folder: int, logs: Path) -> None:
    policy = Policy(log_max_bytes=400)
    for number in range(20):
        events.write(folder, [event(number, at=NOW + number)], policy)
    found = sorted(logs.glob("events*"))
    assert len(found) > 3
    assert all(path.stat().st_size < 600 for path in found)
    told = [line["message"] for path in found for line in lines(path)]
    assert sorted(told) == sorted(f"number {number}" for number in range(20))


def test_no_line_is_lost_when_a_log_is_full_twice_at_the_same_instant(
    folder: int, logs: Path
) -> None:
    policy = Policy(log_max_bytes=200)
    events.write(folder, [event(number) for number in range(10)], policy)
    told = [line["message"] for path in logs.iterdir() for line in lines(path)]
    assert sorted(told) == sorted(f"number {number}" for number in range(10))


def test_old_logs_go_and_young_ones_stay(folder: int, logs: Path) -> None:
    events.write(folder, [event()], Policy())
    for name, days in (("events@old", 100), ("events@young", 10), ("a@old", 100), ("events", 100)):
        path = logs / f"{name}.jsonl"
        path.touch()
        os.utime(path, (NOW - days * DAY,) * 2)
    fd = os.open(logs, os.O_RDONLY)
    try:
        events.expire(fd, NOW, Policy(log_keep_days=90))
    finally:
        os.close(fd)
    assert sorted(os.listdir(logs)) == ["events.jsonl", "events@young.jsonl"]

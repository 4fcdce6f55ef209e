"""Reading the event log: in order, over rotations, past damage, and on from where it was left."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.runs import rules
from watcher import config
from watcher.commands import log as command
from watcher.config import Settings
from watcher.observe.targets import Targets
from watcher.state import event_log
from watcher.state.event_log import Event, Log

NOW = 1_764_000_000.0


@pytest.fixture
def store(folder: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{folder}"))


@pytest.fixture
def logs(store: Path) -> Path:
    return store / ".ollama-watch/logs"


def write(folder: int, *numbers: int, policy: Settings | None = None) -> None:
    told = [Event(NOW + number, "error", str(number)) for number in numbers]
    event_log.write(folder, told, policy or Settings())


def messages(log: Log, *, to_the_end: bool = False) -> list[str]:
    return [line.message for line in log.read(to_the_end=to_the_end)]


def test_a_log_is_read_on_from_its_last_position_across_any_number_of_rotations(
    folder: int, store: Path
) -> None:
    log, small = Log(str(store)), Settings(log_max_bytes=250)
    assert messages(log) == []
    write(folder, 0)
    assert messages(log) == ["0"]
    assert messages(log) == []
    for first, last in ((1, 2), (2, 3), (3, 20), (20, 21), (21, 90)):
        write(folder, *range(first, last), policy=small)
        assert messages(log) == [str(number) for number in range(first, last)]
    assert messages(Log(str(store))) == [str(number) for number in range(90)]


def test_a_log_of_terabytes_of_nothing_is_damaged_and_no_more(
    folder: int, store: Path, logs: Path
) -> None:
    write(folder, 0)
    os.truncate(logs / "events.jsonl", 1 << 42)
    log = Log(str(store))
    assert messages(log) == ["0"]
    assert log.damaged == 1
    assert messages(log, to_the_end=True) == []


def test_logs_set_aside_at_the_same_instant_are_in_order(folder: int, store: Path) -> None:
    told = [Event(NOW, "error", str(number)) for number in range(30)]
    event_log.write(folder, told, rules(log_max_bytes=1).settings)
    assert messages(Log(str(store))) == [str(number) for number in range(30)]


def test_a_log_set_aside_between_listing_and_opening_is_read_once(
    folder: int, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, 1, 2)
    log = Log(str(store))
    real = event_log._in_order
    turning = [lambda: write(folder, 3, policy=Settings(log_max_bytes=1)), lambda: write(folder, 4)]

    def listed(*words: object) -> object:
        there = real(*words)  # type: ignore[arg-type]
        while turning:
            turning.pop(0)()
        return there

    monkeypatch.setattr(event_log, "_in_order", listed)
    assert messages(log) == ["1", "2", "3", "4"]


def test_a_half_line_is_waited_for_or_reported(folder: int, store: Path, logs: Path) -> None:
    write(folder, 1, 2)
    whole = (logs / "events.jsonl").read_bytes()
    (logs / "events.jsonl").write_bytes(whole[:-10])
    log = Log(str(store))
    assert messages(log) == ["1"]
    assert log.damaged == 0
    (logs / "events.jsonl").write_bytes(whole)
    assert messages(log) == ["2"]
    (logs / "events.jsonl").write_bytes(whole[:-10])
    log = Log(str(store))
    assert messages(log, to_the_end=True) == ["1"]
    assert log.damaged == 1


def test_a_half_line_that_is_cut_off_by_the_next_writer_loses_nothing(
    folder: int, store: Path, logs: Path
) -> None:
    write(folder, 1)
    log = Log(str(store))
    with (logs / "events.jsonl").open("ab") as file:
        file.write(b'{"timestamp": "2026')
    assert messages(log) == ["1"]
    write(folder, 2)
    assert messages(log) == ["2"]
    assert log.damaged == 0


DAMAGED = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'{"timestamp": 1}',
    b"\x00" * 100,
    b"\xff\xfe",
    b'{"timestamp":"x","model_name":null,"event_type":"a","message":"b","details":{}}',
    b'{"timestamp":"2026-11-24T10:00:00Z","model_name":1,"event_type":"a","message":"b","details":{}}',
    b'{"timestamp":"2026-11-24T10:00:00Z","model_name":null,"event_type":[],"message":"b","details":{}}',
    b'{"timestamp":"2026-11-24T10:00:00Z","model_name":null,"event_type":"a","message":"b","details":[]}',
    b"x" * (1 << 25),
]


def test_damaged_lines_are_passed_and_counted(folder: int, store: Path, logs: Path) -> None:
    write(folder, 1)
    with (logs / "events.jsonl").open("ab") as file:
        file.write(b"".join(each + b"\n" for each in DAMAGED))
    write(folder, 2)
    log = Log(str(store))
    assert messages(log, to_the_end=True) == ["1", "2"]
    assert log.damaged == len(DAMAGED)


def test_entries_that_are_no_log_files_are_skipped(folder: int, store: Path, logs: Path) -> None:
    write(folder, 1)
    (logs / "events@2026.jsonl").mkdir()
    (logs / "events@2027.jsonl").symlink_to("/etc/passwd")
    os.mkfifo(logs / "events@2028.jsonl")
    (logs / "events@").touch()
    event_log.write(folder, [Event(NOW, "error", "of a", "a")], rules().settings)
    assert messages(Log(str(store))) == ["1", "of a"]


def test_a_log_made_anew_or_cut_short_is_read_from_its_beginning(
    folder: int, store: Path, logs: Path
) -> None:
    log = Log(str(store))
    write(folder, 1, 2, 3)
    assert messages(log) == ["1", "2", "3"]
    (logs / "events.jsonl").unlink()
    assert messages(log) == []
    write(folder, 4)
    assert messages(log) == ["4"]
    write(folder, 5)
    assert messages(log) == ["5"]
    os.truncate(logs / "events.jsonl", 0)
    write(folder, 6)
    assert messages(log) == ["6"]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_line_or_damaged(raw: bytes) -> None:
    assert event_log.parse(raw) is None or isinstance(event_log.parse(raw), Event)


def line(name: str | None, **details: object) -> Event:
    return Event(NOW, "error", "", name, details)


def is_about(it: Event, wanted: Targets) -> bool:
    return wanted.meant(it.models, it.digests)


def test_a_line_is_about_its_models_and_its_digests() -> None:
    digest = "Ab" * 32
    model = Targets(frozenset({"llama3:latest"}), frozenset())
    layer = Targets(frozenset(), frozenset({digest.lower()}))
    assert is_about(line("Llama3:latest"), model)
    assert is_about(line("a:latest", models=["a:latest", "llama3:latest"]), model)
    assert not is_about(line("llama3:8b", models=["llama3:8b"]), model)
    assert not is_about(line(None), model)
    assert is_about(line("sha256-abababababab", digest=f"sha256:{digest}"), layer)
    assert is_about(line(None, subject=f"sha256-{digest}-partial-3"), layer)
    assert is_about(line(None, subjects=["x", digest, 3]), layer)
    assert not is_about(line(None, models={}, subjects=3, digest=None), layer)


def test_models_and_digests_to_ask_for_come_from_the_lines(folder: int, store: Path) -> None:
    lines = [
        line("sha256-abababababab", digest="sha256:" + "ab" * 32),
        line("a:latest", digest="sha256:" + "cd" * 32, models=["a:latest", "b:latest"]),
    ]
    event_log.write(folder, lines, Settings())
    known = command._known(str(store))
    assert known.digests == {"ab" * 32, "cd" * 32}
    assert known.models == dict.fromkeys(("a:latest", "b:latest"), frozenset({"cd" * 32}))


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2h", NOW - 7200),
        ("90", NOW - 90),
        ("1970-01-02", 86400.0 - 9 * 3600),
        ("1970-01-02T00:00", 86400.0 - 9 * 3600),
        ("1970-01-02T00:00:00Z", 86400.0),
        ("1970-01-02T01:00:00+01:00", 86400.0),
    ],
)
def test_a_moment_is_an_age_a_day_or_an_instant(
    text: str, at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert config.moment(text, NOW) == at
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "-5h"])
def test_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        config.moment(text, NOW)

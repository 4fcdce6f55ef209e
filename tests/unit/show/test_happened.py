"""Lines of the event log as text, with colors and without."""

from __future__ import annotations

import click
import pytest

from tests.support.runs import rules
from watcher.commands import daemon
from watcher.commands.context import Context
from watcher.show import log
from watcher.state import event_log
from watcher.state.event_log import Event


def line(kind: str, message: str, at: float = 1_764_000_000.0) -> Event:
    return Event(at, kind, message)


def test_colors_go_by_the_type_and_change_nothing_else() -> None:
    plain, colored = log.printer(color=False), log.printer(color=True)
    styles = {
        "error": "31",
        "partial_stale": "33",
        "download_completed": "32",
        "check_started": "36",
    }
    for kind, style in styles.items():
        shown = colored(line(kind, "what happened " * 9))
        assert f"\x1b[{style}m{kind}" in shown
        assert click.unstyle(shown) == plain(line(kind, "what happened " * 9))


def test_a_type_that_is_longer_than_most_still_leaves_room() -> None:
    shown = log.printer(color=False)(line("a_type_that_is_very_long_indeed", "why " * 30))
    assert all(len(each) <= 80 for each in shown.splitlines())


def test_a_time_that_no_calendar_has_is_shown() -> None:
    tell = log.printer(color=False)
    assert tell(line("error", "x", at=-1e15))
    assert tell(line("error", "x", at=1e15))


def test_a_daemon_on_a_terminal_reports_events_as_the_log_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    event = Event(0.0, "service_started", "ollama-watch watches a store, repairs what broke " * 3)
    daemon._printer(Context(rules().settings))(event)
    told = capsys.readouterr().err
    line = event_log.parse(event.line)
    assert line is not None
    assert told == log.printer(color=False)(line)
    assert max(map(len, told.splitlines())) <= 80


SPEED = {
    "arrived_bytes": 45_000_000, "lost_bytes": 2_000_000, "resets": 2, "stalls": 1, "seconds": 12.4,
    "min_bytes_per_second": 0, "median_bytes_per_second": 3_100_000,
    "max_bytes_per_second": 5_000_000,
}  # fmt: skip
RATES = "3.1 MB/s, from 0 bytes/s to 5.0 MB/s"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, f"x; 45.0 MB downloaded in 12 s; {RATES}; 2 resets; 1 stall; 2.0 MB lost"),
        ({"max_bytes_per_second": None, "resets": 0, "stalls": 0, "lost_bytes": 0},
         "x; 45.0 MB downloaded in 12 s"),
        (dict.fromkeys(SPEED, 0), "x"),
        (dict.fromkeys(SPEED, "\x1b[2J"), "x"),
        (dict.fromkeys(SPEED), "x"),
    ],
)  # fmt: skip
def test_how_fast_a_pull_was(changes: dict[str, object], told: str) -> None:
    shown = log.printer(color=False)(
        Event(0.0, "pull_completed", "x", details={**SPEED, **changes})
    )
    assert " ".join(shown.split("pull_completed")[1].split()) == told

"""The renderer: what it shows fits the terminal, and names and commands stay in one piece."""

from __future__ import annotations

import re
import time

import click
import pytest

from tests.support.runs import rules
from tests.unit.decide.seen import MB, NOW, diagnosis, download, evidence
from watcher import reconcile
from watcher.decide import conditions
from watcher.model import DAY, HOUR, Condition, Evidence, Plan
from watcher.show import tables, text
from watcher.show.text import Line, Span, Table, render
from watcher.system import terminal

WIDTHS = (60, 80, 120, 160)
MODEL = "hf.co/organization/A-Very-Long-Repository-Name-With-Many-Words-GGUF:Q4_K_M"
DIGEST = "3102ddefe309" + "0" * 52
WORDS = f"the download of {MODEL} was interrupted: " + "progress is not recorded " * 8
COMMAND = f"ollama-watch --store '/a b/{'c' * 200}' repair {MODEL}"


def lines(*parts: text.Part, columns: int) -> list[str]:
    return render(parts, color=False, columns=columns).splitlines()


@pytest.mark.parametrize(
    "words", ["", "a", " a b", "  a bbbb  ccccccccccc d ", "aaaaaaaaaa b", "a bb   ccc", "   "]
)
def test_a_paragraph_is_broken_alike_whatever_its_styles_are(words: str) -> None:
    for columns in range(-2, len(words) + 2):
        whole = lines(Line(words), columns=columns)
        for at in (at for at in range(len(words)) if words[max(0, at - 1) : at + 1] != "  "):
            assert lines(Line((Span(words[:at]), Span(words[at:]))), columns=columns) == whole


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("indent", [0, 11])
def test_lines_fit_and_no_name_is_broken(columns: int, indent: int) -> None:
    shown = lines(Line(WORDS, indent), Line((Span("a "), Span(WORDS)), indent), columns=columns)
    longest = max(columns, indent + len(MODEL) + 1)
    assert all(len(line) <= longest for line in shown)
    assert all(len(line) <= columns for line in shown if MODEL not in line)
    assert " ".join(" ".join(shown).split()) == f"{WORDS.strip()} a {WORDS.strip()}"
    assert sum(MODEL in line for line in shown) == 2


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_name_is_not_broken_at_its_spaces(columns: int) -> None:
    path = "my models/" * 8
    shown = lines(f"could not be read: {text.name(path)} {'and so on ' * 20}", columns=columns)
    assert any(path.strip() in line for line in shown)


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_command_is_whole_and_unchanged(columns: int) -> None:
    long = f"{COMMAND} sha256-{DIGEST}"
    shown = lines(text.command(long), Line("it is at risk.", run=long), columns=columns)
    assert f"-> {long}" in shown
    assert f"Run: {long}" in shown, "on a line of its own, since it does not fit behind the words"
    assert lines(Line("it is at risk.", run="do"), columns=columns) == ["it is at risk. Run: do"]


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("model", ["m", MODEL, "m" * 150])
def test_a_table_fits_and_no_name_in_it_is_broken(columns: int, model: str) -> None:
    rows = [("1", model, "normal", "03:39", WORDS[60:]), ("", "n", "high", "", "waiting")]
    table = Table(rows, ("#", "model", "priority", "done by", "state"), frozenset({0}))
    shown = lines(table, columns=columns)
    assert all(len(line) <= columns or model in line for line in shown)
    assert any(model in line.split() for line in shown)
    for word in ("normal", "03:39", "waiting", "priority"):
        assert sum(word in line for line in shown) == 1


def test_wide_characters_take_two_columns() -> None:
    rows = lines("模型 " * 40, columns=60)
    assert max(map(text.cells, rows)) <= 60
    assert text.cells("模型e\u0301") == 5


def test_colors_change_nothing_else() -> None:
    parts: list[text.Part] = [
        Line((Span("a", "bold red"), Span(" b" * 90, "dim")), 3, label=(Span("x", "green"),)),
        Table([(Span("a", "red"), "b ")]),
        text.command("c"),
    ]
    colored = render(parts, color=True, columns=60)
    assert click.unstyle(colored) == render(parts, color=False, columns=60)


def test_digests_are_short_but_in_commands() -> None:
    told = f"blobs/sha256-{DIGEST}-partial-3 and sha256:{DIGEST}, {'f' * 64}"
    assert lines(told, columns=160) == [
        f"blobs/sha256-3102ddefe309…-partial-3 and sha256-3102ddefe309, {'f' * 64}"
    ]


@pytest.mark.parametrize(
    ("columns", "width"),
    [("", 80), ("20", 60), ("100", 100), ("999", 160), ("x", 80), ("0", 80), ("9" * 5000, 80)],
)
def test_the_width_is_that_of_the_terminal_within_limits(
    monkeypatch: pytest.MonkeyPatch, columns: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert terminal.width() == width


def test_the_legend_fits_the_narrowest_terminal() -> None:
    assert len(tables._LEGEND) + 2 <= terminal.NARROWEST


@pytest.mark.parametrize(
    ("part", "whole", "told"),
    [
        (36_000_000_000, 40_000_000_000, "36.0 of 40.0 GB"),
        (5_000_000, 40_000_000_000, "0.0 of 40.0 GB"),
        (0, 999, "0 of 999 bytes"),
        (1, 1, "1 of 1 byte"),
    ],
)
def test_two_sizes_have_one_unit(part: int, whole: int, told: str) -> None:
    assert text.part_of(part, whole) == told


# ---------------------------------------------------------------- the first line


def first_line(seen: Evidence) -> str:
    told_of = diagnosis(seen, rules())
    line = tables.verdict(reconcile.Report(seen, told_of, Plan()))
    return render([line], color=False, columns=160).removesuffix("\n")


def interrupted(ago: float) -> Evidence:
    return evidence(download(ago=ago, trusted=((0, 60 * MB),), models=("llama3:70b",)))


def test_the_verdict_shows_how_much_of_which_model_its_risk_and_what_to_run() -> None:
    told = first_line(interrupted(2 * HOUR))
    assert re.fullmatch(
        r"llama3:70b: \d+ % on disk \(60\.0 of \d+\.0 MB\)\. The next server start deletes it\."
        r" Run: \S*ollama-watch --store /models repair llama3:70b",
        told,
    ), told
    told = first_line(interrupted(HOUR / 2))
    when = time.strftime("%H:%M", time.localtime(NOW + HOUR / 2))
    assert f". The next server start after {when} deletes it. Run: " in told


def test_the_verdict_is_about_what_is_worth_keeping() -> None:
    stale = download(ago=9 * DAY, digest="a" * 64, models=("old:7b",))
    fresh = download(ago=2 * HOUR, digest="b" * 64, models=("new:7b",))
    assert first_line(evidence(stale, fresh)).startswith("new:7b: ")
    told = first_line(evidence(stale))
    assert told.startswith("old:7b: ")
    assert " clean sha256-aaaaaaaaaaaa" in told


def test_the_layers_of_a_model_are_reported_together() -> None:
    layers = [
        download(ago=2 * HOUR, digest=each * 64, trusted=((0, 30 * MB),), models=("two:7b",))
        for each in "ab"
    ]
    total = sum(each.total or 0 for each in layers) / 1e6
    assert f"two:7b: {int(60e2 / total)} % on disk (60.0 of {total:.1f} MB)." in first_line(
        evidence(*layers)
    )


def test_every_condition_has_words_of_its_own() -> None:
    words = [conditions.row(each).words for each in Condition]
    assert len(set(words)) == len(words)

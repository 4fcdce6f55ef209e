"""Each condition, kind of action, kind of finding and type of event is one whole row."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import watcher
from watcher.decide import actions, conditions, events, finding_kinds
from watcher.decide.conditions import NextPull, Step
from watcher.model import ActionKind, BlobFault, Condition, ManifestFault, Severity
from watcher.ollama import names
from watcher.state.event_log import EventType

from .seen import D, download, evidence

HOUSE = Path(watcher.__file__).parent
EVENTS = (HOUSE.parent / "docs/reference/events.md").read_text(encoding="utf-8")


@functools.cache
def nodes() -> list[tuple[Path, ast.AST]]:
    """All of the package's code."""
    paths = [path for path in HOUSE.rglob("*.py") if "demo" not in path.parts]
    return [(path, node) for path in paths for node in ast.walk(ast.parse(path.read_bytes()))]


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call in the package, with the name of what is called."""
    for _, node in nodes():
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", "")), node


def literals(name: str) -> set[str]:
    """The texts that calls of that name have as an argument."""
    given = (arg for called, call in calls() if called == name for arg in call.args)
    found = {arg.value for arg in given if isinstance(arg, ast.Constant)}
    return {each for each in found if isinstance(each, str)}


# ---------------------------------------------------------------- conditions


def test_each_condition_has_one_row_in_words_of_its_own() -> None:
    assert sorted(row.condition for row in conditions.TABLE) == sorted(Condition)
    for wording in (
        [row.words for row in conditions.TABLE],
        [row.sentence for row in conditions.TABLE],
    ):
        assert len(set(wording)) == len(Condition)
    for row in conditions.TABLE:
        assert 0 < len(row.word) <= 9, "the narrow column of a drawing"
        assert row.sentence.format("x:latest").count("x:latest") == 1
        assert row.alone


def test_one_row_is_right_for_every_download() -> None:
    assert conditions.TABLE[-1].because(download())
    assert conditions.settled_condition(download(total=None))[0] is Condition.PAUSED


@pytest.mark.parametrize("row", conditions.TABLE, ids=lambda row: row.condition.value)
def test_a_row_says_the_same_in_all_its_cells(row: conditions.Row) -> None:
    """What nobody may touch is neither repaired nor cleaned; a repair leaves what can be pulled."""
    if row.condition in (Condition.LIVE, Condition.UNKNOWN):
        assert row.clean is Step.NOTHING
        assert row.repair in (Step.NOTHING, Step.WAIT)
    if row.repair is Step.WRITE_SIDECARS:
        assert row.severity is not Severity.INFO
        assert conditions.resumes(row.repaired)
    if row.next_pull is NextPull.IGNORES:
        assert row.cost_alone(download()) in (0, None)


# ---------------------------------------------------------------- actions


def test_each_kind_of_action_has_one_row() -> None:
    assert sorted(row.kind for row in actions.TABLE) == sorted(ActionKind)
    for row in actions.TABLE:
        assert row.does.format("x:latest").count("x:latest") == 1
        assert row.command.split()[0] in ("repair", "clean", "quarantine", "pull")


def test_questions_come_first_and_times_last() -> None:
    order = [row.kind for row in actions.TABLE]
    assert set(order[:2]) == {ActionKind.ASK_REGISTRY, ActionKind.HASH}
    assert order[-1] is ActionKind.REFRESH


# ---------------------------------------------------------------- findings


def test_each_kind_of_finding_stands_once() -> None:
    kinds = [row.kind for row in finding_kinds.TABLE]
    assert len(set(kinds)) == len(kinds)
    assert all(
        re.fullmatch(r"(download|blob|manifest|file|store|state)_[a-z_]+", each) for each in kinds
    )


def test_every_kind_that_can_come_up_has_a_row() -> None:
    made = {f"download_{each}" for each in Condition} | {f"blob_{each}" for each in BlobFault}
    made |= {f"manifest_{each}" for each in ManifestFault} | literals("found")
    assert {each for each in made if "_" in each} <= {row.kind for row in finding_kinds.TABLE}


def test_nothing_makes_a_finding_past_the_table() -> None:
    inside = "decide/finding_kinds.py"
    past = [
        path.relative_to(HOUSE).as_posix()
        for path in (HOUSE / "decide").glob("*.py")
        if re.search(r"\bFinding\(", path.read_text()) and not path.as_posix().endswith(inside)
    ]
    assert past == []


def test_a_finding_that_hides_something_is_an_error_that_repair_reports() -> None:
    hiding = [row for row in finding_kinds.TABLE if row.hides]
    assert {row.kind for row in hiding} == {"store_unlisted", "store_unseen", "manifest_unreadable"}
    for row in hiding:
        assert row.severity is Severity.ERROR
        assert row.left is not finding_kinds.Left.NONE
        assert row.logged


# ---------------------------------------------------------------- events


def test_each_type_of_event_is_emitted_and_none_is_spelled() -> None:
    used = {
        node.attr
        for path, node in nodes()
        if path.name != "event_log.py"
        and isinstance(node, ast.Attribute)
        and getattr(node.value, "id", "") == "EventType"
    }
    assert used == set(EventType.__members__)
    emitting = ("Event", "of_download", "_tell", "_log", "log_download_event")
    assert not {each for name in emitting for each in literals(name)} & set(EventType)


@pytest.mark.parametrize(
    ("kind", "heading"),
    [(events.DownloadDetails, "Of a download"), (events.ActionDetails, "Of an action")],
)
def test_the_docs_name_the_details(kind: type, heading: str) -> None:
    told = EVENTS.partition(f"**{heading}**: ")[2].partition("\n\n")[0]
    always = {key for key, hint in kind.__annotations__.items() if "NotRequired" not in str(hint)}
    assert set(re.findall(r"`(\w+)`", told)) == always


def test_an_event_about_a_download_carries_it() -> None:
    from watcher.decide import diagnose

    from .seen import NOW, POLICY

    (diagnosed,) = diagnose.diagnose(evidence(download(models=("x:latest",))), POLICY)
    event = events.of_download(NOW, EventType.PARTIAL_FOUND, "", diagnosed)
    assert event.about is diagnosed
    assert event.models == {"x:latest"}
    assert event.model_name == names.known_as(("x:latest",), D)


def test_the_best_condition_comes_first_and_the_worst_last() -> None:
    order = sorted(Condition, key=conditions.badness)
    assert (order[0], order[1], order[-1]) == (Condition.LIVE, Condition.PAUSED, Condition.UNKNOWN)
    ranks = [conditions.row(each).severity.rank for each in order]
    assert ranks == sorted(ranks)

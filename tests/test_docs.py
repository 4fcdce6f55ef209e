"""The design's tables have a row for everything of their kind that the code has."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from watcher import errors
from watcher.decide import transitions
from watcher.model import Condition, RefusalKind, Settings, UseKind
from watcher.pull.queue import ItemState

ROOT = Path(__file__).parent.parent
DESIGN = (ROOT / "docs/design.md").read_text(encoding="utf-8")
SCHEMAS = ROOT / "watcher/show"
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: The functions that make or write an event, and which of their arguments is its type.
TELLING = {"Event": 1, "_event": 1, "_tell": 0, "_log": 0, "log_download_event": 1}


def first_cells(text: str) -> set[str]:
    """What stands in the first column of all tables, as code."""
    rows = (line.split(" | ", 1)[0] for line in text.splitlines() if line.startswith("| "))
    return {word for row in rows for word in re.findall(r"`([^`]+)`", row)}


def told(tree: ast.AST) -> Iterator[str]:
    """The types of the events that a module tells, where they stand in the call itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            at = TELLING.get(name, len(node.args))
            if at < len(node.args) and isinstance(node.args[at], ast.Constant):
                yield str(node.args[at].value)  # type: ignore[attr-defined]


def event_types() -> set[str]:
    paths = (each for each in (ROOT / "watcher").rglob("*.py") if "demo" not in each.parts)
    found = {kind for path in paths for kind in told(ast.parse(path.read_bytes()))}
    return found | set(transitions._DONE_EVENT.values()) | {"refused", "error"}


def test_the_search_for_events_finds_some() -> None:
    assert {"service_started", "download_stalled", "pull_failed", "purged"} <= event_types()


@pytest.mark.parametrize(
    "wanted",
    [
        event_types(),
        set(map(str, RefusalKind)),
        set(map(str, UseKind)),
        set(map(str, Condition)),
        set(map(str, ItemState)),
        {each.name for each in fields(Settings)},
    ],
    ids=["events", "refusals", "uses", "conditions", "queue", "policy"],
)
def test_the_design_has_a_row_for_each(wanted: set[str]) -> None:
    assert wanted - first_cells(DESIGN) == set()


def test_each_room_has_its_row() -> None:
    section = DESIGN.partition("## The house")[2].partition("\n## ")[0]
    rooms = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "watcher").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert {each for each in rooms - {"__init__.py"} if f"`{each}`" not in section} == set()


def test_both_schemas_describe_the_same_store() -> None:
    audit, df = (
        json.loads((SCHEMAS / f"{name}.schema.json").read_text()) for name in ("audit", "df")
    )
    assert audit["properties"]["store"] == df["properties"]["store"]


def test_an_event_has_one_row() -> None:
    section = DESIGN.partition("## Events")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)`", section, re.MULTILINE)
    assert {each for each in rows if rows.count(each) > 1} == {"refused", "error"}


@pytest.mark.parametrize("text", [README, DESIGN], ids=["README", "design"])
def test_exit_codes_have_their_rows(text: str) -> None:
    table = text.partition("## Exit codes")[2].partition("\n## ")[0]
    rows = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert rows == set(map(int, errors.Exit))

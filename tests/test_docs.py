"""The documentation has what the code has: its tables, its rooms, its pages, its links."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from . import doc_tables
from .doc_tables import ROOT, Table

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SCHEMAS = ROOT / "watcher/show"
TABLES = doc_tables.tables()
#: Types of events that have several meanings, and so several rows.
SEVERAL = {"`refused`", "`error`"}


def found(name: str) -> str:
    return doc_tables.block((ROOT / TABLES[name].page).read_text(encoding="utf-8"), name)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_as_the_code_has_it(name: str) -> None:
    assert found(name) == doc_tables.updated(found(name), TABLES[name])


@pytest.mark.parametrize("name", TABLES)
def test_each_row_says_something_of_its_own_and_stands_once(name: str) -> None:
    rows = [doc_tables.cells(line) for line in found(name).splitlines()[2:]]
    for row in rows:
        assert row[1 + len(TABLES[name].rows[row[0]])], f"{row[0]} has nothing beside it"
    keys = [row[0] for row in rows]
    assert {each for each in keys if keys.count(each) > 1} <= SEVERAL


def test_an_update_adds_removes_and_keeps() -> None:
    old = "| a | own | b |\n|---|---|---|\n| `x` | 1 | kept |\n| `gone` | 2 | with it |\n"
    table = Table("", {"`x`": ("3",), "`new`": ("4",)})
    new = "| a | own | b |\n|---|---|---|\n| `x` | 3 | kept |\n| `new` | 4 | |\n"
    assert doc_tables.updated(old, table) == new


def test_each_room_has_its_row() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = text.partition("## The rooms")[2].partition("\n## ")[0]
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


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_each_page_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_commands_of_the_readme_are_its_first_two_blocks() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert blocks[0].endswith("ollama-watch demo\n")
    assert blocks[1].endswith("-m pytest\n")
    assert all(each.count("\n") == 1 for each in blocks[:2])


def test_no_page_names_a_file_that_is_gone() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:watcher|tests|docs|systemd|deploy|container)/[\w./-]+)`",
                               page.read_text(encoding="utf-8")):  # fmt: skip
            assert (ROOT / name).exists(), f"{page.name}: {name}"
        for name in re.findall(r"`([a-z_]+/[a-z_]+\.py)`", page.read_text(encoding="utf-8")):
            there = (ROOT / "watcher" / name, ROOT / name, ROOT / "tests" / name)
            assert any(each.exists() for each in there), f"{page.name}: {name}"

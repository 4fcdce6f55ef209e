"""The library's page says what the library has: every method, state, key and error."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, is_typeddict

import pytest

from watcher import errors
from watcher.pull import manager
from watcher.pull.account import Options
from watcher.pull.failures import Cause
from watcher.pull.manager import ModelDownloadManager, StoreFiles
from watcher.state.records import State

PAGE = (Path(__file__).parents[1] / "docs/library.md").read_text()
DICTIONARIES = [each for _, each in inspect.getmembers(manager, is_typeddict)]


def section(title: str) -> str:
    """What stands below a heading, up to the next one of the same or a higher rank."""
    rank, _, rest = PAGE.partition(f"# {title}\n")
    assert rest, f"no heading {title!r}"
    marks = "#" * (len(rank) - len(rank.rstrip("#")) + 1)
    return re.split(rf"^#{{1,{len(marks)}}} ", rest, flags=re.MULTILINE)[0]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of each row of its tables, without heads."""
    lines = text.splitlines()
    for line, after in itertools.pairwise([*lines, ""]):
        if line.startswith("| `") and not after.startswith("|--"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def first_words(text: str) -> list[str]:
    return [cells[0].strip("`") for cells in rows(text)]


def test_every_method_with_its_parameters() -> None:
    told = dict(re.findall(r"^\| `(\w+)\(([^)]*)\)` \|", section("Methods"), re.MULTILINE))
    there = dict(inspect.getmembers(ModelDownloadManager, inspect.isfunction))
    assert told.keys() == {name for name in there if not name.startswith("_")}
    for name, words in told.items():
        known = list(inspect.signature(there[name]).parameters.values())[1:]
        parameters = [each.partition("=")[0].strip() for each in words.split(",") if each.strip()]
        assert parameters == [each.name for each in known], name
        optional = [each.partition("=")[0].strip() for each in words.split(",") if "=" in each]
        assert optional == [each.name for each in known if each.default is not each.empty], name


def test_every_method_gives_a_dictionary_that_is_described() -> None:
    for name, gives, *_ in rows(section("Methods")):
        method = getattr(ModelDownloadManager, name.strip("`").partition("(")[0])
        answer = str(inspect.signature(method).return_annotation)
        for each in DICTIONARIES:
            if re.search(rf"\b{each.__name__}\b", answer):
                assert f"`{each.__name__}`" in gives, name


def test_the_constructors() -> None:
    told = re.search(r"`ModelDownloadManager\(([^)]*)\)`", PAGE)
    assert told is not None
    words = [each.partition("=")[0].strip() for each in told[1].split(",")]
    known = inspect.signature(ModelDownloadManager).parameters
    assert [each for each in words if each != "*"] == list(known)
    assert list(inspect.signature(StoreFiles).parameters) == ["store_path"]
    for each in ("store_path", "state_path", *Options.__dataclass_fields__):
        assert f"`{each}`" in PAGE


@pytest.mark.parametrize("kind", DICTIONARIES, ids=lambda kind: kind.__name__)
def test_every_key_with_its_type(kind: Any) -> None:
    text = section(kind.__name__)
    told = [(cells[0].strip("`"), cells[1].strip("`").replace("\\", "")) for cells in rows(text)]
    base = re.search(r"[Aa] `(\w+)`, and\n", text)
    known = kind.__annotations__.items()
    inherited = getattr(manager, base[1]).__annotations__ if base else {}
    own = {key: value for key, value in known if key not in inherited}
    assert told == [(key, spelled(value)) for key, value in own.items()]


def spelled(annotation: Any) -> str:
    text = getattr(annotation, "__forward_arg__", annotation)
    return str(text)


def test_every_state_with_its_stage() -> None:
    told = {cells[0].strip("`"): cells[2] for cells in rows(section("States"))}
    assert told == {each.value: each.stage for each in State}


def test_every_error_and_every_cause() -> None:
    words = first_words(section("Errors"))
    known = [
        name
        for name, each in inspect.getmembers(errors, inspect.isclass)
        if issubclass(each, errors.WatchError) and each is not errors.WatchError
    ]
    assert sorted(words) == sorted([*known, *(each.code for each in Cause)])
    again = {cells[0].strip("`"): cells[2] for cells in rows(section("Errors")) if len(cells) > 2}
    for each in Cause:
        assert ("can help" in again[each.code]) is each.passes, each
        assert ("hourly" in again[each.code]) is each.hourly, each

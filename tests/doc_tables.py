"""The tables of the documentation that follow the code.

Such a table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. The code owns its
rows, the first cell of each and the cells right behind it; people write the rest. After a change of
the code, ``python -m tests.doc_tables`` adds and removes rows and fills in what the code owns.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from watcher import config
from watcher.decide import actions, conditions, modes
from watcher.decide import finding_kinds as finding_table
from watcher.errors import Exit
from watcher.model import (
    Condition,
    Mode,
    RefusalKind,
    UseKind,
)
from watcher.pull.queue import ItemState
from watcher.state.event_log import EventType

ROOT = Path(__file__).parent.parent


class Table(NamedTuple):
    """What the code owns of a table: first cells, each with the cells right behind it."""

    page: str
    rows: Mapping[str, tuple[str, ...]]


def tables() -> dict[str, Table]:
    """All of them, by name."""
    reference = "docs/reference"
    return {
        "conditions": Table(
            f"{reference}/conditions.md",
            {_code(each.condition): (each.severity.value, each.words) for each in conditions.TABLE},
        ),
        "findings": _words(f"{reference}/conditions.md", finding_kinds()),
        "actions": _words(f"{reference}/conditions.md", [each.kind for each in actions.TABLE]),
        "refusals": _words(f"{reference}/conditions.md", RefusalKind),
        "events": _words(f"{reference}/events.md", EventType),
        "uses": _words(f"{reference}/json.md", UseKind),
        "exit codes": Table(
            f"{reference}/exit-codes.md",
            {str(each.value): (_code(each.name),) for each in Exit},
        ),
        "settings": Table(f"{reference}/settings.md", _settings()),
        "queue": _words("docs/pull.md", ItemState),
        "mode fields": _words("docs/architecture.md", Mode._fields),
        "modes": Table("docs/architecture.md", _modes()),
    }


def _code(word: object) -> str:
    return f"`{word}`"


def _words(page: str, words: object) -> Table:
    return Table(page, {_code(each): () for each in words})  # type: ignore[attr-defined]


def _settings() -> dict[str, tuple[str, ...]]:
    rows: dict[str, tuple[str, ...]] = {
        _code("store"): (_code(f"{config.ENVIRONMENT_PREFIX}STORE"), "found, see below")
    }
    for key, known in config.KEYS.items():
        usual = known.metadata["default"]
        shown = str(usual).lower() if isinstance(usual, bool | int) else f'"{usual}"'
        default = _code(shown) if usual not in ("", []) else "none"
        rows[_code(key)] = (_code(f"{config.ENVIRONMENT_PREFIX}{key.upper()}"), default)
    return rows


def _modes() -> dict[str, tuple[str, ...]]:
    usual = Mode()
    rows: dict[str, tuple[str, ...]] = {}
    for name, mode in vars(modes).items():
        if isinstance(mode, Mode):
            given = mode._asdict().items()
            differing = (pair for pair in given if pair[1] != getattr(usual, pair[0]))
            rows[_code(name)] = (", ".join(itertools.starmap(_field, differing)),)
    return rows


def _field(name: str, value: object) -> str:
    if value is True:
        return _code(name)
    return _code(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}")


def finding_kinds() -> list[str]:
    """The kinds of all findings; those of conditions together."""
    of_conditions = {f"download_{each.value}" for each in Condition}
    kinds = [each.kind for each in finding_table.TABLE if each.kind not in of_conditions]
    return ["download_<condition>", *kinds]


# ---------------------------------------------------------------- in the pages


def block(text: str, name: str) -> str:
    """The table of that name in a page."""
    start, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
    assert text.count(start) == 1, f"the page has not one table {name!r}"
    return text.partition(start)[2].partition(end)[0]


def cells(row: str) -> list[str]:
    """The cells of a row."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def updated(found: str, table: Table) -> str:
    """The table as the code has it: its own cells set, rows added and removed."""
    head, rule, *rows = found.splitlines()
    width = len(cells(head))
    kept = [each for each in map(cells, rows) if each[0] in table.rows]
    there = {each[0] for each in kept}
    kept += [[key] + [""] * (width - 1) for key in table.rows if key not in there]
    for each in kept:
        owned = table.rows[each[0]]
        each[1 : 1 + len(owned)] = owned
    lines = [head, rule, *(_row(each) for each in kept)]
    return "".join(f"{line}\n" for line in lines)


def _row(each: list[str]) -> str:
    return f"| {' | '.join(each)} |".replace("|  |", "| |").replace("|  |", "| |")


def main() -> None:
    """Bring all pages up to date."""
    for name, table in tables().items():
        page = ROOT / table.page
        text = page.read_text(encoding="utf-8")
        found = block(text, name)
        page.write_text(text.replace(found, updated(found, table)), encoding="utf-8")


if __name__ == "__main__":
    main()

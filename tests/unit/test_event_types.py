"""The table of event types in the design is complete, and has nothing that is never told."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import watcher
from watcher.decide import transitions

HOUSE = Path(watcher.__file__).parent
DESIGN = HOUSE.parent / "docs" / "design.md"
#: What an event's type is given to as a literal.
TELLERS = frozenset({"Event", "_event", "_tell", "_log", "log_download_event"})
TYPE = re.compile(r"[a-z]+(_[a-z]+)*")


def told() -> Iterator[str]:
    """Each literal type in the code."""
    for path in HOUSE.rglob("*.py"):
        if "demo" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and _name(node.func) in TELLERS:
                words = (each.value for each in node.args if isinstance(each, ast.Constant))
                yield from [w for w in words if isinstance(w, str) and TYPE.fullmatch(w)][:1]
    yield from transitions._DONE_EVENT.values()


def _name(called: ast.expr) -> str:
    return called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")


def test_the_design_lists_every_type() -> None:
    section = DESIGN.read_text().split("\n## Events\n")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")][1:]
    listed = {word for row in rows for word in re.findall("`([a-z_]+)`", row[1])}
    assert listed == set(told())
    assert all(len(row) == 5 and row[2].strip() and row[3].strip() for row in rows)

"""The queries of the dashboard, as Grafana sends them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy/grafana/ollama-watch.json"


class Query(NamedTuple):
    """A panel's title, the letter of one of its queries, and the query."""

    panel: str
    letter: str
    expression: str


def queries(**variables: str) -> list[Query]:
    """Each query of each panel, with the values of variables filled in."""
    found = []
    for panel in json.loads(FILE.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, value in variables.items():
                expression = expression.replace(f"${name}", value)
            assert "$" not in expression, f"{panel['title']}: no value for a variable: {expression}"
            found.append(Query(panel["title"], target["refId"], expression))
    return found

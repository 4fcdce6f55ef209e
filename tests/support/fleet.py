"""The queries of the dashboard as Grafana sends them, and a store that has something to show."""

from __future__ import annotations

import json
from typing import NamedTuple

from tests.support.driving import HealthyStore
from tests.support.servers import ROOT
from watcher.model import DAY

DASHBOARD = ROOT / "deploy/grafana/ollama-watch.json"
RULES = ROOT / "deploy/prometheus/ollama-watch.rules.yml"


class Query(NamedTuple):
    """A panel's title, the letter of one of its queries, and the query."""

    panel: str
    letter: str
    expression: str
    instant: bool  #: else over a range of time


def queries(**variables: str) -> list[Query]:
    """Each query of each panel, with the values of variables filled in."""
    found = []
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, value in variables.items():
                expression = expression.replace(f"${name}", value)
            assert "$" not in expression, f"{panel['title']}: no value for a variable: {expression}"
            instant = target.get("instant", False)
            found.append(Query(panel["title"], target["refId"], expression, instant))
    return found


def make_ill(store: HealthyStore) -> None:
    """Add a damaged model, a blocked download and one that waits."""
    blob = store.blobs / f"sha256-{store.digests[0]}"
    blob.write_text(blob.read_text()[:-1])
    store.download("waits", aged=DAY)
    store.broken("10:20 {}:10", aged="2h")

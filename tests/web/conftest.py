"""A store of all that a page shows, hostile names among it, and the page of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import driving
from tests.support.driving import HealthyStore
from tests.support.pages import Page, served

#: As a name of a file, of a process, of a label, and in a line of the log.
HOSTILE = "<img src=x onerror=alert(1)>\"'&amp;"
#: What turns the direction of text, and what ends a line: never shown as it is.
CONTROLS = "\u202e\n"


def fill(store: HealthyStore) -> None:
    """Something of everything that the page shows, with hostile names where names are free."""
    store.download("a")
    store.download("b", aged=600)
    store.text_blob("orphan")
    store.file(HOSTILE)
    quarantine = store.ours / "quarantine"
    quarantine.mkdir(parents=True)
    (quarantine / f"1-{HOSTILE}").write_text("kept")
    for folder in (store.ours, quarantine):
        folder.chmod(0o700)
    logs = store.ours / "logs"
    logs.mkdir(mode=0o755)
    line: dict[str, Any] = dict.fromkeys(("event_type", "message"), f"{HOSTILE}{CONTROLS}")
    line |= {"model_name": HOSTILE, "timestamp": "2026-01-01T00:00:00.000Z", "details": {}}
    (logs / "events.jsonl").write_text(f"{json.dumps(line)}\n")
    driving.run(store.path, "queue", "add", "demo")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> HealthyStore:
    store = HealthyStore(tmp_path_factory.mktemp("web") / "models")
    fill(store)
    return store


@pytest.fixture(scope="module")
def page(store: HealthyStore) -> Iterator[Page]:
    with served(store.path) as page:
        yield page

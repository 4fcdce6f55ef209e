"""What the audit says of each recorded store, beside what the real server then did with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import watcher.show
from tests.support import commands
from watcher.demo.registry import Registry

from .player import Player, load

SCHEMA = json.loads((Path(watcher.show.__path__[0]) / "audit.schema.json").read_text())

#: What each recorded download is; the real server's treatment of it is in the recording.
CONDITIONS = {
    "killed": "behind",
    "killed-then-sidecars-advanced": "paused",
    "killed-then-ranges-rewritten": "paused",
    "terminated": "paused",
    "sidecar-missing": "blocked",
    "sidecar-empty": "blocked",
    "sidecar-braces": "blocked",
    "guard-part-0": "blocked",
    "guard": "blocked",
    "sidecars-none": "unclaimed",
    "data-missing": "paused",
    "data-missing-after-progress": "hollow",
    "whole-sidecars-complete": "whole",
    "old": "behind",
    "half-old": "behind",
}
FAULTS = {"blob-corrupt": None, "blob-short": "blob_short", "blob-missing": "blob_missing"}
STARTS = [*CONDITIONS, "start-deletes", "manifests-gone", "manifest-empty"]


@pytest.fixture
def player(registry: Registry, store: Path) -> Player:
    return Player(registry, store)


def audited(store: Path) -> dict[str, Any]:
    """The audit's document, held to its schema; no server runs on the store."""
    environment = {
        "OLLAMA_WATCH_WRITERS_VISIBLE": "true",
        "HOME": str(store),
        "PATH": "/bin",
        "PYTHONPATH": str(commands.ROOT),
    }
    done = commands.run(["--store", str(store), "--json", "audit"], environment)
    assert done.returncode in (0, 1), done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    jsonschema.validate(document, SCHEMA)
    return document


@pytest.mark.parametrize("name", CONDITIONS)
def test_each_recorded_download_has_its_condition(player: Player, name: str) -> None:
    player.lay_out(load(name)["before"])
    (download,) = audited(player.store)["downloads"]
    assert download["condition"] == CONDITIONS[name], download["because"]


@pytest.mark.parametrize("name", FAULTS)
def test_audit_finds_the_faults_of_blobs_that_names_and_sizes_show(
    player: Player, name: str
) -> None:
    player.lay_out(load(name)["before"])
    kinds = [each["kind"] for each in audited(player.store)["findings"]]
    wrong = [kind for kind in kinds if kind.startswith("blob_") and kind != "blob_orphan"]
    assert wrong == ([FAULTS[name]] if FAULTS[name] else [])


@pytest.mark.parametrize("name", [name for name in STARTS if "after_server_start" in load(name)])
def test_the_forecast_is_what_the_recorded_start_did(player: Player, name: str) -> None:
    recording = load(name)
    player.lay_out(recording["before"])
    before, after = (
        {path for path, entry in player.expected_tree(recording[when]).items() if entry.text != ""}
        for when in ("before", "after_server_start")
    )
    gone = {path for path in before - after if path.startswith("blobs/")}
    forecast = audited(player.store)["forecast"]
    assert set(forecast["deletes"]) == gone, forecast["why"]

"""``status`` tells of each model its stage, its percent, its error, and what helps."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.driving import run
from tests.support.notation import PART, Store
from watcher import ModelDownloadManager, StoreFiles
from watcher.model import DAY


@pytest.fixture
def manager(models: Store) -> ModelDownloadManager:
    return ModelDownloadManager(StoreFiles(models.path))


def begin(manager: ModelDownloadManager, model: str, **more: object) -> None:
    for status in ("starting", "pulling_manifest", "downloading"):
        manager.update_download_state(model, {"status": status})
    manager.update_download_state(model, {"total_bytes": 46_000_000_000, **more})


def set_back(models: Store, model: str, seconds: float) -> None:
    """Make the last change of a model's record so much older."""
    path = models.path / ".ollama-watch/models.json"
    kept = json.loads(path.read_bytes())
    kept["models"][model]["updated_at"] -= seconds
    path.write_text(json.dumps(kept))


def status(store: Store) -> dict[str, Any]:
    done = run(store.path, "status", "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_store_without_records_has_nothing_of_it(models: Store) -> None:
    told = status(models)
    assert (told["models"], told["advice"]) == ([], [])


def test_stage_percent_and_speed(models: Store, manager: ModelDownloadManager) -> None:
    begin(manager, "llama3", downloaded_bytes=23_000_000_000, bytes_per_second=5e6)
    (one,) = status(models)["models"]
    assert one.pop("updated_at").endswith("Z")
    assert one == {
        "model": "llama3:latest", "status": "downloading", "stage": "Downloading model layers...",
        "progress_percent": 50.0, "downloaded_bytes": 23_000_000_000,
        "total_bytes": 46_000_000_000, "per_second_bytes": 5_000_000, "error": "",
        "resets": 0, "stalls": 0, "lost_bytes": 0,
    }  # fmt: skip
    shown = run(models.path, "status").stdout
    assert "50 % of 46.0 GB, 5.0 MB/s" in " ".join(shown.split())
    assert max(len(line) for line in shown.splitlines() if str(models.path) not in line) <= 80


def test_finished_and_old_downloads_are_not_listed(
    models: Store, manager: ModelDownloadManager
) -> None:
    begin(manager, "done")
    manager.update_download_state("done", {"status": "completed"})
    manager.reset_download("other")
    begin(manager, "old")
    manager.update_download_state("old", {"status": "error", "error": "connection reset"})
    set_back(models, "old:latest", 2 * DAY)
    told = status(models)
    assert (told["models"], told["advice"]) == ([], [])


def test_an_old_failure_is_reported_while_something_of_it_is_here(
    models: Store, manager: ModelDownloadManager
) -> None:
    digest = models.broken("0:1 0:0")
    models.manifest("old/latest", {digest: 2 * PART})
    begin(manager, "old")
    manager.update_download_state("old", {"status": "error", "error": "connection reset"})
    set_back(models, "old:latest", 2 * DAY)
    assert [each["model"] for each in status(models)["models"]] == ["old:latest"]


@pytest.mark.parametrize("ended", [False, True])
def test_silence_is_reported_of_a_pull_that_should_go_on(
    models: Store, manager: ModelDownloadManager, ended: bool
) -> None:
    begin(manager, "llama3")
    if ended:
        manager.update_download_state("llama3", {"status": "error", "error": "why"})
    heard = "no news for 5 min"
    assert "no news" not in run(models.path, "status").stdout
    set_back(models, "llama3:latest", 301)
    assert (heard in " ".join(run(models.path, "status").stdout.split())) is not ended


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("read: connection reset by peer", "to survive that, pull it with"),
        ("write /m/blobs/sha256-1-partial: no space left on device", "free space"),
        ("it was cancelled", None),
    ],
)
def test_status_shows_the_error_of_a_pull_with_advice(
    models: Store, manager: ModelDownloadManager, error: str, advice: str | None
) -> None:
    begin(manager, "llama3", downloaded_bytes=5)
    manager.update_download_state("llama3", {"status": "error", "error": error})
    told = status(models)
    assert told["models"][0]["error"] == error
    assert (advice in told["advice"][0]) if advice else told["advice"] == []
    shown = " ".join(run(models.path, "status").stdout.split())
    assert error in shown


def test_resets_stalls_and_lost_bytes_are_shown(
    models: Store, manager: ModelDownloadManager
) -> None:
    begin(manager, "llama3", resets=3, stalls=1, lost_bytes=20_000_000)
    told = status(models)
    (one,) = told["models"]
    assert (one["resets"], one["stalls"], one["lost_bytes"]) == (3, 1, 20_000_000)
    assert told["advice"] == ["llama3:latest: connections are reset; the pull repairs it"]
    shown = " ".join(run(models.path, "status").stdout.split())
    assert "3 resets, 1 stall, 20.0 MB lost" in shown


def test_two_pulls_share_one_line(models: Store, manager: ModelDownloadManager) -> None:
    begin(manager, "a", bytes_per_second=2e6)
    assert status(models)["advice"] == []
    begin(manager, "b", bytes_per_second=3e6)
    told = status(models)
    assert told["advice"] == ["2 pulls share the connection: 5.0 MB/s in total"]
    assert told["per_second_bytes"] == 5_000_000

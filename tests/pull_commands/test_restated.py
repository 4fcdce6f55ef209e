"""A record says what is so now of a download, whoever has changed it since."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.driving import run
from tests.support.notation import PART, Store
from watcher import ModelDownloadManager, StoreFiles

NEEDS_REPAIR = "needs repair: progress not recorded"


@pytest.fixture
def manager(models: Store) -> ModelDownloadManager:
    return ModelDownloadManager(StoreFiles(models.path))


def told(store: Store, model: str = "llama3:latest") -> tuple[str, str, str]:
    """A model's state and reason in ``status --json``, and the line of it for people."""
    done = run(store.path, "status", "--json")
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)["models"]
    (row,) = [each for each in rows if each["model"] == model] or [{"status": "", "error": ""}]
    shown = run(store.path, "status", env={"COLUMNS": "160"}).stdout
    lines = [line for line in shown.splitlines() if f"{model} " in line and "Download " in line]
    return row["status"], row["error"], "".join(lines)


def learn(store: Store) -> None:
    """A run of ours that changes nothing of the store."""
    done = run(store.path, "clean", "--yes")
    assert done.returncode in (0, 1), done.stderr


def interrupted(store: Store, name: str = "layer", model: str = "llama3") -> str:
    """A download of which nothing is recorded, found by a scan; its digest."""
    digest = store.broken("0:10 0:0", name=name)
    store.manifest(f"{model}/latest", {digest: 2 * PART})
    learn(store)
    state, why, line = told(store, f"{model}:latest")
    assert (state, why.startswith(NEEDS_REPAIR)) == ("error", True)
    assert NEEDS_REPAIR in line
    return digest


def by_repair(store: Store, _: str) -> None:
    done = run(store.path, "repair", "--offline", "--yes")
    assert done.returncode in (0, 1), done.stderr


def by_hand(store: Store, _: str) -> None:
    store.broken("10:10 0:0")


@pytest.mark.parametrize("change", [by_repair, by_hand])
@pytest.mark.parametrize("scanned", [False, True])
def test_a_repaired_download_no_longer_needs_repair(
    models: Store,
    manager: ModelDownloadManager,
    change: Callable[[Store, str], None],
    scanned: bool,
) -> None:
    digest = interrupted(models)
    change(models, digest)
    if scanned:
        learn(models)
    state, why, line = told(models)
    assert (state, why.startswith("resumable")) == ("error", True)
    assert "Download interrupted: resumable" in line
    if scanned or change is by_repair:
        kept = manager.get_download_state("llama3")
        assert (kept["status"], kept["error"]) == (state, why)


def test_a_download_that_breaks_again_needs_repair_again(models: Store) -> None:
    digest = interrupted(models)
    by_repair(models, digest)
    (models.blobs / f"sha256-{digest}-partial-0").write_bytes(b"{")
    assert told(models)[1] == "needs repair: unreadable progress files"


def test_the_worst_of_several_layers_counts(models: Store) -> None:
    first, second = models.broken("0:10 0:0"), models.broken("0:10 0:0", name="second")
    models.manifest("llama3/latest", {first: 2 * PART, second: 2 * PART})
    learn(models)
    models.broken("10:10 0:0")
    assert told(models)[1].startswith(NEEDS_REPAIR), "the second one does"
    models.broken("10:10 0:0", name="second")
    assert told(models)[1].startswith("resumable")


def test_a_download_that_somebody_else_completed_is_complete(
    models: Store, manager: ModelDownloadManager
) -> None:
    digest = interrupted(models)
    for path in models.blobs.glob(f"sha256-{digest}-partial*"):
        path.unlink()
    whole = models.blob(b"whole")
    models.manifest("llama3/latest", {whole: 5}, aged="1h")
    assert told(models) == ("", "", ""), "what is over is not told"
    learn(models)
    assert manager.get_download_state("llama3")["status"] == "completed"


def test_a_layer_that_is_complete_without_its_manifest_is_not_said_to_need_repair(
    models: Store, manager: ModelDownloadManager
) -> None:
    digest = interrupted(models)
    for path in models.blobs.glob(f"sha256-{digest}-partial*"):
        path.unlink()
    models.blob(b"whole", name="layer")
    (models.manifests / "registry.ollama.ai/library/llama3/latest").unlink()
    assert told(models)[:2] == ("error", "nothing unfinished of it is left, and it is not complete")
    other = models.broken("0:10 0:0", name="of nobody")
    assert told(models)[1].startswith(NEEDS_REPAIR), f"{other} may be a layer of it"


def test_a_model_whose_blob_is_damaged_is_not_complete(
    models: Store, manager: ModelDownloadManager
) -> None:
    digest = models.model()
    learn(models)
    path = models.blobs / f"sha256-{digest}"
    good = path.read_bytes()
    manager.update_download_state("llama3", {"status": "starting", "total_bytes": len(good)})
    manager.update_download_state("llama3", {"status": "completed"})
    path.write_bytes(good[::-1])
    assert run(models.path, "verify").returncode == 1
    state, why, line = told(models)
    assert (state, why) == ("error", "its manifest is written, but some of its blobs are damaged")
    assert why in line
    kept = manager.get_download_state("llama3")
    assert (kept["error"], kept["total_bytes"]) == (why, len(good))
    path.write_bytes(good)
    assert run(models.path, "verify").returncode == 0
    assert manager.get_download_state("llama3")["status"] == "completed"
    assert told(models) == ("", "", "")


@pytest.mark.parametrize("why", ["connection reset by peer", "no space left on device"])
def test_how_a_try_of_ours_ended_stays(
    models: Store, manager: ModelDownloadManager, why: str
) -> None:
    digest = interrupted(models)
    manager.update_download_state("llama3", {"status": "starting"})
    manager.update_download_state("llama3", {"status": "error", "error": why})
    by_repair(models, digest)
    assert told(models)[:2] == ("error", why)


def test_a_repair_is_not_advised_where_nothing_needs_it(
    models: Store, manager: ModelDownloadManager
) -> None:
    digest = interrupted(models)
    manager.update_download_state("llama3", {"status": "starting"})
    manager.update_download_state("llama3", {"status": "error", "error": "EOF"})

    def advised() -> list[str]:
        return list(json.loads(run(models.path, "status", "--json").stdout)["commands"])

    assert any(" repair" in each for each in advised())
    by_repair(models, digest)
    assert not any(" repair" in each for each in advised())
    assert any(" pull " in each for each in advised())


def test_a_scan_leaves_the_record_of_a_model_that_another_process_pulls(models: Store) -> None:
    from watcher.state import folders, records

    digest = interrupted(models)
    with folders.opened_store(str(models.path)) as store:
        lock = records.driving_lock("llama3")
        assert records.drive(lock, store)
        before = records.read(store)
        by_repair(models, digest)
        assert records.read(store) == before
        lock.release()
        learn(models)
        assert records.read(store)["llama3:latest"].error.startswith("resumable")

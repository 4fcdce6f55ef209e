"""`ModelDownloadManager` as programs use it: real folders, a registry, the engine as server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import environment, holding
from tests.support.runs import rules
from tests.support.servers import EngineServer, blob, sidecar
from watcher import ModelDownloadManager, StoreFiles
from watcher.demo.registry import Fault, Layer, Model, Registry
from watcher.errors import (
    DownloadError,
    ManifestError,
    NoStoreError,
    RecordError,
    RefusedError,
    TargetError,
)
from watcher.model import DAY
from watcher.pull.account import Options
from watcher.pull.manager import DownloadProgress, DownloadUpdate
from watcher.state.records import WAYS, State
from watcher.transfer import values

MB = 1_000_000
POLICY = rules(writers_visible=True)
LAYER = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64
CONFIG = "sha256:" + "c" * 64
HALF = 4 << 20
#: The registry of the tests has no certificate.
INSECURE = Options(insecure=True)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store that is empty at first: not even ``blobs/`` is there."""
    path = tmp_path / "models"
    path.mkdir()
    return path


@pytest.fixture
def manager(store: Path) -> ModelDownloadManager:
    return ModelDownloadManager(StoreFiles(store), policy=POLICY.settings)


@pytest.fixture
def server(store: Path) -> Iterator[EngineServer]:
    with EngineServer(store) as running:
        yield running.start().wait_ready()


@pytest.fixture
def driven(store: Path, server: EngineServer) -> ModelDownloadManager:
    """A manager with its server."""
    return ModelDownloadManager(StoreFiles(store), server=server.url, policy=POLICY.settings)


def manifest(
    *layers: tuple[str, object], config: tuple[str, object] = (CONFIG, 7)
) -> dict[str, Any]:
    def reference(digest: str, size: object) -> dict[str, object]:
        return {"mediaType": "application/octet-stream", "digest": digest, "size": size}

    return {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": reference(*config),
        "layers": [reference(*each) for each in layers],
    }


def types(manager: ModelDownloadManager, model: str = "llama3") -> list[str]:
    return [event["event_type"] for event in manager.get_download_log(model)]


def interrupted(store: Path, digest: str, aged: float = DAY) -> Path:
    """A download of one layer of 8 MiB, half of it there and claimed; its data."""
    data = blob(store, digest, "-partial")
    data.parent.mkdir(exist_ok=True)
    data.write_bytes(b"x" * HALF)
    os.truncate(data, 2 * HALF)
    blob(store, digest, "-partial-0").write_text(sidecar(0, 0, 2 * HALF, HALF))
    past = time.time() - aged
    for path in data.parent.glob(f"{data.name}*"):
        os.utime(path, (past, past))
    return data


# ---------------------------------------------------------------- where


def test_any_object_with_two_paths_will_do(tmp_path: Path, store: Path) -> None:
    class Mine:
        store_path = os.fsencode(store)
        state_path = tmp_path / "state"

    Mine.state_path.mkdir()
    manager = ModelDownloadManager(Mine())  # type: ignore[arg-type]
    manager.update_download_state("llama3", {"status": "starting"})
    assert (tmp_path / "state/.ollama-watch/models.json").exists()
    assert list(store.iterdir()) == []
    assert ModelDownloadManager(StoreFiles(store)).get_download_state("llama3")["status"] == "idle"


def test_folders_that_are_not_there_are_reported(tmp_path: Path, store: Path) -> None:
    with pytest.raises(NoStoreError, match=r"the folder .*/nowhere does not exist"):
        ModelDownloadManager(StoreFiles(tmp_path / "nowhere"))
    manager = ModelDownloadManager(StoreFiles(store))
    store.rmdir()
    for call in (
        lambda: manager.get_download_state("a"),
        lambda: manager.update_download_state("a", {"status": "starting"}),
        manager.detect_partial_downloads,
        manager.check_partial_model_downloads,
        lambda: manager.handle_manifest_pull("a", manifest((LAYER, 1))),
        lambda: manager.cleanup_partial_download("a"),
        lambda: manager.reset_download("a"),
        lambda: manager.cleanup_old_logs(1),
    ):
        with pytest.raises(NoStoreError):
            call()


def test_an_empty_store_has_nothing(manager: ModelDownloadManager, store: Path) -> None:
    assert manager.detect_partial_downloads() == []
    assert manager.detect_partial_downloads("llama3") == []
    assert not manager.can_resume("llama3")
    assert manager.get_download_log("llama3") == []
    assert list(store.iterdir()) == [], "looking writes nothing"
    assert manager.check_partial_model_downloads() == []
    assert manager.cleanup_partial_download("llama3") == {
        "removed": [], "freed_bytes": 0, "refused": [],
    }  # fmt: skip
    assert manager.reset_download("llama3")["status"] == "reset"
    manager.cleanup_old_logs(1)
    assert not (store / "blobs").exists()


@pytest.mark.parametrize("model", ["", "a b", "../x", "a/b/c/d", "\udcff", "x" * 500])
def test_manager_refuses_an_invalid_model_name(manager: ModelDownloadManager, model: str) -> None:
    for call in (
        manager.get_download_state,
        manager.get_download_progress,
        manager.detect_partial_downloads,
        manager.can_resume,
        manager.cleanup_partial_download,
        manager.reset_download,
        manager.get_download_log,
        manager.download_model,
    ):
        with pytest.raises(TargetError, match="no name of a model"):
            call(model)
    with pytest.raises(TargetError):
        manager.update_download_state(model, {"status": "starting"})
    with pytest.raises(TargetError):
        manager.handle_manifest_pull(model, manifest((LAYER, 1)))
    with pytest.raises(TargetError):
        manager.log_download_event(model, "x", "y")


# ---------------------------------------------------------------- states


def reached(manager: ModelDownloadManager, state: State) -> None:
    """Bring a model into a state by legal ways only."""
    ways: dict[State, list[State]] = {State.IDLE: []}
    todo = [State.IDLE]
    for at in todo:
        for after in WAYS[at]:
            if after not in ways:
                ways[after] = [*ways[at], after]
                todo.append(after)
    for step in ways[state]:
        assert manager.update_download_state("m", {"status": step.value})["status"] == step


@pytest.mark.parametrize("before", State)
def test_only_legal_transitions(store: Path, before: State) -> None:
    manager = ModelDownloadManager(StoreFiles(store))
    reached(manager, before)
    kept = (store / ".ollama-watch/models.json").read_bytes() if before is not State.IDLE else b""
    for after in State:
        if after in WAYS[before] or after is before:
            continue
        with pytest.raises(RecordError, match=f"m: status: {before} can't become {after}"):
            manager.update_download_state("m", {"status": after, "total_bytes": 5})
        if kept:
            assert (store / ".ollama-watch/models.json").read_bytes() == kept
    for after in WAYS[before]:
        fresh = ModelDownloadManager(StoreFiles(store))
        (store / ".ollama-watch/models.json").unlink(missing_ok=True)
        reached(fresh, before)
        assert fresh.update_download_state("m", {"status": after.value})["status"] == after.value


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"speed": 3}, "unknown: speed"),
        ({"state": "starting"}, "unknown: state"),
        ({"stage": "x", "updated_at": 1.0}, "unknown: stage, updated_at"),
        ({"a\x1bb": 3}, r"unknown: a\\x1bb"),
        ({4: 3}, "unknown: 4"),
        ({"status": "happy"}, "status = 'happy': expected one of idle, starting"),
        ({"status": None}, "status = None"),
        ({"total_bytes": -1}, "total_bytes = -1: expected a whole number"),
        ({"total_bytes": "5"}, "total_bytes = '5'"),
        ({"downloaded_bytes": True}, "downloaded_bytes = True"),
        ({"progress_percent": 101}, "progress_percent = 101"),
        ({"progress_percent": float("nan")}, "progress_percent = nan"),
        ({"manifest_pulled": 1}, "manifest_pulled = 1"),
    ],
)
def test_unknown_keys_and_bad_values_are_named(
    manager: ModelDownloadManager, store: Path, changes: Any, told: str
) -> None:
    with pytest.raises(RecordError, match=told):
        manager.update_download_state("llama3", {"status": "starting", **changes})
    assert not (store / ".ollama-watch/models.json").exists()


def test_a_change_is_on_the_disk_and_seen_by_all(
    manager: ModelDownloadManager, store: Path
) -> None:
    made = manager.update_download_state("llama3", {"status": "starting"})
    assert made["stage"] == "Waiting for manifest..."
    on_disk = json.loads((store / ".ollama-watch/models.json").read_bytes())
    assert on_disk["models"]["llama3:latest"]["state"] == "starting"
    other = ModelDownloadManager(StoreFiles(str(store)))
    for spelled in (
        "llama3",
        "LLAMA3:latest",
        "library/llama3",
        "registry.ollama.ai/library/llama3",
    ):
        assert other.get_download_state(spelled) == made
    assert manager.get_download_state("llama4")["status"] == "idle"


def test_progress_never_falls_within_one_download(manager: ModelDownloadManager) -> None:
    manager.update_download_state("m", {"status": "starting"})
    manager.update_download_state("m", {"status": "pulling_manifest", "total_bytes": 200})
    manager.update_download_state("m", {"status": "downloading", "downloaded_bytes": 150})
    told = manager.update_download_state("m", {"downloaded_bytes": 50, "bytes_per_second": 10.0})
    now = manager.get_download_progress("m")
    assert (now["progress_percent"], now["downloaded_bytes"], told["status"]) == (
        75.0, 50, "downloading",
    )  # fmt: skip
    assert (now["speed"], now["eta_seconds"]) == (10.0, 15.0)
    for step in ({"status": "error", "error": "reset"}, {"status": "starting"}):
        manager.update_download_state("m", step)
        assert manager.get_download_progress("m")["progress_percent"] == 75.0
    manager.update_download_state("m", {"status": "completed"})
    assert manager.get_download_progress("m")["progress_percent"] == 100.0
    manager.update_download_state("m", {"status": "starting"})
    assert manager.get_download_progress("m")["progress_percent"] == 0.0
    assert set(now) == {
        "status", "progress_percent", "downloaded_bytes", "total_bytes", "speed", "eta_seconds",
        "stage", "resume_supported", "can_resume", "partial_size",
    }  # fmt: skip


# ---------------------------------------------------------------- manifests


def test_a_manifest_counts_each_digest_once_and_the_config(
    manager: ModelDownloadManager, store: Path
) -> None:
    (store / "blobs").mkdir()
    blob(store, OTHER).write_bytes(b"x" * 20)
    blob(store, CONFIG).write_bytes(b"too short")
    given = manifest((LAYER, 100), (OTHER, 20), (LAYER, 100), config=(CONFIG, 30))
    told = manager.handle_manifest_pull("llama3", given)
    assert (told["status"], told["total_bytes"], told["present_bytes"]) == (
        "pulling_manifest", 150, 20,
    )  # fmt: skip
    assert told["manifest_pulled"]
    assert told["resume_supported"]
    (event,) = manager.get_download_log("llama3")
    assert event["event_type"] == "manifest_pulled"
    assert (event["details"]["layers"], event["details"]["total_size"]) == (3, 150)
    for again in (json.dumps(given), json.dumps(given).encode()):
        assert manager.handle_manifest_pull("llama3", again)["total_bytes"] == 150


def test_a_manifest_of_no_bytes_has_nothing_to_resume(manager: ModelDownloadManager) -> None:
    told = manager.handle_manifest_pull("llama3", manifest((LAYER, 0), config=(CONFIG, 0)))
    assert (told["total_bytes"], told["resume_supported"]) == (0, False)


@pytest.mark.parametrize("before", State)
def test_a_manifest_may_come_in_every_state(manager: ModelDownloadManager, before: State) -> None:
    reached(manager, before)
    assert manager.handle_manifest_pull("m", manifest((LAYER, 1)))["status"] == "pulling_manifest"


BAD: list[object] = [
    b"", "", b"\xff\xfe", "<html>502</html>", "null", "[]", "3", '"x"', "{", '{"layers": 3}',
    {}, {"errors": [{"code": "MANIFEST_UNKNOWN"}]}, {"layers": [], "config": {}},
    manifest((LAYER, -1)), manifest((LAYER, "5")), manifest((LAYER, 1.5)),
    manifest((LAYER, 1 << 63)), manifest((LAYER, (1 << 63) - 1), (OTHER, (1 << 63) - 1)),
    manifest(("md5:abc", 5)), manifest(("sha256:abc", 5)), manifest(("../" + "a" * 64, 5)),
    {**manifest((LAYER, 5)), "layers": {"0": 1}}, {**manifest((LAYER, 5)), "layers": ["x"]},
    {**manifest((LAYER, 5)), "config": "x"}, {**manifest((LAYER, 5)), "x": object()},
    {1: 2}, None, 7, ["x"], "\udcff", '{"layers":' + "[" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("given", BAD, ids=[str(number) for number in range(len(BAD))])
def test_a_malformed_manifest_is_reported_and_loses_nothing(
    manager: ModelDownloadManager, store: Path, given: Any
) -> None:
    data = interrupted(store, LAYER)
    manager.handle_manifest_pull("llama3", manifest((LAYER, 2 * HALF)))
    manager.update_download_state("llama3", {"status": "downloading", "downloaded_bytes": HALF})
    before = manager.get_download_state("llama3")
    kept = data.read_bytes()
    with pytest.raises(ManifestError, match="the manifest of llama3:latest is damaged"):
        manager.handle_manifest_pull("llama3", given)
    after = manager.get_download_state("llama3")
    assert after["status"] == "error"
    assert "damaged" in after["error"]
    for key in ("total_bytes", "downloaded_bytes", "progress_percent", "manifest_pulled"):
        assert after[key] == before[key]
    assert types(manager)[-1] == "error"
    assert data.read_bytes() == kept
    assert manager.can_resume("llama3"), "the good manifest is known still"


# ---------------------------------------------------------------- partial downloads


@pytest.fixture
def broken(manager: ModelDownloadManager, store: Path) -> Path:
    """A download of llama3 that somebody else has left a day ago; its data."""
    manager.handle_manifest_pull("llama3", manifest((LAYER, 2 * HALF)))
    return interrupted(store, LAYER)


def test_manager_finds_an_unfinished_download(
    manager: ModelDownloadManager, broken: Path, store: Path
) -> None:
    interrupted(store, OTHER)
    (mine,) = manager.detect_partial_downloads("llama3")
    assert mine["digest"] == LAYER
    assert mine["models"] == ["llama3:latest"]
    assert (mine["condition"], mine["partial_size"], mine["total_bytes"]) == (
        "paused", HALF, 2 * HALF,
    )  # fmt: skip
    assert mine["can_resume"]
    assert not mine["stale"]
    assert mine["age_seconds"] >= DAY
    assert {each["digest"] for each in manager.detect_partial_downloads()} == {LAYER, OTHER}
    assert manager.can_resume("LLAMA3")
    assert not manager.can_resume("other")
    now = manager.get_download_progress("llama3")
    assert (now["can_resume"], now["partial_size"]) == (True, HALF)


def test_the_check_finds_repairs_and_tells(
    manager: ModelDownloadManager, broken: Path, store: Path
) -> None:
    broken.with_name(f"{broken.name}-0").write_text(sidecar(0, 0, 2 * HALF, 0))
    past = time.time() - DAY
    os.utime(broken.with_name(f"{broken.name}-0"), (past, past))
    (found,) = manager.check_partial_model_downloads()
    assert found["can_resume"]
    sidecars = [json.loads(path.read_text()) for path in broken.parent.glob("*-partial-*")]
    assert sum(each["Completed"] for each in sidecars) >= HALF // 2
    state = manager.get_download_state("llama3")
    assert state["status"] == "error"
    assert state["total_bytes"] is not None, "what the manifest said stays"
    events = (store / ".ollama-watch/logs/events.jsonl").read_text()
    assert '"check_started"' in events
    assert "download_repaired" in types(manager)


def test_the_check_cleans_where_the_policy_allows_it(store: Path, broken: Path) -> None:
    cleaning = rules(clean=True, stale_after=DAY / 2, writers_visible=True)
    assert (
        ModelDownloadManager(
            StoreFiles(store), policy=cleaning.settings
        ).check_partial_model_downloads()
        == []
    )
    assert not broken.exists()


@pytest.mark.parametrize("pulled", [LAYER, OTHER])
def test_one_layer_that_lies_does_not_hide_that_another_is_pulled(
    manager: ModelDownloadManager, store: Path, broken: Path, pulled: str
) -> None:
    manager.handle_manifest_pull("llama3", manifest((LAYER, 2 * HALF), (OTHER, 2 * HALF)))
    interrupted(store, OTHER)
    manager.update_download_state("llama3", {"status": "error"})
    data = blob(store, pulled, "-partial")
    with holding(data, "r+b"):
        manager.check_partial_model_downloads()
        assert manager.get_download_state("llama3")["status"] == "downloading"
        with pytest.raises(RefusedError):
            manager.reset_download("llama3")
        assert data.exists()


def said_long_ago(store: Path, model: str) -> None:
    """Set the time back at which a record was changed last."""
    path = store / ".ollama-watch/models.json"
    document = json.loads(path.read_bytes())
    document["models"][f"{model}:latest"]["updated_at"] -= 3600
    path.write_text(json.dumps(document))


def test_a_dead_process_leaves_no_download_for_ever(
    manager: ModelDownloadManager, broken: Path, store: Path
) -> None:
    manager.update_download_state("gone", {"status": "starting"})
    manager.update_download_state("llama3", {"status": "downloading"})
    manager.check_partial_model_downloads()
    assert manager.get_download_state("llama3")["status"] == "error"
    assert manager.get_download_state("gone")["status"] == "starting", "it may live"
    said_long_ago(store, "gone")
    manager.check_partial_model_downloads()
    assert manager.get_download_state("gone")["status"] == "error"


def test_cleaning_up_takes_this_model_alone(
    manager: ModelDownloadManager, broken: Path, store: Path
) -> None:
    manager.handle_manifest_pull("other", manifest((OTHER, 2 * HALF)))
    theirs = interrupted(store, OTHER)
    done = manager.cleanup_partial_download("llama3")
    assert (done["removed"], done["refused"]) == ([LAYER], [])
    assert done["freed_bytes"] > 0
    assert not broken.exists()
    assert theirs.exists()
    assert types(manager, "other") == ["manifest_pulled"], "nothing is said of others"
    assert manager.cleanup_partial_download("llama3")["removed"] == []


def test_reset_forgets_and_removes(manager: ModelDownloadManager, broken: Path) -> None:
    manager.update_download_state("llama3", {"status": "error", "error": "x"})
    told = manager.reset_download("llama3")
    assert (told["status"], told["progress_percent"], told["total_bytes"]) == ("reset", 0.0, None)
    assert not broken.exists()
    assert types(manager)[-1] == "download_reset"


def test_reset_refuses_what_is_driven(manager: ModelDownloadManager, broken: Path) -> None:
    manager.update_download_state("llama3", {"status": "downloading"})
    with pytest.raises(RefusedError, match="llama3 is being downloaded: Downloading model layers"):
        manager.reset_download("llama3")
    assert broken.exists()
    assert manager.get_download_state("llama3")["status"] == "downloading"


def test_a_killed_driver_does_not_keep_reset_from_its_work(
    manager: ModelDownloadManager, broken: Path, store: Path
) -> None:
    manager.update_download_state("llama3", {"status": "downloading"})
    said_long_ago(store, "llama3")
    assert manager.reset_download("llama3")["status"] == "reset"
    assert not broken.exists()


def test_manager_keeps_and_reports_a_download_with_unreadable_progress_files(
    manager: ModelDownloadManager, broken: Path
) -> None:
    broken.with_name(f"{broken.name}-0").unlink()
    broken.with_name(f"{broken.name}-0").mkdir()
    manager.update_download_state("llama3", {"status": "error"})
    done = manager.cleanup_partial_download("llama3")
    assert done["removed"] == []
    assert done["refused"]
    with pytest.raises(RefusedError, match="the download of llama3 can't be removed"):
        manager.reset_download("llama3")


# ---------------------------------------------------------------- the log


def test_events_are_written_and_read_back(manager: ModelDownloadManager, store: Path) -> None:
    manager.log_download_event("llama3", "note", "a word", {"some_bytes": 5})
    manager.log_download_event("LLaMA3", "note", "another \udcff")
    manager.log_download_event("other", "note", "no")
    # Two spellings have two logs, and both may be of the same millisecond.
    told = manager.get_download_log("llama3")
    first, second = sorted(told, key=lambda event: str(event["message"]))
    assert list(first) == ["timestamp", "model_name", "event_type", "message", "details"]
    assert (first["model_name"], first["message"]) == ("llama3:latest", "a word")
    assert first["details"] == {"models": ["llama3:latest"], "some_bytes": 5}
    assert second["message"] == "another \\xff"
    assert len((store / ".ollama-watch/logs/events.jsonl").read_text().splitlines()) == 3


def test_details_that_are_no_json_are_refused(manager: ModelDownloadManager) -> None:
    with pytest.raises(RecordError, match="details of note"):
        manager.log_download_event("llama3", "note", "x", {"it": object()})
    assert manager.get_download_log("llama3") == []


def test_a_damaged_log_gives_what_can_be_read(manager: ModelDownloadManager, store: Path) -> None:
    manager.log_download_event("llama3", "one", "x")
    (log,) = (store / ".ollama-watch/logs").glob("llama3*")
    log.write_bytes(b'{"half": \n' + log.read_bytes() + b'{"time')
    assert types(manager) == ["one"]


def test_old_logs_go(manager: ModelDownloadManager, store: Path) -> None:
    manager.log_download_event("old", "note", "x")
    manager.log_download_event("new", "note", "x")
    (old,) = (store / ".ollama-watch/logs").glob("old*")
    past = time.time() - 10 * DAY
    os.utime(old, (past, past))
    manager.cleanup_old_logs(30)
    assert types(manager, "old") == ["note"]
    manager.cleanup_old_logs(7)
    assert (types(manager, "old"), types(manager, "new")) == ([], ["note"])


@pytest.mark.parametrize("days", [-1, float("nan"), float("inf"), True, "7", None])
def test_days_that_are_none_remove_nothing(manager: ModelDownloadManager, days: Any) -> None:
    manager.log_download_event("new", "note", "x")
    with pytest.raises(RecordError, match="days = "):
        manager.cleanup_old_logs(days)
    assert types(manager, "new") == ["note"]


# ---------------------------------------------------------------- driving


def small(registry: Registry, name: str = "demo", size: int = 3 * MB) -> Model:
    return registry.add_model(name, "1b", [Layer(size)], seed=len(name))


def test_a_download_reports_its_progress_and_arrives(
    driven: ModelDownloadManager, registry: Registry, store: Path
) -> None:
    model = small(registry, size=20 * MB)
    registry.throttle(40 * MB)
    seen: list[DownloadProgress] = []
    last = driven.download_model(model.name, seen.append, options=INSECURE)
    percents = [each["progress_percent"] for each in seen]
    assert percents == sorted(percents)
    assert percents[-1] == 100.0
    statuses = list(dict.fromkeys(each["status"] for each in seen))
    assert statuses[:3] == ["starting", "pulling_manifest", "downloading"]
    assert statuses[-1] == "completed"
    amid = [each for each in seen if each["status"] == "downloading" and each["partial_size"]]
    assert amid
    assert all(each["can_resume"] for each in amid)
    assert (last["status"], last["partial_size"], last["can_resume"]) == ("completed", 0, False)
    assert all(blob(store, digest).exists() for digest in model.digests)
    assert driven.get_download_state(model.name)["status"] == "completed"
    assert types(driven, model.name)[-1] == "pull_completed"
    again = driven.download_model(model.name, options=INSECURE)
    assert (again["status"], again["progress_percent"]) == ("completed", 100.0)


def held(registry: Registry) -> Model:
    model = small(registry, size=20 * MB)
    registry.hold(model.digests[0], after=5 * MB)
    return model


def test_a_cancelled_download_can_be_resumed(
    driven: ModelDownloadManager, registry: Registry, store: Path
) -> None:
    model = held(registry)
    seen: list[DownloadProgress] = []
    with pytest.raises(DownloadError, match=r"download of .* failed: canceled") as told:
        driven.download_model(
            model.name,
            seen.append,
            lambda: bool(seen) and seen[-1]["downloaded_bytes"] > 2 * MB,
            INSECURE,
        )
    assert told.value.cause == "interrupted"
    assert driven.get_download_state(model.name)["status"] == "error"
    assert driven.can_resume(model.name)
    before = registry.bytes_served(model.digests[0])
    registry.release()
    assert driven.download_model(model.name, options=INSECURE)["status"] == "completed"
    again = registry.bytes_served(model.digests[0]) - before
    assert again <= 20 * MB - driven_bytes(seen) + 2 * MB


def driven_bytes(seen: list[DownloadProgress]) -> int:
    return seen[-1]["downloaded_bytes"]


@pytest.mark.parametrize("broken", ["progress", "cancel"])
def test_an_exception_of_a_callback_ends_the_download_in_order(
    driven: ModelDownloadManager, registry: Registry, broken: str
) -> None:
    model = held(registry)
    calls: list[float] = []

    def progress(now: DownloadProgress) -> None:
        calls.append(now["downloaded_bytes"])
        if broken == "progress" and now["downloaded_bytes"] > 2 * MB:
            raise ZeroDivisionError

    def cancel() -> bool:
        if broken == "cancel" and calls and calls[-1] > 2 * MB:
            raise ZeroDivisionError
        return False

    with pytest.raises(ZeroDivisionError):
        driven.download_model(model.name, progress, cancel, INSECURE)
    assert driven.get_download_state(model.name)["status"] == "error"
    assert driven.can_resume(model.name)


def test_a_model_that_does_not_exist(driven: ModelDownloadManager, registry: Registry) -> None:
    with pytest.raises(DownloadError, match=r"download of .*/library/nothing:1b failed") as told:
        driven.download_model(f"{registry.url}/library/nothing:1b", options=INSECURE)
    assert told.value.cause == "no_model"
    assert "spelling" in told.value.next_step


def test_reset_refuses_a_model_that_a_server_pulls(
    driven: ModelDownloadManager, registry: Registry, server: EngineServer
) -> None:
    model = held(registry)
    theirs = server.start_pull(model.name)
    registry.wait_held(model.digests[0], 1)
    driven.handle_manifest_pull(model.name, model.manifest)
    driven.update_download_state(model.name, {"status": "error", "error": "seen broken once"})
    (found,) = driven.check_partial_model_downloads()
    assert found["condition"] == "live"
    assert driven.get_download_state(model.name)["status"] == "downloading"
    done = driven.cleanup_partial_download(model.name)
    assert done["removed"] == []
    assert done["refused"]
    driven.update_download_state(model.name, {"status": "error", "error": "seen broken once"})
    with pytest.raises(RefusedError, match="can't be removed"):
        driven.reset_download(model.name)
    assert driven.get_download_state(model.name)["status"] == "error", "as before"
    registry.release()
    assert theirs.result()[-1]["status"] == "success"


CHILD = """
import sys, threading
from watcher import ModelDownloadManager, StoreFiles
from watcher.config import Settings
from watcher.pull.account import Options
store, server, *models = sys.argv[1:]
policy = Settings(writers_visible=True)
manager = ModelDownloadManager(StoreFiles(store), server=server, policy=policy)
failed = []
def pull(model):
    seen = []
    try:
        manager.download_model(
            model, lambda now: seen.append(now["progress_percent"]), options=Options(insecure=True)
        )
        assert seen == sorted(seen), seen
        assert manager.get_download_state(model)["status"] == "completed"
    except BaseException as error:
        failed.append(f"{model}: {error!r}")
threads = [threading.Thread(target=pull, args=(each,)) for each in models]
for each in threads: each.start()
for each in threads: each.join()
sys.exit("; ".join(failed) or 0)
"""


def test_ten_pulls_from_three_processes(
    driven: ModelDownloadManager, registry: Registry, server: EngineServer, store: Path
) -> None:
    models = [small(registry, f"m{'x' * number}") for number in range(10)]
    registry.throttle(30 * MB)
    children = [
        subprocess.Popen(
            [
                sys.executable, "-c", CHILD, str(store), server.url,
                *(model.name for model in models[number::3]),
            ],
            env=environment(store), stderr=subprocess.PIPE, text=True,
        )
        for number in range(3)
    ]  # fmt: skip
    told = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], told
    on_disk = json.loads((store / ".ollama-watch/models.json").read_bytes())["models"]
    assert len(on_disk) == 10
    assert {each["state"] for each in on_disk.values()} == {"completed"}
    for model in models:
        assert registry.bytes_served(model.digests[0]) <= 3 * MB + 3
        assert types(driven, model.name)[-1] == "pull_completed"


def test_threads_and_processes_lose_no_change(store: Path) -> None:
    """Each counts its own model up, and all of them one that is theirs together."""
    script = """
import sys, threading
from watcher import ModelDownloadManager, StoreFiles
manager = ModelDownloadManager(StoreFiles(sys.argv[1]))
def count(mine):
    manager.update_download_state(mine, {"status": "starting"})
    for number in range(1, 21):
        manager.update_download_state(mine, {"downloaded_bytes": number})
        manager.handle_manifest_pull("shared", sys.argv[3])
threads = [threading.Thread(target=count, args=(f"{sys.argv[2]}-{n}",)) for n in range(3)]
for each in threads: each.start()
for each in threads: each.join()
"""
    given = json.dumps(manifest((LAYER, 5)))
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(store), name, given], env=environment(store)
        )
        for name in ("a", "b")
    ]
    assert [child.wait(120) for child in children] == [0, 0]
    manager = ModelDownloadManager(StoreFiles(store))
    for name in ("a", "b"):
        for number in range(3):
            assert manager.get_download_state(f"{name}-{number}")["downloaded_bytes"] == 20
    assert manager.get_download_state("shared")["total_bytes"] == 12
    assert types(manager, "shared") == ["manifest_pulled"] * 120


# ---------------------------------------------------------------- what is refused, and why it waits


def test_a_check_that_is_refused_reports_it(manager: ModelDownloadManager, store: Path) -> None:
    """The data was cut and a sidecar is lost: nothing here tells how long the layer is."""
    data = blob(store, OTHER, "-partial")
    data.parent.mkdir(parents=True)
    data.write_bytes(b"x" * HALF)
    blob(store, OTHER, "-partial-1").write_text(sidecar(1, 2 * HALF, HALF, 0))
    past = time.time() - DAY
    for path in data.parent.iterdir():
        os.utime(path, (past, past))
    (found,) = manager.check_partial_model_downloads()
    (why,) = found["refused"]
    assert "its length and its model are unknown" in why
    (plain,) = manager.detect_partial_downloads()
    assert found == {**plain, "refused": [why], "age_seconds": found["age_seconds"]}


def test_a_check_that_does_all_it_wanted_has_refused_nothing(
    manager: ModelDownloadManager, broken: Path
) -> None:
    (found,) = manager.check_partial_model_downloads()
    assert found["refused"] == []


def test_a_folder_that_is_no_store_is_reported_with_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    (folder / "models/blobs").mkdir(parents=True)
    with pytest.raises(NoStoreError, match="not a model store: it has neither blobs/") as raised:
        StoreFiles(folder)
    assert str(folder / "models") in raised.value.next_step
    StoreFiles(folder / "models")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NoStoreError, match="Not a directory"):
        StoreFiles(file)
    with pytest.raises(NoStoreError, match="No such file"):
        StoreFiles(tmp_path / "nowhere")


@pytest.mark.parametrize("there", [(), (".ollama-watch",), ("lost+found",), ("manifests",)])
def test_a_folder_that_can_become_a_store_is_one(tmp_path: Path, there: tuple[str, ...]) -> None:
    for name in there:
        (tmp_path / name).mkdir()
    assert StoreFiles(tmp_path).state_path == tmp_path


def test_progress_explains_why_it_waits(
    store: Path, server: EngineServer, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = partial(values.Options, first_pause=0.05, longest_pause=0.1)
    monkeypatch.setattr(values, "Options", quick)
    model = registry.add_model("m", "1b", [Layer(1_000_000)]).name
    registry.add_fault(Fault("page", on="manifest", status=503, times=4))
    seen: list[DownloadUpdate] = []
    manager = ModelDownloadManager(StoreFiles(store), server=server.url, policy=POLICY.settings)
    last = manager.download_model(model, progress=seen.append, options=INSECURE)
    assert last["status"] == "completed"
    waits = [each["waiting"] for each in seen if each["waiting"]]
    assert waits
    assert {each["awaited"] for each in waits} == {"the registry"}
    assert all("503" in each["why"] for each in waits)
    assert [each["attempt"] for each in waits if each] == sorted(each["attempt"] for each in waits)
    assert any("waiting for the registry: attempt 2 of 8" in each["note"] for each in seen)

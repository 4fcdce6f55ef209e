"""A length is believed only where a manifest has it, too, and the disk has no more."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.driving import lay_out
from tests.support.runs import changed, one_run, rules
from tests.support.servers import blob, sidecar
from watcher import reconcile
from watcher.demo.registry import Fault, Layer, Model, Registry
from watcher.model import ActionKind, RefusalKind
from watcher.observe.host import Host

SIZE = 32 << 20
POLICY = rules(repair=True, clean=False, online=True, writers_visible=True, repair_stale=True)
ASKS = {ActionKind.ASK_REGISTRY, ActionKind.WRITE_SIDECARS}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    (path / "blobs").mkdir(parents=True)
    return path


@pytest.fixture
def lost(registry: Registry, store: Path) -> Model:
    """A layer whose data was cut to 24 MiB and whose sidecars contradict that, of a known model."""
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    lay_out(registry, store, model.digests[0], aged=600)
    report = one_run(Host(str(store)), changed(POLICY, repair=False, online=False))
    assert report.diagnosis.diagnosed
    remember(store, model.name)
    os.truncate(blob(store, model.digests[0], "-partial"), 24 << 20)
    blob(store, model.digests[0], "-partial-0").unlink()
    return model


def remember(store: Path, *models: str) -> None:
    """The memory knows of which models the layer is, and not how long."""
    path = store / ".ollama-watch/state.json"
    document = json.loads(path.read_bytes())
    shown = sorted(each.removeprefix("http://") for each in models)
    for each in document["downloads"].values():
        each |= {"models": shown, "total_bytes": None, "partition": []}
    path.write_text(json.dumps(document))


def name_shorter(store: Path, model: Model, said: int) -> None:
    """The store has a manifest of the model, with a layer of so many bytes in it."""
    manifest = json.loads(model.manifest)
    manifest["layers"][0]["size"] = said
    path = store / "manifests" / model.name.removeprefix("http://").replace(":1b", "/1b")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(manifest))


def lengths(report: reconcile.Report) -> list[str]:
    return [each.why for each in report.plan.refusals if each.kind is RefusalKind.LENGTH]


def sidecars(store: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (store / "blobs").glob("*-partial-*")}


def test_a_length_that_the_manifest_has_too_is_believed(store: Path, lost: Model) -> None:
    report = one_run(Host(str(store)), POLICY)
    assert lengths(report) == []
    assert [each.action.kind for each in report.outcomes][-1] is ActionKind.WRITE_SIDECARS
    ends = [json.loads(text) for text in sidecars(store).values()]
    assert max(each["Offset"] + each["Size"] for each in ends) == SIZE


@pytest.mark.parametrize("said", [1, 1234, SIZE - 1, SIZE + 1, 2 * SIZE])
def test_another_length_than_the_manifest_s_is_refused(
    store: Path, lost: Model, registry: Registry, said: int
) -> None:
    registry.add_fault(Fault("page", on="head", status=200, body="x" * said))
    before = sidecars(store)
    report = one_run(Host(str(store)), POLICY)
    (why,) = lengths(report)
    assert f"says {said:,} bytes, and its manifest" in why
    assert f"says {SIZE:,}" in why
    assert sidecars(store) == before


def test_a_length_of_what_the_manifest_does_not_name_is_refused(
    store: Path, lost: Model, registry: Registry
) -> None:
    registry.add_model("demo", "1b", [Layer(SIZE, seed=9)], extras=False)
    before = sidecars(store)
    (why,) = lengths(one_run(Host(str(store)), POLICY))
    assert "does not name it" in why
    assert sidecars(store) == before


def test_registries_of_other_models_are_not_asked(
    store: Path, lost: Model, registry: Registry
) -> None:
    with Registry() as other:
        remember(store, lost.name, f"localhost:{other.port}/library/also:1b")
        asked: list[str] = []

        def length(model: object, _: str) -> int | None:
            asked.append(model.host)  # type: ignore[attr-defined]
            return None

        one_run(Host(str(store), registry_length=length), POLICY)
        assert len(set(asked)) == 1


@pytest.mark.parametrize("said", [1234, 10 << 20, SIZE - 4096])
@pytest.mark.parametrize("sound", [True, False], ids=["sound", "broken"])
def test_a_manifest_that_says_less_than_there_is(
    store: Path, registry: Registry, said: int, sound: bool
) -> None:
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    digest = model.digests[0]
    lay_out(registry, store, digest, aged=600)
    data = blob(store, digest, "-partial")
    with data.open("r+b") as file:
        file.seek(SIZE - 2048)
        file.write(b"x" * 2048)
    if not sound:
        blob(store, digest, "-partial-1").write_text(sidecar(1, SIZE // 2 + 1, SIZE // 2 - 1, 5))
    name_shorter(store, model, said)
    one_run(Host(str(store)), changed(POLICY, online=False))
    for text in sidecars(store).values():
        part = json.loads(text)
        assert part["Offset"] + part["Size"] <= SIZE
    ends = [json.loads(text) for text in sidecars(store).values()]
    assert max(each["Offset"] + each["Size"] for each in ends) == SIZE


def test_a_manifest_that_says_less_than_is_claimed(store: Path, registry: Registry) -> None:
    """What is claimed may be a hole by now: then the disk has no data that contradicts it."""
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    lay_out(registry, store, model.digests[0], aged=600)
    data = blob(store, model.digests[0], "-partial")
    os.truncate(data, 0)
    os.truncate(data, SIZE)
    name_shorter(store, model, 4096)
    report = one_run(
        Host(str(store)), changed(POLICY, online=False), approve=reconcile.approve_none
    )
    (download,) = report.evidence.downloads
    assert download.total == SIZE

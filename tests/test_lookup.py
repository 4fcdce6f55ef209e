"""A model that is named is looked up at its registry, and known by its name everywhere then."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from watcher.demo.registry import Layer, Registry

from .conftest import Run
from .support.notation import Store, age

Call = Callable[..., str]
PARTS = "0:40 0:60"


@pytest.fixture
def call(run: Run, models: Store) -> Call:
    def made(*words: str, code: int = 0) -> str:
        done = run("--store", str(models.path), *words)
        text = (done.stdout + done.stderr).decode()
        assert done.returncode == code, text
        assert "Traceback" not in text
        return text

    return made


@pytest.fixture
def named(registry: Registry) -> str:
    """A model that its registry has; nothing of it is in the store yet."""
    layers = [Layer(200_000_000), Layer(data=b"a second layer, which is whole")]
    return registry.add_model("big", "70b", layers, extras=False).name.removeprefix("http://")


def digests(registry: Registry) -> list[str]:
    raw = registry.manifest("library/big", "70b")
    assert raw is not None
    return [each["digest"].removeprefix("sha256:") for each in json.loads(raw)["layers"]]


@pytest.fixture
def partial(models: Store, registry: Registry, named: str) -> str:
    """A layer of it that was broken off, with nothing that says whose it is; its digest."""
    digest = digests(registry)[0]
    made = models.broken(PARTS, total=200_000_000 / 1e6)
    for path in list(models.blobs.iterdir()):
        new = path.with_name(path.name.replace(made, digest))
        path.rename(new)
        age(new, "2h")
    return digest


def download(call: Call) -> dict[str, Any]:
    (found,) = json.loads(call("--json", "audit", "--fail-on", "error"))["downloads"]
    return dict(found)


@pytest.mark.parametrize("as_typed", ["{}", "http://{}", "{}".upper()])
def test_repair_finds_out_by_name(call: Call, named: str, partial: str, as_typed: str) -> None:
    assert "its model is unknown" in call("audit", code=1)
    assert download(call)["models"] == []
    call("repair", "--yes", as_typed.format(named))
    assert download(call)["models"] == [named]


def test_a_name_that_was_found_is_known_to_all_commands(
    call: Call, named: str, partial: str, registry: Registry
) -> None:
    call("repair", "--yes", named)
    registry.close()
    assert download(call)["models"] == [named]
    assert json.loads(call("--json", "status"))["downloads"][0]["models"] == [named]
    for words in (("clean", "-n"), ("repair", "-n"), ("verify",), ("log",)):
        call(*words, named)
    call("reset", "--offline", named, code=2)  # nobody is there to say yes


def test_a_dry_run_asks_and_writes_nothing(
    call: Call, named: str, partial: str, models: Store
) -> None:
    before = models.snapshot()
    told = call("repair", "-n", named, code=1)
    assert named in told
    assert models.snapshot() == before


def test_offline_asks_nobody(call: Call, named: str, partial: str, registry: Registry) -> None:
    told = call("repair", "--offline", "--yes", named, code=2)
    assert "neither a model nor a digest" in told
    assert download(call)["models"] == []
    call("reset", "--offline", "--yes", named, code=2)


@pytest.mark.parametrize("command", ["repair", "reset"])
def test_a_model_that_neither_store_nor_registry_knows_is_wrong_usage(
    call: Call, registry: Registry, command: str, models: Store
) -> None:
    told = call(command, "--yes", f"{registry.host}/library/none:1b", code=2)
    assert "has no" in told
    registry.close()
    told = call(command, "--yes", f"{registry.host}/library/none:1b", code=2)
    assert "does not answer" in told


def test_a_manifest_that_names_nothing_is_reported(call: Call, registry: Registry) -> None:
    registry.set_manifests("library/index", "1b", [b'{"manifests": []}'])
    for command in ("repair", "reset"):
        told = call(command, "--yes", f"{registry.host}/library/index:1b", code=2)
        assert "names no layer" in told


def test_data_that_ended_early_is_not_whole(
    call: Call, named: str, models: Store, registry: Registry
) -> None:
    """A copy may have no holes and be shorter than the layer."""
    path = models.blobs / f"sha256-{digests(registry)[0]}-partial"
    path.write_bytes(bytes(range(1, 200)) * 20_000)
    age(path, "2h")
    call("repair", "--yes", named)
    found = download(call)
    assert found["condition"] != "whole"
    assert found["bytes"]["total"] == 200_000_000


def test_reset_finds_what_is_there_of_a_name(
    call: Call, named: str, partial: str, models: Store
) -> None:
    told = call("reset", "--yes", named)
    assert "1 unfinished layer" in told
    assert models.names() == []


def test_reset_of_a_model_that_is_not_here(call: Call, named: str) -> None:
    assert "there is no download to forget" in call("reset", "--yes", named)


def test_repair_without_arguments_looks_up_queued_models(
    call: Call, named: str, partial: str
) -> None:
    call("queue", "add", named)
    call("repair", "--yes")
    assert download(call)["models"] == [named]


def test_a_model_of_which_an_older_manifest_is_here(
    call: Call, named: str, partial: str, models: Store
) -> None:
    layer = models.blob(b"of an older version")
    host, library, rest = named.split("/")
    model, tag = rest.split(":")
    models.manifest(f"{host}/{library}/{model}/{tag}", {layer: 19})
    call("repair", "--yes")
    assert download(call)["models"] == [named]


def test_a_finished_layer_is_known_too(
    call: Call, named: str, partial: str, models: Store, registry: Registry
) -> None:
    second = digests(registry)[1]
    (models.blobs / f"sha256-{second}").write_bytes(b"a second layer, which is whole")
    models.model("other/latest")
    call("repair", "--yes", named)
    findings = json.loads(call("--json", "audit", "--fail-on", "error"))["findings"]
    (orphan,) = [each for each in findings if each["kind"] == "blob_orphan"]
    assert orphan["models"] == [named]
    assert named in orphan["evidence"]

"""A registry's own manifest that gives a layer a wrong size: whose fault it is, and no loop."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import audit, is_right, run
from tests.support.servers import EngineServer, collapsed
from watcher.demo.registry import Layer, Model, Registry

MB = 1_000_000
SIZE = 3 * MB


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as served:
        yield served


def published(registry: Registry, size: int) -> Model:
    """A model whose manifest gives its layer so many bytes."""
    model = registry.add_model("demo", "1b", [Layer(SIZE, seed=7)], extras=False)
    manifest = json.loads(model.manifest)
    manifest["layers"][0]["size"] = size
    registry.set_manifests("library/demo", "1b", [json.dumps(manifest).encode()])
    return model


def found(store: Path) -> dict[str, Any]:
    (finding,) = audit(store)["findings"]
    return dict(finding)


def printed(store: Path, server: EngineServer, command: str) -> str:
    """What comes of a command, at the server of the test."""
    words = shlex.split(command)
    words = [each for each in words[words.index("pull") :] if each != "--insecure"]
    if "--host" not in words:
        words[1:1] = ["--host", server.url]
    done = run(store, *words[:1], "--insecure", *words[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 1 << 45])
def test_the_publishers_fault_is_named_once_it_is_known(
    server: EngineServer, store: Path, registry: Registry, size: int
) -> None:
    model = published(registry, size)
    assert collapsed(server.pull(model.name))[-1] == "success"
    assert run(store, "verify").returncode == 0
    before = found(store)
    assert before["kind"] == "manifest_wrong_size"
    assert "registry" not in before["evidence"], "nobody has asked it"
    said = printed(store, server, before["command"])
    assert f"{size:,} bytes, but {SIZE:,} are right" in re.sub(r"\s+", " ", said)
    after = found(store)
    assert (after["kind"], after["command"]) == ("manifest_wrong_size", "")
    assert "its registry's manifest was as wrong" in after["evidence"]
    assert "publisher" in after["remedy"]
    served = registry.bytes_served(model.digests[0])
    assert "up to date" in printed(store, server, before["command"])
    assert registry.bytes_served(model.digests[0]) == served
    registry.set_manifests("library/demo", "1b", [model.manifest])
    printed(store, server, before["command"])
    assert audit(store)["findings"] == []


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1, 1 << 45])
def test_our_pull_of_it_arrives(
    server: EngineServer, store: Path, registry: Registry, size: int
) -> None:
    """The disk's room is compared with what the registry has."""
    model = published(registry, size)
    printed(store, server, f"pull {model.name}")
    assert is_right(store, model.digests[0])
    assert "publisher" in found(store)["remedy"]


def test_a_fault_of_the_stores_own_manifest_is_not_the_publishers(
    server: EngineServer, store: Path, registry: Registry
) -> None:
    """A pull of it mends that, also where another model's manifest is as wrong."""
    wrong = published(registry, SIZE + 1)
    other = registry.add_model("other", "1b", [Layer(SIZE, seed=7)], extras=False)
    assert other.digests == wrong.digests
    printed(store, server, f"pull {wrong.name}")
    printed(store, server, f"pull {other.name}")
    finding = found(store)
    assert (finding["models"], finding["command"]) == ([wrong.name.removeprefix("http://")], "")
    host, name = other.name.removeprefix("http://").split("/", 1)
    path = store / "manifests" / host / name.replace(":", "/")
    manifest = json.loads(path.read_bytes())
    manifest["layers"][0]["size"] = SIZE + 1
    path.write_text(json.dumps(manifest))
    findings = {each["models"][0]: each for each in audit(store)["findings"]}
    mended = findings[other.name.removeprefix("http://")]
    assert "its registry" not in mended["evidence"]
    printed(store, server, mended["command"])
    assert found(store) == finding

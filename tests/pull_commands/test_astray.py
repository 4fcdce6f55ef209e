"""A pull says which of its layers lie where no server looks, before it fetches them again."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.driving import run
from tests.support.servers import EngineServer
from watcher.demo.registry import Layer, Registry

#: What became of the blobs, and where they are then.
STATES = {
    "old spelling": 'for f in blobs/sha256-*; do mv "$f" "${f/sha256-/sha256:}"; done',
    "blobs in blobs": "mkdir x; mv blobs x/; mkdir blobs; mv x/blobs blobs/; rmdir x",
    "a store in it": "mkdir models; mv blobs models/; mkdir blobs",
    "one further in": "mkdir -p models/.ollama/models; mv blobs models/.ollama/models; mkdir blobs",
}


AND_VERIFIED = pytest.mark.slow("the same is said before what is pulled is verified")


@pytest.mark.parametrize(
    ("state", "verify"),
    [
        *((state, False) for state in STATES),
        ("one further in", True),
        *(
            pytest.param(state, True, marks=AND_VERIFIED)
            for state in STATES
            if state != "one further in"
        ),
    ],
)
def test_pull_reports_misplaced_layers_with_the_command_that_moves_them(
    store: Path, registry: Registry, server: EngineServer, state: str, verify: bool
) -> None:
    model = registry.add_model("demo", "1b", [Layer(2_000_000)])
    words = ("pull", "--insecure", "--host", server.url, *(("--verify",) if verify else ()))
    assert run(store, *words, model.name).returncode == 0
    subprocess.run(["bash", "-ec", STATES[state]], cwd=store, check=True)
    served = registry.bytes_served(model.digests[0])
    told = run(store, *words, model.name)
    assert told.returncode == 0, told.stderr
    assert registry.bytes_served(model.digests[0]) > served, "it was fetched again, as was said"
    (command,) = re.findall(r"move them first: (.*)$", told.stdout + told.stderr, re.MULTILINE)
    for path in (store / "blobs").glob("sha256-*"):
        path.unlink()
    subprocess.run(["bash", "-ec", command], check=True)
    served = registry.bytes_served(model.digests[0])
    done = run(store, *words, model.name)
    assert done.returncode == 0, done.stderr
    assert registry.bytes_served(model.digests[0]) == served, "nothing of it was fetched again"
    assert "move them first" not in done.stdout + done.stderr

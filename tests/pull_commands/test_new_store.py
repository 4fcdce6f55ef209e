"""A pull without a server, into a named folder that is no store yet."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.support import commands
from tests.support.driving import environment
from tests.support.servers import blob
from watcher.demo.registry import Layer, Registry


@pytest.mark.parametrize("by", ["--store", "OLLAMA_MODELS"])
def test_a_folder_becomes_a_store_with_its_first_pull(
    store: Path, registry: Registry, by: str
) -> None:
    model = registry.add_model("demo", "1b", [Layer(1_000_000)])
    is_option = by == "--store"
    words = ("--store", str(store)) if is_option else ()
    given = {"OLLAMA_MODELS": "" if is_option else str(store)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    order = [*words, "pull", "--host", nobody, model.name]
    done = commands.run(order, environment(store, given), store.parent)
    assert done.returncode == 0, done.stderr
    assert b"the server downloads it" not in done.stdout
    assert blob(store, model.digests[0]).stat().st_size == 1_000_000

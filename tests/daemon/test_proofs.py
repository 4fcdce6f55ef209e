"""What is hashed and asked in the background, and when it is tried again."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.driving import POLICY, Store
from tests.fidelity.harness import wait_until
from watcher import cycle, proofs
from watcher.model import Policy
from watcher.names import ModelName
from watcher.proofs import Proofs
from watcher.world import World

VERIFY = Policy(repair=False, hash=True, verify=True, writers_visible=True)


def test_a_registry_that_was_away_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corrupt blob stays until its registry says that it can be had again, and no longer."""
    store = Store(tmp_path / "models")
    digest = hashlib.sha256(b"right").hexdigest()
    blob = store.blobs / f"sha256-{digest}"
    blob.write_bytes(b"wrong")
    store.manifest("demo", digest)
    cycle.cycle(World(str(store.path)), VERIFY)
    said: list[int | None] = [None, len(b"right")]
    asked: list[str] = []

    def registry_length(_: ModelName, of: str) -> int | None:
        asked.append(of)
        return said[min(len(asked), len(said)) - 1]

    monkeypatch.setattr(proofs, "_AGAIN_SECONDS", 0.0)
    world = World(str(store.path), registry_length=registry_length)
    tried = Proofs(world, pytest.fail)
    policy = replace(POLICY, repair=True)
    try:
        tried.want(frozenset({digest}), policy)
        wait_until(lambda: asked, "the first question")
        wait_until(lambda: not blob.exists() or _again(tried, digest, policy), "the quarantine")
    finally:
        tried.stop()
    assert set(asked) == {digest}
    (kept,) = store.ours.glob("quarantine/*")
    assert kept.name.endswith(f"-sha256-{digest}")


def _again(tried: Proofs, digest: str, policy: Policy) -> bool:
    """What each full look of the daemon does."""
    tried.want(frozenset({digest}), policy)
    return False

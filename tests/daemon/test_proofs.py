"""What is hashed and asked in the background, and when it is tried again."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.driving import POLICY, Store
from tests.fidelity.harness import wait_until
from watcher import cycle, proofs
from watcher.daemon import _Service
from watcher.metrics import Metrics
from watcher.model import Plan, Policy
from watcher.names import ModelName
from watcher.proofs import Proofs
from watcher.world import World

VERIFY = Policy(repair=False, hash=True, verify=True, writers_visible=True)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


@pytest.fixture
def digest(store: Store) -> str:
    """The digest of a blob that is known to be corrupt."""
    found = hashlib.sha256(b"right").hexdigest()
    (store.blobs / f"sha256-{found}").write_bytes(b"wrong")
    store.manifest("demo", found)
    cycle.cycle(World(str(store.path)), VERIFY)
    return found


def test_a_registry_that_was_away_is_asked_again(
    store: Store, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corrupt blob stays until its registry says that it can be had again, and no longer."""
    blob = store.blobs / f"sha256-{digest}"
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


def test_it_is_not_asked_all_the_time(store: Store, digest: str) -> None:
    asked: list[str] = []

    def registry_length(_: ModelName, of: str) -> int | None:
        asked.append(of)
        return None

    tried = Proofs(World(str(store.path), registry_length=registry_length), pytest.fail)
    try:
        for _ in range(3):
            tried.want(frozenset({digest}), replace(POLICY, repair=True))
            wait_until(lambda: tried._thread is None, "the end of the proof")
    finally:
        tried.stop()
    assert asked == [digest]


@pytest.mark.parametrize("said", [None, len(b"right")])
def test_a_service_goes_on_about_what_its_registry_has_not_answered(
    store: Store, digest: str, monkeypatch: pytest.MonkeyPatch, said: int | None
) -> None:
    wanted: list[frozenset[str]] = []
    monkeypatch.setattr(Proofs, "want", lambda _, digests, __: wanted.append(digests))
    world = World(str(store.path), registry_length=lambda *_: said)
    policy = replace(POLICY, repair=True, online=True)

    def only_questions(planned: Plan) -> Plan:
        asks = tuple(each for each in planned.actions if each.verb in cycle.QUESTIONS)
        return replace(planned, actions=asks)

    report = cycle.cycle(world, policy, consent=only_questions)
    _Service(world, policy, Metrics(world.store, policy), [])._prove(report)
    assert [digest in each for each in wanted] == [said is None]

"""What is hashed and asked in the background, and when it is tried again."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import POLICY, HealthyStore, private_proc
from tests.support.runs import changed, one_run, rules
from tests.support.servers import wait_until
from watcher import reconcile
from watcher.model import Plan, Rules
from watcher.observe import evidence
from watcher.observe.host import Host
from watcher.ollama.names import ModelName
from watcher.service import scrub
from watcher.service.daemon import Children, _Service
from watcher.service.metrics import Metrics
from watcher.service.scrub import Scrub

VERIFY = rules(repair=False, hash=True, verify=True, writers_visible=True)


@pytest.fixture
def store(tmp_path: Path) -> HealthyStore:
    return HealthyStore(tmp_path / "models")


@pytest.fixture
def digest(store: HealthyStore) -> str:
    """The digest of a blob that is known to be corrupt."""
    found = hashlib.sha256(b"right").hexdigest()
    (store.blobs / f"sha256-{found}").write_bytes(b"wrong")
    store.manifest_of("demo", found)
    one_run(Host(str(store.path)), VERIFY)
    return found


def test_a_registry_that_was_away_is_asked_again(
    store: HealthyStore, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corrupt blob stays until its registry says that it can be had again, and no longer."""
    blob = store.blobs / f"sha256-{digest}"
    said: list[int | None] = [None, len(b"right")]
    asked: list[str] = []

    def registry_length(_: ModelName, of: str) -> int | None:
        asked.append(of)
        return said[min(len(asked), len(said)) - 1]

    monkeypatch.setattr(scrub, "_AGAIN_SECONDS", 0.0)
    host = Host(str(store.path), registry_length=registry_length)
    tried = Scrub(host, pytest.fail)
    policy = changed(POLICY, repair=True)
    try:
        tried.want(frozenset({digest}), policy.settings)
        wait_until(lambda: asked, "the first question")
        wait_until(lambda: not blob.exists() or _again(tried, digest, policy), "the quarantine")
    finally:
        tried.stop()
    assert set(asked) == {digest}
    (kept,) = store.ours.glob("quarantine/*")
    assert kept.name.endswith(f"-sha256-{digest}")


def _again(tried: Scrub, digest: str, policy: Rules) -> bool:
    """What each full look of the daemon does."""
    tried.want(frozenset({digest}), policy.settings)
    return False


def test_the_registry_is_not_asked_all_the_time(store: HealthyStore, digest: str) -> None:
    asked: list[str] = []

    def registry_length(_: ModelName, of: str) -> int | None:
        asked.append(of)
        return None

    tried = Scrub(Host(str(store.path), registry_length=registry_length), pytest.fail)
    try:
        for _ in range(3):
            tried.want(frozenset({digest}), changed(POLICY, repair=True).settings)
            wait_until(lambda: tried._worker._thread is None, "the end of the proof")
    finally:
        tried.stop()
    assert asked == [digest]


@pytest.mark.parametrize("said", [None, len(b"right")])
def test_a_service_goes_on_about_what_its_registry_has_not_answered(
    store: HealthyStore, digest: str, monkeypatch: pytest.MonkeyPatch, said: int | None
) -> None:
    wanted: list[frozenset[str]] = []
    monkeypatch.setattr(Scrub, "want", lambda _, digests, __: wanted.append(digests))
    host = Host(str(store.path), registry_length=lambda *_: said)
    policy = changed(POLICY, repair=True, online=True)

    def only_questions(planned: Plan) -> Plan:
        asks = tuple(each for each in planned.actions if each.kind in reconcile.QUESTIONS)
        return planned._replace(actions=asks)

    report = one_run(host, policy, approve=only_questions)
    _Service(
        host, policy.settings, Metrics(host.store, policy.settings), Children([])
    )._work_beside(report, lambda _: None)
    assert [digest in each for each in wanted] == [said is None]


def damaged(store: HealthyStore, count: int) -> frozenset[str]:
    """So many blobs that are known to be corrupt, of one model."""
    texts = [f"{store.path} {number}" for number in range(count)]
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    for digest in digests:
        (store.blobs / f"sha256-{digest}").write_bytes(b"wrong")
    store.manifest_of("many", *digests)
    one_run(Host(str(store.path)), VERIFY)
    return frozenset(digests)


def test_thousands_are_put_aside_together(
    store: HealthyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not each of them after a look at all of them."""
    digests = damaged(store, 1200)
    looks: list[object] = []
    real = evidence.observe

    def look(*given: Any) -> Any:
        looks.append(given)
        return real(*given)

    monkeypatch.setattr(evidence, "observe", look)
    proc = private_proc(tmp_path / "proc")
    host = Host(str(store.path), proc=proc, registry_length=lambda *_: len(b"wrong"))
    tried = Scrub(host, pytest.fail)
    tried.want(digests, changed(POLICY, repair=True).settings)
    wait_until(lambda: tried._worker._thread is None, "the end of the proofs", 120)
    assert len(list(store.ours.glob("quarantine/*"))) == len(digests)
    assert len(looks) < 20


def test_stop_ends_asking(store: HealthyStore) -> None:
    digests = damaged(store, 200)
    asked: list[str] = []
    goes_on = threading.Event()

    def registry_length(_: ModelName, of: str) -> int | None:
        asked.append(of)
        goes_on.wait(120)
        return None

    tried = Scrub(Host(str(store.path), registry_length=registry_length), pytest.fail)
    tried.want(digests, changed(POLICY, repair=True).settings)
    wait_until(lambda: asked, "the first question")
    ended = threading.Thread(target=tried.stop)
    ended.start()
    wait_until(tried._worker.is_stopped, "the stop")
    goes_on.set()
    ended.join()
    assert len(asked) == 1


@pytest.mark.parametrize("how", ["cut", "to nowhere", "to other bytes"])
def test_a_daemon_puts_aside_what_it_has_not_hashed_before(
    store: HealthyStore, tmp_path: Path, how: str
) -> None:
    """The hash of a blob of another size decides, and a link goes itself."""
    found = hashlib.sha256(b"right bytes").hexdigest()
    blob = store.blobs / f"sha256-{found}"
    blob.write_bytes(b"right bytes")
    store.manifest_of("demo", found)
    aside = tmp_path / "aside"
    aside.write_bytes(b"others")
    if how == "cut":
        blob.write_bytes(b"right")
    else:
        blob.unlink()
        blob.symlink_to(aside if how == "to other bytes" else tmp_path / "nowhere")
    host = Host(
        str(store.path),
        proc=private_proc(tmp_path / "proc"),
        registry_length=lambda *_: len(b"right bytes"),
    )
    policy = changed(POLICY, repair=True, clean=False)
    service = _Service(host, policy.settings, Metrics(host.store, policy.settings), Children([]))
    try:
        service._work_beside(one_run(host, policy), lambda _: None)
        wait_until(lambda: service._scrub._worker._thread is None, "the end of the proofs")
    finally:
        service._scrub.stop()
    assert not blob.exists()
    assert not blob.is_symlink()
    assert aside.read_bytes() == b"others"
    assert "quarantined" in store.event_types()

"""What is hashed, remembered and told: `verify`, and blobs finished on sidecars of ours."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import HealthyStore, audit, command, environment, private_proc, run
from tests.support.runs import changed, one_run, rules
from tests.support.servers import EngineServer
from watcher import reconcile
from watcher.act import answering
from watcher.demo.registry import Registry
from watcher.model import Action, ActionKind, Ranges, Result
from watcher.observe.host import Host
from watcher.state.event_log import EventType

from .scenes import finished

VERIFY = rules(repair=False, clean=False, hash=True, verify=True, writers_visible=True)


class TrueStore(HealthyStore):
    """One whose blobs have the digests of their content."""

    def digest(self, text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> HealthyStore:
    return TrueStore(tmp_path / "models")


def verify(store: HealthyStore, *words: str) -> tuple[int, dict[str, Any]]:
    """`verify --json`: its exit code and its document."""
    done = run(store.path, "--json", "verify", *words)
    assert done.stdout, done.stderr
    return done.returncode, dict(json.loads(done.stdout))


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed from now on."""
    names: list[str] = []
    real = answering._read

    def note(fd: int, *rest: Any) -> Ranges:
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        return real(fd, *rest)

    monkeypatch.setattr(answering, "_read", note)
    return names


def test_what_was_hashed_is_remembered(
    store: HealthyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = hashed(monkeypatch)
    one_run(Host(str(store.path)), VERIFY)
    assert sorted(names) == sorted(f"sha256-{digest}" for digest in store.digests)
    one_run(Host(str(store.path)), VERIFY)
    assert len(names) == len(store.digests), "nothing is hashed twice"


def test_a_changed_file_is_hashed_again_and_reported(
    store: HealthyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify(store)[0] == 0
    path = store.blobs / f"sha256-{store.digests[0]}"
    info = path.stat()
    with path.open("r+b") as file:
        file.write(b"H")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    names = hashed(monkeypatch)
    report = one_run(Host(str(store.path)), VERIFY)
    assert names == [path.name], "even where its times were set back"
    assert [each.kind for each in report.diagnosis.findings] == ["blob_corrupt"]
    assert verify(store)[0] == 1
    (told,) = [each for each in audit(store.path)["findings"] if each["kind"] == "blob_corrupt"]
    assert told["path"] == f"blobs/{path.name}"
    path.write_text("healthy weights")
    assert verify(store)[0] == 0


def test_a_limit_of_time_ends_it_and_it_goes_on(store: HealthyStore) -> None:
    digests = [store.text_blob(f"layer {number}" * 1000) for number in range(30)]
    store.manifest_of("many", *digests)
    done: list[int] = []
    for _ in range(60):
        over = itertools.chain(itertools.repeat(False, 20), itertools.repeat(True)).__next__
        report = one_run(Host(str(store.path)), VERIFY, stop=over)
        done.append(sum(each.sha256 is not None for each in report.outcomes))
        if sum(done) == len(digests) + 2:
            break
    assert sum(done) == len(digests) + 2
    assert max(done) < len(digests), "no run did all of it"
    assert verify(store, "--max-duration", "1s")[1]["outcomes"] == []


def test_what_the_disk_can_not_give_back_is_damage_with_its_range(
    store: HealthyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.blobs / f"sha256-{store.digests[0]}"
    with path.open("wb") as file:
        file.truncate(answering._READ * 3)
    store.manifest_of("healthy", *store.digests)
    real = os.preadv

    def failing(fd: int, buffers: list[memoryview], at: int) -> int:
        if at == 2 * answering._READ and os.fstat(fd).st_ino == path.stat().st_ino:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", failing)
    report = one_run(Host(str(store.path)), VERIFY)
    (finding,) = [each for each in report.diagnosis.findings if each.kind == "blob_corrupt"]
    assert finding.path == f"blobs/{path.name}"
    assert finding.wrong == ((2 * answering._READ, 2 * answering._READ + 4096),)
    assert "can't give all of it back; damaged: 4.1 kB" in finding.evidence
    (told,) = [each for each in report.events if each.event_type == EventType.BLOB_CORRUPT]
    assert f"starting at byte {2 * answering._READ:,}" in told.message
    assert "hashed" not in told.details
    monkeypatch.undo()  # a disk may give it back another time
    report = one_run(Host(str(store.path)), VERIFY)
    (finding,) = [each for each in report.diagnosis.findings if each.kind == "blob_corrupt"]
    assert "its hash is sha256-" in finding.evidence, "it was read again"


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    store: HealthyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.blobs / f"sha256-{store.digests[0]}"
    real, done = os.preadv, threading.Event()

    def changing(fd: int, buffers: list[memoryview], at: int) -> int:
        found = real(fd, buffers, at)
        if os.fstat(fd).st_ino == path.stat().st_ino and not done.is_set():
            done.set()
            with path.open("ab") as file:
                file.write(b"more")
        return found

    monkeypatch.setattr(os, "preadv", changing)
    report = one_run(Host(str(store.path)), VERIFY)
    (refused,) = [each for each in report.outcomes if each.result is Result.REFUSED]
    assert refused.sha256 is None


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("words", [("repair", "--yes"), ("verify",)])
def test_a_blob_finished_on_our_sidecars_is_unproven_until_it_was_hashed(
    words: tuple[str, ...], right: bool, registry: Registry, tmp_path: Path
) -> None:
    with EngineServer(tmp_path / "pulled") as server:
        it = finished(server, registry, right=right)
    # A look has to see that the download is there no more.
    assert run(it.store, "prepare").returncode == 0
    kinds = [each["kind"] for each in audit(it.store)["findings"]]
    assert kinds.count("blob_unproven") == 1
    done = run(it.store, "--json", *words)
    kinds = [each["kind"] for each in audit(it.store)["findings"]]
    assert "blob_unproven" not in kinds
    asked = json.loads(done.stdout)["outcomes"]
    verbs = [each["verb"] for each in asked if each["subject"] in it.digest]
    assert verbs.count("hash") == 1
    if right:
        assert done.returncode == 0
        assert kinds == []
    elif words[0] == "repair":
        # Its registry has it still, so it is out of the way.
        assert list((it.store / ".ollama-watch").glob("quarantine/*"))
    else:
        assert "blob_corrupt" in kinds


def test_an_audit_alone_reports_what_is_unproven(registry: Registry, tmp_path: Path) -> None:
    """It writes nothing, and the end of the download was seen by nobody."""
    with EngineServer(tmp_path / "pulled") as server:
        it = finished(server, registry, right=True)
    assert "blob_unproven" in [each["kind"] for each in audit(it.store)["findings"]]


def test_a_kill_while_hashing_loses_little(store: HealthyStore) -> None:
    """The command is killed; what it had hashed and kept is not hashed again, all else is."""
    with subprocess.Popen(
        command(store.path, "verify"), env=environment(store.path), stdout=subprocess.DEVNULL
    ) as process:
        process.kill()
    code, document = verify(store)
    assert code == 0
    assert {each["result"] for each in document["outcomes"]} <= {"done"}


def test_only_what_is_meant_is_hashed(store: HealthyStore) -> None:
    digest = store.text_blob("another layer")
    store.manifest_of("other", digest, store.text_blob("another config"))

    def just(action: Action) -> bool:
        return action.subject == digest

    one_run(
        Host(str(store.path)),
        VERIFY,
        approve=lambda plan: plan._replace(actions=tuple(filter(just, plan.actions))),
    )
    report = one_run(Host(str(store.path)), VERIFY, approve=reconcile.approve_none)
    assert len(report.plan.actions) == 3


def test_what_a_hash_has_found_is_asked_of_the_registry_in_the_same_run(
    store: HealthyStore, tmp_path: Path
) -> None:
    rotten = store.blobs / f"sha256-{store.digests[0]}"
    rotten.write_bytes(rotten.read_bytes().swapcase())
    asked = []

    def length(_: object, digest: str) -> int:
        asked.append(digest)
        return rotten.stat().st_size

    here = Host(str(store.path), proc=private_proc(tmp_path / "proc"), registry_length=length)
    policy = changed(VERIFY, repair=True, online=True)
    report = one_run(here, policy)
    assert asked == [store.digests[0]]
    assert [each.action.kind for each in report.outcomes][-1] is ActionKind.QUARANTINE_BLOB
    assert not rotten.exists()

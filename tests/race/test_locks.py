"""Two of us at once: one acts, the other one waits, or says who has the lock."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.test_every_call import shape
from tests.support.driving import HealthyStore, command, environment, run
from tests.support.notation import Store
from watcher import cli
from watcher.act.journal import locked
from watcher.config import Settings
from watcher.decide import modes
from watcher.model import ActionKind, Result
from watcher.reconcile import Reconciler, approve_none
from watcher.state import folders

HOLD = """
import fcntl, os, sys
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
os.pwrite(lock, b"pid %d since then %s\\n" % (os.getpid(), b"x" * 100), 0)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path) -> HealthyStore:
    made = HealthyStore(tmp_path / "models")
    run(made.path, "clean", "--yes")  # it makes our folder
    made.download("stale")
    return made


@pytest.fixture
def holder(store: HealthyStore) -> Iterator[subprocess.Popen[str]]:
    """A process that has the lock for acting."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.ours / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_held_lock_ends_in_exit_11_and_names_the_holder(
    store: HealthyStore,
    holder: subprocess.Popen[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = store.tree()
    monkeypatch.setattr(modes, "CLEAN", modes.CLEAN._replace(lock_seconds=0.2))
    assert cli.main(["--store", str(store.path), "clean", "--yes"]) == 11
    assert f"pid {holder.pid} " in capsys.readouterr().err
    assert store.tree() == before


def test_an_audit_needs_no_lock(store: HealthyStore, holder: subprocess.Popen[str]) -> None:
    assert run(store.path, "audit").returncode == 1
    assert run(store.path, "clean", "--dry-run").returncode == 1
    assert holder.poll() is None


def test_a_lock_whose_holder_died_is_free(
    store: HealthyStore, holder: subprocess.Popen[str]
) -> None:
    """The text of the dead one is still in it."""
    holder.kill()
    holder.wait()
    assert f"pid {holder.pid}" in (store.ours / "lock").read_text()
    done = run(store.path, "clean", "--yes")
    assert done.returncode == 0, done.stderr
    text = (store.ours / "lock").read_text()
    assert f"pid {holder.pid}" not in text
    assert "x" not in text


def test_many_at_once_come_to_the_end_of_one(store: HealthyStore) -> None:
    for number in range(4):
        store.download(f"stale {number}")
        store.text_blob(f"orphan {number}")
    running = [
        subprocess.Popen(
            command(store.path, "--json", "clean", "--yes"),
            env=environment(store.path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in running]
    assert {code for _, code in ended} <= {0, 3}, ended
    assert run(store.path, "clean", "--yes").returncode == 0
    assert sorted(path.name[7:] for path in store.blobs.iterdir()) == sorted(store.digests)
    assert store.leftovers() == []
    assert store.event_types().count("partial_cleaned") == 5
    assert store.event_types().count("orphan_removed") == 4


def test_repairs_and_clean_ups_at_once_come_to_the_end_of_one_after_another(
    store: HealthyStore, tmp_path: Path
) -> None:
    def lay_out(into: HealthyStore) -> list[str]:
        made = [into.download(f"broken {number}", aged=3600) for number in range(4)]
        for digest in made:
            into.partial(digest, 1).unlink()
        return made

    alone = HealthyStore(tmp_path / "alone")
    alone.download("stale")
    digests = lay_out(alone)
    for words in (("repair", "--offline"), ("clean",)):
        assert run(alone.path, *words, "--yes").returncode == 0
    lay_out(store)
    running = [
        subprocess.Popen(
            command(store.path, *words, "--yes"),
            env=environment(store.path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words in [("repair", "--offline"), ("clean",)] * 2
    ]
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in running]
    assert {code for _, code in ended} <= {0, 3}, ended
    for words in (("repair", "--offline"), ("clean",)):
        assert run(store.path, *words, "--yes").returncode == 0
    assert shape(store) == shape(alone)
    assert store.leftovers() == []
    assert store.event_types().count("download_repaired") == len(digests)


def test_times_that_are_set_without_the_lock_are_remembered_once_it_is_free(
    tmp_path: Path,
) -> None:
    """So what `prepare` protects in the first second is repaired after it, and no younger."""
    store = Store(tmp_path / "models")
    digest = store.broken("0:10 0:0", aged="2h")
    data = store.blobs / f"sha256-{digest}-partial"
    own = data.stat().st_mtime_ns
    by = Reconciler(store.host(), Settings(writers_visible=True))
    by.reconcile(modes.INSPECT, approve=approve_none)  # it makes our folder
    brief = modes.PREPARE_TIMES._replace(lock_seconds=0.0)
    with folders.opened_store(str(store.path)) as opened, locked(opened, 0.0):
        by.keep_fresh(brief)
        assert data.stat().st_mtime_ns > own, "protected, whoever acts"
    report = by.reconcile(modes.PREPARE)
    assert report.memory is not None
    touched = report.memory.touched[data.name]
    assert (touched.set_ns, touched.own_ns) == (data.stat().st_mtime_ns, own)
    (left,) = report.evidence.downloads
    assert report.evidence.age_of(left.progress_at or 0) > 3600
    (outcome,) = report.outcomes
    assert (outcome.action.kind, outcome.result) == (ActionKind.WRITE_SIDECARS, Result.DONE)

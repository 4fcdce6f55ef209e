"""The service mends at once what dies, and keeps what is wanted; and whose the new files are."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import pytest

from tests.conftest import needs_root
from tests.support.driving import Daemon, HealthyStore, is_right, private_proc, run
from tests.support.notation import age
from tests.support.runs import one_run, rules
from tests.support.servers import (
    Server,
    collapsed,
    least,
    wait_until,
    wait_written,
)
from tests.support.workers import ALONE
from watcher.demo.registry import Layer, Registry
from watcher.model import DAY, HOUR, ActionKind
from watcher.observe.host import Host
from watcher.ollama import sidecars
from watcher.reconcile import Report

from .scenes import MB, MIB, PART, SIZE, STATES, Download, seed_of

REPAIRS = {"OLLAMA_WATCH_REPAIR": "true"}
POLICY = rules(repair=True, refresh=True, writers_visible=True)
HELD = 5 * MB
OWNER = 12345
#: Rounds of kill and repair.
ROUNDS = 5


def download(server: Server, registry: Registry) -> Download:
    """A layer of the registry, nothing of it there."""
    model = registry.add_model(
        "demo", "1b", [Layer(SIZE, seed=seed_of(server.store))], extras=False
    )
    return Download(server.store, model, registry.content(model.digests[0]))


def test_rounds_of_kill_and_repair_end_right(server: Server, registry: Registry) -> None:
    it = download(server, registry)
    counts: list[int] = []
    for _ in range(ROUNDS):
        registry.hold(it.digest, after=HELD)
        server.start().wait_ready()
        with contextlib.closing(server.start_pull(it.model.name)):
            texts: list[bytes] = []

            def whole(texts: list[bytes] = texts) -> bool:
                texts[:] = it.texts().values()  # the server empties each before it writes it
                return it.data.exists() and bool(texts) and all(texts)

            wait_until(whole, "sidecars")
            parts = [sidecars.parse(raw) for raw in texts]
            long = sum(part.size - part.completed > HELD for part in parts)
            wait_written(it.data, registry.wait_held(it.digest, min(16, long)))
            server.kill()
        registry.release()
        assert run(it.store, "repair", "--yes").returncode == 0
        counts.append(len(it.texts()))
    assert max(counts) <= 16 + 2 * ROUNDS
    server.start().wait_ready()
    before = registry.bytes_served(it.digest)
    assert collapsed(server.pull(it.model.name))[-1] == "success"
    assert is_right(it.store, it.digest)
    assert registry.bytes_served(it.digest) - before < SIZE
    assert registry.bytes_served(it.digest) <= SIZE + 1.1 * MIB * sum(counts) + 16 * MIB * ROUNDS


def test_daemon_repairs_a_broken_download_within_a_second(
    server: Server, registry: Registry, tmp_path: Path
) -> None:
    tries = itertools.count()

    def once() -> float:
        with type(server)(tmp_path / str(next(tries)) / "models") as anew:
            return _repaired(anew, registry)

    assert least(once, 1) < 1


def _repaired(server: Server, registry: Registry) -> float:
    """A pull whose server is killed beside a daemon: the seconds from that to its repair."""
    it = download(server, registry)
    (it.store / "blobs").mkdir(parents=True)
    (it.store / "manifests").mkdir()
    server.start().wait_ready()
    registry.hold(it.digest, after=HELD)
    with Daemon(it.store, REPAIRS) as daemon:
        with contextlib.closing(server.start_pull(it.model.name)):
            registry.wait_held(it.digest, 3)
            wait_written(it.data, [HELD, PART + HELD, 2 * PART + HELD])
            daemon.wait_event("download_started")
            killed = time.time()
            server.kill()
        told = daemon.wait_event("download_repaired")
        types = [event["event_type"] for event in daemon.events]
        of_it = [each for each in types if each.startswith(("download", "act"))]
        assert of_it == [
            "download_started",
            "download_interrupted",
            "act_started",
            "download_repaired",
        ]
        parts = len(it.texts())
        registry.release()
        registry.reset_stats()
        server.start().wait_ready()
        assert collapsed(server.pull(it.model.name))[-1] == "success"
        served = registry.bytes_served(it.digest)
        assert served <= SIZE - 3 * HELD + 1.1 * MIB * parts
        assert is_right(it.store, it.digest)
        daemon.wait_event("download_completed")
        return datetime.fromisoformat(told["timestamp"]).timestamp() - killed


@pytest.fixture
def store(tmp_path: Path) -> HealthyStore:
    return HealthyStore(tmp_path / "models")


class Machine:
    """A store on a machine whose clock is set by hand, and on which nothing else runs."""

    def __init__(self, store: HealthyStore, tmp_path: Path) -> None:
        self.later = 0.0
        self._host = Host(
            str(store.path),
            proc=private_proc(tmp_path / "proc"),
            clock=lambda: time.time() + self.later,
        )

    def look(self, scope: frozenset[str] | None = None) -> Report:
        """A cycle as the service has it."""
        return one_run(self._host, POLICY, scope)


def test_stale_downloads_are_left_by_the_service(store: HealthyStore, tmp_path: Path) -> None:
    digest = store.download("stale", aged=8 * DAY)
    store.partial(digest, 1).unlink()
    before = {path.name: path.stat() for path in store.blobs.iterdir()}
    report = Machine(store, tmp_path).look()
    assert [each for each in report.plan.actions if digest in each.subject] == []
    assert {path.name: path.stat() for path in store.blobs.iterdir()} == before


def test_wanted_ones_are_refreshed_and_stale_ones_are_not(
    store: HealthyStore, tmp_path: Path
) -> None:
    wanted = store.download("wanted", aged=0.75 * HOUR)
    young = store.download("young", aged=0.25 * HOUR)
    live = store.download("live", aged=0.75 * HOUR)
    stale = store.download("stale", aged=8 * DAY)
    orphan = store.text_blob("of a pull that is not finished", aged=0.75 * HOUR)
    with store.partial(live).open("r+b"):
        report = Machine(store, tmp_path).look()
    done = {each.subject for each in report.plan.actions if each.kind is ActionKind.REFRESH}
    assert done == {wanted, live, f"sha256-{orphan}"}
    now = time.time()
    for digest, fresh in ((wanted, True), (live, True), (young, False), (stale, False)):
        times = {path.stat().st_mtime for path in store.blobs.glob(f"sha256-{digest}-partial*")}
        assert all((now - each < 60) is fresh for each in times)
        assert len({round(each, 3) for each in times}) == 1 or not fresh


def test_times_are_never_set_back(store: HealthyStore, tmp_path: Path) -> None:
    """One of the files has a later time than our clock: it stays, and the others follow."""
    digest = store.download("wanted", aged=0.75 * HOUR)
    age(store.partial(digest, 1), -300)
    before = store.partial(digest, 1).stat().st_mtime_ns
    Machine(store, tmp_path).look()
    assert store.partial(digest, 1).stat().st_mtime_ns == before
    assert time.time() - store.partial(digest, 0).stat().st_mtime < 60


def test_age_and_quiet_are_not_disturbed_by_what_we_set(
    store: HealthyStore, tmp_path: Path
) -> None:
    """A week of refreshed times: stale all the same, and not live for a moment."""
    digest = store.download("wanted", aged=2 * HOUR)
    machine = Machine(store, tmp_path)
    for _ in range(10):
        (diagnosed,) = [
            each for each in machine.look().diagnosis.diagnosed if each.digest == digest
        ]
        assert diagnosed.age == pytest.approx(2 * HOUR + machine.later, abs=60)
        assert diagnosed.condition.value != "live"
        machine.later += DAY
        if machine.later >= 7 * DAY:
            break
    report = machine.look()
    (diagnosed,) = [each for each in report.diagnosis.diagnosed if each.digest == digest]
    assert diagnosed.stale
    assert report.plan.actions == ()


def test_a_stale_download_that_grew_since_the_last_scan_is_not_removed(store: HealthyStore) -> None:
    """The memory has it as stale; then a pull of it got on, unseen, and was killed."""
    digest = store.download("resumed", aged=8 * DAY)
    assert run(store.path, "repair", "--yes").returncode == 0
    with store.partial(digest).open("r+b") as data:
        data.write(b"new")
    age(store.partial(digest), 600)
    before = store.partials(digest)
    assert run(store.path, "clean", "--yes").returncode == 0
    assert store.partials(digest) == before


def test_the_rule_for_a_reboot_goes_by_the_own_time(store: HealthyStore, tmp_path: Path) -> None:
    """Written before the machine started: after a refresh it still counts as that."""
    digest = store.download("wanted", aged=2 * HOUR)
    machine = tmp_path / "rebooted"
    (machine / "self" / "ns").mkdir(parents=True)
    (machine / "self" / "ns" / "pid").symlink_to("pid:[4026531836]")
    (machine / "self" / "mounts").write_text("none / ext4 rw 0 0\n")
    (machine / "stat").write_text(f"btime {int(time.time() - HOUR)}\n")
    here = Host(str(store.path), proc=str(machine))
    for _ in range(3):
        report = one_run(here, POLICY)
        (diagnosed,) = [each for each in report.diagnosis.diagnosed if each.digest == digest]
        assert diagnosed.download.trust.rebooted
        age(store.partial(digest, 0), 0.9 * HOUR)


# ---------------------------------------------------------------- owners


@needs_root
@pytest.mark.parametrize("words", [("repair", "--yes"), ("prepare",)])
def test_progress_files_written_by_root_belong_to_the_owner_of_the_download(
    words: Sequence[str], tmp_path: Path
) -> None:
    store = HealthyStore(tmp_path / "models")
    digest = store.download("killed", aged=600)
    for number in range(3):
        store.partial(digest, number).unlink()
    for path in (store.path, *store.path.rglob("*")):
        os.chown(path, OWNER, OWNER)
    done = run(store.path, *words, env=REPAIRS)
    assert done.returncode == 0, done.stdout + done.stderr
    made = list(store.blobs.glob(f"sha256-{digest}-partial-*"))
    assert made
    for path in made:
        info = path.stat()
        assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (OWNER, OWNER, 0o644)
    for path in (store.ours, *store.ours.rglob("*")):
        assert path.stat().st_uid == OWNER, path


@needs_root
def test_another_ordinary_user_is_refused(
    tmp_path: Path, as_nobody: Callable[[Sequence[str]], list[str]]
) -> None:
    store = HealthyStore(tmp_path / "models")
    digest = store.download("killed", aged=2 * HOUR)
    for number in range(3):
        store.partial(digest, number).unlink()
    for path in (store.path, *store.path.rglob("*")):
        os.chown(path, OWNER, OWNER)
        path.chmod(0o777 if path.is_dir() else 0o666)
    before = store.tree()
    words = ["-m", "watcher", "--store", str(store.path), "--json", "repair", "--yes"]
    # Of servers of others on this machine this user could not tell what store they have.
    done = subprocess.run([*ALONE, *as_nobody(words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stdout + done.stderr
    refused = json.loads(done.stdout)["plan"]["refusals"]
    assert {each["kind"] for each in refused} == {"owner"}
    assert store.tree() == before


def test_a_repaired_download_survives_the_start_that_would_delete_it(
    server: Server, registry: Registry
) -> None:
    """Two hours old: the service refreshes it at its first look, and mends it."""
    it = download(server, registry)
    STATES["old"](it)
    (it.store / "manifests").mkdir()
    with Daemon(it.store, REPAIRS) as daemon:
        daemon.wait_event("refreshed")
        server.start().wait_ready()
        assert it.data.exists()
        wait_until(lambda: len(it.texts()) > 2, "sidecars")

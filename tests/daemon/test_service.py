"""The service itself: what it tells once, who may run, how it ends, and stores that come and go."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import (
    OLD,
    POLICY,
    Daemon,
    HealthyStore,
    command,
    content,
    environment,
    holding,
    host,
    ollama_process,
    run,
    whole_lines,
)
from tests.support.notation import age
from tests.support.runs import one_run
from tests.support.servers import Line, least, wait_until
from watcher import reconcile
from watcher.model import DAY
from watcher.observe import processes

CLEANS = {"OLLAMA_WATCH_CLEAN": "true"}


def look_again(daemon: Daemon, store: HealthyStore, mark: str) -> None:
    """Make it look at the whole store; it has done so when this returns."""
    digest = store.download(mark, aged=3600)
    model = store.manifest_of(mark, *store.digests)
    found = lambda: any(digest[:12] in str(e["model_name"]) for e in daemon.of("partial_found"))  # noqa: E731
    wait_until(found, "the new download to be found")
    daemon.wait_idle()
    model.unlink()
    daemon.wait_idle()


# ---------------------------------------------------------------- what is told, and once


def test_a_partial_is_found_and_stale_once_and_not_at_every_look(store: HealthyStore) -> None:
    store.download("stale")
    store.download("young", aged=DAY)
    with Daemon(store.path) as daemon:
        look_again(daemon, store, "more")
        look_again(daemon, store, "and-more")
        assert len(daemon.of("partial_found")) == 4
        (stale,) = daemon.of("partial_stale")
        assert stale["details"]["age_seconds"] == pytest.approx(OLD, abs=60)
        assert daemon.of("check_started")[0]["message"].startswith("Checking for partial model")


def test_a_stale_download_is_cleaned_where_the_settings_allow_it(store: HealthyStore) -> None:
    digest = store.download("stale")
    kept = store.download("young", aged=DAY)
    size = sum(path.stat().st_blocks * 512 for path in store.blobs.glob(f"*{digest}*"))
    with Daemon(store.path, CLEANS) as daemon:
        told = daemon.wait_event("partial_cleaned")
        assert told["details"]["freed_bytes"] == size
        assert told["message"] == f"Cleaned up partial download for: sha256-{digest[:12]}"
        assert store.partials(digest) == []
        assert len(store.partials(kept)) == 4
        assert daemon.of("partial_removed") == []


def test_nothing_is_cleaned_by_default(store: HealthyStore) -> None:
    digest = store.download("stale")
    before = store.tree()
    with Daemon(store.path) as daemon:
        daemon.wait_event("partial_stale")
        assert store.tree() == before
        assert store.partials(digest)


def test_a_refusal_is_reported_once_and_the_act_done_when_it_can_be(store: HealthyStore) -> None:
    digest = store.download("stale")
    with Daemon(store.path, CLEANS) as daemon:
        daemon.kill(signal.SIGTERM)
    with (
        holding(store.partial(store.download("stale")), "rb"),
        Daemon(store.path, CLEANS) as daemon,
    ):
        told = daemon.wait_event("refused")
        assert told["details"]["kind"] == "held"
        look_again(daemon, store, "more")
        look_again(daemon, store, "and-more")
        assert len(daemon.of("refused")) == 1
        assert len(store.partials(digest)) == 4
    with Daemon(store.path, CLEANS) as daemon:
        daemon.wait_event("partial_cleaned")


def test_each_model_has_its_own_log(store: HealthyStore) -> None:
    digest = store.digests[0]
    (store.blobs / f"sha256-{digest}").unlink()
    store.download("healthy weights", aged=DAY)
    other = store.download("of no model", aged=DAY)
    with Daemon(store.path) as daemon:
        daemon.wait_event("partial_found", 2)
        daemon.kill(signal.SIGTERM)
        assert [e["model_name"] for e in store.events("healthy%3Alatest")] == ["healthy:latest"]
        assert [e["model_name"] for e in store.events(f"sha256-{other[:12]}")] == [
            f"sha256-{other[:12]}"
        ]
        assert store.events() == daemon.events
        service = [e for e in daemon.events if e["event_type"].startswith("service")]
        assert [e["model_name"] for e in service] == [None, None]


# ---------------------------------------------------------------- beginning and end


def test_a_second_service_is_refused_by_name_and_pid(store: HealthyStore) -> None:
    with Daemon(store.path) as daemon:
        second = run(store.path, "--json", "daemon")
        assert second.returncode == 11
        assert f"pid {daemon.pid} " in second.stderr
        assert "watches this store already" in second.stderr
        assert second.stdout == ""
        daemon.kill()
    with Daemon(store.path):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_within_a_second(store: HealthyStore, number: signal.Signals) -> None:
    store.download("young", aged=DAY)
    logged: list[Line] = []

    def end() -> float:
        with Daemon(store.path) as daemon:
            begun = time.monotonic()
            assert daemon.kill(number) == 0
            took = time.monotonic() - begun
            assert daemon.events[-1]["event_type"] == "service_stopped"
            assert number.name in daemon.events[-1]["message"]
            logged.extend(daemon.events)
            assert store.events() == logged
            return took

    assert least(end, 1) < 1


def test_a_command_beside_it_is_not_kept_waiting(store: HealthyStore) -> None:
    store.download("stale")
    with Daemon(store.path) as daemon:
        assert run(store.path, "clean", "--yes").returncode == 0  # it waits for no lock in vain
        wait_until(lambda: "partial_cleaned" in store.event_types(), "the log")
        daemon.wait_idle()
        assert daemon.of("partial_removed") == []


def test_a_server_that_ends_while_it_is_looked_at_stops_nothing(
    store: HealthyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.download("stale")
    with ollama_process(tmp_path, "serve") as pid:
        real = processes._holders

        def look(*words: Any) -> Any:
            """The processes have been listed, and the servers among them are asked next."""
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return real(*words)

        monkeypatch.setattr(processes, "_holders", look)
        report = one_run(host(store), POLICY, approve=reconcile.approve_none)
    assert len(report.diagnosis.diagnosed) == 1
    assert pid not in [server.pid for server in report.evidence.servers]


# ---------------------------------------------------------------- folders that come and go


def _folder_removed(store: HealthyStore, name: str) -> Callable[[], None]:
    def back() -> None:
        (store.path / name).mkdir()

    shutil.rmtree(store.path / name)
    return back


def _folder_moved(store: HealthyStore, name: str) -> Callable[[], None]:
    away = store.path / f"{name}.away"
    (store.path / name).rename(away)
    return lambda: (away.rename(store.path / name), None)[1]


def _store_moved(store: HealthyStore, _: str) -> Callable[[], None]:
    away = store.path.with_name("away")
    store.path.rename(away)
    return lambda: (away.rename(store.path), None)[1]


COMES_BACK = {
    "blobs removed": (_folder_removed, "blobs"),
    "manifests removed": (_folder_removed, "manifests"),
    "blobs moved": (_folder_moved, "blobs"),
    "manifests moved": (_folder_moved, "manifests"),
    "store moved": (_store_moved, ""),
}


def about(daemon: Daemon, digest: str) -> list[Line]:
    """The events of a download."""
    return [each for each in daemon.events if each["details"].get("digest") == f"sha256:{digest}"]


@pytest.mark.parametrize("case", COMES_BACK)
def test_the_daemon_goes_on_when_a_folder_comes_back(store: HealthyStore, case: str) -> None:
    with Daemon(store.path) as daemon:
        go, name = COMES_BACK[case]
        back = go(store, name)
        daemon.wait_idle()
        back()
        daemon.wait_idle()
        digest = store.download("new", aged=DAY)
        # A look in the middle of that sees a pull that begins, and not yet a partial download.
        wait_until(lambda: about(daemon, digest), "the download to be found")
        # And what is under manifests/ wakes it as well: it looks at the whole store then.
        before = daemon.work()
        path = store.path / "manifests/registry.ollama.ai/library/new/latest"
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        wait_until(lambda: daemon.work() > before, "a look")
        daemon.wait_idle()


def test_a_store_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "home" / ".ollama" / "models"
    tmp_path.joinpath("home").mkdir()
    with contextlib.closing(Daemon(path, beside=tmp_path / "models").start()) as daemon:
        assert daemon.wait_event("error")["message"].startswith("waiting for a store at")
        HealthyStore(tmp_path / "ready").download("new", aged=DAY)
        path.parent.mkdir()
        tmp_path.joinpath("ready").rename(path)
        daemon.wait_event("partial_found")
        daemon.wait_event("service_started")
        assert len(daemon.of("error")) == 1


def test_a_store_made_anew_is_taken_by_the_service_again(store: HealthyStore) -> None:
    """The lock lay in the old one, so that a second service would begin beside it."""
    with Daemon(store.path) as daemon:
        while store.path.exists():
            shutil.rmtree(store.path, ignore_errors=True)  # it writes to its log meanwhile
        daemon.wait_event("error")
        anew = HealthyStore(store.path)
        anew.download("new", aged=DAY)
        daemon.wait_event("partial_found")
        process = subprocess.Popen(
            command(store.path, "--json", "daemon"),
            env=environment(store.path),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            _, errors = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            pytest.fail("two services watch one store")
        assert process.returncode == 11
        assert f"pid {daemon.pid} ".encode() in errors


def test_a_start_of_the_server_that_makes_manifests_anew_does_not_blind_it(
    store: HealthyStore,
) -> None:
    store.text_blob("orphan")
    with Daemon(store.path, CLEANS) as daemon:
        daemon.wait_event("orphan_removed")
        orphan = store.text_blob("another orphan")
        shutil.rmtree(store.path / "manifests")
        (store.path / "manifests").mkdir()
        daemon.wait_idle()
        store.manifest_of("healthy", *store.digests)
        daemon.wait_event("orphan_removed", 2)
        assert not (store.blobs / f"sha256-{orphan}").exists()


def test_stderr_stays_empty_while_folders_come_and_go(store: HealthyStore) -> None:
    with Daemon(store.path) as daemon:
        for turn in range(10):
            shutil.rmtree(store.path / "manifests")
            (store.path / "manifests").mkdir()
            store.manifest_of(f"turn{turn}", *store.digests)
        daemon.wait_idle()
        assert daemon.errors == ""


# ---------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    point = tmp_path / "disk"
    point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(point)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield point
    subprocess.run(["umount", "--lazy", str(point)], check=True)


def fill(disk: Path) -> Path:
    """Leave not a byte free."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path


def empty_data(store: HealthyStore, digest: str) -> None:
    """A download that takes no room on the disk, and is there at once, old as it is."""
    path = store.path / "data"
    path.touch()
    age(path, DAY)
    path.rename(store.partial(digest))


def test_a_store_that_cannot_be_written_is_watched_all_the_same(
    small_disk: Path, tmp_path: Path
) -> None:
    store = HealthyStore(small_disk / "models")
    store.download("stale", parts=1)
    before = content(store.path)
    environment(store.path)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with Daemon(store.path, CLEANS, beside=tmp_path / "models") as daemon:
        daemon.wait_event("partial_stale")
        assert any("Read-only" in event["message"] for event in daemon.of("error"))
        assert daemon.wait_event("refused")["details"]["kind"] == "permission"
        assert daemon.kill(signal.SIGTERM) == 0
        assert daemon.events[-1]["event_type"] == "service_stopped"
    assert run(store.path, "audit").returncode == 1
    assert run(store.path, "clean", "--yes").returncode == 3
    assert content(store.path) == before


def test_a_full_disk_leaves_whole_lines_and_is_reported(small_disk: Path, tmp_path: Path) -> None:
    store = HealthyStore(small_disk / "models")
    with Daemon(store.path, beside=tmp_path / "models") as daemon:
        empty_data(store, "f" * 64)
        daemon.wait_event("partial_found")
        filler = fill(small_disk)
        for number in range(20):
            empty_data(store, f"{number:064x}")
            daemon.wait_event("partial_found", number + 2)
        told = [event["message"] for event in daemon.of("error")]
        assert any("No space left on device" in message for message in told), told
        whole_lines(store.ours / "logs/events.jsonl", growing=False)
        json.loads((store.ours / "state.json").read_bytes())
        filler.unlink()
        empty_data(store, "a" * 64)
        last = daemon.wait_event("partial_found", 22)
        wait_until(lambda: last in store.events(), "the event in the log")
        daemon.wait_idle()
        assert "a" * 64 in json.loads((store.ours / "state.json").read_bytes())["downloads"]


def test_a_full_disk_can_be_cleaned(small_disk: Path) -> None:
    """It is when the disk is full that cleaning is asked for."""
    store = HealthyStore(small_disk / "models")
    run(store.path, "clean", "--yes")
    digest = store.download("stale", parts=1)
    fill(small_disk)
    done = run(store.path, "clean", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert store.partials(digest) == []


# ---------------------------------------------------------------- killed at any moment


def test_killed_at_any_moment_it_leaves_whole_lines_and_a_valid_memory(store: HealthyStore) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    store.download("stale")
    for turn in range(30):
        daemon = Daemon(store.path, CLEANS).start()
        try:
            wait_until(lambda d=daemon: d.told.stat().st_size, "its first line")  # type: ignore[misc]
            until = time.monotonic() + chance.uniform(0, 0.15)
            while time.monotonic() < until:
                store.download(f"{turn} {chance.random()}", aged=chance.choice([DAY, OLD]))
                time.sleep(0.01)
        finally:
            daemon.kill()
        where = f"seed {seed}, turn {turn}"
        memory = store.ours / "state.json"
        assert not memory.exists() or json.loads(memory.read_bytes()), where
        assert "Traceback" not in daemon.errors, where
        whole_lines(daemon.told)
    assert run(store.path, "clean", "--yes").returncode == 0, f"seed {seed}"
    for log in (store.ours / "logs").iterdir():
        whole_lines(log)
    assert store.leftovers() == [], f"seed {seed}"

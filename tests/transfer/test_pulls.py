"""Whole pulls whose bytes we move: with and without a server, over what breaks, to the manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.pull.conftest import SERVERS
from tests.pull.driven import OPTIONS, POLICY, add, arrived, at_a_port, drive
from tests.support import transfers
from tests.support.driving import audit, holding
from tests.support.notation import age
from tests.support.servers import Server, blob, wait_until
from watcher.decide import modes
from watcher.demo.registry import Fault, Layer, Manners, Model, Registry
from watcher.model import ActionKind, Download, Scope
from watcher.observe.host import Host
from watcher.ollama import manifests, names
from watcher.pull import by_transfer, driver
from watcher.pull.account import Options, Update
from watcher.pull.failures import Cause, of_error
from watcher.pull.target import Target
from watcher.reconcile import Reconciler
from watcher.state import event_log, fs
from watcher.state import transfers as kept_transfers
from watcher.transfer import publication, questions, values
from watcher.transfer import store as store_of_transfers

MB = 1_000_000
SIZE = 24 * MB
#: Each connection gives a kilobyte or so for its registry's headers; and the manifest, twice.
OVERHEAD = 64 * 1024


@pytest.fixture(autouse=True)
def _no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk of the tests may be nearly full; and small pieces, so that several come."""
    usual = values.Options

    def options(**more: object) -> values.Options:
        small = {"piece": 2 << 20, "first_pause": 0.01, "longest_pause": 0.05}
        return usual(**{**small, **more, "reserve": 0})  # type: ignore[arg-type]

    monkeypatch.setattr(values, "Options", options)


def here(server: Server) -> Target:
    """The store of a server that need not run."""
    return Target(
        f"http://127.0.0.1:{server.port}",
        POLICY.settings,
        questions.asking(Host(str(server.store))),
    )


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """Not started; it comes back at the same port."""
    with at_a_port(request.param, tmp_path) as made:
        yield made


@pytest.fixture
def store(server: Server) -> Path:
    (server.store / "blobs").mkdir(parents=True)
    return server.store


def served(registry: Registry, model: Model) -> int:
    """Bytes of its large layer that the registry has sent."""
    return registry.bytes_served(model.digests[0])


# ---------------------------------------------------------------- to the manifest


@pytest.mark.usefixtures("store")
def test_a_layer_that_is_wrong_twice_is_not_fetched_again(
    server: Server, registry: Registry
) -> None:
    model = add(registry, server, SIZE)
    registry.content(model.digests[0])._zeros = ((5 * MB, 5 * MB + 3000),)
    seen = drive(here(server), model)
    assert seen.end.cause is Cause.OTHER_BYTES
    assert served(registry, model) == 2 * SIZE + 1
    found = {each["digest"]: each for each in audit(server.store)["downloads"]}[model.digests[0]]
    assert (found["because"], found["bytes"]["trusted"]) == ("its hash was wrong", SIZE)


@pytest.mark.usefixtures("store")
def test_a_pull_without_a_server_leaves_a_model_that_a_server_lists(
    server: Server, registry: Registry
) -> None:
    model = add(registry, server, SIZE)
    seen = drive(here(server), model)
    assert seen.end.cause is None
    assert arrived(server, model)
    assert served(registry, model) <= SIZE + OVERHEAD
    assert not list((server.store / ".ollama-watch/transfers").glob("*"))
    server.start().wait_ready()
    assert b"demo:1b" in server.request("GET", "/api/tags")[1]


def test_a_running_server_writes_the_manifest(server: Server, registry: Registry) -> None:
    model = add(registry, server, SIZE)
    server.start().wait_ready()
    seen = drive(here(server), model)
    assert seen.end.cause is None
    assert arrived(server, model)
    assert served(registry, model) <= SIZE + OVERHEAD


def test_a_server_that_can_not_reach_the_registry_leaves_it_to_us(
    server: Server, registry: Registry
) -> None:
    model = add(registry, server, SIZE)
    server.start().wait_ready()
    # It is asked without `insecure`, which a registry that speaks http takes.
    seen = drive(here(server), model, Options())
    assert seen.end.cause is None
    assert arrived(server, model)
    assert any("ollama-watch writes the manifest itself" in each for each in seen.notes)


@pytest.mark.usefixtures("store")
def test_a_model_that_is_here_is_up_to_date(server: Server, registry: Registry) -> None:
    model = add(registry, server, SIZE)
    drive(here(server), model)
    before = registry.stats()["requests"]["data"]
    seen = drive(here(server), model)
    assert "up to date" in seen.notes
    assert registry.stats()["requests"]["data"] == before


@pytest.mark.usefixtures("store")
def test_a_stopped_transfer_resumes(server: Server, registry: Registry) -> None:
    model = add(registry, server, SIZE)
    registry.throttle(24 * MB)
    stop = threading.Event()

    def look(update: Update) -> None:
        if update.record.downloaded_bytes > SIZE // 2:
            stop.set()

    seen = drive(here(server), model, cancelled=stop.is_set, on_update=look)
    assert seen.end.cause is Cause.INTERRUPTED
    assert not arrived_at_all(server, model)
    seen = drive(here(server), model)
    assert seen.end.cause is None
    assert arrived(server, model)
    assert any(each.startswith("resuming: ") for each in seen.notes)
    # What was on its way when it was stopped is kept to the byte but for the sockets' buffers.
    assert served(registry, model) <= SIZE + 8 * MB


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EINVAL])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a folder to somebody else")
def test_a_folder_of_another_user_is_named_with_the_command_that_mends_it(
    tmp_path: Path, number: int
) -> None:
    folder = tmp_path / ".ollama-watch/transfers/digest"
    folder.mkdir(parents=True)
    os.chown(folder, 12345, 12345)
    error = OSError(number, os.strerror(number), ".ollama-watch/transfers/digest/lock")
    end = by_transfer._refused(str(tmp_path), error)
    assert end.text == f"{folder} belongs to user id 12345"
    assert end.step == f"run `chown -R 0:0 {folder}`, then this again"
    subprocess.run(["sh", "-c", end.step.split("`")[1]], check=True)
    assert folder.stat().st_uid == 0


def test_what_lies_in_the_place_of_a_lock_is_named(
    server: Server, registry: Registry, store: Path
) -> None:
    model = add(registry, server, MB)
    lock = store / ".ollama-watch/transfers" / model.digests[0].removeprefix("sha256:") / "lock"
    lock.mkdir(parents=True)
    seen = drive(here(server), model)
    assert seen.end.text.startswith(f"{lock}: ")
    assert "move it out of the way" in seen.end.step
    lock.rmdir()
    assert drive(here(server), model).end.cause is None
    assert arrived(server, model)


def test_an_answer_without_words_ends_with_its_number(
    server: Server, registry: Registry, store: Path
) -> None:
    model = add(registry, server, MB)
    registry.add_fault(Fault("page", status=404, body="", times=2))
    seen = drive(here(server), model)
    assert arrived(server, model)
    told = [each for each in seen.notes if " answers 404" in each]
    assert told
    assert not any(" answers 404:" in each for each in told)


def test_what_a_kill_left_without_bytes_goes_where_all_is_there(
    server: Server, registry: Registry, store: Path
) -> None:
    """As one that comes between the manifest and the end."""
    model = add(registry, server, MB)
    assert drive(here(server), model).end.cause is None
    above = store / ".ollama-watch" / "transfers"
    left = above / model.digests[0].removeprefix("sha256:")
    left.mkdir()
    (left / "arrived").touch()
    seen = drive(here(server), model)
    assert (seen.end.cause, seen.notes[-1]) == (None, "up to date")
    assert not list(above.iterdir())


@pytest.mark.usefixtures("store")
def test_the_manifest_is_asked_for_at_the_beginning_and_at_the_end(
    server: Server, registry: Registry
) -> None:
    model = add(registry, server, MB)
    assert drive(here(server), model).end.cause is None
    assert registry.stats()["requests"]["manifest"] == 2


@pytest.mark.usefixtures("store")
def test_a_registry_that_gives_a_layer_another_length_each_time_ends_it(
    server: Server, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add(registry, server, MB)
    registry.add_fault(Fault("wrong_total"))
    lengths = iter(range(MB + 10, MB + 30))
    monkeypatch.setattr(questions, "length", lambda *_, **__: next(lengths))
    seen = drive(here(server), model)
    assert seen.end.cause is Cause.WRONG_LENGTH
    assert next(lengths) == MB + 12, "once of the layer, and of the config"


@pytest.mark.usefixtures("store")
def test_a_layer_that_never_fits_and_has_another_length_each_time_ends_it(
    server: Server, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add(registry, server, MB)
    lengths = iter(range(1 << 45, 0, -1))
    monkeypatch.setattr(questions, "length", lambda *_, **__: next(lengths))
    huge = model.manifest.replace(b"%d" % MB, b"%d" % ((1 << 45) + 1))
    registry.set_manifests("library/demo", "1b", [huge])
    seen = drive(here(server), model)
    assert seen.end.cause in (Cause.DISK_FULL, Cause.FILE_TOO_LARGE)
    assert next(lengths) == (1 << 45) - 1


def test_a_tag_that_moves_meanwhile_is_counted_once(
    server: Server, registry: Registry, store: Path
) -> None:
    old = add(registry, server, MB)
    moved = registry.add_model("moved", "1b", [Layer(2 * MB)], extras=False)
    registry.set_manifests("library/demo", "1b", [old.manifest, *[moved.manifest] * 5])
    seen = drive(here(server), old)
    assert seen.end.cause is None
    assert seen.updates[-1].record.total_bytes == sum(manifests.sizes(moved.manifest).values())


def test_a_server_that_never_ends_its_start_is_waited_for_a_while(
    server: Server, registry: Registry, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publication, "_START_SECONDS", 0.2)
    model = add(registry, server, MB)
    words = ("ollama", "-c", "read line", "serve")
    env = {"OLLAMA_MODELS": str(store), "OLLAMA_HOST": "127.0.0.1:1"}
    given_up_at = time.monotonic() + 120
    with subprocess.Popen(words, executable="/bin/sh", stdin=subprocess.PIPE, env=env) as starting:
        try:
            where = here(server)
            seen = drive(where, model, cancelled=lambda: time.monotonic() > given_up_at)
        finally:
            starting.kill()
    assert any("waiting for its start to end" in each for each in seen.notes)
    assert seen.end.cause is None
    assert arrived(server, model)


def test_a_tag_that_moves_after_a_wrong_size_was_corrected(
    server: Server, registry: Registry, store: Path
) -> None:
    old = add(registry, server, MB)
    wrong = old.manifest.replace(b"%d" % MB, b"%d" % (MB + 1))
    assert wrong != old.manifest
    moved = registry.add_model("moved", "1b", [Layer(2 * MB)], extras=False)
    registry.set_manifests("library/demo", "1b", [wrong, wrong, *[moved.manifest] * 5])
    seen = drive(here(server), old)
    assert seen.end.cause is None, seen.end
    assert seen.updates[-1].record.total_bytes == sum(manifests.sizes(moved.manifest).values())


@pytest.mark.parametrize("status", [404, 410])
def test_a_layer_that_another_host_lacks_ends_the_pull(
    server: Server, registry: Registry, store: Path, status: int
) -> None:
    model = add(registry, server, MB)
    registry.add_fault(Fault("page", status=status))
    seen = drive(here(server), model)
    assert seen.end.cause is Cause.NO_LAYER
    told = [each for each in seen.notes if f" answers {status}" in each]
    assert told
    assert not any("attempt 4 of" in each for each in told), "a layer is asked for three times"


def test_a_wait_for_room_has_no_last_attempt(
    server: Server, registry: Registry, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add(registry, server, MB)
    full = iter((1, 1, 1))
    free = store_of_transfers.Store.free
    monkeypatch.setattr(
        store_of_transfers.Store, "free", lambda self: free(self) if not next(full, 0) else 0
    )
    seen = drive(here(server), model)
    assert arrived(server, model)
    told = [each for each in seen.notes if "waiting for room on the disk" in each]
    assert "MB more are needed" in told[0]
    assert not any(" of " in each for each in told)


@pytest.mark.usefixtures("store")
def test_a_disk_without_inodes_is_not_called_full(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store_of_transfers.opened(str(server.store)) as opened:
        for files, reason in (9, "the disk has no inodes left"), (0, "the disk is full"):
            found = SimpleNamespace(f_files=files, f_favail=0)
            monkeypatch.setattr(os, "fstatvfs", lambda _, found=found: found)
            assert opened.why_full() == reason


def test_a_server_that_is_not_seen_is_not_claimed() -> None:
    seen = cast(Download, SimpleNamespace(digest="a" * 64, writers=()))
    assert by_transfer._why_waiting(seen).endswith("and an unseen server may use it")


def arrived_at_all(server: Server, model: Model) -> bool:
    return blob(server.store, model.digests[0]).exists()


# ---------------------------------------------------------------- the server's own


def killed_half_way(server: Server, registry: Registry, model: Model) -> int:
    """A server's pull, killed at more than half; the bytes that the registry had sent."""
    registry.throttle(24 * MB)
    server.start().wait_ready()
    pull = server.start_pull(model.name)
    wait_until(lambda: pull.completed > SIZE // 2, "half of it")
    server.kill()
    pull.close()
    registry.throttle(None)
    return served(registry, model)


def test_a_download_of_a_killed_server_is_taken_over(server: Server, registry: Registry) -> None:
    model = add(registry, server, SIZE)
    before = killed_half_way(server, registry, model)
    seen = drive(here(server), model)
    assert seen.end.cause is None
    assert arrived(server, model)
    assert any("Took over" in each for each in seen.notes)
    assert served(registry, model) - before < SIZE // 2 + 2 * MB


def room_for_the_rest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a copy of what the server has left, besides."""

    def all_but_that(room: os.statvfs_result) -> int:
        return room.f_bavail * room.f_frsize - 3 * SIZE // 4

    monkeypatch.setattr(kept_transfers, "reserve", all_but_that)


def data_of(server: Server, model: Model) -> Path:
    return blob(server.store, model.digests[0], "-partial")


def test_without_room_for_a_copy_it_is_renamed(
    server: Server, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add(registry, server, SIZE)
    sent = killed_half_way(server, registry, model)
    inode = data_of(server, model).stat().st_ino
    room_for_the_rest_alone(monkeypatch)
    seen = drive(here(server), model)
    assert seen.end.cause is None, seen.end
    assert arrived(server, model)
    assert blob(server.store, model.digests[0]).stat().st_ino == inode
    assert served(registry, model) - sent < SIZE // 2 + 2 * MB


def test_what_can_not_be_renamed_is_copied(server: Server, registry: Registry) -> None:
    model = add(registry, server, SIZE)
    sent = killed_half_way(server, registry, model)
    os.link(data_of(server, model), server.store / "another")
    seen = drive(here(server), model)
    assert seen.end.cause is None, seen.end
    assert arrived(server, model)
    assert (server.store / "another").stat().st_size == SIZE
    assert served(registry, model) - sent < SIZE // 2 + 2 * MB


def test_beside_bytes_of_ours_it_is_copied_and_no_other_way_is_tried(
    server: Server, registry: Registry
) -> None:
    model = add(registry, server, SIZE)
    sent = killed_half_way(server, registry, model)
    digest = model.digests[0].removeprefix("sha256:")
    content = registry.content(model.digests[0]).read(0, SIZE)
    transfers.lay_out(server.store, digest, content, ((SIZE - MB, SIZE),))
    seen = drive(here(server), model)
    assert seen.end.cause is None, seen.end
    assert arrived(server, model)
    assert served(registry, model) - sent < SIZE // 2 + MB
    log = event_log.Log(str(server.store), event_log.ALL)
    lines = [event_log.parse(each.line) for each in log.read(to_the_end=True)]
    assert "take_over" not in [each.details.get("verb") for each in lines if each]


def test_what_time_does_not_help_against_ends_it_with_what_does(
    server: Server, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add(registry, server, SIZE)
    killed_half_way(server, registry, model)
    os.link(data_of(server, model), server.store / "another")
    room_for_the_rest_alone(monkeypatch)
    seen = drive(here(server), model)
    assert seen.end.cause is Cause.DISK_FULL
    assert "another name" in seen.end.text
    assert "let the server continue" in seen.end.step
    assert Cause.DISK_FULL is of_error(seen.end.text), "as a record has it"


def test_without_room_for_a_copy_it_waits_until_it_may_be_renamed(
    server: Server, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server runs again, and nobody goes on with it."""
    model = add(registry, server, SIZE)
    sent = killed_half_way(server, registry, model)
    server.start().wait_ready()
    room_for_the_rest_alone(monkeypatch)

    def look(update: Update) -> None:
        if update.waiting is not None:
            for path in server.store.glob("blobs/*-partial*"):
                age(path, 200)

    seen = drive(here(server), model, on_update=look)
    assert seen.end.cause is None, seen.end
    assert arrived(server, model)
    assert served(registry, model) - sent < SIZE // 2 + 2 * MB
    (wait,) = {each.waiting for each in seen.updates if each.waiting is not None}
    assert wait is not None
    assert (wait.awaited, wait.attempt) == ("the server's download", 1)
    assert 60 < (wait.until or 0) - time.time() <= 90
    (told,) = [each for each in seen.notes if "no room for a copy" in each]
    assert "waiting for the server's download: attempt 1 of 8 in " in told


def test_a_wait_to_take_over_can_be_stopped_and_changes_no_byte(
    server: Server, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add(registry, server, SIZE)
    killed_half_way(server, registry, model)
    kept = data_of(server, model).read_bytes()
    server.start().wait_ready()
    room_for_the_rest_alone(monkeypatch)
    stop = threading.Event()

    def look(update: Update) -> None:
        if update.waiting is not None:
            stop.set()

    seen = drive(here(server), model, cancelled=stop.is_set, on_update=look)
    assert seen.end.cause is Cause.INTERRUPTED
    assert data_of(server, model).read_bytes() == kept


def test_without_room_for_a_copy_it_waits_for_who_reads_it(
    server: Server, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup, say. It is not written to while somebody has it open."""
    model = add(registry, server, SIZE)
    killed_half_way(server, registry, model)
    room_for_the_rest_alone(monkeypatch)
    with contextlib.ExitStack() as reading:
        reading.enter_context(holding(data_of(server, model)))

        def look(update: Update) -> None:
            if update.waiting is not None:
                assert "has sha256-" in update.waiting.why
                reading.close()

        seen = drive(here(server), model, on_update=look)
    assert any(each.waiting for each in seen.updates)
    assert seen.end.cause is None, seen.end
    assert arrived(server, model)


def test_a_take_over_that_was_killed_is_finished_before_anything_is_fetched(
    server: Server, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add(registry, server, SIZE)
    sent = killed_half_way(server, registry, model)
    real = fs.replace

    def fails(name: str, *words: int) -> None:
        if name == "ledger":
            raise KeyboardInterrupt
        real(name, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(fs, "replace", fails)
    with pytest.raises(KeyboardInterrupt):
        drive(here(server), model)
    monkeypatch.setattr(fs, "replace", real)
    seen = drive(here(server), model)
    assert seen.end.cause is None, seen.end
    assert arrived(server, model)
    assert served(registry, model) - sent < SIZE // 2 + 2 * MB


def test_wrong_bytes_of_the_servers_are_fetched_anew(server: Server, registry: Registry) -> None:
    model = add(registry, server, SIZE)
    killed_half_way(server, registry, model)
    with data_of(server, model).open("r+b") as file:
        for at in range(MB, 10 * MB, MB):  # some of it is doubted anyway
            file.seek(at)
            file.write(b"<html>")
    seen = drive(here(server), model)
    assert seen.end.cause is None, seen.end
    assert any("from the server's download must be downloaded again" in each for each in seen.notes)
    assert arrived(server, model)


def test_a_live_pull_is_waited_for(server: Server, registry: Registry) -> None:
    model = add(registry, server, SIZE)
    registry.throttle(12 * MB)
    server.start().wait_ready()
    pull = server.start_pull(model.name)
    wait_until(lambda: pull.completed > MB, "some of it")
    seen = drive(here(server), model)
    assert seen.end.cause is None
    waits = [each for each in seen.updates if each.waiting is not None]
    assert "is downloading sha256-" in waits[0].waiting.why  # type: ignore[union-attr]
    assert any("waiting for it since " in each for each in seen.notes)
    pull.result()
    assert arrived(server, model)
    assert served(registry, model) <= SIZE + OVERHEAD


def test_a_live_pull_of_a_server_that_dies_is_taken_over(
    server: Server, registry: Registry
) -> None:
    model = add(registry, server, SIZE)
    registry.throttle(12 * MB)
    server.start().wait_ready()
    pull = server.start_pull(model.name)
    wait_until(lambda: pull.completed > SIZE // 3, "some of it")

    def look(update: Update) -> None:
        if update.waiting is not None:
            server.stop()
            registry.throttle(None)

    seen = drive(here(server), model, on_update=look)
    pull.close()
    assert seen.end.cause is None
    assert arrived(server, model)


def test_without_waiting_both_fetch_it(server: Server, registry: Registry) -> None:
    model = add(registry, server, SIZE)
    registry.throttle(24 * MB)
    server.start().wait_ready()
    pull = server.start_pull(model.name)
    wait_until(lambda: pull.completed > MB, "some of it")
    seen = drive(here(server), model, dataclasses.replace(OPTIONS, wait=False))
    assert seen.end.cause is None
    assert not any("waiting for it since" in each for each in seen.notes)
    pull.result()
    assert arrived(server, model)


# ---------------------------------------------------------------- what no retry cures


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("status", "cause"),
    [(404, Cause.NO_MODEL), (412, Cause.OLD_SERVER), (401, Cause.NO_PERMISSION)],
)
def test_what_no_retry_cures_ends_at_once(
    server: Server, registry: Registry, status: int, cause: Cause
) -> None:
    model = add(registry, server, SIZE)
    registry.add_fault(Fault("page", "manifest", status=status))
    seen = drive(here(server), model, dataclasses.replace(OPTIONS, until_done=True))
    assert seen.end.cause is cause
    assert served(registry, model) == 0


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("host", ["host:port", "host:80:90", "host:99999"])
def test_a_name_with_a_port_that_is_none(server: Server, host: str) -> None:
    model = Model(f"{host}/library/demo:1b", b"", (), "")
    seen = drive(here(server), model)
    assert seen.end.cause is Cause.BAD_ADDRESS
    assert host in seen.end.text


@pytest.mark.usefixtures("store")
def test_a_page_in_place_of_the_manifest(server: Server, registry: Registry) -> None:
    model = add(registry, server, SIZE)
    registry.add_fault(Fault("page", "manifest", status=200))
    seen = drive(here(server), model)
    assert seen.end.cause is Cause.PORTAL


# ---------------------------------------------------------------- what is kept of it


@pytest.mark.usefixtures("store")
def test_nothing_that_it_has_hashed_is_hashed_again(server: Server, registry: Registry) -> None:
    model = add(registry, server, SIZE)
    drive(here(server), model)
    host = Host(str(server.store))
    seen = Reconciler(host, POLICY.settings).inspect(modes.VERIFY, Scope(None))
    asked = [each for each in seen.plan.actions if each.kind is ActionKind.HASH]
    assert asked == []
    assert seen.evidence.census.hashed == 2


@pytest.mark.usefixtures("store")
def test_events_of_a_pull_of_ours_name_the_transfer(server: Server, registry: Registry) -> None:
    model = add(registry, server, SIZE)
    drive(here(server), model)
    log = event_log.Log(str(server.store), event_log.ALL)
    lines = [event_log.parse(each.line) for each in log.read(to_the_end=True)]
    told = {each.event_type: each.details["by"] for each in lines if each and "by" in each.details}
    assert told == {
        "download_started": "transfer",
        "download_completed": "transfer",
        "pull_completed": "transfer",
    }


@pytest.mark.usefixtures("store")
def test_a_damaged_blob_is_replaced(server: Server, registry: Registry) -> None:
    model = add(registry, server, SIZE)
    drive(here(server), model)
    path = blob(server.store, model.digests[0])
    os.truncate(path, SIZE - 1)
    seen = drive(here(server), model)
    assert seen.end.cause is None
    assert arrived(server, model)


# ---------------------------------------------------------------- the choice


def choose(server: Server, name: str = "demo:1b", **more: object) -> str:
    target = dataclasses.replace(here(server), **more)  # type: ignore[arg-type]
    return driver.why_server(target, names.to_model(name))


@pytest.mark.usefixtures("store")
def test_ours_is_chosen_wherever_it_can_be(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(server) == ""
    assert choose(server, "gpt-oss:120b-cloud") == "it runs in the cloud"
    assert choose(server, host=None, why="it is elsewhere") == "it is elsewhere"

    def lacking(_: str) -> None:
        raise ImportError("No module named 'pycurl'")

    monkeypatch.setattr(driver.importlib, "import_module", lacking)  # type: ignore[attr-defined]
    assert choose(server) == "pycurl can't be loaded (No module named 'pycurl'): pip install pycurl"


def test_blobs_on_another_file_system_are_the_servers(server: Server, tmp_path: Path) -> None:
    server.store.mkdir()
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system here")
    with tempfile.TemporaryDirectory(dir=shm) as elsewhere:
        (server.store / "blobs").symlink_to(elsewhere)
        reason = choose(server)
    assert reason == "blobs/ is on another file system than the store"


@pytest.mark.usefixtures("store")
def test_a_registry_that_wants_a_token(server: Server, registry: Registry) -> None:
    registry.manners = Manners(wants="bearer")
    model = add(registry, server, SIZE)
    seen = drive(here(server), model)
    assert seen.end.cause is None
    assert arrived(server, model)

"""The power fails: whatever is claimed on the disk then is there, or is looked through first."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SERVERS
from tests.support.driving import Daemon, HealthyStore, command, environment, is_right, run
from tests.support.runs import one_run, rules
from tests.support.servers import (
    EngineServer,
    Server,
    blob,
    collapsed,
    sidecar,
    wait_until,
    wait_written,
)
from watcher.act import durability, transaction
from watcher.commands import prepare
from watcher.commands.context import Context
from watcher.demo.registry import Content, Layer, Model, Registry
from watcher.model import MIB, ActionKind, Condition, Entry, Mode, Ranges, Result
from watcher.observe import evidence, scan
from watcher.ollama import names, ranges, sidecars
from watcher.state import fs, memory
from watcher.state.hashes import Hashed, Hashes
from watcher.state.memory import Memory, Remembered

from .power import Disk, Machine

MB = 1_000_000
SIZE = 62 * MB
PART = 20 * MB
#: How far each of the parts has come; `whole` is all of it.
COME = (PART, 15 * MB, 14 * MB, 0)
REPAIR = rules(repair=True, repair_stale=True, hash=True, writers_visible=True)
#: What the daemon, `prepare` and `pull` do.
AHEAD = rules(repair=True, writers_visible=True, sync_behind=True)
TAKE = rules(repair=False, take_over=True, writers_visible=True)


class Scene:
    """A download that a server has just written, and that is in memory alone."""

    def __init__(self, disk: Disk, registry: Registry, *, layout: str, whole: bool) -> None:
        self.disk, self.registry = disk, registry
        self.model: Model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
        self.digest = self.model.digests[0]
        self.content: Content = registry.content(self.digest)
        self.store = disk.path / "models"
        (self.store / "blobs").mkdir(parents=True)
        (self.store / "manifests").mkdir()
        data = blob(self.store, self.digest, "-partial")
        starts = range(0, SIZE, PART)
        for number, start in enumerate(starts):
            text = sidecar(number, start, min(PART, SIZE - start), 0)
            blob(self.store, self.digest, f"-partial-{number}").write_text(text)
        with data.open("wb") as file:
            if layout == "zeros":  # a file system that lays out before it writes
                file.write(bytes(SIZE))
            file.truncate(SIZE)
        disk.keep_all()
        with data.open("r+b") as file:
            for start, come in zip(starts, COME, strict=True):
                end = min(SIZE, start + (PART if whole else come))
                file.seek(start)
                file.writelines(self.content.slices(start, end))

    def claims(self, store: Path) -> Ranges:
        """What the sidecars claim."""
        found = blob(store, self.digest).parent.glob(f"{blob(store, self.digest).name}-partial-*")
        return sidecars.claims([sidecars.parse(path.read_bytes()) for path in found])

    def false(self, store: Path) -> int:
        """Claimed bytes that the data does not have, to a MiB."""
        wrong = 0
        with blob(store, self.digest, "-partial").open("rb") as file:
            for start, end in self.claims(store):
                for low in range(start, end, MIB):
                    high = min(low + MIB, end)
                    here = os.pread(file.fileno(), high - low, low)
                    wrong += (high - low) * (here != self.content.read(low, high))
        return wrong

    def pull(self, store: Path) -> int:
        """Pull it to its end; the bytes that took."""
        before = self.registry.bytes_served(self.digest)
        with EngineServer(store) as server:
            server.start().wait_ready()
            assert collapsed(server.pull(self.model.name))[-1] == "success"
        assert is_right(store, self.digest)
        return self.registry.bytes_served(self.digest) - before


def remembered(store: Path) -> Memory:
    """What is remembered on the disk."""
    with fs.opened_folder(str(store)) as fd:
        return memory.load(fd)


def notes(store: Path) -> list[str]:
    """The notes about claims ahead of their data."""
    return [each.unsynced for each in remembered(store).downloads.values() if each.unsynced]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with Disk(tmp_path / "disk") as made:
        yield made


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "proc")


@pytest.fixture(params=["holes", "zeros"])
def killed(request: pytest.FixtureRequest, disk: Disk, registry: Registry) -> Scene:
    return Scene(disk, registry, layout=request.param, whole=False)


@pytest.fixture(params=["holes", "zeros"])
def whole(request: pytest.FixtureRequest, disk: Disk, registry: Registry) -> Scene:
    return Scene(disk, registry, layout=request.param, whole=True)


def test_a_power_cut_takes_what_nobody_has_written_back(killed: Scene) -> None:
    """Else nothing here would show anything."""
    with killed.disk.power_cut() as after:
        data = blob(after.path / "models", killed.digest, "-partial").read_bytes()
        assert not data.strip(b"\0")


def test_what_repair_claims_is_on_the_disk(killed: Scene) -> None:
    done = run(killed.store, "repair", "--yes")
    assert done.returncode == 0, done.stderr
    with killed.disk.power_cut() as after:
        store = after.path / "models"
        assert ranges.size(killed.claims(store)) > sum(COME) - 5 * MIB
        assert killed.false(store) == 0
        # A server that starts first believes them, and is right.
        assert killed.pull(store) < SIZE - sum(COME) + 12 * MIB


@pytest.mark.parametrize("kind", SERVERS)
def test_a_killed_server_goes_on_after_a_power_cut(
    kind: type[Server], disk: Disk, registry: Registry
) -> None:
    """It starts first, and pulls: before a command of ours has seen what the power cut has left."""
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    digest = model.digests[0]
    store = disk.path / "models"
    with kind(store) as server:
        server.start().wait_ready()
        registry.hold(digest, after=15 * MB)
        with contextlib.closing(server.start_pull(model.name)):
            registry.wait_held(digest, 1)
            wait_written(blob(store, digest, "-partial"), [15 * MB])
            server.kill()
    registry.release()
    assert run(store, "repair", "--yes").returncode == 0
    with disk.power_cut() as after, kind(after.path / "models") as server:
        before = registry.bytes_served(digest)
        server.start().wait_ready()
        assert collapsed(server.pull(model.name))[-1] == "success"
        assert is_right(after.path / "models", digest)
        assert registry.bytes_served(digest) - before < SIZE - 10 * MB


def test_what_repair_claims_of_a_whole_download_is_on_the_disk(whole: Scene) -> None:
    assert run(whole.store, "repair", "--yes").returncode == 0
    with whole.disk.power_cut() as after:
        store = after.path / "models"
        assert whole.claims(store) == ((0, SIZE),)
        assert whole.false(store) == 0
        assert whole.pull(store) == 0


def test_claims_ahead_of_their_data_are_looked_through_at_the_next_start(
    killed: Scene, machine: Machine
) -> None:
    assert_looked_through(killed, machine)


def test_claims_ahead_of_a_whole_download_are_looked_through_at_the_next_start(
    whole: Scene, machine: Machine
) -> None:
    assert_looked_through(whole, machine)


def assert_looked_through(it: Scene, machine: Machine) -> None:
    machine.act(it.store, AHEAD)
    assert len(notes(it.store)) == 1
    with it.disk.power_cut() as after:
        store = after.path / "models"
        assert it.false(store) > 40 * MB, "the claims are there, the data is not"
        machine.restart()
        before = it.claims(store)
        # A look that may not read much reads this.
        little = rules(repair=False, writers_visible=True, read_limit_bytes=1)
        (diagnosed,) = machine.act(store, little).diagnosis.diagnosed
        assert diagnosed.condition in (Condition.HOLLOW, Condition.WHOLE)
        assert not diagnosed.download.trust.trusted
        assert it.claims(store) == before
        machine.act(store, AHEAD)
        assert it.false(store) == 0
        durability.sync_noted(machine.host(store), AHEAD.settings)
        assert notes(store) == []
        it.pull(store)


def test_prepare_reads_what_an_earlier_start_has_claimed(killed: Scene, machine: Machine) -> None:
    """The note is of another start than this machine's own."""
    machine.act(killed.store, AHEAD)
    with killed.disk.power_cut() as after:
        store = after.path / "models"
        assert run(store, "prepare").returncode == 0
        assert killed.false(store) == 0
        assert notes(store) == []
        killed.pull(store)


def test_what_there_is_no_time_to_read_stays_doubted_and_is_named(
    disk: Disk,
    registry: Registry,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Holes are seen without being read; blocks that were laid out and not written are not."""
    killed = Scene(disk, registry, layout="zeros", whole=False)
    machine.act(killed.store, AHEAD)
    with killed.disk.power_cut() as after:
        store = after.path / "models"
        before, noted = killed.claims(store), notes(store)
        given = Context(rules(writers_visible=True).settings, stores=(str(store),))
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "_PREPARE_READS_SECONDS", 0.0)
            assert prepare.prepare.callback(given) == 0
        told = capsys.readouterr().err
        assert names.short(killed.digest[7:]) in told
        assert f"--store {store} repair {names.short(killed.digest[7:])}" in told
        assert (killed.claims(store), notes(store)) == (before, noted)
        assert prepare.prepare.callback(given) == 0
        assert "not read" not in capsys.readouterr().err
        assert (killed.false(store), notes(store)) == (0, [])


def test_the_reading_for_zeros_ends_in_the_middle_of_a_file(
    disk: Disk, registry: Registry, machine: Machine
) -> None:
    killed = Scene(disk, registry, layout="zeros", whole=False)
    machine.act(killed.store, AHEAD)
    killed.disk.keep_all()
    machine.restart()
    asked = itertools.count()
    host = replace(machine.host(killed.store), uptime=lambda: float(next(asked)), reads_until=9.0)
    (diagnosed,) = one_run(host, AHEAD).diagnosis.diagnosed
    assert not diagnosed.download.trust.zeros_read
    assert len(notes(killed.store)) == 1
    machine.act(killed.store, AHEAD)
    assert notes(killed.store) == []


def test_the_most_valuable_claims_are_read_first() -> None:
    claimed = {"a": 0, "b": 1, "c": 5, "d": 9, "e": 7}
    known = {
        key: Remembered(
            device=1,
            inode=1,
            born_ns=0,
            condition=Condition.PAUSED,
            stale=False,
            pulling=False,
            total=10,
            claimed=size,
            allocated=size,
            progress_at=0.0,
            unsynced="" if key == "a" else "another",
        )
        for key, size in claimed.items()
    }
    known["d"] = replace(known["d"], unsynced="this")
    pieces = {key: scan.Pieces() for key in claimed}
    found = evidence._doubted_first(pieces, Memory(downloads=known), "this")
    assert "".join(found) == "ecbad"


def test_a_server_that_starts_first_finds_the_note_still_there(
    killed: Scene, machine: Machine
) -> None:
    machine.act(killed.store, AHEAD)
    with killed.disk.power_cut() as after:
        store = after.path / "models"
        machine.restart()
        with EngineServer(store) as server:
            server.start().wait_ready()
        machine.act(store, AHEAD)
        assert killed.false(store) == 0
        killed.pull(store)


def test_data_synced_after_its_claims_is_on_the_disk_and_the_note_is_removed(
    killed: Scene, machine: Machine
) -> None:
    machine.act(killed.store, AHEAD)
    assert durability.sync_noted(machine.host(killed.store), AHEAD.settings) == frozenset()
    assert notes(killed.store) == []
    with killed.disk.power_cut() as after:
        store = after.path / "models"
        assert killed.false(store) == 0
        assert ranges.size(killed.claims(store)) > sum(COME) - 5 * MIB
        machine.restart()
        (diagnosed,) = machine.act(store, AHEAD).diagnosis.diagnosed
        assert diagnosed.condition is Condition.PAUSED


@pytest.mark.parametrize("words", [("prepare",), ("repair", "--yes")])
def test_who_has_time_left_finishes_what_others_have_claimed(
    words: tuple[str, ...], disk: Disk, registry: Registry, tmp_path: Path
) -> None:
    """The note is that of this machine's start: a command of this machine takes it back."""
    killed = Scene(disk, registry, layout="holes", whole=False)
    this = Machine(tmp_path / "this")
    (tmp_path / "this/sys/kernel/random/boot_id").write_text(
        Path("/proc/sys/kernel/random/boot_id").read_text()
    )
    this.act(killed.store, AHEAD)
    assert len(notes(killed.store)) == 1
    assert run(killed.store, *words).returncode == 0
    assert notes(killed.store) == []
    with killed.disk.power_cut() as after:
        assert killed.false(after.path / "models") == 0


def test_prepare_brings_to_the_disk_what_it_claims(killed: Scene) -> None:
    assert run(killed.store, "prepare").returncode == 0
    with killed.disk.power_cut() as after:
        store = after.path / "models"
        assert ranges.size(killed.claims(store)) > sum(COME) - 5 * MIB
        assert killed.false(store) == 0
        assert notes(store) == []


def test_the_daemon_brings_to_the_disk_what_it_claims(killed: Scene) -> None:
    with Daemon(killed.store, {"OLLAMA_WATCH_REPAIR": "true"}) as daemon:
        daemon.wait_event("download_repaired")
        wait_until(lambda: not notes(killed.store), "the note to go")
        with killed.disk.power_cut() as after:
            store = after.path / "models"
            assert ranges.size(killed.claims(store)) > sum(COME) - 5 * MIB
            assert killed.false(store) == 0


# ---------------------------------------------------------------- what something stays for


class Fresh:
    """A store with a blob that was just written over zeros, and is known to be right."""

    def __init__(self, disk: Disk, machine: Machine) -> None:
        self.disk, self.machine = disk, machine
        self.store = HealthyStore(disk.path / "models")
        self.text = b"right " * 3 * MIB
        self.name = f"sha256-{hashlib.sha256(self.text).hexdigest()}"
        with (self.store.blobs / self.name).open("wb") as file:
            file.write(bytes(len(self.text)))
            file.flush()
            self.store.manifest_of("demo", self.name[7:])
            disk.keep_all()
            file.seek(0)
            file.write(self.text)

    def know(self, models: Path, boot: str) -> None:
        """Remember the right hash, found in that start of the machine.

        To hash it here would have it written: what was read is given back to the system.
        """
        found = (models / "blobs" / self.name).stat()
        hashed = Hashed(found.st_ino, found.st_size, found.st_ctime_ns, self.name[7:], boot)
        with fs.opened_folder(str(models)) as fd:
            memory.save(fd, Memory(hashes=Hashes({self.name: hashed})))

    def assert_kept(self) -> None:
        """The disk has it."""
        with self.disk.power_cut() as after:
            assert (after.path / "models/blobs" / self.name).read_bytes() == self.text


def test_nothing_goes_for_a_blob_that_is_not_on_the_disk(disk: Disk, machine: Machine) -> None:
    """A corrupt blob was put aside; its replacement was found right, and lets it go."""
    it = Fresh(disk, machine)
    kept = it.store.ours / "quarantine"
    kept.mkdir(parents=True)
    (kept / f"00000001-{it.name}").write_bytes(b"wrong")
    it.know(it.store.path, machine.boot)
    purge = rules(repair=False, purge_replaced=True, writers_visible=True)
    (done,) = machine.act(it.store.path, purge).outcomes
    assert (done.action.kind, done.result) == (ActionKind.PURGE, Result.DONE)
    it.assert_kept()


@pytest.mark.parametrize("renames", [True, False])
def test_a_restored_file_is_always_in_quarantine_or_in_blobs(
    disk: Disk, machine: Machine, monkeypatch: pytest.MonkeyPatch, renames: bool
) -> None:
    """Cut before and after each call of `quarantine restore`."""
    store = HealthyStore(disk.path / "models")
    name = f"sha256-{store.digest('kept')}"
    kept = store.ours / "quarantine"
    kept.mkdir(parents=True)
    (kept / f"00000001-{name}").write_bytes(b"kept " * MIB)
    machine.act(store.path, rules(repair=False))  # it makes the rest of our folder
    disk.keep_all()
    places: list[tuple[bool, bool]] = []

    def cut() -> None:
        with disk.power_cut() as after:
            models = after.path / "models"
            both = models / "blobs" / name, models / f".ollama-watch/quarantine/00000001-{name}"
            assert {each.read_bytes() == b"kept " * MIB for each in both if each.exists()} == {True}
            places.append((both[0].exists(), both[1].exists()))

    within = [False]

    def cut_around(call: str) -> None:
        usual = getattr(os, call)

        def around(*given: Any, **more: Any) -> Any:
            if not within[0]:
                return usual(*given, **more)
            within[0] = False
            cut()
            answer = usual(*given, **more)
            cut()
            within[0] = True
            return answer

        monkeypatch.setattr(os, call, around)

    if not renames:
        monkeypatch.setattr(fs, "_renameat2", None)
    for call in ("link", "unlink", "fsync"):
        cut_around(call)
    usual = transaction.leave_quarantine

    def leave(*given: Any, **more: Any) -> None:
        within[0] = True
        usual(*given, **more)
        within[0] = False

    monkeypatch.setattr(transaction, "leave_quarantine", leave)
    policy = rules(repair=False, restore=frozenset({f"00000001-{name}"}), writers_visible=True)
    (done,) = machine.act(store.path, policy).outcomes
    monkeypatch.undo()
    assert (done.action.kind, done.result) == (ActionKind.RESTORE, Result.DONE)
    assert len(places) > 1
    cut()
    assert places[-1] == (True, False), "it is back in its place, on the disk"


def test_a_trusted_byte_is_always_the_servers_or_ours(
    killed: Scene, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut before each call of a take-over; the next run puts it back, or finishes it."""
    machine.act(killed.store, rules(repair=False))  # it makes our folder
    sides: list[str] = []

    def cut() -> None:
        with killed.disk.power_cut() as after:
            store = after.path / "models"
            machine.restart()
            report = machine.act(store, TAKE._replace(mode=Mode()))
            (found,) = (each.download for each in report.diagnosis.diagnosed)
            sides.append("ours" if found.ours else "server's")
            assert ranges.size(found.trust.trusted) > sum(COME) - 5 * MIB, sides
            with (store / found.paths[0]).open("rb") as file:
                for start, end in found.trust.trusted:
                    here = os.pread(file.fileno(), end - start, start)
                    assert here == killed.content.read(start, end), sides

    within = [False]

    def cut_before(call: str) -> None:
        usual = getattr(os, call)

        def before(*given: Any, **more: Any) -> Any:
            if within[0]:
                within[0] = False
                cut()
                within[0] = True
            return usual(*given, **more)

        monkeypatch.setattr(os, call, before)

    for call in ("rename", "fsync"):
        cut_before(call)
    commit = transaction.commit_all

    def committed(*given: Any, **more: Any) -> Any:
        within[0] = True
        answers = commit(*given, **more)
        within[0] = False
        return answers

    monkeypatch.setattr(transaction, "commit_all", committed)
    (done,) = machine.act(killed.store, TAKE).outcomes
    monkeypatch.undo()
    assert (done.action.kind, done.result) == (ActionKind.TAKE_OVER, Result.DONE)
    cut()
    assert sides == sorted(sides, reverse=True)
    assert {*sides} == {"ours", "server's"}


def test_partial_data_stays_until_its_blob_is_on_the_disk(disk: Disk, machine: Machine) -> None:
    it = Fresh(disk, machine)
    partial = it.store.file(f"{it.name}-partial", "some".ljust(len(it.text), "\0"))
    it.know(it.store.path, machine.boot)
    report = machine.act(it.store.path, REPAIR)
    assert [each.action.kind for each in report.outcomes] == [ActionKind.REMOVE_DOWNLOAD]
    assert not partial.exists()
    it.assert_kept()


def test_a_hash_of_what_was_in_memory_alone_does_not_outlive_the_machine(
    disk: Disk, machine: Machine
) -> None:
    it = Fresh(disk, machine)
    it.know(it.store.path, machine.boot)
    assert it.name not in hashed_by(machine, it.store.path), "in this start it is known"
    with disk.power_cut() as after:
        models = after.path / "models"
        before = machine.boot
        machine.restart()
        it.know(models, before)  # it has come through, and so have the blob's times
        assert it.name in hashed_by(machine, models)
        assert it.name not in hashed_by(machine, models), "what is wrong stays known"
        machine.restart()
        assert it.name not in hashed_by(machine, models)
        odd = machine.act(models, VERIFY).evidence.census.odd
        assert it.name[7:] in {each.digest for each in odd}


def test_a_blob_from_before_the_machine_started_is_hashed_once(
    disk: Disk, machine: Machine
) -> None:
    it = Fresh(disk, machine)
    (Path(machine.proc) / "stat").unlink()
    (Path(machine.proc) / "stat").write_text(f"btime {time.time() + 1:.0f}\n")
    assert it.name in hashed_by(machine, it.store.path)
    machine.restart()
    assert it.name not in hashed_by(machine, it.store.path)


VERIFY = rules(repair=False, hash=True, verify=True, writers_visible=True)


def hashed_by(machine: Machine, models: Path) -> set[str]:
    """The files that `verify` reads."""
    return {each.action.expects[0].name for each in machine.act(models, VERIFY).outcomes}


# ---------------------------------------------------------------- a disk that refuses


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is missing")
def test_bytes_that_the_disk_refuses_are_not_claimed(registry: Registry, disk: Disk) -> None:
    it = Scene(disk, registry, layout="holes", whole=False)
    before = ranges.size(it.claims(it.store))
    assert before == 0
    inject = ["-e", "trace=sync_file_range", "-e", "inject=sync_file_range:error=EIO:when=2"]
    done = subprocess.run(
        ["strace", "-f", "-o", "/dev/null", *inject, *command(it.store, "repair", "--yes")],
        env=environment(it.store),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    claims = it.claims(it.store)
    # The first slice begins behind the MiB in which an attempt may have left an error page.
    refused = ((MIB + durability.SLICE, PART),)
    assert not ranges.intersection(claims, refused)
    assert ranges.size(claims) > 20 * MB
    told = [each for each in HealthyStore.at(it.store).events() if each["event_type"] == "error"]
    assert [each["details"]["refused_bytes"] for each in told] == [PART - MIB - durability.SLICE]
    # Nor later, when the disk says nothing any more and memory still shows it.
    assert run(it.store, "repair", "--yes").returncode == 0
    assert not ranges.intersection(it.claims(it.store), refused)
    assert run(it.store, "repair", "--yes").stdout == "nothing to repair\n"
    it.pull(it.store)


def entry_of(path: Path) -> Entry:
    with fs.opened_folder(str(path.parent)) as folder:
        found = scan.look(path.name, folder)
        assert found is not None
        return found


def write_back(path: Path, stop: Callable[[], bool]) -> durability.Written:
    with fs.opened_folder(str(path.parent)) as folder:
        need = durability.Need(entry_of(path), ((0, path.stat().st_size),))
        (written,) = durability.write_back(folder, [need], stop)
        return written


def test_stop_is_asked_between_slices(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(5 * durability.SLICE))
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) >= 3

    assert write_back(path, stop) == durability.Written(cut_short=True)
    assert len(asked) == 4, "nor was anything begun after that"


def test_another_file_of_that_name_is_not_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x")
    meant = entry_of(path)
    path.rename(tmp_path / "old")
    path.write_bytes(b"y")
    with fs.opened_folder(str(tmp_path)) as folder:
        need = durability.Need(meant, ((0, 1),))
        (written,) = durability.write_back(folder, [need], lambda: False)
        assert written == durability.Written(gone=True)


def test_a_stop_leaves_a_stuck_sync_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it leaves holds nothing: no lock, and no pipe that somebody reads to its end."""
    path = tmp_path / "data"
    path.write_bytes(b"x")
    monkeypatch.setattr(fs, "_fdatasync", lambda _: time.sleep(60))
    reader, writer = os.pipe()
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    began = time.monotonic()
    written = write_back(path, lambda: time.monotonic() - began > 0.5)
    assert written == durability.Written(cut_short=True)
    os.close(lock)
    os.close(writer)
    again = os.open(tmp_path / "lock", os.O_RDWR)
    wait_until(lambda: _locks(again), "the lock", timeout=40)
    os.set_blocking(reader, False)
    assert os.read(reader, 1) == b""
    for fd in (reader, again):
        os.close(fd)


def _locks(fd: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def test_an_error_of_the_rest_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x")

    def fails(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fs, "_fdatasync", fails)
    written = write_back(path, lambda: False)
    assert written.error is not None
    assert written.error.errno == errno.EIO
    assert not written.cut_short

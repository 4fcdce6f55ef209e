"""The clock is set by a day, back or forward, and set right again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.support.driving import HealthyStore, command, environment, private_proc
from tests.support.runs import one_run, rules
from tests.support.servers import wait_until
from tests.support.workers import ALONE
from watcher.model import DAY, HOUR, ActionKind, RefusalKind, Result, Rules
from watcher.observe.host import Host
from watcher.reconcile import Report

CLEAN = rules(repair=False, clean=True, writers_visible=True)
SERVICE = rules(repair=True, refresh=True, clean=True, writers_visible=True)


class Machine:
    """A store on a machine whose clock is wrong by `ahead` seconds."""

    def __init__(self, folder: Path) -> None:
        self.store = HealthyStore(folder / "models")
        self.ahead = 0.0
        self.up = 1000.0
        #: Seconds that have passed besides the test's own.
        self.passed = 0.0
        self._boot = folder / "proc/sys/kernel/random/boot_id"
        self._host = Host(
            str(self.store.path),
            proc=private_proc(folder / "proc"),
            clock=lambda: time.time() + self.passed + self.ahead,
            uptime=lambda: self.up,
            counted=lambda: self._since_start() + self.passed,
        )
        self._boot.parent.mkdir(parents=True)
        self.restart()
        self._started -= DAY

    def _since_start(self) -> float:
        return time.monotonic() - self._started

    def restart(self, off: float = 0.0, awake: float = 0.0) -> None:
        """It starts anew, after it was off for a while, and has been awake for another."""
        self._boot.write_text(f"{uuid.uuid4()}\n")
        self.passed += off + awake
        self._started = time.monotonic() + self.passed - awake

    def up_for(self, seconds: float) -> None:
        """It counts so many seconds more since its start."""
        self._started -= seconds

    def share(self, other: Machine) -> None:
        """Have the store that another machine has."""
        self.store = other.store
        self._host = replace(self._host, store=str(other.store.path))

    def named(self, folder: Path, machine_id: str) -> None:
        """It has this id."""
        (folder / "etc").mkdir(parents=True, exist_ok=True)
        (folder / "etc/machine-id").write_text(f"{machine_id}\n")
        self._host = replace(self._host, system=str(folder))

    def act(self, policy: Rules) -> Report:
        """A cycle; whatever the clock says, nothing has an age below zero."""
        report = one_run(self._host, policy)
        for diagnosed in report.diagnosis.diagnosed:
            assert diagnosed.age >= 0
            assert diagnosed.quiet >= 0
        for event in self.store.events():
            assert event["details"].get("age_seconds", 0) >= 0
        for refused in report.plan.refusals:
            assert refused.seconds_left is None or refused.seconds_left >= 0
            assert "-" not in refused.why.split("changed")[-1]
        return report


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("ahead", [-DAY, DAY])
def test_a_clock_that_jumps_ahead_and_back_has_nothing_removed(
    machine: Machine, ahead: float, known: bool
) -> None:
    store = machine.store
    for text, aged in (("new", 0), ("young", HOUR), ("older", 5.5 * DAY)):
        store.download(text, aged=aged)
        store.text_blob(f"orphan {text}", aged=aged)
    if known:
        machine.act(SERVICE)
    names = sorted(path.name for path in store.blobs.iterdir())
    for machine.ahead in (ahead, 0.0, ahead, 0.0):
        report = machine.act(SERVICE)
        assert {each.action.kind for each in report.outcomes} <= {ActionKind.REFRESH}
        assert sorted(path.name for path in store.blobs.iterdir()) == names


def gone(report: Report) -> list[ActionKind]:
    """What was removed."""
    done = [each.action.kind for each in report.outcomes if each.result is Result.DONE]
    return [kind for kind in done if kind is not ActionKind.REFRESH]


def test_a_stale_download_goes_once_the_clock_is_right_for_hours(machine: Machine) -> None:
    digest = machine.store.download("stale", aged=7.5 * DAY)
    machine.ahead = -DAY
    assert machine.act(CLEAN).outcomes == ()
    machine.ahead = 0
    for machine.passed in (0, HOUR, 1.9 * HOUR):
        report = machine.act(CLEAN)
        assert gone(report) == []
        (refused,) = report.plan.refusals
        assert refused.kind is RefusalKind.CLOCK
        assert refused.seconds_left == pytest.approx(2 * HOUR - machine.passed, abs=60)
    machine.passed = 2.1 * HOUR
    assert gone(machine.act(CLEAN)) == [ActionKind.REMOVE_DOWNLOAD]
    assert machine.store.partials(digest) == []


def lay_out(store: HealthyStore) -> list[str]:
    """One of each thing that age removes; the names under ``blobs/``."""
    name = f"sha256-{store.digest('replaced')}"
    store.download("a download", aged=2 * HOUR)
    store.text_blob("an orphan", aged=2 * HOUR)
    store.file("sha256-1234567", aged=60)  # a left-over of `ollama create`
    kept = store.ours / "quarantine"
    kept.mkdir(parents=True)
    (kept / f"00000001-{name}").write_text("replaced")
    logs = store.ours / "logs"
    logs.mkdir(exist_ok=True)
    (logs / "old.jsonl").write_text("")
    return sorted(path.name for path in store.blobs.iterdir())


@pytest.mark.parametrize("jump", [8 * DAY, 31 * DAY, 400 * DAY])
def test_a_clock_that_jumps_ahead_removes_nothing(machine: Machine, jump: float) -> None:
    store = machine.store
    names = lay_out(store)
    machine.act(SERVICE)
    machine.passed = 300.0
    machine.act(SERVICE)
    for machine.ahead in (jump, 0.0, jump):  # for three seconds, and once more
        report = machine.act(SERVICE)
        assert gone(report) == []
        assert sorted(path.name for path in store.blobs.iterdir()) == names
        assert len(list((store.ours / "quarantine").iterdir())) == 1
        assert (store.ours / "logs/old.jsonl").exists()
    told = [each for each in store.events() if each["event_type"] == "clock_jumped"]
    jumps = [each["details"]["jump_seconds"] for each in told]
    assert jumps == pytest.approx([jump, -jump, jump], abs=5)


def test_the_age_of_what_was_there_before_a_jump_is_its_own(machine: Machine) -> None:
    """The clock was behind by 8 days all along and is set right: what came meanwhile is young."""
    machine.ahead = -8 * DAY
    machine.act(SERVICE)
    store = machine.store
    digest = store.download("young", aged=8 * DAY + HOUR)  # an hour ago, by that clock
    store.text_blob("young orphan", aged=8 * DAY + HOUR)
    machine.act(SERVICE)
    machine.ahead = 0
    for machine.passed in (0, HOUR, 3 * HOUR, DAY):
        report = machine.act(CLEAN)
        assert gone(report) == []
    (diagnosed,) = report.diagnosis.diagnosed
    assert diagnosed.digest == digest
    assert diagnosed.age == pytest.approx(DAY + HOUR, abs=120)
    machine.passed = 7.5 * DAY
    assert sorted(gone(machine.act(CLEAN))) == [
        ActionKind.REMOVE_DOWNLOAD,
        ActionKind.REMOVE_ORPHAN,
    ]


def test_a_download_is_not_quiet_right_after_the_clock_has_jumped(machine: Machine) -> None:
    digest = broken(machine.store)
    now = time.time()
    os.utime(machine.store.partial(digest), (now, now))
    machine.act(CLEAN)
    machine.ahead = 8 * DAY
    (diagnosed,) = machine.act(CLEAN).diagnosis.diagnosed
    assert diagnosed.quiet < 10
    machine.passed = 95
    (diagnosed,) = machine.act(CLEAN).diagnosis.diagnosed
    assert diagnosed.quiet == pytest.approx(95, abs=10)


# ---------------------------------------------------------------- the commands themselves


def _counting(seconds: float) -> list[str]:
    """Before a command: by its machine it has been so long since the start."""
    return ["unshare", "--time", "--fork", "--boottime", f"{seconds:.0f}"]


def test_a_command_goes_by_what_the_machine_counts(tmp_path: Path) -> None:
    """The machine has counted nothing since the run before, and the clock eight days."""
    if subprocess.run([*_counting(DAY), "true"], capture_output=True).returncode:
        pytest.skip("no time namespace can be made here")
    store = HealthyStore(tmp_path / "models")

    def clean(counted: float) -> subprocess.CompletedProcess[str]:
        words = [*ALONE, *_counting(counted), *command(store.path, "clean", "--yes")]
        return subprocess.run(
            words, env=environment(store.path), capture_output=True, text=True, timeout=120
        )

    assert clean(9 * DAY).returncode == 0
    store.download("young", aged=7.5 * DAY)
    store.text_blob("young orphan", aged=7.5 * DAY)
    before = store.tree()
    done = clean(DAY)
    assert done.returncode == 3
    assert "only the clock makes it old" in done.stdout
    assert store.tree() == before
    assert store.event_types() == ["partial_found", "clock_jumped"]


def test_a_daemon_goes_by_what_the_machine_counts(tmp_path: Path) -> None:
    """Its clock jumps ahead by eight days for three seconds, and it looks meanwhile."""
    store = HealthyStore(tmp_path / "models")
    names = lay_out(store)
    ahead = tmp_path / "ahead"
    ahead.write_text("0")
    script = tmp_path / "daemon.py"
    script.write_text(DAEMON)
    process = subprocess.Popen(
        [sys.executable, str(script), str(store.path), str(ahead)], env=environment(store.path)
    )
    try:
        wait_until(lambda: "check_started" in store.event_types(), "the daemon's first look")
        wait_until(lambda: "partial_found" in store.event_types(), "the download to be found")
        for jump, jumps in ((8 * DAY, 1), (0, 2)):
            ahead.write_text(str(jump))
            process.send_signal(signal.SIGHUP)  # a full look
            wait_until(partial(_has_jumped, store, jumps), "the jump to be told")
            time.sleep(3)  # what it would do about it, it has time for
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
    assert sorted(path.name for path in store.blobs.iterdir()) == names
    assert len(list((store.ours / "quarantine").iterdir())) == 1


def _has_jumped(store: HealthyStore, times: int) -> bool:
    return store.event_types().count("clock_jumped") == times


DAEMON = """
import sys, time
from pathlib import Path
from watcher.model import Settings
from watcher.observe.host import Host
from watcher.service import daemon

store, ahead = sys.argv[1], Path(sys.argv[2])
host = Host(store, clock=lambda: time.time() + float(ahead.read_text() or 0))
settings = Settings(repair=True, clean=True, writers_visible=True)
daemon.run(host, lambda: settings, daemon.Children([]))
"""


# ---------------------------------------------------------------- without a daemon


def test_a_first_clean_finds_what_is_stale(machine: Machine) -> None:
    machine.store.download("stale", aged=12 * DAY)
    machine.store.text_blob("an orphan", aged=12 * DAY)
    assert sorted(gone(machine.act(CLEAN))) == [
        ActionKind.REMOVE_DOWNLOAD,
        ActionKind.REMOVE_ORPHAN,
    ]


def test_a_clean_each_week_finds_what_is_stale(machine: Machine) -> None:
    machine.act(CLEAN)
    machine.store.download("a", aged=0)
    machine.passed = 6.9 * DAY
    assert gone(machine.act(CLEAN)) == []
    machine.passed = 13.9 * DAY
    assert gone(machine.act(CLEAN)) == [ActionKind.REMOVE_DOWNLOAD]


def test_a_machine_that_slept_has_counted_it(machine: Machine) -> None:
    """Asleep it counts on; only the seconds awake stand still."""
    machine.act(CLEAN)
    machine.store.download("a", aged=0)
    machine.passed = 8 * DAY
    assert machine.up == 1000
    assert gone(machine.act(CLEAN)) == [ActionKind.REMOVE_DOWNLOAD]


def test_time_off_counts_once_the_clock_has_stood_for_hours(machine: Machine) -> None:
    machine.act(CLEAN)
    machine.store.download("a", aged=0)
    machine.restart(off=8 * DAY, awake=30)
    report = machine.act(CLEAN)
    assert gone(report) == []
    assert [each.kind for each in report.plan.refusals] == [RefusalKind.CLOCK]
    machine.passed += HOUR
    assert gone(machine.act(CLEAN)) == []
    machine.passed += 1.5 * HOUR
    assert gone(machine.act(CLEAN)) == [ActionKind.REMOVE_DOWNLOAD]
    assert "clock_jumped" not in machine.store.event_types()


def test_a_machine_that_is_up_for_an_hour_a_day_cleans_too(machine: Machine) -> None:
    """Each start bears out what the one before has said."""
    machine.act(CLEAN)
    machine.store.download("a", aged=0)
    days = 0
    while not gone(machine.act(CLEAN)):
        machine.restart(off=DAY - HOUR, awake=HOUR)
        days += 1
        assert days < 12
    assert days > 6


def test_a_wrong_clock_at_each_start_removes_nothing(machine: Machine) -> None:
    """No time server has been asked yet, each time; then one has."""
    machine.act(SERVICE)
    lay_out(machine.store)
    for _ in range(4):
        machine.ahead = 40 * DAY
        machine.restart(off=60, awake=20)
        assert gone(machine.act(SERVICE)) == []
        machine.passed += 30
        machine.ahead = 0
        assert gone(machine.act(SERVICE)) == []
        machine.passed += 300
        machine.act(SERVICE)


def test_a_clock_that_is_wrong_right_after_each_start_removes_nothing(machine: Machine) -> None:
    """And nobody looks later on, when it is right."""
    machine.act(SERVICE)
    lay_out(machine.store)
    machine.ahead = 40 * DAY
    for _ in range(4):
        machine.restart(off=600, awake=20)
        assert gone(machine.act(SERVICE)) == []


def test_machines_that_share_a_store_count_nothing_twice(machine: Machine, tmp_path: Path) -> None:
    """Each is another start to the other one, and each has been up for a month."""
    other = Machine(tmp_path / "other")
    other.share(machine)
    for each in (machine, other):
        each.up_for(30 * DAY)
        each.act(SERVICE)
    lay_out(machine.store)
    for _ in range(3):
        for each in (machine, other):
            each.passed += 60
            assert gone(each.act(SERVICE)) == []
    machine.ahead = 8 * DAY
    assert gone(machine.act(SERVICE)) == []


def beside(machine: Machine, folder: Path, machine_id: str) -> Machine:
    """Another machine that shares the store, and has been up for a month, too."""
    other = Machine(folder)
    other.share(machine)
    for each, name in ((machine, "a" * 32), (other, machine_id)):
        each.named(folder.parent / f"system {name}", name)
        each.up_for(30 * DAY)
    return other


#: Of another machine, of a clone, and of one that has none.
IDS = ["b" * 32, "a" * 32, ""]


@pytest.mark.parametrize("machine_id", IDS)
def test_another_machines_look_is_no_jump(
    machine: Machine, tmp_path: Path, machine_id: str
) -> None:
    """Each is compared with itself alone, and so the clock of each is believed."""
    other = beside(machine, tmp_path / "other", machine_id)
    machine.act(SERVICE)
    machine.store.download("stale later", aged=0)
    for hours in range(1, 6):
        machine.passed = other.passed = hours * HOUR
        for each in (other, machine):
            assert gone(each.act(SERVICE)) == []
    assert "clock_jumped" not in machine.store.event_types()
    machine.passed = other.passed = 8 * DAY
    assert gone(other.act(SERVICE)) == [ActionKind.REMOVE_DOWNLOAD]
    machine.act(SERVICE)
    assert "clock_jumped" not in machine.store.event_types()


@pytest.mark.parametrize("machine_id", IDS)
@pytest.mark.parametrize("ahead", [8 * DAY, 40 * DAY, 400 * DAY])
def test_the_wrong_clock_of_a_machine_that_joins_removes_nothing(
    machine: Machine, tmp_path: Path, ahead: float, machine_id: str
) -> None:
    """What one machine knows no single reading of another's clock makes older."""
    other = beside(machine, tmp_path / "other", machine_id)
    machine.act(SERVICE)
    names = lay_out(machine.store)
    other.ahead = ahead
    for passed in (0, 60, HOUR / 2):
        machine.passed = other.passed = passed
        for each in (other, machine):
            assert gone(each.act(SERVICE)) == []
    assert sorted(path.name for path in machine.store.blobs.iterdir()) == names
    other.ahead = 0
    other.act(SERVICE)
    assert machine.store.event_types().count("clock_jumped") == 1, "its own"


@pytest.mark.parametrize("machine_id", IDS)
def test_a_file_from_a_clock_that_is_ahead_is_young_on_another_machine(
    machine: Machine, tmp_path: Path, machine_id: str
) -> None:
    other = beside(machine, tmp_path / "other", machine_id)
    machine.act(SERVICE)
    other.act(SERVICE)
    machine.store.download("from ahead", aged=-HOUR)
    for each in (other, machine, other):
        (diagnosed,) = each.act(SERVICE).diagnosis.diagnosed
        assert diagnosed.age < 60


def test_files_written_by_a_machine_with_a_late_clock_are_young_on_other_machines(
    machine: Machine, tmp_path: Path
) -> None:
    """Its clock is set right; the other one's was right all along."""
    other = beside(machine, tmp_path / "other", "b" * 32)
    machine.ahead = -8 * DAY
    machine.act(SERVICE)
    other.act(SERVICE)
    machine.store.download("young", aged=8 * DAY)
    machine.ahead = 0
    machine.act(SERVICE)
    for passed in (0, 3 * HOUR):
        machine.passed = other.passed = passed
        for each in (other, machine):
            assert gone(each.act(CLEAN)) == []


def test_a_clock_that_was_set_back_while_the_machine_was_off_is_reported(machine: Machine) -> None:
    """Once no other machine can explain it: none has looked for two hours."""
    machine.act(SERVICE)
    machine.ahead = -3 * DAY
    machine.restart(off=60, awake=20)
    machine.act(SERVICE)
    assert "clock_jumped" not in machine.store.event_types()
    machine.passed += 2.1 * HOUR
    machine.act(SERVICE)
    machine.act(SERVICE)
    assert machine.store.event_types().count("clock_jumped") == 1


def test_the_clocks_of_a_few_machines_are_kept(machine: Machine, tmp_path: Path) -> None:
    machine.act(SERVICE)
    for number in range(12):
        other = beside(machine, tmp_path / f"other{number}", f"{number:032}")
        assert gone(other.act(SERVICE)) == []
    assert "clock_jumped" not in machine.store.event_types()
    memory = json.loads((machine.store.ours / "state.json").read_bytes())
    assert len(memory["other_clocks"]) == 7


@pytest.mark.parametrize("more", [30 * DAY, -DAY / 2])
def test_uptime_counted_from_another_start_makes_nothing_old(machine: Machine, more: float) -> None:
    """A time namespace counts from another start on, and so does a machine's earlier snapshot."""
    machine.act(SERVICE)
    lay_out(machine.store)
    machine.up_for(more)
    assert gone(machine.act(SERVICE)) == []
    machine.ahead = 8 * DAY
    assert gone(machine.act(SERVICE)) == []
    machine.up_for(-more)
    assert gone(machine.act(SERVICE)) == []


def test_a_clock_that_was_set_back_is_reported_and_removes_nothing(machine: Machine) -> None:
    machine.act(CLEAN)
    machine.store.download("a", aged=6 * DAY)
    machine.ahead = -3 * DAY
    assert gone(machine.act(CLEAN)) == []
    assert machine.store.event_types().count("clock_jumped") == 1
    machine.passed = 0.9 * DAY
    assert gone(machine.act(CLEAN)) == []
    assert machine.store.event_types().count("clock_jumped") == 1


def test_a_clock_that_is_brought_right_slowly_has_not_jumped(machine: Machine) -> None:
    machine.act(CLEAN)
    for hours in range(1, 60):
        machine.passed = hours * HOUR
        machine.ahead = hours * HOUR * 0.0005
        machine.act(CLEAN)
    assert "clock_jumped" not in machine.store.event_types()


def broken(store: HealthyStore) -> str:
    """A download whose repair takes a surplus name away, so that quiet counts."""
    digest = store.download("broken", aged=HOUR)
    for number in range(3):
        store.partial(digest, number).unlink()
    store.file(f"sha256-{digest}-partial-0.bak", aged=HOUR)
    return digest


def test_times_from_the_future_show_no_quiet_and_looks_do(machine: Machine) -> None:
    broken(machine.store)
    before = machine.store.tree()
    for machine.ahead, machine.up, left in ((-DAY, 100, 90), (-2 * DAY, 150, 40)):
        (refused,) = machine.act(SERVICE).plan.refusals
        assert refused.kind is RefusalKind.NOT_QUIET
        assert refused.seconds_left == left
        assert machine.store.tree() == before
    machine.up = 190
    done = machine.act(SERVICE).outcomes
    assert [each.result for each in done if each.action.kind is ActionKind.WRITE_SIDECARS] == [
        Result.DONE
    ]


def test_quiet_time_seen_by_another_start_of_the_machine_does_not_count(machine: Machine) -> None:
    """Nor another machine that has the same folder."""
    broken(machine.store)
    machine.ahead = -DAY
    for machine.up, left in ((100, 90), (5000, 90), (5020, 70)):
        if left == 90:
            machine.restart()
        (refused,) = machine.act(SERVICE).plan.refusals
        assert refused.seconds_left == left


def test_a_download_that_changes_after_the_clock_was_set_back_is_not_quiet(
    machine: Machine,
) -> None:
    digest = broken(machine.store)
    machine.ahead = -DAY
    machine.act(SERVICE)
    machine.up += 200
    set_back = time.time() - DAY - 30
    os.utime(machine.store.partial(digest), (set_back, set_back))
    (refused,) = machine.act(SERVICE).plan.refusals
    assert refused.seconds_left == pytest.approx(60, abs=10)


def test_times_that_were_set_by_a_wrong_clock_don_t_make_anything_younger(
    machine: Machine,
) -> None:
    machine.store.download("wanted", aged=2 * HOUR)
    machine.ahead = DAY
    assert [each.action.kind for each in machine.act(SERVICE).outcomes] == [ActionKind.REFRESH]
    machine.ahead = 0
    (diagnosed,) = machine.act(SERVICE).diagnosis.diagnosed
    assert diagnosed.age == pytest.approx(2 * HOUR, abs=60)
    assert diagnosed.quiet == pytest.approx(2 * HOUR, abs=60)

"""The clock is set by a day, back or forward, and set right again."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import pytest

from tests.driving import Store, private_proc
from watcher import cycle
from watcher.cycle import Report
from watcher.model import DAY, HOUR, Policy, RefusalKind, Result, Verb
from watcher.world import World

CLEAN = Policy(repair=False, clean=True, writers_visible=True)
SERVICE = Policy(repair=True, refresh=True, clean=True, writers_visible=True)


class Machine:
    """A store on a machine whose clock is wrong by `ahead` seconds."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "models")
        self.ahead = 0.0
        self.up = 1000.0
        self._boot = folder / "proc/sys/kernel/random/boot_id"
        self._world = World(
            str(self.store.path),
            proc=private_proc(folder / "proc"),
            clock=lambda: time.time() + self.ahead,
            uptime=lambda: self.up,
        )
        self._boot.parent.mkdir(parents=True)
        self.restart()

    def restart(self) -> None:
        """The machine starts anew."""
        self._boot.write_text(f"{uuid.uuid4()}\n")

    def act(self, policy: Policy) -> Report:
        """A cycle; whatever the clock says, nothing has an age below zero."""
        report = cycle.cycle(self._world, policy)
        for judged in report.verdict.judged:
            assert judged.age >= 0
            assert judged.quiet >= 0
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
def test_nothing_is_thrown_away_for_it(machine: Machine, ahead: float, known: bool) -> None:
    store = machine.store
    for text, aged in (("new", 0), ("young", HOUR), ("older", 5.5 * DAY)):
        store.download(text, aged=aged)
        store.blob(f"orphan {text}", aged=aged)
    if known:
        machine.act(SERVICE)
    names = sorted(path.name for path in store.blobs.iterdir())
    for machine.ahead in (ahead, 0.0, ahead, 0.0):
        report = machine.act(SERVICE)
        assert {each.action.verb for each in report.outcomes} <= {Verb.REFRESH}
        assert sorted(path.name for path in store.blobs.iterdir()) == names


def test_what_is_stale_goes_once_the_clock_is_right_again(machine: Machine) -> None:
    digest = machine.store.download("stale", aged=7.5 * DAY)
    machine.ahead = -DAY
    assert machine.act(CLEAN).outcomes == ()
    machine.ahead = 0
    assert [each.result for each in machine.act(CLEAN).outcomes] == [Result.DONE]
    assert machine.store.partials(digest) == []


def broken(store: Store) -> str:
    """A download whose repair takes a surplus name away, so that quiet counts."""
    digest = store.download("broken", aged=HOUR)
    for number in range(3):
        store.partial(digest, number).unlink()
    store.file(f"sha256-{digest}-partial-0.bak", aged=HOUR)
    return digest


def test_times_from_the_future_tell_no_quiet_and_looks_do(machine: Machine) -> None:
    broken(machine.store)
    before = machine.store.tree()
    for machine.ahead, machine.up, left in ((-DAY, 100, 90), (-2 * DAY, 150, 40)):
        (refused,) = machine.act(SERVICE).plan.refusals
        assert refused.kind is RefusalKind.NOT_QUIET
        assert refused.seconds_left == left
        assert machine.store.tree() == before
    machine.up = 190
    done = machine.act(SERVICE).outcomes
    assert [each.result for each in done if each.action.verb is Verb.WRITE_SIDECARS] == [
        Result.DONE
    ]


def test_what_another_start_of_the_machine_has_seen_does_not_count(machine: Machine) -> None:
    """Nor another machine that has the same folder."""
    broken(machine.store)
    machine.ahead = -DAY
    for machine.up, left in ((100, 90), (5000, 90), (5020, 70)):
        if left == 90:
            machine.restart()
        (refused,) = machine.act(SERVICE).plan.refusals
        assert refused.seconds_left == left


def test_what_changes_after_the_clock_was_set_back_is_not_quiet(machine: Machine) -> None:
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
    assert [each.action.verb for each in machine.act(SERVICE).outcomes] == [Verb.REFRESH]
    machine.ahead = 0
    (judged,) = machine.act(SERVICE).verdict.judged
    assert judged.age == pytest.approx(2 * HOUR, abs=60)
    assert judged.quiet == pytest.approx(2 * HOUR, abs=60)

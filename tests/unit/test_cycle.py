"""The cycle: what consent, the lock and a world that keeps nothing make of a plan."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest

from tests.conftest import ordinary_user
from tests.support.notation import Store
from tests.support.runs import one_look, one_run, rules
from watcher import reconcile
from watcher.act import journal
from watcher.errors import Exit, LockedError
from watcher.model import ActionKind, Plan, Result
from watcher.state import fs, memory
from watcher.state.event_log import Event

POLICY = rules(clean=True, repair=False)


@pytest.fixture
def stale(models: Store) -> str:
    models.model()
    return models.broken("0:1 -:1", aged="9d")


def logged(models: Store) -> list[str]:
    raw = (models.path / ".ollama-watch" / "logs" / "events.jsonl").read_bytes()
    return [json.loads(line)["event_type"] for line in raw.splitlines()]


def test_a_plan_that_is_agreed_to_is_done_and_reported(models: Store, stale: str) -> None:
    told: list[Event] = []
    report = one_run(models.host(report=told.append), POLICY)
    assert [each.result for each in report.outcomes] == [Result.DONE]
    assert report.outcomes[0].freed == report.plan.frees > 0
    assert not [name for name in models.names() if stale in name]
    assert logged(models) == [event.event_type for event in told]
    told_of_it = [each for each in logged(models) if each in ("act_started", "partial_cleaned")]
    assert told_of_it == ["act_started", "partial_cleaned"]
    assert one_run(models.host(), POLICY).outcomes == ()


def test_many_orphans_go_in_batches_each_reported_before_and_after_it(models: Store) -> None:
    """The first batch is small: on a full disk its intent has little room."""
    models.model()
    for number in range(250):
        models.orphan(f"orphan {number}")
    told: list[Event] = []
    report = one_run(models.host(report=told.append), POLICY)
    assert [each.result for each in report.outcomes] == [Result.DONE] * 250
    kinds = ["act_started"] * 100 + ["orphan_removed"] * 100
    kinds += ["act_started"] * 150 + ["orphan_removed"] * 150
    assert [event.event_type for event in told][-500:] == kinds
    assert logged(models)[-500:] == kinds
    assert len(models.names()) == 1


def test_an_action_that_was_not_approved_is_remembered_and_not_done(
    models: Store, stale: str
) -> None:
    before = models.names()
    report = one_run(models.host(), POLICY, approve=reconcile.approve_none)
    assert [each.kind for each in report.plan.actions] == [ActionKind.REMOVE_DOWNLOAD]
    assert models.names() == before
    fd = os.open(models.path, os.O_RDONLY)
    assert stale in memory.load(fd).downloads
    os.close(fd)


def test_a_world_that_keeps_nothing_is_only_looked_at(models: Store, stale: str) -> None:
    before = models.snapshot()
    assert one_look(models.host(), POLICY).plan.actions
    assert models.snapshot() == before


def test_the_holder_of_the_lock_is_named(models: Store, stale: str) -> None:
    (models.path / ".ollama-watch").mkdir()
    fd = os.open(models.path / ".ollama-watch", os.O_RDONLY)
    try:
        with fs.locked(journal.ACTING_LOCK, fd), pytest.raises(LockedError) as caught:
            one_run(models.host(), POLICY, lock_seconds=0.1)
    finally:
        os.close(fd)
    assert f"pid {os.getpid()}" in str(caught.value)
    assert caught.value.exit_code is Exit.LOCKED
    assert [name for name in models.names() if stale in name]


def test_a_file_that_changes_between_plan_and_act_is_left(models: Store, stale: str) -> None:
    data = models.blobs / f"sha256-{stale}-partial"

    def approve(planned: Plan) -> Plan:
        os.utime(data)
        return planned

    (outcome,) = one_run(models.host(), POLICY, approve=approve).outcomes
    assert outcome.result is Result.REFUSED
    assert outcome.refusal is not None
    assert data.exists()


def test_a_damaged_memory_is_reported_and_everything_goes_on(models: Store, stale: str) -> None:
    (models.path / ".ollama-watch").mkdir()
    (models.path / ".ollama-watch" / "state.json").write_bytes(b"{")
    report = one_run(models.host(), POLICY)
    assert [each.result for each in report.outcomes] == [Result.DONE]
    assert "error" in logged(models)
    assert (models.path / ".ollama-watch" / "state.json.damaged").exists()


@pytest.mark.parametrize("hours", [0.6, 5, 30])
def test_time_that_passes_while_somebody_is_asked_changes_no_plan(
    models: Store, stale: str, hours: float
) -> None:
    passed = 0.0

    def approve(planned: Plan) -> Plan:
        nonlocal passed
        passed = hours * 3600
        return planned

    host = models.host(clock=lambda: time.time() + passed)
    (outcome,) = one_run(host, POLICY, approve=approve).outcomes
    assert outcome.result is Result.DONE, outcome.message


@pytest.mark.parametrize("unreadable", ["no permission", "an error of the disk"])
def test_a_memory_that_can_not_be_read_is_not_written_over(
    models: Store, unreadable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be whole: without it no sidecars are written and no times are set."""
    digest = models.broken("0:1 E:1", aged="50m")
    policy = rules(repair=True, refresh=True, writers_visible=True)
    one_run(models.host(), policy, approve=reconcile.approve_none)
    state = models.path / ".ollama-watch" / "state.json"
    before, inode = state.read_bytes(), state.stat().st_ino
    shown = models.shown(digest)
    times = {path: path.stat().st_mtime_ns for path in models.blobs.iterdir()}

    def look() -> reconcile.Report:
        report = one_run(models.host(), policy)
        assert {path: path.stat().st_mtime_ns for path in models.blobs.iterdir()} == times
        return report

    if unreadable == "no permission":
        with ordinary_user(tmp_path):
            state.chmod(0)
            report = look()
            state.chmod(0o644)
    else:
        real = fs.read_ours

        def failing(name: str, *words: int) -> bytes:
            if name == "state.json":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(name, *words)

        with monkeypatch.context() as patch:
            patch.setattr(fs, "read_ours", failing)
            report = look()
    assert any("state.json can't be read" in each for each in report.warnings)
    assert (state.read_bytes(), state.stat().st_ino) == (before, inode)
    assert models.shown(digest) == shown
    with ordinary_user(tmp_path):
        done = one_run(models.host(), policy).outcomes
    assert {each.action.kind for each in done} == {ActionKind.WRITE_SIDECARS, ActionKind.REFRESH}


@pytest.mark.parametrize("end", ["", "\n", "\n\n", " \t\n"])
def test_events_that_were_kept_from_the_log_become_lines_of_it(
    models: Store, stale: str, end: str
) -> None:
    """However the memory spells them: a line without its end would spoil the next one."""
    one_run(models.host(), POLICY, approve=reconcile.approve_none)
    state = models.path / ".ollama-watch" / "state.json"
    document = json.loads(state.read_bytes())
    line = Event(1e9, "error", "kept from the log")
    spelled = json.dumps(json.loads(line.line), indent=2) + end
    document["untold"] = [spelled, spelled.replace("kept from", "missing in")]
    state.write_text(json.dumps(document))
    one_run(models.host(), POLICY)
    log = models.path / ".ollama-watch" / "logs" / "events.jsonl"
    messages = [json.loads(each)["message"] for each in log.read_bytes().splitlines()]
    assert {"kept from the log", "missing in the log"} <= set(messages)

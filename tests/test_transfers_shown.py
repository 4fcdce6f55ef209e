"""A transfer that nobody goes on with: shown, cleaned, forgotten, and given back."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import HealthyStore, content, holding, host, private_proc, run
from tests.support.notation import age
from tests.support.runs import changed, one_look, one_run, rules, surveyed
from tests.support.transfers import folder, held, lay_out
from tests.transfer.driven import Here as Driven
from watcher.act import transaction
from watcher.decide import findings, repairing, usage
from watcher.demo.registry import Registry
from watcher.model import (
    DAY,
    HOUR,
    ActionKind,
    Condition,
    Diagnosed,
    Refusal,
    RefusalKind,
    Result,
    Rules,
    UseKind,
)
from watcher.ollama import ranges, sidecars
from watcher.ollama.names import to_model
from watcher.reconcile import Report
from watcher.state import folders, fs, registry_cache, transfers
from watcher.transfer import taking_over

from .conftest import needs_root

CONTENT = bytes(range(1, 251)) * 40_000
DURABLE, ARRIVED = ((0, 4_000_000),), ((6_000_000, 7_000_000),)
LOOK = rules(repair=True, clean=True, writers_visible=True)
CLEAN = rules(repair=False, clean=True, writers_visible=True)
GIVE = changed(rules(writers_visible=True, give_back=True), repair=False)


class Here:
    """A store with one transfer in it."""

    def __init__(self, tmp_path: Path) -> None:
        self.store = HealthyStore(tmp_path / "models")
        self.digest = self.store.digest("ours")
        proc = Path(private_proc(tmp_path / "proc"))
        (proc / "sys").symlink_to("/proc/sys")  # which start of the machine this is
        self.host = host(self.store, str(proc))

    @property
    def folder(self) -> Path:
        return folder(self.store.path, self.digest)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def lay_out(self, aged: float = 2 * HOUR, **more: Any) -> Path:
        return lay_out(self.store.path, self.digest, CONTENT, DURABLE, ARRIVED, aged=aged, **more)

    def partial(self, aged: float = 2 * HOUR) -> list[Path]:
        """A download of the server's of the same layer."""
        assert self.store.download("ours", aged=aged) == self.digest
        return self.partial_files()

    def partial_files(self) -> list[Path]:
        return sorted(self.store.blobs.glob(f"sha256-{self.digest}-partial*"))

    def look(self, by: Rules = LOOK, **world: Any) -> Report:
        return one_look(replace(self.host, **world), by)

    def seen(self, **world: Any) -> Diagnosed:
        (found,) = [x for x in self.look(**world).diagnosis.diagnosed if x.download.ours]
        return found

    def run(self, by: Rules, **more: Any) -> Report:
        return one_run(self.host, by, **more)

    def claimed(self) -> list[tuple[int, int]]:
        files = self.store.blobs.glob(f"sha256-{self.digest}-partial-*")
        parts = [sidecars.parse(each.read_bytes()) for each in files]
        return list(sidecars.claims(parts))


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


def refusals(report: Report) -> list[RefusalKind]:
    return [each.kind for each in report.plan.refusals]


# ---------------------------------------------------------------- seen


def test_what_is_durable_and_what_has_arrived_counts(here: Here) -> None:
    here.lay_out()
    found = here.seen()
    trust = found.download.trust
    assert found.condition is Condition.TRANSFER
    assert (trust.claimed, trust.present) == (DURABLE, (*DURABLE, *ARRIVED))
    assert (found.download.total, found.stale) == (len(CONTENT), False)
    assert found.cost_alone == len(CONTENT)
    assert found.cost_repaired == len(CONTENT) - 5_000_000
    assert 1.9 * HOUR < found.age < 2.1 * HOUR


@pytest.mark.parametrize("boot", ["another start", ""])
def test_after_another_start_only_what_is_durable_counts(
    here: Here, boot: str, tmp_path: Path
) -> None:
    here.lay_out()
    proc = tmp_path / "proc"
    (proc / "sys").unlink()
    if boot:
        name = proc / "sys/kernel/random/boot_id"
        name.parent.mkdir(parents=True)
        name.write_text(boot)
    assert here.seen().download.trust.present == DURABLE


def test_a_transfer_is_not_deleted_by_a_start_nor_repaired_nor_protected(here: Here) -> None:
    """No start deletes it, no repair is planned for it, and nothing protects it."""
    here.lay_out(aged=2 * DAY)
    report = here.look()
    assert report.diagnosis.forecast is not None
    assert not [x for x in report.diagnosis.forecast.deletes if "transfers" in x.path]
    assert not [x for _, x in report.diagnosis.forecast.later if "transfers" in x.path]
    kinds = {each.kind for each in report.diagnosis.findings}
    assert "download_transfer" in kinds
    assert "download_at_risk" not in kinds
    repair = here.look(changed(LOOK, clean=False, refresh=True))
    assert [each for each in repair.plan.actions if each.subject == here.digest] == []


@pytest.mark.parametrize("kind", ["manifest", "registry"])
def test_audit_names_the_model_of_a_transfer_by_manifest_or_registry(here: Here, kind: str) -> None:
    here.lay_out()
    if kind == "manifest":
        blob = here.store.blobs / f"sha256-{here.digest}"
        blob.write_bytes(b"")
        path = here.store.manifest_of("half", here.digest, here.store.digests[1])
        path.write_text(path.read_text().replace('"size": 0', f'"size": {len(CONTENT)}'))
        blob.unlink()
    else:
        known_as_half(here)
    assert here.seen().download.models == ("half:latest",)
    said = run(here.store.path, "audit", "-v").stdout
    assert "pull half:latest" in " ".join(said.split())


def test_the_command_that_is_printed_goes_on_with_it(tmp_path: Path, registry: Registry) -> None:
    served = Driven(tmp_path / "models", registry, 6_000_000)
    whole = served.content()
    lay_out(served.path, served.digest, whole, ((0, 4_000_000),))
    with folders.opened_store(str(served.path)) as store:
        registry_cache.keep(store, served.name, served.model.manifest, "", time.time())
    (download,) = json.loads(run(served.path, "audit", "--json").stdout)["downloads"]
    assert download["models"] == [served.name.shown]
    registry.reset_stats()
    words = shlex.split(download["advice"])
    done = run(served.path, *words[words.index("pull") :])
    assert done.returncode == 0, done.stdout + done.stderr
    served.check()
    fetched = registry.bytes_served(f"sha256:{served.digest}")
    assert 2_000_000 <= fetched <= 2_000_100, "and a byte for its address"


def test_a_transfer_is_in_use_while_its_lock_is_held(here: Here) -> None:
    with held(here.lay_out()):
        now = here.seen()
        assert (now.condition, now.stale) == (Condition.LIVE, False)
        (holder,) = now.download.holders
        assert holder.pid == os.getpid()
        assert now.because.startswith(f"ollama-watch ({os.getpid()}) fetches it since ")
        assert refusals(here.look(changed(GIVE, clean=False))) == [RefusalKind.HELD]
        age(here.data, 30 * DAY)
        report = here.run(CLEAN)
        assert not report.plan.actions
        known_as_half(here)
        done = run(here.store.path, "reset", "--offline", "--yes", "half")
        assert done.returncode == 3
        assert "fetches it" in done.stderr
        assert not here.look().evidence.pulling, "no reason to leave the server's downloads"
        assert taking_over.live(here.look()) == [], "a second pull of ours joins in"
    assert here.seen().condition is Condition.TRANSFER
    assert here.data.exists()
    assert taking_over.partials(here.look()) == ()


def known_as_half(here: Here) -> None:
    """A registry has told whose layer it is."""
    known_as(here, "half", here.digest)


def known_as(here: Here, model: str, *digests: str) -> None:
    with folders.opened_store(str(here.store.path)) as store:
        layers = [{"digest": f"sha256:{each}", "size": len(CONTENT)} for each in digests]
        config = {"digest": f"sha256:{here.store.digests[1]}", "size": 14}
        raw = json.dumps({"schemaVersion": 2, "config": config, "layers": layers}).encode()
        registry_cache.keep(store, to_model(model), raw, "", time.time())


def test_both_a_partial_and_a_transfer_are_shown(here: Here) -> None:
    here.lay_out()
    here.partial()
    found = here.look().diagnosis.diagnosed
    assert [(x.digest, x.download.ours) for x in found] == [
        (here.digest, False),
        (here.digest, True),
    ]
    assert findings.lacking(found) == min(
        (each.download.total or 0) - ranges.size(each.download.trust.present) for each in found
    )
    seen = json.loads(run(here.store.path, "audit", "--json").stdout)
    assert [each["ours"] for each in seen["downloads"]] == [False, True]


def test_df_counts_it_as_a_download(here: Here) -> None:
    here.lay_out()
    report = here.look()
    uses, total = usage.usage(surveyed(here.host), report.diagnosis.diagnosed)
    (mine,) = [each for each in uses if each.kind is UseKind.PARTIAL]
    assert mine.name == "transfer"
    assert mine.sizes.allocated >= here.data.stat().st_blocks * 512
    assert sum(each.sizes.allocated for each in uses) == total.allocated


# ---------------------------------------------------------------- a second name of a finished blob


def test_a_second_name_counts_once_and_goes_once_the_server_is_done(here: Here) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    blob = here.store.file(f"sha256-{digest}", CONTENT.decode("latin-1"), 8 * DAY)
    blob.write_bytes(CONTENT)
    here.store.manifest_of("whole", digest, here.store.digests[1])
    other = folder(here.store.path, digest)
    other.mkdir(parents=True)
    os.link(blob, other / "data")
    age(blob, 8 * DAY)
    here.run(rules(repair=False, hash=True, verify=True, writers_visible=True))
    uses, total = usage.usage(surveyed(here.host), here.look().diagnosis.diagnosed)
    assert sum(each.sizes.allocated for each in uses) == total.allocated
    assert [each for each in uses if each.kind is UseKind.PARTIAL and each.sizes.freed > 8192] == []
    left = here.store.file(f"sha256-{digest}-partial", "still pulled", 60)
    here.run(CLEAN)
    assert (other / "data").exists(), "the server may still take the name from the blob"
    left.unlink()
    assert [each for each in here.run(CLEAN).outcomes if each.freed] == []
    assert not other.exists()
    assert blob.read_bytes() == CONTENT


# ---------------------------------------------------------------- hostile content


def _other_digest(here: Here) -> None:
    said = json.loads((here.folder / "ledger").read_text())
    (here.folder / "ledger").write_text(json.dumps({**said, "digest": "0" * 64}))


def _ledger(**more: Any) -> Callable[[Here], None]:
    def change(here: Here) -> None:
        said = json.loads((here.folder / "ledger").read_text())
        (here.folder / "ledger").write_text(json.dumps({**said, **more}))

    return change


def _replaced(name: str, by: Callable[[Path], object]) -> Callable[[Here], None]:
    def change(here: Here) -> None:
        (here.folder / name).unlink()
        by(here.folder / name)

    return change


def _large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


DAMAGED = {
    "other-digest": _other_digest,
    "beyond-the-data": _ledger(durable=[[0, 9_000_000]]),
    "beyond-the-layer": _ledger(total=1_000_000),
    "negative": _ledger(durable=[[-5, 10]]),
    "huge": _ledger(durable=[[0, 10**30]]),
    "other-schema": _ledger(schema="ollama-watch/transfer/9"),
    "no-json": _replaced("ledger", lambda path: path.write_text("{")),
    "too-large": _replaced("ledger", _large),
    "a-fifo": _replaced("ledger", os.mkfifo),
    "a-link": _replaced("ledger", lambda path: path.symlink_to("/etc/passwd")),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_ledger_is_said_and_not_believed(here: Here, how: str) -> None:
    here.lay_out(aged=8 * DAY)
    DAMAGED[how](here)
    age(here.data, 8 * DAY)
    found = here.seen()
    assert found.condition in (Condition.TRANSFER, Condition.UNKNOWN)
    assert "ledger is damaged" in found.because or "reading it failed" in found.because
    assert ranges.size(found.download.trust.present) == 0
    report = here.run(GIVE)
    assert not report.outcomes
    assert refusals(report) == [RefusalKind.UNKNOWN]
    if found.condition is Condition.TRANSFER:
        assert [each.result for each in here.run(CLEAN).outcomes] == [Result.DONE]
        assert not here.folder.exists() or list(here.folder.iterdir()) == []


def test_marks_that_make_no_sense_count_for_nothing(here: Here) -> None:
    here.lay_out()
    log = here.folder / "arrived"
    for line in ("5 3", "0 99999999999", "a b", "-1 5", "1 2 3", "9" * 5000 + " 1"):
        log.write_text("\n".join([log.read_text().split("\n")[0], line, "6000000 7000000", ""]))
        assert here.seen().download.trust.present == DURABLE, line


def test_what_leads_elsewhere_is_neither_followed_nor_removed(here: Here, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    shutil.copytree(here.lay_out(aged=30 * DAY), victim)
    before = content(victim)
    for way in ("data", "fifo", "folder", "transfers"):
        shutil.rmtree(here.store.ours / "transfers")
        if way == "transfers":
            (here.store.ours / "transfers").symlink_to(victim)
        elif way == "folder":
            (here.store.ours / "transfers").mkdir()
            here.folder.symlink_to(victim)
        else:
            here.folder.mkdir(parents=True)
            if way == "fifo":
                os.mkfifo(here.data)
            else:
                here.data.symlink_to(victim / "data")
        for by in (CLEAN, GIVE):
            report = here.run(by)
            assert not report.outcomes
        if way == "transfers":
            done = run(here.store.path, "status")
            assert "transfers" in done.stdout
            assert done.returncode == 4
            (here.store.ours / "transfers").unlink()
            (here.store.ours / "transfers").mkdir()
        else:
            assert here.seen().condition is Condition.UNKNOWN
        assert content(victim) == before


@needs_root
def test_what_another_user_has_put_there_is_not_believed(here: Here) -> None:
    here.lay_out(aged=8 * DAY)
    os.chown(here.folder / "ledger", 12345, 12345)
    assert "it belongs to user id 12345" in here.seen().because
    os.chown(here.folder / "ledger", 0, 0)
    os.chown(here.folder, 12345, 12345)
    found = here.seen()
    assert found.condition is Condition.UNKNOWN
    assert "it belongs to user id 12345" in found.because
    report = here.run(CLEAN)
    assert not report.outcomes
    assert here.data.exists()


@needs_root
def test_who_may_only_read_sees_it_and_who_has_it(
    here: Here, as_user: Callable[..., list[str]]
) -> None:
    def seen() -> dict[str, Any]:
        words = ["-m", "watcher", "--store", str(here.store.path), "audit", "--json"]
        done = subprocess.run(as_user(words), capture_output=True, timeout=120, check=False)
        (download,) = json.loads(done.stdout)["downloads"]
        return dict(download)

    with held(here.lay_out()):
        now = seen()
        assert (now["condition"], now["bytes"]["present"]) == ("live", 5_000_000)
        assert [each["pid"] for each in now["holders"]] == [os.getpid()]
    assert seen()["condition"] == "transfer"


# ---------------------------------------------------------------- clean, reset


def test_clean_removes_it_once_it_is_stale(here: Here) -> None:
    here.lay_out(aged=6 * DAY)
    report = here.run(CLEAN)
    assert not report.outcomes
    assert [each.digest for each in report.plan.spared] == [here.digest]
    age(here.data, 8 * DAY)
    (here.store.ours / "state.json").unlink()
    allocated = here.data.stat().st_blocks * 512
    report = here.run(CLEAN)
    (done,) = report.outcomes
    assert (done.action.kind, done.freed) == (ActionKind.REMOVE_TRANSFER, allocated)
    assert not here.folder.exists()
    kinds = [each["event_type"] for each in here.store.events()]
    assert "partial_removed" not in kinds
    assert kinds[-2:] == ["act_started", "partial_cleaned"]


def test_a_clock_that_was_set_ahead_makes_it_no_older(here: Here) -> None:
    here.lay_out(aged=HOUR)
    here.run(CLEAN)
    report = one_run(replace(here.host, clock=lambda: time.time() + 30 * DAY), CLEAN)
    assert not report.outcomes
    assert RefusalKind.CLOCK in refusals(report)
    assert here.data.exists()


def test_of_a_partial_and_a_transfer_each_goes_by_its_own_age(here: Here) -> None:
    here.lay_out(aged=HOUR)
    files = here.partial(aged=8 * DAY)
    here.run(CLEAN)
    assert here.data.exists()
    assert not any(path.exists() for path in files)
    found = [each["event_type"] for each in here.store.events()]
    assert found.count("partial_found") == 2, "what is known of the other one stays known"
    records = json.loads((here.store.ours / "state.json").read_text())["downloads"]
    assert list(records) == [f"{here.digest}.own"]
    kept = here.partial(aged=HOUR)
    (here.store.ours / "state.json").unlink()
    age(here.data, 8 * DAY)
    here.run(CLEAN)
    assert not here.folder.exists()
    assert all(path.exists() for path in kept)
    records = json.loads((here.store.ours / "state.json").read_text())["downloads"]
    assert list(records) == [here.digest]


def test_it_is_not_removed_once_it_goes_on_again(here: Here) -> None:
    here.lay_out(aged=8 * DAY)

    def goes_on(planned: Any) -> Any:
        with here.data.open("r+b") as data:
            data.write(b"more")
        return planned

    (outcome,) = here.run(CLEAN, approve=goes_on).outcomes
    assert outcome.result is Result.REFUSED
    assert here.data.exists()


def test_a_transfer_that_went_on_after_the_plan_is_not_removed(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last plan, before the lock: whoever went on has stopped again."""
    here.lay_out(aged=8 * DAY)
    real = transfers.held

    def went_on(ours: int, digest: str) -> Any:
        with here.data.open("r+b") as data:
            data.write(b"more")
        return real(ours, digest)

    monkeypatch.setattr(transfers, "held", went_on)
    (outcome,) = here.run(CLEAN).outcomes
    assert outcome.result is Result.REFUSED
    assert here.data.exists()


def test_a_lock_that_is_taken_at_the_last_moment_keeps_it(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.lay_out(aged=8 * DAY)
    real = fs.locked

    def locked(name: str, parent: int, *words: Any, **more: Any) -> Any:
        if name == "lock" and os.readlink(f"/proc/self/fd/{parent}").endswith(here.digest):
            with held(here.folder), real(name, parent, *words, **more):
                pass
        return real(name, parent, *words, **more)

    monkeypatch.setattr(fs, "locked", locked)
    (outcome,) = here.run(CLEAN).outcomes
    assert outcome.refusal is not None
    assert outcome.refusal.kind is RefusalKind.HELD
    assert here.data.exists()


@pytest.mark.parametrize("beside", [True, False])
def test_data_that_was_set_aside_is_counted_and_goes_with_it(here: Here, beside: bool) -> None:
    here.lay_out()
    aside = here.folder / "data.damaged-1"
    shutil.copy(here.data, aside)
    (here.folder / "arrived.damaged").touch()
    if not beside:
        here.data.unlink()
    uses, _ = usage.usage(surveyed(here.host), here.look().diagnosis.diagnosed)
    (mine,) = [each for each in uses if each.kind is UseKind.PARTIAL]
    assert mine.sizes.allocated >= aside.stat().st_blocks * 512
    for path in here.folder.iterdir():
        age(path, 6 * DAY)
    assert not here.run(CLEAN).outcomes
    assert aside.exists()
    for path in here.folder.iterdir():
        age(path, 8 * DAY)
    (here.store.ours / "state.json").unlink()
    (done,) = here.run(CLEAN).outcomes
    assert (done.action.kind, done.result) == (ActionKind.REMOVE_TRANSFER, Result.DONE)
    assert not here.folder.exists()


def test_a_layer_whose_pull_fetches_another_one_stays(here: Here) -> None:
    here.lay_out(aged=8 * DAY)
    other = here.store.digest("other")
    known_as(here, "half", here.digest, other)
    with held(lay_out(here.store.path, other, CONTENT)):
        for by in (CLEAN, GIVE):
            report = here.run(by)
            assert not report.outcomes
            assert {each.kind for each in report.plan.refusals} == {RefusalKind.HELD}
            (refusal,) = [x for x in report.plan.refusals if x.subject == here.digest]
            assert f"({os.getpid()}) fetches another layer of half:latest" in refusal.why
    assert here.run(CLEAN).outcomes


def test_what_is_empty_goes_with_a_clean(here: Here) -> None:
    """A manifest that a kill has left, once it is old, and folders without bytes."""
    here.lay_out()
    others = [folder(here.store.path, here.store.digest(name)) for name in ("a", "b")]
    for other in others:
        other.mkdir()
    (others[1] / "lock").touch(0o600)
    above = here.folder.parent
    for name, aged in (("manifest-12", 2 * HOUR), ("manifest-13", 0), ("manifest-x", 2 * HOUR)):
        (above / name).write_text("{}")
        age(above / name, aged)
    one_look(here.host, CLEAN)
    assert all(other.exists() for other in others), "a look changes nothing"
    here.run(CLEAN)
    left = sorted(path.name for path in above.iterdir())
    assert left == sorted([here.digest, "manifest-13", "manifest-x"])


def test_reset_forgets_it(here: Here) -> None:
    here.lay_out(aged=60)
    known_as_half(here)
    done = run(here.store.path, "reset", "--offline", "--yes", "half")
    assert done.returncode == 0, done.stderr
    assert "removed 5.0 MB of 1 unfinished layer" in done.stdout
    assert not here.folder.exists()


# ---------------------------------------------------------------- giving it back


def test_given_back_it_is_a_download_of_the_servers(here: Here) -> None:
    here.lay_out()
    (outcome,) = here.run(GIVE).outcomes
    assert outcome.result is Result.DONE, outcome.message
    assert here.claimed() == [*DURABLE, *ARRIVED]
    data = here.store.partial(here.digest)
    status = data.stat()
    assert (status.st_size, stat.S_IMODE(status.st_mode)) == (len(CONTENT), 0o644)
    assert time.time() - status.st_mtime < 60, "a start spares it for an hour"
    for start, end in (*DURABLE, *ARRIVED):
        assert data.read_bytes()[start:end] == CONTENT[start:end]
    assert not here.folder.exists()
    (found,) = here.look().diagnosis.diagnosed
    assert (found.condition, found.download.ours) == (Condition.PAUSED, False)
    kinds = [each["event_type"] for each in here.store.events()]
    assert kinds == ["partial_found", "act_started", "download_repaired"]
    assert not here.run(GIVE).outcomes


def _a_partial(here: Here) -> RefusalKind:
    here.partial()
    return RefusalKind.CHANGED


def _a_finished_blob(here: Here) -> RefusalKind:
    path = here.store.blobs / f"sha256-{here.digest}"
    path.write_bytes(CONTENT)
    return RefusalKind.CHANGED


def _nothing_believed(here: Here) -> RefusalKind:
    (here.folder / "ledger").write_text("{")
    return RefusalKind.UNKNOWN


@pytest.mark.parametrize("why", [_a_partial, _a_finished_blob, _nothing_believed])
def test_a_transfer_that_must_not_be_given_back_is_refused_and_unchanged(
    here: Here, why: Callable[[Here], RefusalKind]
) -> None:
    here.lay_out()
    kind = why(here)
    before = content(here.store.blobs), content(here.folder)
    report = here.run(GIVE)
    assert refusals(report) == [kind]
    assert not report.outcomes
    assert (content(here.store.blobs), content(here.folder)) == before


@needs_root
def test_what_the_servers_user_could_not_write_is_not_given_back(here: Here) -> None:
    here.lay_out()
    for path in (here.store.path, *here.store.path.rglob("*")):
        os.chown(path, 12345, 12345)
    os.chown(here.data, 0, 0)
    done = run(here.store.path, "repair", "--give-back", "--yes", "--json")
    assert done.returncode == 3
    (refusal,) = json.loads(done.stdout)["plan"]["refusals"]
    assert refusal["kind"] == "owner"
    subprocess.run(shlex.split(refusal["command"]), check=True)
    done = run(here.store.path, "repair", "--give-back", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.stat().st_uid for path in here.store.blobs.iterdir()} == {12345}


def test_a_members_data_in_a_group_is_not_given_back(here: Here) -> None:
    """The member could write the progress files, and the server could not write the data."""
    here.lay_out()
    report = here.look()
    (mine,) = report.diagnosis.diagnosed
    place = report.evidence.place._replace(owner=os.geteuid() + 1)
    evidence = report.evidence._replace(place=place)
    refusal = repairing.give_back(mine, evidence)
    assert isinstance(refusal, Refusal)
    assert refusal.kind is RefusalKind.OWNER


def test_a_partial_that_appears_meanwhile_stops_it(here: Here) -> None:
    here.lay_out()

    def appears(planned: Any) -> Any:
        here.partial()
        return planned

    (outcome,) = here.run(GIVE, approve=appears).outcomes
    assert outcome.result is Result.REFUSED
    assert here.data.exists()
    assert not list(here.store.ours.glob("intents/*"))


def test_a_partial_that_appears_beside_the_guard_stops_it(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once nothing is planned any more: a server had looked before the guard came."""
    here.lay_out()
    real = transaction._put_guard

    def put(*words: Any) -> None:
        real(*words)
        here.store.partial(here.digest).write_bytes(b"")

    monkeypatch.setattr(transaction, "_put_guard", put)
    (outcome,) = here.run(GIVE).outcomes
    assert outcome.result is Result.REFUSED
    assert here.data.exists()
    assert [path.name for path in here.partial_files()] == [f"sha256-{here.digest}-partial"]


def test_bytes_that_are_doubted_at_the_last_moment_are_not_claimed(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong hash, say: it takes marks back and leaves the data as it is."""
    here.lay_out()
    real = fs.open_data

    def opens(name: str, parent: int) -> int:
        _ledger(durable=[[0, 1_000_000]])(here)
        return real(name, parent)

    monkeypatch.setattr(fs, "open_data", opens)
    (outcome,) = here.run(GIVE).outcomes
    assert outcome.result is Result.REFUSED
    assert here.data.exists()


def test_our_own_pulls_are_no_news(here: Here) -> None:
    """A pull of ours logs what it does: a daemon that looks on adds nothing."""
    with held(here.lay_out()):
        here.run(changed(LOOK, clean=False, repair=False))
        here.run(changed(LOOK, clean=False, repair=False))
    assert here.store.events() == []
    here.run(changed(LOOK, clean=False, repair=False))
    assert [each["event_type"] for each in here.store.events()] == ["partial_found"]
    shutil.rmtree(here.folder)
    (here.store.blobs / f"sha256-{here.digest}").write_bytes(CONTENT)
    here.run(changed(LOOK, clean=False, repair=False))
    kinds = [each["event_type"] for each in here.store.events()]
    assert not {"download_completed", "partial_removed"} & set(kinds)


def test_a_pull_that_ends_before_the_first_byte_of_a_layer_is_no_news(here: Here) -> None:
    here.folder.mkdir(parents=True)
    here.data.touch()
    (here.folder / "lock").touch(0o600)
    with held(here.folder):
        here.run(changed(LOOK, clean=False, repair=False))
    here.run(changed(LOOK, clean=False, repair=False))
    assert here.store.events() == []


def test_bytes_that_the_disk_refuses_are_not_claimed(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second try must not take for synced what the first could not bring to the disk."""
    here.lay_out()
    real = fs.make_blob

    def refuses(fd: int, blobs: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fs, "make_blob", refuses)
    (outcome,) = here.run(GIVE).outcomes
    assert outcome.result is Result.FAILED
    monkeypatch.setattr(fs, "make_blob", real)
    assert here.seen().download.trust.present == DURABLE
    (outcome,) = here.run(GIVE).outcomes
    assert outcome.result is Result.DONE
    assert here.claimed() == list(DURABLE)


def test_data_is_on_the_disk_before_anything_claims_it(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.lay_out()
    calls: list[str] = []

    def spied(what: str) -> None:
        real = getattr(fs, what)

        def call(name: object, *words: Any, **more: Any) -> Any:
            calls.append(f"{what} {str(name)[-9:]}" if isinstance(name, str) else what)
            return real(name, *words, **more)

        monkeypatch.setattr(fs, what, call)

    for what in ("make_blob", "move", "replace", "sync"):
        spied(what)
    here.run(GIVE)
    wanted = ["make_blob", "move guard", "move data", "replace partial-1", "replace partial-0"]
    assert [each for each in calls if each in wanted] == wanted
    moved = calls.index("move data")
    assert calls[moved + 1] == "sync", "its name, before the claims"


def test_what_was_cut_short_is_finished_beside_a_new_transfer(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has begun to fetch the layer meanwhile: what is theirs is left alone."""
    here.lay_out()
    real = fs.replace

    def fails(name: str, *words: Any) -> None:
        if name.endswith("-partial-1"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(name, *words)

    monkeypatch.setattr(fs, "replace", fails)
    (outcome,) = here.run(GIVE).outcomes
    assert outcome.result is Result.FAILED
    assert not here.data.exists()
    monkeypatch.undo()
    with held(here.folder):
        here.data.touch()
        report = here.run(changed(GIVE, give_back=False))
        assert [each.event_type for each in report.events][:1] == ["recovered"]
        assert sorted(path.name for path in here.folder.iterdir()) == sorted(
            ["arrived", "data", "ledger", "lock"]
        )
    assert here.claimed() == [*DURABLE, *ARRIVED]
    here.run(CLEAN)
    assert not here.folder.exists()


def test_a_hard_link_to_it_keeps_it_ours(here: Here, tmp_path: Path) -> None:
    """Its mode and its times would change with it, wherever that other name is."""
    here.lay_out()
    os.link(here.data, tmp_path / "another")
    (outcome,) = here.run(GIVE).outcomes
    assert outcome.result is Result.FAILED
    assert "second name" in outcome.message
    assert here.data.exists()


def test_a_transfer_that_a_process_reads_is_given_back(here: Here) -> None:
    here.lay_out()
    with holding(here.data):
        (outcome,) = here.run(GIVE).outcomes
    assert outcome.result is Result.DONE


@pytest.mark.parametrize("dense", [False, True])
def test_bytes_that_a_power_cut_may_have_lost_are_not_claimed_by_a_repair(
    here: Here, dense: bool
) -> None:
    """`dense`: on a file system without holes."""
    here.lay_out()
    log = here.folder / "arrived"
    log.write_text(log.read_text().replace(log.read_text().split("\n")[0], "another start"))
    if dense:
        here.data.write_bytes(here.data.read_bytes())
    assert here.run(GIVE).outcomes
    for path in here.partial_files():
        age(path, HOUR)
    here.run(rules(repair=True, writers_visible=True))
    assert here.claimed() == list(DURABLE)


def test_the_command_gives_back(here: Here) -> None:
    here.lay_out()
    done = run(here.store.path, "repair", "--give-back", "--dry-run")
    assert done.returncode == 1
    assert here.data.exists()
    done = run(here.store.path, "repair", "--give-back", "--yes", here.digest[:12])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "back to the server" in done.stdout
    assert here.claimed() == [*DURABLE, *ARRIVED]

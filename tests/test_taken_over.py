"""What a server has left becomes a transfer of ours: when it may, and what is kept of both."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import HealthyStore, content, holding, host, private_proc
from tests.support.runs import one_look, one_run, rules
from tests.support.servers import EngineServer
from tests.support.transfers import folder, held, lay_out
from watcher.act import durability
from watcher.model import HOUR, ActionKind, Condition, Outcome, Ranges, RefusalKind, Result
from watcher.ollama import ranges
from watcher.reconcile import Report
from watcher.state import fs, transfers

TAKE = rules(repair=False, clean=False, take_over=True, writers_visible=True)


class Here:
    """A store with one download of a server's in it."""

    def __init__(self, tmp_path: Path) -> None:
        self.store = HealthyStore(tmp_path / "models")
        proc = Path(private_proc(tmp_path / "proc"))
        (proc / "sys").symlink_to("/proc/sys")
        self.host = host(self.store, str(proc))
        self.digest = self.store.download("left", aged=2 * HOUR)
        self.data = self.store.partial(self.digest)
        self.bytes = self.data.read_bytes()
        (left,) = self.look().diagnosis.diagnosed
        self.trusted = left.download.trust.trusted
        self.before = content(self.store.blobs)

    @property
    def ours(self) -> Path:
        return folder(self.store.path, self.digest)

    def look(self) -> Report:
        return one_look(self.host, TAKE)

    def run(self, **more: Any) -> Report:
        return one_run(self.host, TAKE, **more)

    def outcome(self, **more: Any) -> Outcome:
        (outcome,) = self.run(**more).outcomes
        return outcome

    def assert_untouched(self) -> None:
        assert content(self.store.blobs) == self.before
        assert list(self.store.ours.glob("intents/*")) == []

    def ledger(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.ours / "ledger").read_bytes())
        return found

    def assert_taken(self) -> None:
        assert self.store.partials(self.digest) == []
        assert (self.ours / "data").read_bytes() == self.bytes
        told = self.ledger()
        wanted = [list(each) for each in self.trusted]
        assert (told["durable"], told["taken"], told["total"]) == (wanted, wanted, len(self.bytes))


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


def test_it_is_the_same_file_with_all_that_is_trusted(here: Here) -> None:
    inode = here.data.stat().st_ino
    outcome = here.outcome()
    assert (outcome.action.kind, outcome.result) == (ActionKind.TAKE_OVER, Result.DONE)
    here.assert_taken()
    assert (here.ours / "data").stat().st_ino == inode
    (found,) = here.look().diagnosis.diagnosed
    assert (found.condition, found.download.ours) == (Condition.TRANSFER, True)
    assert found.download.trust.trusted == here.trusted


def test_what_had_arrived_beside_a_damaged_ledger_is_not_said_of_its_data(here: Here) -> None:
    size = len(here.bytes)
    ours = lay_out(here.store.path, here.digest, here.bytes, arrived=((0, size),))
    (ours / "ledger").write_text("damaged")
    assert here.outcome().result is Result.DONE
    (found,) = here.look().diagnosis.diagnosed
    assert found.download.trust.trusted == here.trusted != ((0, size),)


def test_taking_over_is_logged_as_one_act_that_begins_and_ends(here: Here) -> None:
    """Nobody has removed a download, and none was found."""
    one_run(here.host, rules(repair=False, clean=False))
    before = len(here.store.events())
    here.run()
    types = [each["event_type"] for each in here.store.events()][before:]
    assert types == ["act_started", "download_repaired"]
    assert {each["details"]["verb"] for each in here.store.events()[before:]} == {"take_over"}
    assert here.run().events == ()


# ---------------------------------------------------------------- when it may


def test_a_download_that_a_process_reads_is_not_taken_over(here: Here) -> None:
    with holding(here.data) as pid:
        visible = one_run(host(here.store), TAKE)
    assert [each.kind for each in visible.plan.refusals] == [RefusalKind.HELD]
    assert str(pid) in visible.plan.refusals[0].why
    here.assert_untouched()


def test_a_download_that_a_process_opens_after_the_plan_is_not_taken_over(here: Here) -> None:
    with holding(here.data):
        (outcome,) = one_run(
            here.host, TAKE, approve=lambda planned: _seen_from_here(here, planned)
        ).outcomes
    assert outcome.refusal
    assert outcome.refusal.kind is RefusalKind.HELD
    here.assert_untouched()


def _seen_from_here(here: Here, planned: Any) -> Any:
    """From now on every process is visible."""
    proc = Path(here.host.proc)
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and not (proc / path.name).exists():
            (proc / path.name).symlink_to(path)
    return planned


def _links(here: Here) -> None:
    os.link(here.data, here.store.path / "another")


def _locks(here: Here) -> None:
    here.data.chmod(0o444)


@pytest.mark.parametrize("spoil", [_links, _locks])
def test_what_we_could_not_write_to_alone_is_not_ours(
    here: Here, spoil: Callable[[Here], None]
) -> None:
    spoil(here)
    before = content(here.store.blobs)
    (refusal,) = here.run().plan.refusals
    assert refusal.kind in (RefusalKind.LINKED, RefusalKind.PERMISSION)
    assert refusal.seconds_left is None
    assert content(here.store.blobs) == before


def test_beside_a_running_server_it_has_to_be_quiet(here: Here) -> None:
    for path in here.store.blobs.glob(f"sha256-{here.digest}-partial*"):
        os.utime(path)
    with EngineServer(here.store.path) as server:
        server.start().wait_ready()
        (refusal,) = one_look(host(here.store), TAKE).plan.refusals
    assert refusal.kind is RefusalKind.NOT_QUIET
    assert 80 < (refusal.seconds_left or 0) <= 90
    assert here.run().outcomes[0].result is Result.DONE  # without one it need not


# ---------------------------------------------------------------- beside bytes of ours


def ours(here: Here, durable: Ranges, taken: Ranges = ()) -> None:
    lay_out(here.store.path, here.digest, here.bytes, durable, taken=taken)


def test_what_was_copied_of_it_is_given_up_for_it(here: Here) -> None:
    start, end = here.trusted[0]
    copied = ((start, end // 2),)
    ours(here, copied, copied)
    assert here.outcome().result is Result.DONE
    here.assert_taken()


@pytest.mark.parametrize("inside", [True, False])
def test_bytes_that_we_have_fetched_are_not_given_up(here: Here, inside: bool) -> None:
    """Not even for those of the server: they may be wrong, and ours are right then."""
    start, end = here.trusted[0]
    ours(here, ((start, end // 2),) if inside else ((end, end + 1000),))
    before = content(here.ours)
    outcome = here.outcome()
    assert outcome.result is Result.REFUSED
    assert outcome.refusal
    assert outcome.refusal.kind is RefusalKind.CHANGED
    here.assert_untouched()
    assert {**content(here.ours), "lock": 0}.keys() >= before.keys()
    assert here.ledger()["taken"] == []


def test_while_somebody_fetches_the_layer_it_stays(here: Here) -> None:
    ours(here, ())
    with held(here.ours):
        outcome = here.outcome()
    assert outcome.refusal
    assert outcome.refusal.kind is RefusalKind.HELD
    here.assert_untouched()


# ---------------------------------------------------------------- on the disk


def test_the_data_is_on_the_disk_before_anything_claims_it(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def spied(module: Any, what: str) -> None:
        real = getattr(module, what)

        def call(name: object, *words: Any, **more: Any) -> Any:
            calls.append(f"{what} {name[-8:]}" if isinstance(name, str) else what)
            return real(name, *words, **more)

        monkeypatch.setattr(module, what, call)

    for what in ("data_synced", "replace", "sync"):
        spied(fs, what)
    here.run()
    steps = ["data_synced", "replace -partial", "sync", "replace ledger", "sync"]
    at = [calls.index("data_synced"), *range(calls.index("replace -partial"), len(calls))]
    assert [calls[each] for each in at[:5]] == steps


def test_what_the_disk_refuses_is_not_taken_over(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(
        durability, "write_back", lambda *_: iter([durability.Written(error=error)])
    )
    assert here.outcome().result is Result.FAILED
    here.assert_untouched()


def test_a_stop_while_it_is_brought_to_the_disk_changes_nothing(here: Here) -> None:
    asked = iter(range(10**6))
    report = here.run(stop=lambda: next(asked) > 3)
    assert [each for each in report.outcomes if each.result is Result.DONE] == []
    here.assert_untouched()


def cut_short_before_the_ledger(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data is ours by then, and nothing says what is right of it."""
    real = fs.replace

    def fails(name: str, *words: Any) -> None:
        if name == transfers.LEDGER:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(name, *words)

    monkeypatch.setattr(fs, "replace", fails)
    assert here.outcome().result is Result.FAILED
    monkeypatch.undo()


def test_a_ledger_is_put_beside_its_own_data_alone(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short behind the data, and then somebody has removed what was there, and begun anew."""
    cut_short_before_the_ledger(here, monkeypatch)
    data = here.ours / "data"
    (here.ours / "old").write_bytes(b"")  # so that the inode is not used again at once
    data.rename(here.ours / "kept")
    data.write_bytes(bytes(len(here.bytes)))
    report = here.run()
    assert [each.event_type for each in report.events][:1] == ["recovered"]
    assert not (here.ours / "ledger").exists()


def test_what_was_cut_short_is_finished_by_the_next_run(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a server has begun anew meanwhile: its download is left alone."""
    cut_short_before_the_ledger(here, monkeypatch)
    here.data.write_bytes(b"new")
    with holding(here.data, "r+b"):
        report = one_run(host(here.store), rules(repair=False, clean=False))
    assert not report.stuck
    assert here.data.read_bytes() == b"new"
    here.data.unlink()
    here.assert_taken()
    assert ranges.size(here.trusted) > 0

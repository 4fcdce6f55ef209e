"""Somebody opens, changes or replaces a file at the worst instant of its removal."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.support.driving import (
    POLICY,
    HealthyStore,
    content,
    holding,
    host,
    ollama_process,
    once,
    run,
)
from tests.support.runs import one_look, one_run, rules
from watcher import reconcile
from watcher.model import HOUR, Approve, Plan, Refusal, RefusalKind, Result, Rules
from watcher.reconcile import Report
from watcher.state import fs

Mode = Literal["rb", "r+b"]


@pytest.fixture
def store(tmp_path: Path) -> HealthyStore:
    made = HealthyStore(tmp_path / "models")
    made.download("a young download", aged=3600)
    return made


class Moment:
    """An instant of a removal, at which something else happens: once."""

    def __init__(self, patch: pytest.MonkeyPatch, store: HealthyStore) -> None:
        self._patch, self._store = patch, store
        self._stack = contextlib.ExitStack()
        self.came = False
        self._tell: Callable[[object], None] = lambda _: None
        self._approve: Approve = reconcile.approve_all

    def clean(self) -> Report:
        """Remove what is worth nothing; the instant must have come."""
        report = self.act(POLICY)
        assert self.came
        return report

    def act(self, policy: Rules, **more: Any) -> Report:
        """A cycle in a world that may be another one."""
        with self._stack:
            here = host(self._store, report=self._tell, **more)
            return one_run(here, policy, approve=self._approve)

    def before_the_act_is_planned_again(self, act: Callable[[], object]) -> None:
        """When the plan has been agreed to."""

        def approve(planned: Plan) -> Plan:
            assert planned.actions
            self._noted(act)()
            return planned

        self._approve = approve

    def before_acting(self, act: Callable[[], object]) -> None:
        """After the last plan, before anything is changed."""
        hook = once(self._noted(act))

        def tell(event: Any) -> None:
            if event.event_type == "act_started":
                hook()

        self._tell = tell

    def before(self, call: str, name: str, act: Callable[[], object]) -> None:
        """Before the first call of a function of `files` for a file of that name."""
        self._around(call, name, act, after=False)

    def after(self, call: str, name: str, act: Callable[[], object]) -> None:
        """After it."""
        self._around(call, name, act, after=True)

    def hold(self, path: Path, mode: Mode) -> Callable[[], object]:
        """To do at the instant: a process opens a file, and has it open until the end."""
        return lambda: self._stack.enter_context(holding(path, mode))

    def run_ollama(self, folder: Path) -> Callable[[], object]:
        """To do at the instant: a client of Ollama's starts."""
        return lambda: self._stack.enter_context(ollama_process(folder))

    def _around(self, call: str, name: str, act: Callable[[], object], *, after: bool) -> None:
        real, hook = getattr(fs, call), once(self._noted(act))

        def called(given: str, *words: Any, **more: Any) -> Any:
            if given == name and not after:
                hook()
            result = real(given, *words, **more)
            if given == name and after:
                hook()
            return result

        self._patch.setattr(fs, call, called)

    def _noted(self, act: Callable[[], object]) -> Callable[[], object]:
        def noted() -> object:
            self.came = True
            return act()

        return noted


@pytest.fixture
def moment(monkeypatch: pytest.MonkeyPatch, store: HealthyStore) -> Moment:
    return Moment(monkeypatch, store)


def refusal(report: Report) -> Refusal:
    """The one refusal that came of a cycle."""
    (outcome,) = report.outcomes
    assert outcome.result is Result.REFUSED, outcome
    assert outcome.refusal is not None
    return outcome.refusal


# ---------------------------------------------------------------- a file is opened

DOWNLOAD_INSTANTS = {
    "before the guard": ("before", "second_name", 0),
    "under the guard, before the data goes": ("before", "move", None),
    "between the data and a sidecar": ("before", "move", 1),
}


def test_a_holder_since_the_plan_was_approved_is_reported(
    store: HealthyStore,
) -> None:
    path = store.partial(store.download("stale"))
    with contextlib.ExitStack() as opened:

        def approve(planned: Plan) -> Plan:
            opened.enter_context(holding(path))
            return planned

        refused = refusal(one_run(host(store), POLICY, approve=approve))
    assert refused.kind is RefusalKind.HELD
    assert f"has {path.name} open" in refused.why
    assert path.exists()


def test_an_action_that_another_process_did_since_the_approval_is_reported_once(
    store: HealthyStore,
) -> None:
    path = store.partial(store.download("stale"))

    def approve(planned: Plan) -> Plan:
        assert run(store.path, "clean", "--yes").returncode == 0
        return planned

    assert refusal(one_run(host(store), POLICY, approve=approve)).kind is RefusalKind.CHANGED
    assert not path.exists()
    told = store.event_types()
    assert (told.count("partial_cleaned"), told.count("refused")) == (1, 0)


def test_times_that_somebody_else_of_us_has_set_since_are_no_files_own(tmp_path: Path) -> None:
    """Two repairs at once: the second one knows the first one's times for what they are."""
    here = HealthyStore(tmp_path / "models")
    here.download("resumable", aged=7200)
    refresh = rules(refresh=True)

    def approve(planned: Plan) -> Plan:
        assert one_run(host(here), refresh).outcomes
        return planned

    assert one_run(host(here), refresh, approve=approve).outcomes
    (seen,) = one_look(host(here), refresh).evidence.downloads
    age = time.time() - max(each.changed_at for each in seen.entries)
    assert 7200 <= age < 7200 + HOUR


def test_a_full_disk_is_reported_with_what_helps(
    store: HealthyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.download("stale")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("create_all", "save", "save_all"):
        monkeypatch.setattr(fs, name, full)
    report = one_run(host(store), POLICY)
    (outcome,) = report.outcomes
    reason = "No space left on device; free space on that file system"
    assert outcome.message == f"{reason}, or make room by hand, while no server runs:"
    assert outcome.command.startswith(f"rm {store.blobs}/sha256-")
    assert f"state.json can't be written: {reason}" in report.warnings


@pytest.mark.parametrize("mode", ["rb", "r+b"])
@pytest.mark.parametrize("instant", DOWNLOAD_INSTANTS)
def test_a_download_that_is_opened_meanwhile_is_put_back(
    instant: str, mode: Mode, store: HealthyStore, moment: Moment
) -> None:
    digest = store.download("stale")
    when, call, number = DOWNLOAD_INSTANTS[instant]
    before = store.tree()
    path = store.partial(digest, number)
    getattr(moment, when)(call, path.name, moment.hold(path, mode))
    refused = refusal(moment.clean())
    assert refused.kind is RefusalKind.HELD
    assert "sleep (" in refused.why
    assert store.tree() == before
    assert store.leftovers() == []
    one_run(host(store), POLICY)
    assert store.partials(digest) == []


@pytest.mark.parametrize("mode", ["rb", "r+b"])
def test_a_transfer_that_is_opened_meanwhile_is_put_back(
    mode: Mode, store: HealthyStore, moment: Moment
) -> None:
    path = store.file(f"sha256-{store.digest('transfer')}.tmp")
    before = store.tree()
    moment.before("move", path.name, moment.hold(path, mode))
    refused = refusal(moment.clean())
    assert refused.kind is RefusalKind.HELD
    assert "sleep (" in refused.why
    assert store.tree() == before


@pytest.mark.parametrize("mode", ["rb", "r+b"])
def test_only_the_opened_files_of_a_batch_are_put_back(
    mode: Mode, store: HealthyStore, moment: Moment
) -> None:
    orphans = [store.blobs / f"sha256-{store.text_blob(f'orphan {n}')}" for n in range(3)]
    held = orphans[1]
    before = content(store.blobs)[f"blobs/{held.name}"]
    moment.before("move", held.name, moment.hold(held, mode))
    report = moment.clean()
    results = {outcome.action.subject: outcome.result for outcome in report.outcomes}
    assert results.pop(held.name) is Result.REFUSED
    assert set(results.values()) == {Result.DONE}
    assert [path.exists() for path in orphans] == [False, True, False]
    assert content(store.blobs)[f"blobs/{held.name}"] == before


def test_the_refusal_of_a_held_orphan_names_who_has_it(store: HealthyStore, moment: Moment) -> None:
    orphan = store.blobs / f"sha256-{store.text_blob('orphan')}"
    moment.before("move", orphan.name, moment.hold(orphan, "rb"))
    refused = refusal(moment.clean())
    assert refused.kind is RefusalKind.HELD
    assert "sleep (" in refused.why


def test_nothing_is_put_back_over_a_new_file(store: HealthyStore, moment: Moment) -> None:
    """A pull began anew under the old name while the data was out: both stay."""
    digest = store.download("stale", parts=0)
    data = store.partial(digest)
    old = data.read_bytes()

    def begin_anew() -> None:
        moment.hold(data, "rb")()

    moment.before("move", data.name, begin_anew)
    real = fs.move

    def move(name: str, *words: Any, **more: Any) -> None:
        real(name, *words, **more)
        if name == data.name and not data.exists():
            data.write_bytes(b"new")

    moment._patch.setattr(fs, "move", move)
    assert moment.clean().outcomes[0].result is Result.REFUSED
    assert data.read_bytes() == b"new"
    kept = [path for path in store.path.rglob("*") if path.is_file() and path != data]
    assert old in [path.read_bytes() for path in kept]


# ---------------------------------------------------------------- a file changes


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _new_sidecar(store: HealthyStore, digest: str) -> None:
    store.partial(digest, 7).write_text("{}")


#: Makes something happen at an instant of the removal of a file of that name.
Instant = Callable[[Moment, str, Callable[[], object]], None]

INSTANTS: dict[str, Instant] = {
    "before acting": lambda moment, _, act: moment.before_acting(act),
    "under the guard": lambda moment, _, act: moment.after("replace", "guard", act),
    "just before it moves": lambda moment, name, act: moment.before("move", name, act),
}


@pytest.mark.parametrize("instant", INSTANTS)
@pytest.mark.parametrize("number", [None, 1])
def test_a_download_that_changes_meanwhile_stays(
    instant: str, number: int | None, store: HealthyStore, moment: Moment
) -> None:
    digest = store.download("stale")
    path = store.partial(digest, number)
    names = store.partials(digest)
    INSTANTS[instant](moment, path.name, lambda: _grow(path))
    assert refusal(moment.clean()).kind is RefusalKind.CHANGED
    assert store.partials(digest) == names
    assert path.read_bytes().endswith(b"more")
    assert store.leftovers() == []


@pytest.mark.parametrize("instant", ["before acting", "under the guard"])
def test_a_download_that_gets_a_new_sidecar_meanwhile_stays(
    instant: str, store: HealthyStore, moment: Moment
) -> None:
    digest = store.download("stale")
    names = store.partials(digest)
    INSTANTS[instant](moment, "", lambda: _new_sidecar(store, digest))
    assert refusal(moment.clean()).kind is RefusalKind.CHANGED
    assert store.partials(digest) == sorted([*names, store.partial(digest, 7).name])


def test_sidecars_that_get_their_data_meanwhile_stay(store: HealthyStore, moment: Moment) -> None:
    digest = store.download("sidecars alone")
    data = store.partial(digest)
    data.unlink()
    moment.after("replace", "guard", lambda: data.write_bytes(b"data"))
    assert refusal(moment.clean()).kind is RefusalKind.CHANGED
    assert data.read_bytes() == b"data"


def test_data_that_gets_its_first_sidecar_meanwhile_stays(
    store: HealthyStore, moment: Moment
) -> None:
    """The guard's name is taken by the time that it is put there."""
    digest = store.download("unclaimed", parts=0)
    sidecar = store.partial(digest, 0)
    moment.before("move", "guard", lambda: sidecar.write_text("{}"))
    assert refusal(moment.clean()).kind is RefusalKind.CHANGED
    assert store.partials(digest) == [store.partial(digest).name, sidecar.name]
    assert sidecar.read_text() == "{}"


def test_a_sidecar_written_over_the_guard_stays(store: HealthyStore, moment: Moment) -> None:
    """A pull that had seen no sidecar at all writes its own."""
    digest = store.download("stale")
    guard = store.partial(digest, 0)
    original = guard.read_bytes()
    moment.after("replace", "guard", lambda: guard.write_text('{"N":0,"Size":5}'))
    assert refusal(moment.clean()).kind is RefusalKind.CHANGED
    assert guard.read_text() == '{"N":0,"Size":5}'
    kept = (store.ours / "quarantine").iterdir()
    assert [path.read_bytes() for path in kept] == [original]


@pytest.mark.parametrize("kind", ["download", "orphan"])
def test_a_file_that_vanishes_meanwhile_is_a_refusal_and_no_failure(
    kind: str, store: HealthyStore, moment: Moment
) -> None:
    if kind == "orphan":
        path = store.blobs / f"sha256-{store.text_blob('orphan')}"
    else:
        path = store.partial(store.download("stale"))
    moment.before("move", path.name, path.unlink)
    assert refusal(moment.clean()).kind is RefusalKind.CHANGED
    assert store.leftovers() == []


def test_an_orphan_that_vanishes_meanwhile_stops_no_other(
    store: HealthyStore, moment: Moment
) -> None:
    orphans = [store.blobs / f"sha256-{store.text_blob(f'orphan {n}')}" for n in range(3)]
    moment.before("move", orphans[1].name, orphans[1].unlink)
    report = moment.clean()
    assert sum(outcome.result is Result.DONE for outcome in report.outcomes) == 2
    assert not any(path.exists() for path in orphans)


# ---------------------------------------------------------------- links


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder outside of the store, which must stay as it is, to its time of change."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("precious")
    os.utime(folder, (1e9, 1e9))
    before, changed = content(folder), folder.stat().st_ctime_ns
    yield folder
    assert content(folder) == before
    assert folder.stat().st_ctime_ns == changed


@pytest.mark.parametrize("instant", INSTANTS)
@pytest.mark.parametrize("how", [os.symlink, os.link])
def test_a_link_put_in_the_way_is_not_followed(
    instant: str,
    how: Callable[[Path, Path], None],
    store: HealthyStore,
    moment: Moment,
    outside: Path,
) -> None:
    digest = store.download("stale")
    data = store.partial(digest)
    aside = store.path / "aside"

    def swap() -> None:
        data.rename(aside)
        how(outside / "precious", data)

    INSTANTS[instant](moment, data.name, swap)
    assert refusal(moment.clean()).kind is RefusalKind.CHANGED
    assert data.read_text() == "precious"
    assert aside.exists()
    data.unlink()


@pytest.mark.parametrize("folder", [".ollama-watch", "intents", "logs", "quarantine"])
def test_our_own_folder_may_be_no_link(
    folder: str, store: HealthyStore, tmp_path: Path, outside: Path
) -> None:
    digest = store.download("stale")
    one_run(host(store), POLICY, approve=reconcile.approve_none)
    place = store.ours if folder == ".ollama-watch" else store.ours / folder
    if place.exists():
        place.rename(tmp_path / "away")
    place.symlink_to(outside)
    with contextlib.suppress(Exception):
        one_run(host(store), POLICY)
    assert len(store.partials(digest)) in (0, 4)
    place.unlink()


@pytest.mark.parametrize("parts", [0, 3])
def test_blobs_replaced_by_a_link_meanwhile_touches_nothing_there(
    parts: int, store: HealthyStore, moment: Moment, outside: Path
) -> None:
    store.download("stale", parts=parts)
    away = store.path / "blobs.away"

    def swap() -> None:
        store.blobs.rename(away)
        store.blobs.symlink_to(outside)

    before = {name: entry[1:] for name, entry in content(store.blobs).items()}
    moment.before_acting(swap)
    assert refusal(moment.clean()).kind is RefusalKind.CHANGED
    store.blobs.unlink()
    away.rename(store.blobs)
    assert {name: entry[1:] for name, entry in content(store.blobs).items()} == before


def test_a_second_hard_link_meanwhile_keeps_the_bytes(
    store: HealthyStore, moment: Moment, tmp_path: Path
) -> None:
    digest = store.download("stale")
    data, other = store.partial(digest), tmp_path / "second"
    moment.before("move", data.name, lambda: other.hardlink_to(data))
    (outcome,) = moment.clean().outcomes
    assert outcome.result is Result.DONE
    assert outcome.freed < data_size(other)
    assert other.read_bytes()


def data_size(path: Path) -> int:
    """Bytes allocated."""
    return path.stat().st_blocks * 512


# ---------------------------------------------------------------- bytes freed


def test_a_file_with_a_second_name_elsewhere_frees_nothing(
    store: HealthyStore, tmp_path: Path
) -> None:
    digest = store.download("stale")
    (tmp_path / "second").hardlink_to(store.partial(digest))
    sidecars = sum(data_size(store.partial(digest, number)) for number in range(3))
    report = one_run(host(store), POLICY)
    assert (report.plan.frees, report.outcomes[0].freed) == (sidecars, sidecars)


def test_two_names_of_one_file_that_both_go_free_it_once(store: HealthyStore) -> None:
    """Such as a blob and the hard link to it that `ollama create` leaves."""
    orphan = store.blobs / f"sha256-{store.text_blob('orphan')}"
    (store.blobs / "split-copy77").hardlink_to(orphan)
    size = data_size(orphan)
    report = one_run(host(store), POLICY)
    assert [outcome.result for outcome in report.outcomes] == [Result.DONE] * 2
    assert sum(outcome.freed for outcome in report.outcomes) == size


# ---------------------------------------------------------------- orphans and who may want them

ORPHAN_INSTANTS: dict[str, Instant] = {
    "between plan and act": lambda moment, _, act: moment.before_the_act_is_planned_again(act),
    "before acting": lambda moment, _, act: moment.before_acting(act),
    "just before it moves": lambda moment, name, act: moment.before("move", name, act),
    "just after it moved": lambda moment, name, act: moment.after("move", name, act),
}


@pytest.mark.parametrize("instant", ORPHAN_INSTANTS)
def test_an_orphan_that_a_manifest_names_meanwhile_stays(
    instant: str, store: HealthyStore, moment: Moment
) -> None:
    digest = store.text_blob("orphan")
    orphan = store.blobs / f"sha256-{digest}"
    wanted = content(store.blobs)[f"blobs/{orphan.name}"]
    manifest = store.manifest_of("late", digest, store.digests[1])
    text = manifest.read_text()
    manifest.unlink()
    ORPHAN_INSTANTS[instant](moment, orphan.name, lambda: manifest.write_text(text))
    assert refusal(moment.clean()).kind is RefusalKind.CHANGED
    assert content(store.blobs)[f"blobs/{orphan.name}"] == wanted


@pytest.mark.parametrize("instant", ORPHAN_INSTANTS)
def test_an_orphan_stays_when_an_ollama_process_starts_meanwhile(
    instant: str, store: HealthyStore, moment: Moment, tmp_path: Path
) -> None:
    """Its pull may have looked for the blob already, and found it."""
    orphan = store.blobs / f"sha256-{store.text_blob('orphan')}"
    before = content(store.blobs)
    ORPHAN_INSTANTS[instant](moment, orphan.name, moment.run_ollama(tmp_path))
    assert refusal(moment.clean())
    assert content(store.blobs) == before


@pytest.mark.parametrize("what", ["orphan", "split-copy1"])
def test_orphans_and_leftovers_stay_while_an_ollama_process_runs(
    what: str, store: HealthyStore, tmp_path: Path
) -> None:
    path = store.file(what if what != "orphan" else f"sha256-{store.digest('orphan')}")
    with ollama_process(tmp_path):
        report = one_run(host(store), POLICY)
    assert [each.kind for each in report.plan.refusals] == [RefusalKind.SERVER_RUNS]
    assert report.plan.refusals[0].remedy.startswith("stop the server")
    assert path.exists()


# ---------------------------------------------------------------- a plan that waits


def test_a_plan_that_was_agreed_to_an_hour_later_is_carried_out(store: HealthyStore) -> None:
    """Somebody left the question unanswered for a while; nothing has changed but the time."""
    digest = store.download("stale")
    late = [0.0]

    def approve(planned: Any) -> Any:
        late[0] = 3600.0
        return planned

    here = host(store, clock=lambda: time.time() + late[0])
    report = one_run(here, POLICY, approve=approve)
    assert [outcome.result for outcome in report.outcomes] == [Result.DONE]
    assert store.partials(digest) == []

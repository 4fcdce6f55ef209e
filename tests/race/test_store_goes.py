"""The store is moved, unmounted or made read-only in the middle of an act."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import needs_root, ordinary_user
from tests.crash.test_every_call import shape
from tests.support.driving import POLICY, HealthyStore, host, private_proc
from tests.support.runs import one_run, rules
from watcher.errors import NoPermissionError, WatchError
from watcher.model import Rules

from .test_opened_meanwhile import Moment

REPAIR = rules(repair=True, repair_stale=True, writers_visible=True)


class Case(NamedTuple):
    """An act on a download, and a call of it for a file of the download."""

    policy: Rules
    breaks: Callable[[HealthyStore, str], object]
    call: str
    number: int | None


CASES = {
    "clean": Case(POLICY, lambda _, __: None, "move", None),
    "repair": Case(REPAIR, lambda store, digest: store.partial(digest, 1).unlink(), "replace", 1),
}
#: Makes something happen at an instant of an act on a file of that name.
INSTANTS: dict[str, Callable[[Moment, Case, str, Callable[[], object]], None]] = {
    "agreed to": lambda moment, _, __, act: moment.before_the_act_is_planned_again(act),
    "before acting": lambda moment, _, __, act: moment.before_acting(act),
    "under the guard": lambda moment, _, __, act: moment.after("replace", "guard", act),
    "before a file": lambda moment, case, name, act: moment.before(case.call, name, act),
    "after a file": lambda moment, case, name, act: moment.after(case.call, name, act),
}


class Scene:
    """A store with something to do in it, and what comes of it where nobody interferes."""

    def __init__(self, folder: Path, case: Case, moment_patch: pytest.MonkeyPatch) -> None:
        self.case, self._folder = case, folder
        self.proc = private_proc(folder / "proc")
        reference, _ = self._laid_out(folder / "reference")
        self.before = shape(reference)
        one_run(host(reference, self.proc), case.policy)
        self.end = shape(reference)
        assert self.before != self.end
        self.store, self.digest = self._laid_out(folder / "models")
        self.moment = Moment(moment_patch, self.store)

    def _laid_out(self, path: Path) -> tuple[HealthyStore, str]:
        store = HealthyStore(path)
        digest = store.download("broken")
        self.case.breaks(store, digest)
        return store, digest

    def act(self, instant: str, meanwhile: Callable[[], object]) -> None:
        """The act, and something else at an instant of it: done, refused, or an error of ours."""
        name = self.store.partial(self.digest, self.case.number).name
        INSTANTS[instant](self.moment, self.case, name, meanwhile)
        with contextlib.suppress(WatchError):
            self.moment.act(self.case.policy, proc=self.proc)
        assert self.moment.came

    def assert_whole(self, path: Path) -> None:
        """At its present place the store comes to the same end, in one run."""
        store = self.store_at(path)
        one_run(host(store, self.proc), self.case.policy)
        assert shape(store) == self.end
        assert store.leftovers() == []

    def store_at(self, path: Path) -> HealthyStore:
        """The same store elsewhere."""
        return HealthyStore.at(path)


@pytest.fixture(params=CASES)
def scene(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, CASES[request.param], monkeypatch)


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_store_that_is_moved_meanwhile_is_whole(
    instant: str, scene: Scene, tmp_path: Path
) -> None:
    away = tmp_path / "away"
    scene.act(instant, lambda: scene.store.path.rename(away))
    assert not scene.store.path.exists()
    assert shape(scene.store_at(away)) in (scene.before, scene.end)
    scene.assert_whole(away)


@pytest.mark.parametrize("instant", INSTANTS)
def test_another_store_in_its_place_is_left_alone(
    instant: str, scene: Scene, tmp_path: Path
) -> None:
    """What is looked at in the middle of the act must not be the other one."""
    away, other = tmp_path / "away", HealthyStore(tmp_path / "other")
    other.download("broken")
    before = other.tree()

    def swap() -> None:
        scene.store.path.rename(away)
        other.path.rename(scene.store.path)

    scene.act(instant, swap)
    scene.store.path.rename(other.path)
    assert other.tree() == before
    assert shape(scene.store_at(away)) in (scene.before, scene.end)
    scene.assert_whole(away)


@contextlib.contextmanager
def mounted(path: Path, *options: str) -> Iterator[None]:
    """Something mounted there, whatever becomes of it meanwhile."""
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", *options, str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], capture_output=True)


@needs_root
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("instant", INSTANTS)
def test_a_store_that_is_unmounted_meanwhile_is_whole(
    instant: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, again = tmp_path / "disk", tmp_path / "again"
    with mounted(disk, "-t", "tmpfs", "none"), mounted(again, "--bind", str(disk)):
        scene = Scene(disk, CASES[name], monkeypatch)
        scene.act(instant, lambda: subprocess.run(["umount", "-l", str(disk)], check=True))
        assert os.listdir(disk) == []
        assert shape(scene.store_at(again / "models")) in (scene.before, scene.end)
        scene.proc = private_proc(tmp_path / "proc")
        scene.assert_whole(again / "models")


@needs_root
@pytest.mark.parametrize("name", CASES)
def test_a_disk_that_turns_read_only_before_the_act_is_reported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later than that the kernel doesn't let anybody but itself: we have the lock's file open."""
    disk = tmp_path / "disk"

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

    with mounted(disk, "-t", "tmpfs", "none"):
        scene = Scene(disk, CASES[name], monkeypatch)
        scene.moment.before_the_act_is_planned_again(lambda: remount("ro"))
        with pytest.raises(NoPermissionError, match="Read-only"):
            scene.moment.act(scene.case.policy, proc=scene.proc)
        assert shape(scene.store) == scene.before
        remount("rw")
        scene.assert_whole(scene.store.path)


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_folder_that_may_no_longer_be_written_is_whole_once_it_may(
    instant: str, scene: Scene, tmp_path: Path
) -> None:
    with ordinary_user(tmp_path):
        scene.act(instant, lambda: scene.store.blobs.chmod(0o555))
        scene.store.blobs.chmod(0o755)
        scene.assert_whole(scene.store.path)

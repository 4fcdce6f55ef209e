"""Broken at each of its changing calls, and run again: the same end, and nothing of worth lost.

Before its first intent every scene makes the same calls: they break in the first one, with `--slow`
in each. A kill before a call that changes nothing is that before the next call. In the first scene
a kill is one of a process, with `--slow` in each (see `tests/support/breaking.py`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import open_parents
from tests.support.breaking import REFUSED
from tests.support.driving import HealthyStore, whole_lines
from tests.support.kills import Ended
from tests.support.transfers import lay_out
from watcher.model import DAY, Result

from .conftest import Driver

#: A young download and a file of the user's, beside what is worth nothing: they must stay.
KEPT = "a young download"


def _stale_with_sidecars(store: HealthyStore) -> None:
    store.download("stale")


def _unclaimed(store: HealthyStore) -> None:
    store.download("unclaimed", parts=0)


def _sidecars_alone(store: HealthyStore) -> None:
    digest = store.download("sidecars alone")
    store.partial(digest).unlink()


def _gap_in_sidecars(store: HealthyStore) -> None:
    """No `-partial-0`: the guard takes a free name."""
    digest = store.download("gap")
    store.partial(digest, 0).unlink()


def _surplus(store: HealthyStore) -> None:
    digest = store.text_blob("weights that have arrived")
    store.manifest_of("arrived", digest, store.text_blob("its config"))
    for number in (0, 1, 16):
        store.file(f"sha256-{digest}-partial-{number}", "{}")


def _orphans_and_temporaries(store: HealthyStore) -> None:
    for number in range(3):
        store.text_blob(f"an orphan {number}")
    store.file("split-copy123")
    store.file("sha256-1234567")


def _transfer(store: HealthyStore) -> None:
    store.file("sha256-" + "ab" * 32 + ".tmp")


def _of_ours(store: HealthyStore) -> None:
    lay_out(store.path, store.digest("ours"), b"layer" * 1000, ((0, 4000),), aged=8 * DAY)


#: Each breaks at every call.
ALIKE = pytest.mark.slow("another error, scene or instant of a kind that stands beside it")
#: Where each call takes several runs: at the first call and each third one after it, and so on.
TURNS = (0, pytest.param(1, marks=ALIKE), pytest.param(2, marks=ALIKE))

SCENES: dict[str, Callable[[HealthyStore], None]] = {
    "stale": _stale_with_sidecars,
    "unclaimed": _unclaimed,
    "sidecars-alone": _sidecars_alone,
    "gap": _gap_in_sidecars,
    "surplus": _surplus,
    "orphans": _orphans_and_temporaries,
    "transfer": _transfer,
    "of ours": _of_ours,
}


class Broken(NamedTuple):
    """A store in which a cycle broke, and how that ended."""

    store: HealthyStore
    ended: Ended
    where: str


class Trial:
    """One scene, laid out anew for each call to break at."""

    def __init__(self, folder: Path, driver: Driver, scene: str, **order: Any) -> None:
        self._folder, self._driver, self._lay_out = folder, driver, SCENES[scene]
        self.scene, self._order, self._number = scene, order, 0
        reference = self.store()
        self.before = shape(reference)
        ended = self.run(reference)
        assert ended.code == 0, driver.errors
        self.end, self.calls = shape(reference), ended.calls
        assert self.end != self.before

    def store(self) -> HealthyStore:
        """The scene in a new store, and beside it what must stay."""
        self._number += 1
        store = HealthyStore(self._folder / f"models{self._number}")
        store.download("a young download", aged=3600)
        store.file("README", "of the user")
        self._lay_out(store)
        if "owner" in self._order:
            give_away(store.path, self._order["owner"])
        return store

    def run(self, store: HealthyStore, **more: Any) -> Ended:
        """A cycle over a store: unhindered, if nothing else is said."""
        processes = {"process": True} if self.scene == next(iter(SCENES)) else {}
        return self._driver.cycle(store, **(self._order | processes | more))

    def intent(self) -> int:
        """The number of the call by which it prepares its first intent."""
        return self.calls.index("mkdir intents") + 1 if "mkdir intents" in self.calls else 1

    def broken(
        self, how: str, part: slice = slice(None), first: int = 1, **more: Any
    ) -> Iterator[Broken]:
        """Stores in which a cycle broke at its first call, at its second one, and so on."""
        chosen = [at for at in places(self.run(self.store(), **more).calls, how) if at >= first]
        for at in chosen[part]:
            store = self.store()
            files = inodes(store.path)
            ended = self.run(store, at=at, how=how, **more)
            where = f"{how} at call {at}, {ended.calls[at - 1]!r}"
            assert_nothing_lost(store, files, where)
            yield Broken(store, ended, where)
            shutil.rmtree(store.path)

    def assert_same_end(self, store: HealthyStore, where: str) -> None:
        """One unhindered run comes to the end that it would have come to at once."""
        if self._order:
            again = self.run(store)
            assert again.code == 0, f"{where}; then {again}: {self._driver.errors}"
        else:
            outcomes = self._driver.unhindered(store).outcomes
            assert {each.result for each in outcomes} <= {Result.DONE}, f"{where}; then {outcomes}"
        assert shape(store) == self.end, where
        assert_settled(store, where)


def places(calls: list[str], how: str) -> list[int]:
    """The numbers of the calls to break at; of those that come anew all the time, the first."""
    chosen: dict[str, int] = {}
    for number, call in enumerate(calls, 1):
        changes = not call.startswith("fsync ") and not call.endswith(REFUSED)
        if how in ("kill", "half") and not changes:
            continue
        routine = call.endswith((".jsonl", " .ollama-watch", " logs", "logs.lock", "driven"))
        # Whether a folder is there is made sure of before each step, in the same way.
        routine = routine or call.endswith(REFUSED)
        # Each look that has found anything saves the memory and the records in the same way.
        routine = routine or "state.json" in call or "models.json" in call
        if how != "half" or call.startswith(("write ", "pwrite ")):
            chosen.setdefault(call if routine else f"{number} {call}", number)
    return list(chosen.values())


def shape(store: HealthyStore) -> dict[str, object]:
    """The tree without inodes and times, which differ from store to store."""
    ours = (path for path in store.ours.glob("transfers/*/*") if path.name != "lock")
    # Of a transfer only its bytes count: behind the last one there may be a hole.
    found = {str(each.relative_to(store.ours)): each.read_bytes().rstrip(b"\0") for each in ours}
    return {**found, **{name: (entry[0], entry[-1]) for name, entry in store.tree().items()}}


def assert_nothing_lost(store: HealthyStore, files: set[int], where: str) -> None:
    """What is out of its place stands in an intent; until that is decided all of it is there."""
    for intent in (store.ours / "intents").glob("*"):
        if (intent / "decided").exists():
            continue
        if any((intent / "out").glob("*")):
            listed = json.loads((intent / "intent.json").read_bytes())["files"]
            wanted = {inode for *_, inode, taken in listed if taken}
            assert wanted <= files, where
            assert wanted <= inodes(store.path), f"{where}: lost before it was decided"


def inodes(folder: Path) -> set[int]:
    """The files that are left anywhere below a folder, but our own."""
    ours = {"lock", "guard", "intent.json", "decided", "state.json", "events.jsonl"}
    return {
        path.lstat().st_ino
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ours and path.suffix != ".jsonl"
    }


def assert_settled(store: HealthyStore, where: str) -> None:
    """No intent and no temporary; every line of the logs whole; the memory readable."""
    left = [
        name for name in store.leftovers() if not name.startswith((".state.json", ".models.json"))
    ]
    assert left == [], where  # the next save replaces a temporary file, which has a test of its own
    whole_lines(store.ours / "logs/events.jsonl")
    json.loads((store.ours / "state.json").read_text())


def give_away(folder: Path, owner: int) -> None:
    """Give all files below a folder to a user."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, owner, owner, follow_symlinks=False)


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.fixture(params=SCENES)
def trial(request: pytest.FixtureRequest, tmp_path: Path, driver: Driver) -> Trial:
    return Trial(tmp_path, driver, request.param)


@pytest.fixture
def first(trial: Trial, slow: bool) -> int:
    """The number of the first call to break at."""
    return 1 if slow or trial.scene == next(iter(SCENES)) else trial.intent()


@pytest.mark.parametrize("how", ["kill", "half"])
def test_a_kill_at_any_call_comes_to_the_same_end(trial: Trial, how: str, first: int) -> None:
    for store, _, where in trial.broken(how, first=first):
        trial.assert_same_end(store, where)


@pytest.mark.parametrize(
    "how",
    ["EIO", pytest.param("ENOSPC", marks=ALIKE), pytest.param("EACCES", marks=ALIKE)],
)
def test_an_error_at_any_call_loses_nothing(trial: Trial, how: str, first: int, slow: bool) -> None:
    if how != "EIO" and trial.scene not in ("stale", "orphans"):
        pytest.skip("which error it is makes no difference to this scene")
    if not slow and trial.scene in ("unclaimed", "sidecars-alone"):
        pytest.skip("slow, needs --slow: a kill breaks it, and an error the same calls of `stale`")
    # Where the scene's own calls differ from these two in the names alone, every second one.
    some = slice(None, None, 1 if slow or trial.scene in ("stale", "orphans") else 2)
    for store, ended, where in trial.broken(how, some, first):
        assert ended.code in (0, 3, 4), f"{where}: the error escaped"
        trial.assert_same_end(store, where)


@pytest.mark.parametrize("scene", ["stale", pytest.param("unclaimed", marks=ALIKE), "orphans"])
@pytest.mark.parametrize("how", ["kill", pytest.param("EIO", marks=ALIKE)])
def test_the_same_holds_without_a_rename_that_never_replaces(
    scene: str, how: str, tmp_path: Path, driver: Driver
) -> None:
    trial = Trial(tmp_path, driver, scene, no_replace=False)
    for store, _, where in trial.broken(how, first=trial.intent()):
        trial.assert_same_end(store, where)


@pytest.mark.parametrize(
    ("scene", "look"),
    [
        ("stale", 1),
        pytest.param("stale", 2, marks=ALIKE),
        ("unclaimed", 2),
        pytest.param("surplus", 2, marks=ALIKE),
    ],
)
def test_a_kill_while_a_held_file_is_put_back_leaves_all_in_place(
    scene: str, look: int, tmp_path: Path, driver: Driver
) -> None:
    trial = Trial(tmp_path, driver, scene)
    for store, _, where in trial.broken("kill", first=trial.intent(), held_from=look):
        assert trial.run(store, clean=False).code == 0
        assert shape(store) == trial.before, where
        assert_settled(store, where)
        trial.assert_same_end(store, where)


@pytest.mark.parametrize("scene", ["stale", "surplus", "orphans"])
@pytest.mark.parametrize("share", [0.5, pytest.param(0.8, marks=ALIKE)])
@pytest.mark.parametrize("first_call", TURNS)
def test_a_kill_of_the_recovery_itself_comes_to_the_same_end(
    scene: str, share: float, first_call: int, tmp_path: Path, driver: Driver
) -> None:
    trial = Trial(tmp_path, driver, scene)
    first = int(len(trial.calls) * share)
    again = trial.store()
    trial.run(again, at=first, how="kill")
    for at in places(trial.run(again).calls, "kill")[first_call :: len(TURNS)]:
        store = trial.store()
        assert trial.run(store, at=first, how="kill").code == -9
        ended = trial.run(store, at=at, how="kill")
        trial.assert_same_end(store, f"kill at call {at} after a kill, {ended.calls[-1]!r}")
        shutil.rmtree(store.path)


def test_a_kill_while_the_memory_is_saved_leaves_no_temporary_file(
    tmp_path: Path, driver: Driver
) -> None:
    trial = Trial(tmp_path, driver, "stale")
    left = 0
    for at in [at for at in places(trial.calls, "kill") if ".new" in trial.calls[at - 1]]:
        store = trial.store()
        trial.run(store, at=at, how="kill")
        left += bool(list(store.ours.glob(".*")))
        trial.run(store)
        assert not list(store.ours.glob(".*")), trial.calls[at - 1]
    assert left


def test_the_memory_can_be_read_at_any_time(tmp_path: Path, driver: Driver) -> None:
    trial = Trial(tmp_path, driver, "stale")
    for how in ("kill", "half", "ENOSPC"):
        store = trial.store()
        trial.run(store, clean=False)
        before = (store.ours / "state.json").read_bytes()
        calls = trial.run(trial.store()).calls
        for at in [at for at in places(calls, how) if "state.json" in calls[at - 1]]:
            trial.run(store, at=at, how=how)
            json.loads((store.ours / "state.json").read_bytes())
        assert before


@pytest.mark.parametrize("log", ["events", "sha256-"])
def test_half_a_line_that_a_kill_left_is_gone_after_the_next_run(
    log: str, tmp_path: Path, driver: Driver
) -> None:
    trial = Trial(tmp_path, driver, "stale")
    for at, call in enumerate(trial.calls, 1):
        if call.startswith(f"write {log}") and call.endswith(".jsonl"):
            store = trial.store()
            trial.run(store, at=at, how="half")
            trial.run(store)
            for path in (store.ours / "logs").iterdir():
                whole_lines(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files for others")
@pytest.mark.parametrize("first", TURNS)
def test_files_of_root_after_a_kill_belong_to_the_owner_of_the_store(
    first: int, tmp_path: Path, driver: Driver
) -> None:
    owner = 65534
    open_parents(driver.proc)  # as everybody may read the real one
    trial = Trial(tmp_path, driver, "stale", owner=owner, umask=0o077)
    for store, _, where in trial.broken("kill", slice(first, None, len(TURNS))):
        trial.assert_same_end(store, where)
        for path in (store.ours, *store.ours.rglob("*")):
            if path.name.startswith(".state.json"):
                continue
            info = path.stat()
            assert info.st_uid == owner, f"{path.relative_to(store.path)}: {where}"
            wanted = 0o700 if path.is_dir() else 0o600
            assert info.st_mode & wanted == wanted, f"{path.relative_to(store.path)}: {where}"

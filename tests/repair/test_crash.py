"""What a repair that was killed leaves: the original, or what nobody else has changed since.

`tests/crash/test_every_act.py` breaks it at each of its calls.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.conftest import Driver, driver
from tests.crash.test_every_call import places
from tests.support.driving import HealthyStore, host, private_proc
from tests.support.kills import Ended
from tests.support.notation import age
from tests.support.runs import one_run, rules
from tests.support.servers import sidecar
from watcher.model import MIB, Part, Ranges
from watcher.ollama import sidecars
from watcher.state import memory

__all__ = ["driver"]

POLICY = {"repair": True, "clean": False, "repair_stale": True}
PART = 5 * MIB
#: How far each of three parts has come.
PRESENT = (PART, 3 * MIB, 0)


def lay_out(store: HealthyStore, claimed: int = 0) -> str:
    """A download of three parts, killed; its digits."""
    digest = "ab" * 32
    data = store.partial(digest)
    with data.open("wb") as file:
        file.truncate(3 * PART)
        for number, length in enumerate(PRESENT):
            file.seek(number * PART)
            file.write(b"x" * length)
    for number in range(3):
        store.partial(digest, number).write_text(sidecar(number, number * PART, PART, claimed))
    for path in data.parent.glob(f"{data.name}*"):
        age(path, 600)
    return digest


def _killed(store: HealthyStore) -> str:
    return lay_out(store)


def _empty(store: HealthyStore) -> str:
    digest = lay_out(store)
    store.partial(digest, 1).write_bytes(b"")
    return digest


def _surplus(store: HealthyStore) -> str:
    digest = lay_out(store)
    store.file(f"sha256-{digest}-partial-0.bak", "{}", 600)
    return digest


SCENES: dict[str, Callable[[HealthyStore], str]] = {
    "killed": _killed,
    "empty": _empty,
    "surplus": _surplus,
}


def texts(store: HealthyStore, digest: str) -> dict[str, bytes]:
    """The sidecars as they stand."""
    found = store.blobs.glob(f"sha256-{digest}-partial-*")
    return {path.name: path.read_bytes() for path in found}


def claims(store: HealthyStore, digest: str) -> Ranges:
    """What they claim."""
    parts = [sidecars.parse(raw) for raw in texts(store, digest).values()]
    return sidecars.claims(parts)


class Trial:
    """A scene, laid out anew for each call to break at."""

    def __init__(self, folder: Path, broken: Driver, scene: str) -> None:
        self._folder, self._driver, self._scene, self._number = folder, broken, scene, 0
        store, self.digest = self.laid_out()
        self.before = texts(store, self.digest)
        ended = self.run(store)
        assert ended.code == 0, broken.errors
        self.calls, self.end = ended.calls, texts(store, self.digest)
        assert self.end != self.before

    def laid_out(self) -> tuple[HealthyStore, str]:
        """The scene in a new store."""
        self._number += 1
        store = HealthyStore(self._folder / f"models{self._number}")
        return store, SCENES[self._scene](store)

    def run(self, store: HealthyStore, **order: object) -> Ended:
        """A repair over a store."""
        return self._driver.cycle(store, policy=POLICY, **order)


@pytest.mark.parametrize("scene", ["killed", "empty", "surplus"])
def test_a_repair_killed_before_its_decision_is_undone_to_the_byte(
    scene: str, tmp_path: Path, driver: Driver, slow: bool
) -> None:
    """Killed before the decision: the next run of a command that repairs nothing undoes it.

    What all scenes do before their intent breaks in one of them; with `--slow` in each.
    """
    trial = Trial(tmp_path, driver, scene)
    decided = next(n for n, call in enumerate(trial.calls, 1) if call.startswith("open decided"))
    first = 1 if slow or scene == "killed" else trial.calls.index("mkdir intents") + 1
    for at in [at for at in places(trial.calls, "kill") if first <= at <= decided]:
        store, digest = trial.laid_out()
        inodes = {path.name: path.stat().st_ino for path in store.blobs.iterdir()}
        trial.run(store, at=at, how="kill")
        driver.unhindered(store, **{**POLICY, "repair": False})
        where = f"kill at call {at}, {trial.calls[at - 1]!r}"
        assert texts(store, digest) == trial.before, where
        assert {path.name: path.stat().st_ino for path in store.blobs.iterdir()} == inodes, where
        shutil.rmtree(store.path)


def test_nothing_is_repaired_where_it_can_not_be_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the doubts in the memory, the bytes that were given up would be trusted later."""
    store = HealthyStore(tmp_path / "models")
    digest = lay_out(store)
    before = texts(store, digest)
    times = {path: path.stat().st_mtime_ns for path in store.blobs.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(memory, "save", full)
    here = host(store, private_proc(tmp_path / "proc"), clock=lambda: time.time() + 2400)
    policy = rules(repair=True, repair_stale=True, writers_visible=True)
    report = one_run(here, policy)
    assert report.warnings
    assert texts(store, digest) == before
    assert {path: path.stat().st_mtime_ns for path in store.blobs.iterdir()} == times


def test_a_new_pull_after_a_kill_keeps_its_own_sidecars(tmp_path: Path, driver: Driver) -> None:
    """Killed after the decision; somebody removes the download, and pulls it anew.

    What is recovered then must not stand beside bytes that it was not written for.
    """
    trial = Trial(tmp_path, driver, "killed")
    decided = next(n for n, call in enumerate(trial.calls, 1) if call.startswith("open decided"))
    for at in [at for at in places(trial.calls, "kill") if at > decided]:
        store, digest = trial.laid_out()
        trial.run(store, at=at, how="kill")
        for path in store.blobs.glob(f"sha256-{digest}-partial*"):
            path.unlink()
        with store.partial(digest).open("wb") as file:
            file.truncate(3 * PART)
        fresh = {}
        for number in range(3):
            path = store.partial(digest, number)
            path.write_text(sidecar(number, number * PART, PART, 0))
            fresh[path.name] = path.read_bytes()
        driver.cycle(store, policy={**POLICY, "repair": False})
        where = f"kill at call {at}, {trial.calls[at - 1]!r}"
        assert texts(store, digest) == fresh, where
        shutil.rmtree(store.path)


def test_the_end_is_what_was_there_less_the_starts(tmp_path: Path, driver: Driver) -> None:
    store = HealthyStore(tmp_path / "models")
    digest = lay_out(store)
    assert driver.cycle(store, policy=POLICY).code == 0
    assert claims(store, digest) == ((MIB, PART), (PART + MIB, PART + 3 * MIB))
    parts = sorted(sidecars.parse(raw) for raw in texts(store, digest).values())
    assert parts[0] == Part(0, 0, MIB, 0)

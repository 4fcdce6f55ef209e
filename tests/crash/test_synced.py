"""What a step of a change relies on is on the disk before that step, whatever the file system."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import POLICY, HealthyStore, host, private_proc
from tests.support.notation import age
from tests.support.runs import changed, one_run
from watcher.model import HOUR, ActionKind, Result
from watcher.observe import intents
from watcher.state import fs

REPAIR = changed(POLICY, clean=False, repair=True)


class Unsynced:
    """Folders with names that are not on the disk yet, checked at each step of a change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, blobs: Path) -> None:
        self.blobs = blobs.stat().st_ino
        self.folders: set[int] = set()
        self.intent = self.taken = 0
        self.steps: list[str] = []
        for name in ("create_all", "sync", "move", "replace", "remove"):
            self._watch(monkeypatch, name)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        real, note = getattr(fs, name), getattr(self, f"_{name}")

        def call(*given: Any, **more: Any) -> object:
            note(*(each if isinstance(each, str | dict) else _inode(each) for each in given))
            return real(*given, **more)

        monkeypatch.setattr(fs, name, call)

    def _create_all(self, contents: dict[str, bytes], parent: int, *_: object) -> None:
        if intents.NOTE in contents:
            self.intent = parent
        if intents.DECIDED in contents:
            self._assert_synced("decided", self.blobs, self.taken)
        self.folders.add(parent)

    def _sync(self, folder: int) -> None:
        self.folders.discard(folder)

    def _move(self, _: str, parent: int, __: str, new_parent: int) -> None:
        if parent == self.blobs:
            self._assert_synced("taken", self.intent)
            self.taken = new_parent if new_parent != self.intent else self.taken
        if self.blobs in (parent, new_parent):
            self.folders |= {self.blobs, self.taken}

    def _replace(self, _: str, __: int, ___: str, new_parent: int) -> None:
        if new_parent == self.blobs:
            self._assert_synced("replaced", self.intent)
            self.folders.add(self.blobs)

    def _remove(self, _: str, parent: int) -> None:
        if parent == self.taken:
            self._assert_synced("deleted", self.intent, self.blobs)

    def _assert_synced(self, step: str, *folders: int) -> None:
        assert not self.folders & {*folders}, step
        self.steps.append(step)


def _inode(given: object) -> object:
    return os.fstat(given).st_ino if isinstance(given, int) else given


@pytest.fixture
def store(tmp_path: Path) -> HealthyStore:
    made = HealthyStore(tmp_path / "models")
    one_run(host(made, private_proc(tmp_path / "proc")), REPAIR)  # it makes our folder
    return made


def test_a_removal_deletes_nothing_before_it_is_decided_on_the_disk(
    store: HealthyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.download("stale")
    unsynced = Unsynced(monkeypatch, store.blobs)
    (outcome,) = one_run(host(store, str(tmp_path / "proc")), POLICY).outcomes
    assert (outcome.action.kind, outcome.result) == (ActionKind.REMOVE_DOWNLOAD, Result.DONE)
    assert {"replaced", "taken", "decided", "deleted"} <= {*unsynced.steps}


def test_a_repair_replaces_nothing_before_its_intent_is_on_the_disk(
    store: HealthyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.download("broken", aged=2 * HOUR)
    store.partial(digest, 1).write_text("")
    age(store.partial(digest, 1), 2 * HOUR)
    unsynced = Unsynced(monkeypatch, store.blobs)
    (outcome,) = one_run(host(store, str(tmp_path / "proc")), REPAIR).outcomes
    assert (outcome.action.kind, outcome.result) == (ActionKind.WRITE_SIDECARS, Result.DONE)
    assert {"replaced", "decided"} <= {*unsynced.steps}

"""What is printed for root, run as printed: never does it reach what a planted symlink leads to."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import environment, needs_root
from tests.support.driving import command
from tests.support.notation import LIBRARY, Store
from watcher.model import Mode, ServerUser
from watcher.observe import scan
from watcher.observe.access import Access
from watcher.state import fs

pytestmark = needs_root
OWNER = 12345


def owned(path: Path) -> None:
    for each in (path, *path.rglob("*")):
        os.chown(each, OWNER, OWNER, follow_symlinks=False)


def tree(path: Path) -> dict[str, tuple[int, int, int, int]]:
    found = {}
    for each in (path, *path.rglob("*")):
        status = each.lstat()
        found[str(each)] = (status.st_mode, status.st_uid, status.st_ino, status.st_size)
    return found


def blobs(store: Store, victim: Path) -> None:
    """`blobs` leads to a folder of root's, in which one model's blob is for root alone."""
    there = Store(victim / "models")
    digest = there.model("llama3/latest")
    (there.blobs / f"sha256-{digest}").chmod(0o600)
    os.rename(there.blobs / f"sha256-{there.orphan()}", there.blobs / f"sha256:{'a' * 64}")
    store.model("llama3/latest")
    os.rename(store.blobs, store.path / "aside")
    store.blobs.symlink_to(there.blobs)


def manifests(store: Store, victim: Path) -> None:
    """A folder of manifests leads to one of root's, whose names are no models' and not readable."""
    library = victim / "library"
    for name in ("no name", "secret", "open"):
        (library / name).mkdir(parents=True)
        (library / name / "b@d name").write_text("worth something")
        (library / name / "latest").write_text("{")
    (library / "secret").chmod(0o700)
    (library / "open" / "latest").chmod(0o600)
    store.model("llama3/latest")
    (store.manifests / "planted").symlink_to(victim)
    (store.manifests / LIBRARY / "here").symlink_to(library / "no name")


def itself(store: Store, victim: Path) -> None:
    """`manifests` leads to root's."""
    there = Store(victim / "models")
    there.model("llama3/latest")
    (there.manifests / LIBRARY / "llama3" / "latest").chmod(0o600)
    (there.manifests / LIBRARY / "too-high").write_text("worth something")
    store.model("qwen/latest")
    os.rename(store.manifests, store.path / "aside")
    store.manifests.symlink_to(there.manifests)


@pytest.mark.parametrize("plant", [blobs, manifests, itself])
def test_no_printed_command_reaches_behind_a_planted_symlink(
    tmp_path: Path, plant: Callable[[Store, Path], None]
) -> None:
    store, victim = Store(tmp_path / "models"), tmp_path / "victim"
    victim.mkdir()
    plant(store, victim)
    owned(store.path)
    before = tree(victim)
    for words in (("audit",), ("repair", "-n", "--offline"), ("clean", "-n")):
        done = subprocess.run(
            command(store.path, "--json", *words),
            env=environment(tmp_path), capture_output=True, timeout=120,
        )  # fmt: skip
        assert b"Traceback" not in done.stderr
        printed = commands(json.loads(done.stdout))
        for each in printed:
            if not each.startswith("ollama "):
                subprocess.run(["bash", "-c", each], env=environment(tmp_path), timeout=120)
            assert tree(victim) == before, each


def test_no_command_is_printed_for_a_store_behind_a_planted_symlink(tmp_path: Path) -> None:
    there, planted = Store(tmp_path / "root's"), tmp_path / "models"
    there.model("llama3/latest")
    there.orphan()
    there.temporary()
    planted.symlink_to(there.path)
    os.chown(planted, OWNER, OWNER, follow_symlinks=False)
    for words in (("audit",), ("repair", "-n", "--offline"), ("clean", "-n")):
        done = subprocess.run(
            command(planted, "--json", *words),
            env=environment(tmp_path), capture_output=True, timeout=120,
        )  # fmt: skip
        assert commands(json.loads(done.stdout)) == []


@pytest.mark.parametrize("name", ["blobs", "manifests", f"manifests/{LIBRARY}"])
def test_a_symlink_for_the_moment_at_which_a_folder_is_entered_is_noted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after it the folder is what it was: no other look can see the symlink."""
    store, victim = Store(tmp_path / "models"), Store(tmp_path / "victim")
    for each in (store, victim):
        each.model("llama3/latest")
    owned(store.path)
    place, aside = store.path / name, store.path / "aside"
    enter = fs.open_quietly

    def exchanged(path: str, flags: int, parent: int) -> int:
        if path != place.name:
            return enter(path, flags, parent)
        place.rename(aside)
        place.symlink_to(victim.path / name)
        os.chown(place, OWNER, OWNER, follow_symlinks=False)
        try:
            return enter(path, flags, parent)
        finally:
            place.unlink()
            aside.rename(place)

    monkeypatch.setattr(fs, "open_quietly", exchanged)
    with fs.opened_folder(str(store.path)) as folder:
        access = Access(ServerUser())
        found = scan.scan_store(folder, access, Mode(), manifests_hidden=False)
    assert name in {*found.census.behind_foreign, *found.named.unlisted}


def commands(told: object) -> list[str]:
    """Every `command` in a document."""
    if isinstance(told, list):
        return [each for part in told for each in commands(part)]
    if not isinstance(told, dict):
        return []
    here = [told["command"]] if told.get("command") else []
    return here + [each for part in told.values() for each in commands(part)]

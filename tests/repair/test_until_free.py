"""`clean --until-free`: no more than it takes, and told what more it would take."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.driving import run
from tests.support.notation import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "models")
    made.model()
    return made


def dead(store: Store, name: str, *, size: int, aged: str) -> Path:
    """A download that died so long ago, with so many bytes on the disk."""
    digest = store.broken("0:0", aged=aged, name=name)
    path = store.blobs / f"sha256-{digest}-partial"
    path.write_bytes(b"x" * size)
    times = (store.blobs / f"sha256-{digest}-partial-0").stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return path


def test_nothing_is_removed_where_enough_is_free(store: Store) -> None:
    stale = dead(store, "stale", size=1 << 20, aged="20d")
    assert run(store.path, "clean", "--yes", "--until-free", "1").returncode == 0
    assert stale.exists()


def test_clean_until_free_reports_what_else_could_be_removed(store: Store) -> None:
    stale = dead(store, "stale", size=1 << 20, aged="20d")
    young = dead(store, "young", size=2 << 20, aged="3d")
    done = run(store.path, "clean", "--yes", "--until-free", "8000TB")
    assert done.returncode == 1
    assert (stale.exists(), young.exists()) == (False, True)
    assert "not stale yet (--stale-after 72h)" in done.stderr
    assert "ollama rm" in done.stderr
    planned = json.loads(run(store.path, "--json", "clean", "-n").stdout)["plan"]
    assert [each["frees_bytes"] >= 2 << 20 for each in planned["spared"]] == [True]
    kept = run(store.path, "clean", "-n").stdout
    assert kept.startswith("nothing to clean yet: ")
    assert kept.endswith("MB becomes stale after 7 days without bytes\n")
    assert run(store.path, "clean", "-n", "--until-free", "much").returncode == 2

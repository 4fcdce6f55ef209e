"""A second name of a server's blob, broken while it is made and let go: none stays for good."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.driving import HealthyStore
from watcher.act import second_names
from watcher.observe.host import Host
from watcher.state import transfers

from .conftest import Driver

_LIKE_A_KILL = pytest.mark.slow("as a kill, where nothing is written halfway")
BREAKS = ["kill", *(pytest.param(each, marks=_LIKE_A_KILL) for each in ("half", "ENOSPC", "EIO"))]
#: What the daemon does at a look, and `clean`.
WATCH = {"clean": False, "patient": True}
CLEAN = {"clean": True}


def finished(path: Path) -> tuple[HealthyStore, str]:
    """A store with a blob that a server has just finished, and its digest."""
    store = HealthyStore(path)
    return store, store.text_blob("finished", 0)


def check(store: HealthyStore, digest: str, names: tuple[int, ...]) -> None:
    blob = store.blobs / f"sha256-{digest}"
    assert blob.read_text() == "finished"
    assert blob.stat().st_nlink in names


@pytest.mark.parametrize("how", BREAKS)
def test_made_it_is_there_or_it_is_not(driver: Driver, tmp_path: Path, how: str) -> None:
    store, digest = finished(tmp_path / "reference")
    calls = driver.cycle(store, keep=[digest]).calls
    check(store, digest, (2,))
    for at, _ in enumerate(calls, 1):
        store, digest = finished(tmp_path / f"broken{at}")
        driver.cycle(store, keep=[digest], at=at, how=how)
        check(store, digest, (1, 2))
        if at % 2:
            second_names.keep(Host(str(store.path)), [digest])
            check(store, digest, (2,))
        driver.unhindered(store, **CLEAN)
        check(store, digest, (1,))
        assert not list(store.ours.glob("transfers/*"))


@pytest.mark.parametrize("how", BREAKS)
def test_let_go_it_goes_with_the_next_look(driver: Driver, tmp_path: Path, how: str) -> None:
    def named(name: str) -> tuple[HealthyStore, str]:
        store, digest = finished(tmp_path / name)
        driver.unhindered(store, **WATCH)
        assert second_names.keep(Host(str(store.path)), [digest]) == ""
        store.manifest_of("finished", digest, store.digests[1])
        return store, digest

    store, digest = named("reference")
    calls = driver.cycle(store, policy=WATCH).calls
    check(store, digest, (1,))
    files = {*transfers.FILES, digest}
    for at, call in enumerate(calls, 1):
        if files.isdisjoint(call.split()[1:]):
            continue
        store, digest = named(f"broken{at}")
        driver.cycle(store, policy=WATCH, at=at, how=how)
        check(store, digest, (1, 2))
        driver.unhindered(store, **WATCH)
        check(store, digest, (1,))
        assert not list(store.ours.glob("transfers/*/data"))

"""Who may write to ``blobs/`` makes us, root even, touch nothing outside of the store."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import needs_root
from tests.support.driving import POLICY, HealthyStore, content, host, once, private_proc
from tests.support.runs import one_run, rules
from watcher import reconcile
from watcher.model import HOUR, RefusalKind, Result
from watcher.state import fs

from .test_opened_meanwhile import INSTANTS, Moment, refusal

REPAIR = rules(repair=True, repair_stale=True, writers_visible=True)
REFRESH = rules(repair=False, refresh=True, writers_visible=True)
LABEL = "00000001-"


@pytest.fixture
def store(tmp_path: Path) -> HealthyStore:
    return HealthyStore(tmp_path / "models")


@pytest.fixture
def moment(monkeypatch: pytest.MonkeyPatch, store: HealthyStore) -> Moment:
    return Moment(monkeypatch, store)


@pytest.fixture
def proc(tmp_path: Path) -> str:
    return private_proc(tmp_path / "proc")


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder outside of the store, which must stay as it is, to its times."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("precious")
    for path in (folder / "precious", folder):
        os.utime(path, (1e9, 1e9))
    before = content(folder)
    yield folder
    assert content(folder) == before
    assert folder.stat().st_mtime == 1e9


Swap = Callable[[Path, Path], object]
#: What somebody puts in a file's place: made of the path, and of a file outside.
SWAPS: dict[str, Swap] = {
    "symlink": lambda path, outside: path.symlink_to(outside),
    "hard link": lambda path, outside: path.hardlink_to(outside),
    "fifo": lambda path, _: os.mkfifo(path),
    "folder": lambda path, _: path.mkdir(),
    "device": lambda path, _: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
}
DEVICE = pytest.param("device", marks=needs_root)


def swap(path: Path, how: str, outside: Path) -> Callable[[], object]:
    """To do at an instant: the file goes, and something else is there."""

    def do() -> None:
        path.unlink()
        SWAPS[how](path, outside / "precious")

    return do


@pytest.mark.parametrize("how", ["fifo", "folder", DEVICE])
@pytest.mark.parametrize("instant", INSTANTS)
def test_only_regular_files_are_removed(
    instant: str, how: str, store: HealthyStore, moment: Moment, outside: Path
) -> None:
    data = store.partial(store.download("stale"))
    INSTANTS[instant](moment, data.name, swap(data, how, outside))
    assert refusal(moment.clean()).kind is RefusalKind.CHANGED
    assert not data.is_file()
    assert data.exists()


@pytest.mark.parametrize("how", ["symlink", "hard link", "fifo", DEVICE])
def test_a_sidecar_takes_the_place_of_what_somebody_has_put_there(
    how: str, store: HealthyStore, moment: Moment, outside: Path, proc: str
) -> None:
    """Under the guard, just before the new one is renamed over it."""
    digest = store.download("broken")
    store.partial(digest, 2).unlink()
    path = store.partial(digest, 1)
    moment.before("replace", path.name, swap(path, how, outside))
    report = moment.act(REPAIR, proc=proc)
    assert moment.came
    assert [each.result for each in report.outcomes] == [Result.DONE]
    assert path.is_file()
    assert not path.is_symlink()
    assert path.stat().st_nlink == 1


def test_a_folder_in_a_sidecars_place_is_reported_until_it_has_gone(
    store: HealthyStore, moment: Moment, outside: Path, proc: str
) -> None:
    digest = store.download("broken")
    store.partial(digest, 2).unlink()
    path = store.partial(digest, 1)
    moment.before("replace", path.name, swap(path, "folder", outside))
    (outcome,) = moment.act(REPAIR, proc=proc).outcomes
    assert outcome.result is Result.FAILED
    assert "the next run finishes it" in outcome.message
    again = one_run(host(store, proc), REPAIR)
    assert again.stuck
    assert again.outcomes == ()
    path.rmdir()
    assert not one_run(host(store, proc), REPAIR).stuck
    assert store.leftovers() == []
    assert path.is_file()


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("name", [".", "intents", "quarantine", "logs"])
def test_a_link_in_place_of_a_folder_of_ours_leads_nowhere(
    name: str, store: HealthyStore, moment: Moment, outside: Path, proc: str
) -> None:
    """Put there when the act has been announced: it is done with what was opened, or not at all."""
    digest = store.download("stale")
    one_run(host(store, proc), POLICY, approve=reconcile.approve_none)
    place, away = (store.ours / name).resolve(), store.path / "away"

    def swap() -> None:
        if place.exists():
            place.rename(away)
        place.symlink_to(outside)

    moment.before_acting(swap)
    (outcome,) = moment.act(POLICY, proc=proc).outcomes
    assert len(store.partials(digest)) == (0 if outcome.result is Result.DONE else 4)
    place.unlink()
    if away.exists():
        away.rename(place)
    one_run(host(store, proc), POLICY)
    assert store.partials(digest) == []
    assert store.leftovers() == []


@pytest.fixture
def linked(store: HealthyStore, outside: Path) -> Iterator[Callable[[], None]]:
    """Puts a link to the folder outside in the place of ``blobs``; the end puts it right."""
    away = store.path / "blobs.away"

    def do() -> None:
        store.blobs.rename(away)
        store.blobs.symlink_to(outside)

    yield do
    store.blobs.unlink()
    away.rename(store.blobs)


def test_nothing_comes_out_of_quarantine_into_another_folder(
    store: HealthyStore, moment: Moment, linked: Callable[[], None], proc: str
) -> None:
    name = f"sha256-{store.digest('kept')}"
    kept = store.ours / "quarantine" / f"{LABEL}{name}"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    moment.before_acting(linked)
    policy = rules(repair=False, restore=frozenset({kept.name}), writers_visible=True)
    assert refusal(moment.act(policy, proc=proc)).kind is RefusalKind.CHANGED
    assert kept.read_text() == "kept"


def test_no_times_are_set_in_another_folder(
    store: HealthyStore,
    moment: Moment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    proc: str,
) -> None:
    """It has files of the same names."""
    store.download("wanted", aged=0.9 * HOUR)
    other = HealthyStore(tmp_path / "other")
    digest = other.download("wanted", aged=0.9 * HOUR)
    assert store.partial(digest).exists()
    before = content(other.blobs)

    def link() -> None:
        store.blobs.rename(store.path / "away")
        store.blobs.symlink_to(other.blobs)

    moment.before_the_act_is_planned_again(link)
    moment.act(REFRESH, proc=proc)
    assert moment.came
    assert content(other.blobs) == before


# ---------------------------------------------------------------- times


@needs_root
@pytest.mark.parametrize("instant", ["before the look", "meanwhile"])
@pytest.mark.parametrize("how", ["symlink", "hard link", "fifo", "device"])
def test_root_sets_no_times_of_what_lies_outside(
    instant: str,
    how: str,
    store: HealthyStore,
    outside: Path,
    monkeypatch: pytest.MonkeyPatch,
    proc: str,
) -> None:
    path = store.partial(store.download("wanted", aged=0.9 * HOUR), 1)
    do = swap(path, how, outside)
    if instant == "meanwhile":
        real, hook = fs.touch, once(do)

        def touch(name: str, *words: int) -> None:
            if name == path.name:
                hook()
            real(name, *words)

        monkeypatch.setattr(fs, "touch", touch)
    else:
        do()
    one_run(host(store, proc), REFRESH)
    assert not path.is_file() or path.stat().st_mtime == 1e9


@needs_root
def test_a_download_with_a_second_name_keeps_all_its_times(
    store: HealthyStore, tmp_path: Path, proc: str
) -> None:
    """Some of them fresh, the server's start would delete the others: worse than all of them."""
    digest = store.download("wanted", aged=0.9 * HOUR)
    (tmp_path / "second").hardlink_to(store.partial(digest))
    before = content(store.blobs)
    report = one_run(host(store, proc), REFRESH)
    assert report.outcomes == ()
    assert content(store.blobs) == before


def test_the_clean_up_takes_a_second_name_and_leaves_the_file(
    store: HealthyStore, outside: Path, proc: str
) -> None:
    """A stale download that is a link to somebody's file: the name goes, the file stays."""
    digest = store.download("stale")
    path = store.partial(digest)
    swap(path, "hard link", outside)()
    report = one_run(host(store, proc), POLICY)
    assert [each.result for each in report.outcomes] == [Result.DONE]
    assert store.partials(digest) == []

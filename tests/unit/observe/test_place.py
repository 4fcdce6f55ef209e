"""Which store, and what it stands on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pyfakefs.fake_filesystem import FakeFilesystem

from tests.conftest import needs_root
from tests.support.notation import Store, quiet_machine
from watcher.errors import Exit, NoPermissionError, NoStoreError
from watcher.observe import place, processes, unit
from watcher.observe.host import Host
from watcher.observe.unit import Unit
from watcher.state import folders

HOME = "/home/someone"


@pytest.fixture
def quiet(fs: FakeFilesystem, monkeypatch: pytest.MonkeyPatch) -> FakeFilesystem:
    """A machine without servers and without systemd; its files are made up."""
    monkeypatch.setattr(processes, "served_stores", lambda _: [])
    monkeypatch.setattr(unit, "find", lambda: None)
    monkeypatch.setenv("HOME", HOME)
    return fs


PLACES = ["/usr/share/ollama/.ollama/models", "/var/lib/ollama/models", f"{HOME}/.ollama/models"]


def test_the_first_place_that_is_there_in_the_documented_order(quiet: FakeFilesystem) -> None:
    for path in reversed(PLACES):
        quiet.create_dir(f"{path}/blobs")
        assert place.find(None, {}).path == path


def test_a_server_that_runs_and_the_unit_come_before(
    quiet: FakeFilesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet.create_dir(f"{PLACES[0]}/blobs")
    quiet.create_dir("/unit/manifests")
    named = Unit(variables={"OLLAMA_MODELS": "/unit"})
    monkeypatch.setattr(unit, "find", lambda: named)
    assert place.find(None, {}).path == "/unit"
    quiet.create_dir("/served/blobs")
    monkeypatch.setattr(processes, "served_stores", lambda _: [("/gone", 1), ("/served", 7)])
    found = place.find(None, {})
    assert found.path == "/served"
    assert "7" in found.by


@pytest.mark.parametrize("variables", [{"OLLAMA_MODELS": "/disk/m"}, {"HOME": "/disk/home"}])
@pytest.mark.parametrize("there", ["nothing", "an empty folder"])
def test_no_other_store_is_taken_for_one_that_a_unit_names(
    quiet: FakeFilesystem, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], there: str
) -> None:
    """Such as on a disk that is not mounted."""
    quiet.create_dir(f"{PLACES[2]}/blobs")
    named = Unit(variables=variables)
    assert named.store is not None
    if there == "an empty folder":
        quiet.create_dir(named.store)
    quiet.create_file("/etc/fstab", contents="/dev/x /disk ext4 0 0\n")
    monkeypatch.setattr(unit, "find", lambda: named)
    with pytest.raises(NoStoreError) as caught:
        place.find(None, {})
    assert named.store in str(caught.value)
    assert next(iter(variables)) in str(caught.value)
    assert caught.value.command.endswith("mount /disk")
    monkeypatch.setattr(unit, "find", lambda: named._replace(idle=True))
    assert place.find(None, {}).path == PLACES[2]
    monkeypatch.setattr(unit, "find", lambda: Unit(user="ollama", root="/nowhere"))
    assert place.find(None, {}).path == PLACES[2]


def test_a_unit_whose_variables_can_not_be_read_may_have_another_store(
    quiet: FakeFilesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet.create_dir(f"{PLACES[0]}/blobs")
    monkeypatch.setattr(unit, "find", lambda: Unit(unread="/etc/secret"))
    with pytest.raises(NoPermissionError, match="/etc/secret"):
        place.find(None, {})


def test_the_variable_comes_before_and_the_flag_first(quiet: FakeFilesystem) -> None:
    quiet.create_dir(f"{PLACES[0]}/blobs")
    quiet.create_dir("/variable/blobs")
    quiet.create_dir("/flag/blobs")
    given = {"OLLAMA_MODELS": " '/variable' "}
    assert place.find(None, given)[:2] == ("/variable", "OLLAMA_MODELS")
    assert place.find("/flag", given)[:2] == ("/flag", "--store")
    assert place.find(None, {"OLLAMA_MODELS": "  "}).path == PLACES[0]


def test_a_named_store_that_does_not_exist_is_an_error_and_no_other_is_taken(
    quiet: FakeFilesystem,
) -> None:
    quiet.create_dir(f"{PLACES[0]}/blobs")
    for given, environment in (("/gone", {}), (None, {"OLLAMA_MODELS": "/gone"})):
        with pytest.raises(NoStoreError, match="/gone"):
            place.find(given, environment)


def test_a_folder_without_blobs_and_manifests_is_no_store(quiet: FakeFilesystem) -> None:
    quiet.create_dir("/empty")
    with pytest.raises(NoStoreError, match="neither"):
        place.find("/empty", {})


def test_everything_looked_at_is_listed(quiet: FakeFilesystem) -> None:
    with pytest.raises(NoStoreError) as caught:
        place.find(None, {})
    assert caught.value.exit_code is Exit.NO_STORE
    for path in PLACES:
        assert path in str(caught.value)


@pytest.mark.parametrize(
    ("file_system", "network"),
    [("ext4", False), ("nfs4", True), ("cifs", True), ("fuse.sshfs", True), ("xfs", False)],
)
def test_network_file_systems_are_known(models: Store, file_system: str, network: bool) -> None:
    proc = quiet_machine(models.path.parent / "proc", file_system=file_system)
    fd = os.open(models.path, os.O_RDONLY)
    found = place.describe(models.host(proc=proc), fd)
    os.close(fd)
    assert (found.file_system, found.network) == (file_system, network)


@pytest.mark.parametrize(
    ("name", "globbed"), [("models", False), ("m [1]", True), ("a\\b", True), ("a*?", False)]
)
def test_paths_in_which_the_server_finds_nothing(tmp_path: Path, name: str, globbed: bool) -> None:
    store = Store(tmp_path / name)
    fd = os.open(store.path, os.O_RDONLY)
    assert place.describe(store.host(), fd).globbed is globbed
    os.close(fd)


def test_blobs_that_are_a_link(models: Store, tmp_path: Path) -> None:
    models.blobs.rename(tmp_path / "elsewhere")
    models.blobs.symlink_to(tmp_path / "elsewhere")
    fd = os.open(models.path, os.O_RDONLY)
    found = place.describe(models.host(), fd)
    os.close(fd)
    assert (found.blobs_linked, found.blobs_elsewhere) == (True, False)


@needs_root
@pytest.mark.parametrize(
    ("link", "blobs", "foreign"),
    [(1000, 1000, False), (0, 1001, False), (1000, 0, True), (1000, 1001, True)],
)
def test_blobs_behind_somebody_elses_link(
    models: Store, tmp_path: Path, link: int, blobs: int, foreign: bool
) -> None:
    models.blobs.rename(tmp_path / "elsewhere")
    models.blobs.symlink_to(tmp_path / "elsewhere")
    os.chown(models.path, 1000, 1000)
    os.chown(models.blobs, link, link, follow_symlinks=False)
    os.chown(tmp_path / "elsewhere", blobs, blobs)
    fd = os.open(models.path, os.O_RDONLY)
    found = place.describe(models.host(), fd)
    os.close(fd)
    assert bool(found.foreign) is foreign


@needs_root
def test_a_store_behind_somebody_elses_link_is_taken_for_what_it_is(
    models: Store, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(models.path)
    found = place.find(str(tmp_path / "link"), {})
    assert found == (str(tmp_path / "link"), "--store", None)
    os.chown(tmp_path / "link", 1000, 1000, follow_symlinks=False)
    found = place.find(str(tmp_path / "link"), {})
    assert found.path == str(models.path)
    assert found.foreign is not None
    assert (found.foreign.uid, found.foreign.target_uid) == (1000, 0)


@pytest.mark.parametrize(
    ("stat", "at"), [("btime 1700000000\n", 1.7e9), ("", 0), ("btime\n", 0), ("btime x\n", 0)]
)
def test_when_the_machine_started(models: Store, tmp_path: Path, stat: str, at: float) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "stat").write_text(stat)
    assert place.started_at(models.host(proc=str(tmp_path / "proc"))) == at
    assert place.started_at(models.host(proc="/nowhere")) == 0


def test_a_store_that_may_not_even_be_searched_is_not_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with folders.opened_store(str(tmp_path)) as store:
        assert not place.describe(Host(str(tmp_path)), store).writable

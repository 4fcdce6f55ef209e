"""The way to a store's folder and to its blobs: whose symlinks count, and where they lead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import needs_root
from watcher.state import folders

OWNER, OTHER = 12345, 54321


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder of the owner's, with a store of root's in it, as a container's volume has it."""
    home = tmp_path / "home"
    (home / "models/blobs").mkdir(parents=True)
    (home / "models/blobs/file").touch()
    if os.geteuid() == 0:
        os.chown(home, OWNER, OWNER)
    return home


def own(path: Path, uid: int) -> None:
    os.chown(path, uid, uid, follow_symlinks=False)


def blobs(store: Path, *, foreign_too: bool = False) -> list[str]:
    with (
        folders.opened_store(str(store)) as fd,
        folders.opened_blobs(fd, foreign_too=foreign_too) as there,
    ):
        return os.listdir(there)


def test_real_folders_are_entered_whoever_owns_what_they_lie_in(here: Path) -> None:
    assert blobs(here / "models") == ["file"]
    assert folders.way(str(here / "models")) == (str(here / "models"), True, None)
    assert folders.way(str(here)) == (str(here), False, None)


@pytest.mark.parametrize("target", ["models", "./models/", "models/../models", "../home/models"])
def test_ones_own_links_lead_where_the_kernel_says(here: Path, target: str) -> None:
    (here / "link").symlink_to(target)
    (here / "chain").symlink_to(here / "link")
    assert blobs(here / "chain") == ["file"]
    assert folders.way(str(here / "chain")).real == str(here / "models")


@needs_root
@pytest.mark.parametrize(
    ("link", "target", "counts"),
    [
        (0, OTHER, True),
        (OTHER, OTHER, True),
        (OWNER, 0, False),
        (OWNER, OTHER, False),
    ],
)
def test_a_link_of_somebody_else_is_not_followed(
    here: Path, link: int, target: int, counts: bool
) -> None:
    own(here / "models", target)
    (here / "link").symlink_to("models")
    own(here / "link", link)
    way = folders.way(str(here / "link"))
    assert way.real == str(here / "models")
    assert (way.foreign is None) is counts
    if counts:
        with pytest.raises(folders.NotRootsError, match=str(OTHER)):
            blobs(here / "link")
        own(here / "models", 0)
        own(here / "link", 0)
        assert blobs(here / "link") == ["file"]
        return
    with pytest.raises(folders.ForeignLinkError) as caught:
        blobs(here / "link")
    found = (str(here / "link"), link, str(here / "models"), target)
    assert caught.value.link == way.foreign == found


@needs_root
@pytest.mark.parametrize("place", ["first", "middle", "behind"])
def test_one_such_link_anywhere_on_the_way_is_enough(here: Path, place: str) -> None:
    first = here / "first"
    first.symlink_to("middle/models" if place == "middle" else "behind")
    (here / "middle").symlink_to(".")
    (here / "behind").symlink_to("models")
    own(here / place, OTHER)
    with pytest.raises(folders.ForeignLinkError):
        blobs(here / "first")


@needs_root
def test_blobs_behind_such_a_link_are_only_looked_at(here: Path, tmp_path: Path) -> None:
    store = here / "store"
    store.mkdir()
    (store / "blobs").symlink_to(here / "models/blobs")
    assert blobs(store) == ["file"]
    own(store / "blobs", OWNER)
    with pytest.raises(folders.ForeignLinkError, match="12345"):
        blobs(store)
    assert blobs(store, foreign_too=True) == ["file"]
    with folders.opened_store(str(store)) as fd:
        found = folders.look_at_blobs(fd)
    assert found.linked
    assert found.status is not None
    assert found.foreign is not None


def test_a_circle_a_file_and_nothing(here: Path) -> None:
    (here / "circle").symlink_to("circle")
    (here / "file").touch()
    for name, error in (
        ("circle", OSError),
        ("file", NotADirectoryError),
        ("none", FileNotFoundError),
    ):
        with pytest.raises(error):
            folders.way(str(here / name))
        with pytest.raises(error):
            folders.way(str(here / name / "more"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_store_that_may_not_be_read_is_named(here: Path) -> None:
    (here / "models").chmod(0o311)
    with pytest.raises(PermissionError) as caught, folders.opened_store(str(here / "models")):
        pass
    assert caught.value.filename == str(here / "models")
    (here / "models").chmod(0o755)


def test_links_of_the_kernels_own_lead_where_it_says(here: Path) -> None:
    fd = os.open(here, os.O_RDONLY)
    try:
        assert blobs(Path(f"/proc/self/fd/{fd}/models")) == ["file"]
    finally:
        os.close(fd)


def test_no_descriptor_is_left_open(here: Path) -> None:
    (here / "link").symlink_to("models")
    (here / "bad").symlink_to("link/none")
    before = len(os.listdir("/proc/self/fd"))
    blobs(here / "link")
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            folders.way(str(here / "bad"))
    assert len(os.listdir("/proc/self/fd")) <= before

"""A disk without room, or without an inode: what is said helps, also at the first clean."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import needs_root
from tests.support.driving import HealthyStore, run
from watcher import errors
from watcher.state import folders
from watcher.system import advice

from .test_store_goes import mounted

BY_HAND = re.compile(r"make room by hand, while no server\s+runs:\s+-> (rm .*)")


def filled(folder: Path) -> None:
    """Leave no byte of a file system free."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1 << 9, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    path, image = tmp_path / "disk", tmp_path / "image"
    options = ["-t", "tmpfs", "-o", "size=2m", "none"]
    if request.param == "ext4":
        image.write_bytes(b"")
        os.truncate(image, 4 << 20)
        words = ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image)]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("mkfs.ext4 does not work here")
        options = ["-o", "loop", str(image)]
    try:
        with mounted(path, *options):
            yield path
    except subprocess.CalledProcessError:
        pytest.skip("loop devices can't be mounted here")


@needs_root
@pytest.mark.parametrize("what", ["orphan", "download"])
def test_the_first_clean_at_no_byte_free_prints_a_removal_that_helps(disk: Path, what: str) -> None:
    store = HealthyStore(disk / "models")
    store.path.with_name("models.home").mkdir()
    stale = [store.download(name) for name in "ab"] if what == "download" else []
    orphans = [store.text_blob(name * 50_000) for name in "cd"] if what == "orphan" else []
    filled(disk)
    before = store.tree()
    done = run(store.path, "clean", "--yes")
    told = done.stdout + done.stderr
    assert done.returncode != 0
    assert store.tree() == before
    found = BY_HAND.search(told)
    assert found is not None, told
    assert subprocess.run(found[1], shell=True).returncode == 0
    gone = before.keys() - store.tree().keys()
    assert gone, "it removes something, and all of it is what clean removes"
    assert all(any(digest in name for digest in (*stale, *orphans)) for name in gone)
    again = run(store.path, "clean", "--yes")
    assert again.returncode == 0, again.stdout + again.stderr
    assert not any(digest in name for name in store.tree() for digest in (*stale, *orphans))


@needs_root
def test_missing_inodes_are_not_called_missing_space(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", "size=2m,nr_inodes=60", "none"):
        store = HealthyStore(disk / "models")
        store.download("stale")
        store.path.with_name("models.home").mkdir()
        with contextlib.suppress(OSError):
            for number in range(100):
                (disk / str(number)).touch()
        assert errors.lacks_inodes(str(store.path))
        for words in (["queue", "add", "x"], ["clean", "--yes"], ["repair", "--offline", "-y"]):
            done = run(store.path, *words)
            told = done.stdout + done.stderr
            assert "free space" not in told, (words, told)
            if done.returncode == 4:
                assert "no inode" in told, (words, told)
        assert "no inode" in run(store.path, "queue", "add", "llama3").stderr
        failed = OSError(errno.ENOSPC, "No space left on device", str(store.path / "x"))
        reply = errors.named(failed)
        assert reply is not None
        assert reply.next_step == errors.NO_INODES
        reply = advice.cant_write("x", OSError(errno.ENOSPC, "y"), str(store.path))
        assert reply.command == f"df -i {store.path}"
        with folders.opened_store(str(store.path)) as opened:
            assert errors.with_step("x", errno.ENOSPC, opened) == f"x; {errors.NO_INODES}"


def test_a_disk_with_inodes_is_short_of_space(tmp_path: Path) -> None:
    assert not errors.lacks_inodes(str(tmp_path))
    assert not errors.lacks_inodes(str(tmp_path / "gone" / "file"))
    assert "free space" in errors.with_step("x", errno.ENOSPC, str(tmp_path))

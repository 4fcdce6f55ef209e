"""A disk whose power fails: what its file system had in memory alone is gone.

with Disk(tmp_path / "disk") as disk:
    ...                       # something happens in disk.path
    with disk.power_cut() as after:
        ...                   # after.path is what the disk had at that moment
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.conftest import IS_ROOT
from tests.support.driving import private_proc
from tests.support.runs import one_run
from watcher.model import Rules
from watcher.observe.host import Host
from watcher.reconcile import Report

SIZE = 256 << 20


def needs_disks() -> None:
    """Skip where no image can be mounted."""
    if not IS_ROOT:
        pytest.skip("needs root to mount an image")
    for tool in ("mkfs.ext4", "mount", "umount"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")


class Disk:
    """An ext4 file system in a file, mounted at `path`."""

    def __init__(self, folder: Path, image: Path | None = None) -> None:
        needs_disks()
        folder.mkdir()
        self.folder, self.path = folder, folder / "mounted"
        self.image = folder / "image"
        if image is None:
            with self.image.open("wb") as file:
                file.truncate(SIZE)
            options = ["-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
            subprocess.run(["mkfs.ext4", *options, str(self.image)], check=True)
        else:
            # What the loop device has, and nothing of what the file system above it holds back.
            subprocess.run(["cp", "--sparse=always", str(image), str(self.image)], check=True)
        self.path.mkdir()
        self._crashes = 0

    def __enter__(self) -> Self:
        done = subprocess.run(
            ["mount", "-o", "loop", str(self.image), str(self.path)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no image can be mounted here: {done.stderr.strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)
        self.image.unlink()

    @contextlib.contextmanager
    def power_cut(self) -> Iterator[Disk]:
        """The disk as it is at this moment."""
        self._crashes += 1
        after = Disk(self.folder / f"after{self._crashes}", self.image)
        with after:
            yield after

    def keep_all(self) -> None:
        """Bring everything to the disk."""
        subprocess.run(["sync", "--file-system", str(self.path)], check=True)


class Machine:
    """Looks at a store in one start of a machine, and in the next ones."""

    def __init__(self, folder: Path) -> None:
        self.proc = private_proc(folder)
        self._boot = folder / "sys/kernel/random/boot_id"
        self._boot.parent.mkdir(parents=True)
        self.restart()

    @property
    def boot(self) -> str:
        """The id of its start."""
        return self._boot.read_text().strip()

    def restart(self) -> None:
        """The machine starts anew."""
        self._boot.write_text(f"{uuid.uuid4()}\n")

    def host(self, store: Path) -> Host:
        """This machine with a store."""
        return Host(str(store), proc=self.proc)

    def act(self, store: Path, policy: Rules) -> Report:
        """A cycle."""
        return one_run(self.host(store), policy)

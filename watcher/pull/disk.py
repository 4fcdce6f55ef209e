"""What of the disk no retry can change, seen before a byte is fetched."""

import contextlib
import itertools
import os
from collections.abc import Iterator

from rich.filesize import decimal

from watcher.observe import place
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.pull.failures import Cause, End
from watcher.state import fs
from watcher.state.memory import FOLDER

_MOST_NAMES = 1000  #: so many names are tried for a file that shows what the file system takes


def fault(host: Host, largest: int) -> End | None:
    """Why no layer of `largest` bytes can be written to a store; None where nothing forbids it."""
    if why := read_only(host.store):
        return End(Cause.READ_ONLY, why)
    size = f"a layer has {decimal(largest)}"
    try:
        with _folders(host.store) as folders:
            if not _takes(folders, largest):
                why = f"{size}, more than this file system allows for a file"
                return End(Cause.FILE_TOO_LARGE, why)
    except OSError:
        pass  # whoever writes meets it
    return None


def read_only(store: str) -> str:
    """That layers can't be written since the file system is read-only; "" where it is not."""
    with contextlib.suppress(OSError), _folders(store) as folders:
        if os.fstatvfs(folders[0]).f_flag & os.ST_RDONLY:
            return f"the file system {_mount_point(folders[0])} is mounted read-only"
    return ""


def _mount_point(fd: int) -> str:
    with contextlib.suppress(OSError, StopIteration):
        with open(f"/proc/self/fdinfo/{fd}", encoding="utf-8") as info:
            number = next(line.split()[1] for line in info if line.startswith("mnt_id:"))
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            point = next(line.split()[4] for line in mounts if line.split()[0] == number)
        return f"at {names.printable(place.unescaped(point))}"
    return "of the store"


@contextlib.contextmanager
def _folders(path: str) -> Iterator[list[int]]:
    """The folder that layers are written to, and others in which there may be files."""
    with contextlib.ExitStack() as opened:
        store = opened.enter_context(fs.opened_folder(path))
        found = []
        for name in ("blobs", FOLDER):
            with contextlib.suppress(FileNotFoundError):
                found.append(opened.enter_context(fs.opened_folder(name, store, follow=True)))
        yield [*found, store]


def _takes(folders: list[int], size: int) -> bool:
    """Whether a file may be so long: the kernel seeks to no place beyond what it takes."""
    device = os.fstat(folders[0]).st_dev
    for folder in folders:
        with os.scandir(folder) as entries:
            some = itertools.islice(entries, _MOST_NAMES)
            name = next((each.name for each in some if each.is_file(follow_symlinks=False)), None)
        if name is None:
            continue
        with open(fs.open_to_read(name, folder), "rb") as file:
            if os.fstat(file.fileno()).st_dev != device:
                continue
            try:
                os.lseek(file.fileno(), size, os.SEEK_SET)
            except OSError:
                return False
            return True
    return True  # there is no file to seek in

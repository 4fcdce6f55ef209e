"""The daemon with its inotify events counted: ``python -m tests.bench.counted FILE WORDS...``.

The count goes to FILE when it ends.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

from watcher.cli import main

_HEAD = struct.Struct("iIII")


def counting(file: Path, words: list[str]) -> int:
    """Run the command line; write how many events the kernel has handed over."""
    events = 0
    read = os.read

    def counted(fd: int, length: int) -> bytes:
        nonlocal events
        data = read(fd, length)
        if os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:inotify":
            at = 0
            while at < len(data):
                at += _HEAD.size + _HEAD.unpack_from(data, at)[3]
                events += 1
        return data

    os.read = counted
    code = main(words)
    file.write_text(str(events))
    return code


if __name__ == "__main__":
    sys.exit(counting(Path(sys.argv[1]), sys.argv[2:]))

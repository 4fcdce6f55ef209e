"""How often the data of an unfinished download is read, and when it is read again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.driving import run
from tests.support.notation import Store
from watcher.model import MIB, Part, Reads, Trust
from watcher.observe import parts
from watcher.observe.parts import Content

PART = 100_000_000
SETTLED = 0.3


def reads_of(do: Callable[[], object]) -> int:
    """How many reads of files the kernel counts meanwhile (one for the count itself)."""

    def count() -> int:
        return int(re.search(r"syscr: (\d+)", Path("/proc/thread-self/io").read_text())[1])  # type: ignore[index]

    idle = -count() + count()
    before = count()
    do()
    return count() - before - idle


@pytest.mark.parametrize("holes", [True, False], ids=["sparse", "copy"])
def test_a_download_of_16_parts_takes_16_reads_and_none_once_they_are_known(
    tmp_path: Path, holes: bool
) -> None:
    path = tmp_path / "data"
    each = PART if holes else MIB + 100
    with path.open("w+b") as file:
        if holes:
            file.truncate(16 * each)
        else:
            file.write(bytes(16 * each))
            file.flush()
        for number in range(16):
            os.pwrite(file.fileno(), b"x" * 4096, number * each)
            if not holes:
                os.pwrite(file.fileno(), b"x" * 100, (number + 1) * each - 100)
        given = [Part(number, number * each, each, 0) for number in range(16)]
        content = Content(file.fileno(), 16 * each)

        def look(at: Content) -> Trust:
            return parts.trust(at, given, parts.Doubts(), parts.Limits())

        assert reads_of(lambda: look(content)) == 16
        known = Content(file.fileno(), 16 * each, Reads(16 * each, 0, "", content.answers))
        assert reads_of(lambda: look(known)) == 0
        assert look(known) == look(content)


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("change", ["nothing", "same size and time", "another start"])
def test_a_download_unchanged_since_the_last_scan_is_not_read_again(
    models: Store, tmp_path: Path, change: str
) -> None:
    models.broken("0:1 0:0 0:2", name="one")
    time.sleep(SETTLED)  # a change within one tick of the file system's clock shows in no time
    state = models.path / ".ollama-watch" / "state.json"
    words = [sys.executable, "-m", "watcher", "--store", str(models.path)]
    for _ in range(3):  # a repair sets times, so the scan behind it has to settle as well
        run(models.path, "repair", "--yes", "--offline")
        time.sleep(SETTLED)
    (data,) = models.blobs.glob("*-partial")
    before = preads([*words, "audit"], data, tmp_path)
    assert before == 0
    if change == "same size and time":
        status = data.stat()
        with data.open("r+b") as file:
            file.write(b"other bytes")
        os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    if change == "another start":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state.write_text(state.read_text().replace(boot, boot[::-1]))
    after = preads([*words, "audit"], data, tmp_path)
    assert (after > 0) == (change != "nothing")


def preads(words: list[str], data: Path, folder: Path) -> int:
    """How many reads a command makes of a file, as strace sees them."""
    log = folder / "strace"
    subprocess.run(
        ["strace", "-f", "-y", "-e", "trace=pread64,preadv", "-o", str(log), *words],
        capture_output=True,
        check=False,
    )
    return sum(f"{data.name}>" in line for line in log.read_text().splitlines())


def test_the_zeros_before_an_offset_and_the_end_before_it_are_one_read(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x" * 1000 + bytes(300_000))
    with path.open("rb") as file:
        content = Content(file.fileno(), 301_000)
        assert reads_of(lambda: content.is_zeros_before(200_000)) == 1
        assert reads_of(lambda: content.written_end(199_000, 200_000)) == 0
        assert content.is_zeros_before(200_000)
        assert not content.is_zeros_before(66_000)


def test_answers_that_are_none_of_ours_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x" * 1000 + bytes(1000))
    with path.open("rb") as file:
        for text in ("0 2000 9999999", "0 2000", "a b c", "0 2000 -1"):
            content = Content(file.fileno(), 2000, Reads(2000, 0, "", text))
            assert content.written_end(0, 2000) == 1000

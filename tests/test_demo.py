"""The demo as its audience runs it: it tells its story, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import at_length
from tests.driving import environment
from tests.fidelity.harness import wait_until

STORY = [
    "old, forgotten download",
    "kill -9",
    '"event_type":"download_interrupted"',
    "$ ollama-watch audit",
    "-> ollama-watch repair sha256-",
    "$ ollama-watch clean --dry-run",
    "$ ollama-watch clean --yes",
    "after ollama-watch repair",
    "$ ollama-watch pull train:7b",
    "were lost with a broken connection",
    "Download complete",
    "max retries exceeded            success",
]


class Show:
    """A demo under way, in a process group of its own, with a TMPDIR of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder / "tmp"
        self.folder.mkdir()
        self.output = folder / "out"
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "watcher", "demo", *words],
                env=environment(folder / "demo") | {"TMPDIR": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def told(self) -> str:
        """What it has told so far."""
        return self.output.read_text()

    def left(self) -> list[str]:
        """Processes and files that are left of it."""
        found = [str(path) for path in self.folder.rglob("*")]
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "environ").read_bytes()
                session = (process / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if session[0] != "Z" and (
                str(self.folder).encode() in words or int(session[3]) == self.process.pid
            ):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        return found


@pytest.fixture
def show(tmp_path: Path) -> Iterator[Show]:
    (tmp_path / "pictures").mkdir()
    made = Show(tmp_path, "--svg", str(tmp_path / "pictures"))
    yield made
    if made.process.poll() is None:
        os.killpg(made.process.pid, signal.SIGKILL)
        made.process.wait()


def test_it_tells_its_story_and_leaves_nothing(show: Show, tmp_path: Path) -> None:
    assert show.process.wait(60) == 0, show.told
    at = [show.told.find(words) for words in STORY]
    assert -1 not in at, show.told
    assert at == sorted(at)
    assert "Traceback" not in show.told
    assert show.left() == []
    pictures = {path.name: path.read_text() for path in (tmp_path / "pictures").iterdir()}
    assert set(pictures) == {"audit.svg", "repair.svg", "pull.svg"}
    assert "-&gt;&#160;ollama-watch&#160;repair&#160;sha256-" in pictures["audit.svg"]
    assert "train:7b" in pictures["pull.svg"]
    assert not any(str(tmp_path) in pictures[name] for name in ("repair.svg", "pull.svg"))


@pytest.mark.parametrize(
    "when",
    [
        pytest.param("== A store", marks=at_length),
        "== A daemon watches",
        pytest.param("== What an audit shows", marks=at_length),
        "== A network that",
    ],
)
def test_ctrl_c_ends_it_and_leaves_nothing(show: Show, when: str) -> None:
    wait_until(lambda: when in show.told, when, 60)
    os.killpg(show.process.pid, signal.SIGINT)
    assert show.process.wait(20) == 130, show.told
    assert "Traceback" not in show.told
    wait_until(lambda: show.left() == [], "its processes to end", 10)

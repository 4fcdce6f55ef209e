"""The demo as its audience runs it: it tells its story, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.conftest import IS_ROOT, NOBODY, needs_root
from tests.support.driving import environment
from tests.support.servers import wait_until

OTHER = 54321
STORY = [
    "old, forgotten download",
    "kill -9",
    "  download_interrupted  ",
    "$ ollama-watch audit",
    "-> ollama-watch repair big:7b",
    "$ ollama-watch clean --dry-run",
    "$ ollama-watch clean --yes",
    "after ollama-watch repair",
    "$ ollama-watch pull train:7b",
    "Download complete",
    "max retries exceeded            success",
]


class Show:
    """A demo under way, in a process group of its own, with a TMPDIR of its own."""

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        """`command`: of Python, with the words for its module."""
        self.folder = folder / "tmp"
        self.folder.mkdir(exist_ok=True)
        self.output = folder / "out"
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                command,
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


@contextlib.contextmanager
def server_of(uid: int) -> Iterator[None]:
    """A process that looks like a user's Ollama server; its environment is that user's secret."""
    words = ("ollama", "-c", "read line", "serve")
    with subprocess.Popen(words, executable="/bin/sh", stdin=subprocess.PIPE, user=uid) as server:
        try:
            yield
        finally:
            server.kill()


@contextlib.contextmanager
def shown(folder: Path, command: Sequence[str]) -> Iterator[Show]:
    made = Show(folder, command)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            os.killpg(made.process.pid, signal.SIGKILL)
            made.process.wait()


@pytest.fixture
def show(tmp_path: Path) -> Iterator[Show]:
    """By the user who runs the tests."""
    with shown(tmp_path, [sys.executable, "-m", "watcher", "demo"]) as made:
        yield made


def demo_of(request: pytest.FixtureRequest, uid: int, folder: Path, *words: str) -> list[str]:
    """The command that runs it as a user; its temporary files are in the folder `tmp`."""
    start = (
        f"import os, sys; os.environ['TMPDIR'] = {str(folder / 'tmp')!r};"
        "from watcher.cli import main; sys.exit(main(['demo', *sys.argv[1:]]))"
    )
    if not IS_ROOT:
        return [sys.executable, "-c", start, *words]
    as_user: Callable[..., list[str]] = request.getfixturevalue("as_user")
    return as_user(["-c", start, *words], uid, uid)


def test_it_runs_its_story_and_leaves_nothing(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """By an ordinary user, beside a server of their own and, where tests run as root, root's."""
    uid = NOBODY if IS_ROOT else os.geteuid()
    for name in ("tmp", "pictures"):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, uid, -1)
    command = demo_of(request, uid, tmp_path, "--svg", str(tmp_path / "pictures"))
    with server_of(uid), server_of(os.geteuid()), shown(tmp_path, command) as show:
        _is_the_story(show, tmp_path)


def _is_the_story(show: Show, tmp_path: Path) -> None:
    assert show.process.wait(120) == 0, show.told
    at = [show.told.find(words) for words in STORY]
    assert -1 not in at, show.told
    assert at == sorted(at)
    assert "Traceback" not in show.told
    assert show.left() == []
    pictures = {path.name: path.read_text() for path in (tmp_path / "pictures").iterdir()}
    assert set(pictures) == {"audit.svg", "repair.svg", "pull.svg"}
    assert "ollama-watch&#160;repair&#160;big:7b" in pictures["audit.svg"]
    assert "train:7b" in pictures["pull.svg"]
    for name, picture in pictures.items():
        assert "&#160;MB" in picture, f"a size in {name}"
        assert re.search(r"(>|&#160;)0(&#160;)+[0-9.]+&#160;MB", picture), f"a scale in {name}"
        assert ":7b" in picture, f"a model in {name}"
    assert not any(str(tmp_path) in pictures[name] for name in ("repair.svg", "pull.svg"))


ANOTHER_USER = pytest.mark.slow("the server of one more user, beside the same demo")
ANOTHER_SCENE = pytest.mark.slow("an interrupt in one more scene of the same demo")


@needs_root
@pytest.mark.parametrize(
    ("by", "server"),
    [
        pytest.param(NOBODY, 0, marks=pytest.mark.slow("the story runs beside it, too")),
        pytest.param(NOBODY, OTHER, marks=ANOTHER_USER),
        pytest.param(0, 0, marks=pytest.mark.slow("the whole story runs beside one's own server")),
        pytest.param(0, OTHER, marks=ANOTHER_USER),
    ],
)
def test_it_runs_through_beside_anybody_s_server(
    request: pytest.FixtureRequest, tmp_path: Path, by: int, server: int
) -> None:
    """Of a server whose environment can't be read nobody knows which store it has."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    os.chown(temporary, by, by)
    with server_of(server):
        command = demo_of(request, by, tmp_path)
        done = subprocess.run(command, capture_output=True, timeout=120)
    told = done.stdout.decode()
    assert done.returncode == 0, told + done.stderr.decode()
    assert [words for words in STORY if words not in told] == []
    assert list(temporary.iterdir()) == []


@needs_root
@pytest.mark.slow("another whole demo, for the settings that it does not read")
def test_the_settings_of_this_machine_are_not_the_demo_s(tmp_path: Path) -> None:
    """Its old download is twelve days old, and goes."""
    etc = tmp_path / "etc"
    etc.mkdir()
    shutil.copy("/etc/hosts", etc)
    (etc / "ollama-watch.toml").write_text('stale_after = "30d"')
    script = 'mount --bind "$0" /etc && exec "$@"'
    demo = [sys.executable, "-m", "watcher", "demo"]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, str(etc), *demo],
        env=environment(tmp_path / "demo"),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    assert b"-> ollama-watch clean sha256-" in done.stdout
    assert b"/dev/null" not in done.stdout


@pytest.mark.parametrize(
    "when",
    [
        pytest.param("== A store", marks=ANOTHER_SCENE),
        "== A daemon watches",
        pytest.param("== What an audit shows", marks=ANOTHER_SCENE),
        pytest.param("== A network that", marks=ANOTHER_SCENE),
    ],
)
def test_ctrl_c_ends_it_and_leaves_nothing(show: Show, when: str) -> None:
    wait_until(lambda: when in show.told, when)
    os.killpg(show.process.pid, signal.SIGINT)
    assert show.process.wait(120) == 130, show.told
    assert "Traceback" not in show.told
    wait_until(lambda: show.left() == [], "its processes to end")

"""Fixtures for all tests: a store, a registry, nobody's real home, another user to run as."""

from __future__ import annotations

import compileall
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest

import watcher
from watcher.demo.registry import Registry

from .support import commands, examples
from .support.loaded import load_all
from .support.notation import Store
from .support.servers import EngineServer, RealServer, wait_until
from .support.workers import pytest_cmdline_main as pytest_cmdline_main
from .support.workers import pytest_collection as pytest_collection
from .support.workers import pytest_collection_finish as pytest_collection_finish
from .support.workers import pytest_xdist_setupnodes as pytest_xdist_setupnodes

#: Deterministic, and not in need of a fast machine.
hypothesis.settings.register_profile(
    "suite", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile("suite")

# A shell starts what runs in the background with interrupts ignored, and so would our children be.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What makes and mounts file systems lies where a short PATH does not lead.
os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))

IS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="needs root")
NOBODY = 65534
ENOUGH_MEMORY = 6 << 30


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--slow`: the cases, too, that the usual run leaves out, each for the reason at its mark."""
    parser.addoption("--slow", action="store_true", help="run what is marked as slow, too")


def pytest_configure(config: pytest.Config) -> None:
    """Say it to what is imported, here and in the workers."""
    if config.getoption("--slow"):
        os.environ[examples.ALL] = "true"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked as slow, unless it is asked for."""
    if config.getoption("--slow"):
        return
    for item in items:
        mark = item.get_closest_marker("slow")
        if mark is not None:
            item.add_marker(pytest.mark.skip(reason=f"slow, needs --slow: {mark.args[0]}"))


@pytest.fixture(scope="session")
def slow(request: pytest.FixtureRequest) -> bool:
    """Whether everything is asked for, however long it takes."""
    return bool(request.config.getoption("--slow"))


#: For fixtures that are a server: the engine and, where there is one, the real thing.
SERVERS = (
    pytest.param(EngineServer, id="engine"),
    pytest.param(
        RealServer,
        id="real",
        marks=pytest.mark.skipif("OLLAMA_BIN" not in os.environ, reason="OLLAMA_BIN is not set"),
    ),
)

Run = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(autouse=True)
def _nobodys_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No test reads or writes a real home, or follows the settings of this machine.

    Whoever owns a test's store could reach it, as the owners of real stores can.
    """
    if IS_ROOT:
        open_parents(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in list(os.environ):
        if name.startswith("OLLAMA_") and name != "OLLAMA_BIN":
            monkeypatch.delenv(name)
    before = psutil.PROCFS_PATH
    yield
    psutil.PROCFS_PATH = before


@pytest.fixture
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory, if there is much of it: the `tmp_path` of tests that write much.

    Not of those in which the file system plays a part: theirs is one that stores are on.
    """
    memory = Path("/dev/shm")
    much = memory.is_dir() and shutil.disk_usage(memory).free >= ENOUGH_MEMORY
    path = Path(tempfile.mkdtemp(dir=memory if much else tmp_path_factory.getbasetemp()))
    yield path

    def gone() -> bool:
        shutil.rmtree(path, ignore_errors=True)  # a process that ends may still write
        return not path.exists()

    wait_until(gone, "the end of all that writes there")


@pytest.fixture
def models(tmp_path: Path) -> Store:
    """An empty model store."""
    return Store(tmp_path / "models")


@pytest.fixture
def registry() -> Iterator[Registry]:
    """A registry without models, which serves on loopback."""
    with Registry() as served:
        yield served


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    """The descriptor of an empty folder."""
    path = tmp_path / "folder"
    path.mkdir()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the command line; nothing of this machine's settings gets through."""

    def call(
        *words: str | bytes, env: dict[str, str] | None = None, **more: object
    ) -> subprocess.CompletedProcess[bytes]:
        given = {**environment(tmp_path), **(env or {})}
        if not more.keys() - {"timeout", "cwd"}:
            return commands.run(words, given, **more)  # type: ignore[arg-type]
        options: dict[str, object] = {"capture_output": True, "timeout": 60, "check": False, **more}
        command = [sys.executable, "-W", "error", "-m", "watcher", *words]
        return subprocess.run(command, env=given, **options)  # type: ignore[call-overload,no-any-return]

    return call


def environment(home: Path) -> dict[str, str]:
    """What a child of ours gets to see."""
    return {
        "HOME": str(home / "home"),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(watcher.__file__).parent.parent),
        "LC_ALL": "C.UTF-8",
    }


@pytest.fixture(scope="session")
def nobodys_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and what it needs, where an ordinary user can read it."""
    target = tmp_path_factory.mktemp("package")
    shutil.copytree(Path(watcher.__file__).parent, target / "watcher")
    installed = Path(psutil.__file__).parent.parent
    needed = ["click", "orjson", "psutil", "rich", "watchdog", "markdown_it", "mdurl", "pygments"]
    needed += ["prometheus_client", "certifi", "pycurl", "pycurl.libs"]
    needed += ["xxhash"] if (installed / "xxhash").is_dir() else []
    for name in needed:
        shutil.copytree(installed / name, target / name)
    # Else each process compiles it, which may not write there.
    compileall.compile_dir(target / "watcher", quiet=1)
    subprocess.run(["chmod", "-R", "a+rX", str(target)], check=True)
    open_parents(target)
    return target


def open_parents(path: Path) -> None:
    """Let others pass through to a folder of pytest's, and nothing more."""
    for each in (path, *path.parents):
        status = each.stat()
        if each in (Path(tempfile.gettempdir()), Path("/dev/shm")) or status.st_uid != os.geteuid():
            break
        each.chmod(status.st_mode | 0o011)


@contextlib.contextmanager
def ordinary_user(folder: Path) -> Iterator[None]:
    """Go on as an ordinary user, who owns the folder with all in it."""
    if not IS_ROOT:
        yield
        return
    load_all()  # they may not be able to
    open_parents(folder)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def as_nobody(as_user: Callable[..., list[str]]) -> Callable[[Sequence[str]], list[str]]:
    """The command that runs Python, with the package, as an ordinary user."""
    return as_user


@pytest.fixture(scope="session")
def user_runs(nobodys_package: Path) -> Callable[..., list[str]]:
    """The command that `as_user` gives."""
    if not IS_ROOT:
        pytest.skip("needs root to become another user")
    # The interpreter may lie in a folder of root's own: it is mounted where others can reach it,
    # in a mount namespace that ends with the child.
    mounted = nobodys_package / "python"
    mounted.mkdir(exist_ok=True)
    python = mounted / os.path.relpath(os.path.realpath(sys.executable), sys.base_prefix)

    def command(
        words: Sequence[str],
        uid: int = NOBODY,
        gid: int = NOBODY,
        groups: Sequence[int] = (),
        powers: Sequence[str] = (),
    ) -> list[str]:
        # Another pytest of this user's that begins meanwhile shuts the folder of all of them.
        open_parents(nobodys_package)
        script = 'mount --bind "$0" "$1" && shift && exec "$@"'
        mount = ["unshare", "--mount", "sh", "-c", script, sys.base_prefix, str(mounted)]
        others = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
        user = ["setpriv", f"--reuid={uid}", f"--regid={gid}", others, *powers]
        clean = [
            "env",
            "-i",
            f"PYTHONPATH={nobodys_package}",
            "PATH=/usr/bin:/bin",
            "HOME=/nowhere",
        ]
        return [*mount, *user, *clean, "PYTHONSAFEPATH=1", str(python), *words]

    probe = subprocess.run(
        command(["-c", "import watcher.cli, watcher.reconcile, watcher.show.tables"]),
        capture_output=True,
        check=False,
    )
    if probe.returncode:
        pytest.skip(f"the interpreter can't be used by others: {probe.stderr.decode()[-200:]}")
    return command


@pytest.fixture
def as_user(user_runs: Callable[..., list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    """The same for any user and groups: `uid`, `gid`, and `groups`, those besides.

    `powers`: options of `setpriv` for the capabilities that the user has.
    """

    def command(words: Sequence[str], *user: int, **more: Any) -> list[str]:
        open_parents(tmp_path)
        return user_runs(words, *user, **more)

    return command

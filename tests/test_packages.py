"""What pip installs: a source distribution with the whole tree, and from that a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from .conftest import environment
from .doc_tables import ROOT
from .support import completions

#: What lies about in a checkout, and what only the repository needs.
NOT_SHIPPED = (".*", "__pycache__", "*.egg-info", "build", "dist")
BUILD = "import sys; from setuptools import build_meta as made; print(made.{}(sys.argv[1]))"
#: Where each shell and `man` look, below the prefix of an installation.
SHARED = {
    "man": "share/man/man1",
    "completions/ollama-watch.bash": "share/bash-completion/completions",
    "completions/_ollama-watch": "share/zsh/site-functions",
    "completions/ollama-watch.fish": "share/fish/vendor_completions.d",
}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def build(kind: str, source: Path, target: Path) -> Path:
    """Build what pip would build from a source tree, with the setuptools that is installed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD.format(kind), str(target)],
        cwd=source, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, without what lies about."""
    target = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    return target


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    before = files(tree)
    packed = build("build_sdist", tree, tmp_path_factory.mktemp("sdist"))
    for each in files(tree) - before:
        (tree / each).unlink()
    with tarfile.open(packed) as archive:
        archive.extractall(packed.parent, filter="data")
    return packed.parent / packed.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from the source distribution as pip does."""
    return zipfile.ZipFile(build("build_wheel", sdist, tmp_path_factory.mktemp("wheel")))


def in_wheel(wheel: zipfile.ZipFile, part: str) -> set[str]:
    """Files below ``<name>-<version>.<part>/`` of a wheel."""
    found = (name.partition(f".{part}/") for name in wheel.namelist())
    return {path for _, is_part, path in found if is_part}


def test_a_source_distribution_has_the_whole_tree(tree: Path, sdist: Path) -> None:
    made = {each for each in files(sdist) if ".egg-info/" in each}
    assert files(sdist) - made == files(tree) | {"PKG-INFO"}


def test_a_wheel_has_the_whole_package_and_nothing_besides(
    tree: Path, wheel: zipfile.ZipFile
) -> None:
    about, data = (in_wheel(wheel, part) for part in ("dist-info", "data"))
    package = {each for each in wheel.namelist() if each.startswith("watcher/")}
    assert package == {f"watcher/{each}" for each in files(tree / "watcher")}
    assert len(wheel.namelist()) == len(package) + len(about) + len(data)
    assert "licenses/LICENSE" in about


def test_a_wheel_has_manual_pages_and_completions_where_they_are_looked_for(
    tree: Path, wheel: zipfile.ZipFile
) -> None:
    wanted = {
        f"data/{folder}/{path.name}"
        for source, folder in SHARED.items()
        for path in ((tree / source).iterdir() if (tree / source).is_dir() else [tree / source])
    }
    assert in_wheel(wheel, "data") == wanted


def test_a_wheel_names_itself_and_its_command(wheel: zipfile.ZipFile) -> None:
    def text(name: str) -> str:
        (found,) = (each for each in wheel.namelist() if each.endswith(f".dist-info/{name}"))
        return wheel.read(found).decode()

    about: Message = Parser().parsestr(text("METADATA"))
    assert (about["Name"], about["Requires-Python"]) == ("ollama-watchd", ">=3.11")
    assert "ollama-watch = watcher.__main__:main" in text("entry_points.txt")
    assert "Root-Is-Purelib: true" in text("WHEEL")


def test_the_completions_are_those_of_the_commands() -> None:
    """After a change: ``python -m tests.support.completions``."""
    there = {path.name: path.read_text() for path in completions.FOLDER.iterdir()}
    assert there == completions.scripts()


def test_bash_completes_by_the_file(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    program = tmp_path / "ollama-watch"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m watcher "$@"\n')
    program.chmod(0o755)
    script = 'source "$0"; COMP_WORDS=("$1" quar) COMP_CWORD=1; $2 "$1"; echo "${COMPREPLY[@]}"'
    file = completions.FOLDER / "ollama-watch.bash"
    done = subprocess.run(
        [bash, "-c", script, file, program, "_ollama_watch_completion"],
        env=environment(tmp_path), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("quarantine\n", "")

"""What pip installs: a source distribution with the whole tree, and from that a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.conftest import environment
from tests.support import completions

from . import built, container

#: Where each shell and `man` look, below the prefix of an installation.
SHARED = {
    "man": "share/man/man1",
    "completions/ollama-watch.bash": "share/bash-completion/completions",
    "completions/_ollama-watch": "share/zsh/site-functions",
    "completions/ollama-watch.fish": "share/fish/vendor_completions.d",
}


def test_the_packages_have_what_they_should(tmp_path: Path) -> None:
    """One test, because building takes seconds."""
    tree = built.tree(tmp_path / "tree")
    wanted = built.files(tree)
    sdist = built.sdist(tree, tmp_path / "sdist")
    found = built.files(sdist)
    assert {each for each in found if ".egg-info/" not in each} == wanted | {"PKG-INFO"}

    wheel = built.wheel(sdist, tmp_path / "wheel")
    about, data = (in_wheel(wheel, part) for part in ("dist-info", "data"))
    package = {each for each in wheel.namelist() if each.startswith("watcher/")}
    assert package == {each for each in wanted if each.startswith("watcher/")}
    assert len(wheel.namelist()) == len(package) + len(about) + len(data)
    assert data == {
        f"data/{folder}/{path.name}"
        for source, folder in SHARED.items()
        for path in ((tree / source).iterdir() if (tree / source).is_dir() else [tree / source])
    }

    (name,) = {each.partition("/")[0] for each in wheel.namelist() if ".dist-info/" in each}
    text = {each: wheel.read(f"{name}/{each}").decode() for each in about if "/" not in each}
    metadata = Parser().parsestr(text["METADATA"])
    assert (metadata["Name"], metadata["Requires-Python"]) == ("ollama-watchd", ">=3.11")
    assert "ollama-watch = watcher.__main__:main" in text["entry_points.txt"]
    assert "Root-Is-Purelib: true" in text["WHEEL"]
    assert "licenses/LICENSE" in about

    container.copy_sources(tmp_path / "image")
    of_image = built.wheel(tmp_path / "image/src", tmp_path / "of_image")
    assert {*of_image.namelist()} == {*wheel.namelist()}, "the image's recipe copies too little"


def in_wheel(wheel: zipfile.ZipFile, part: str) -> set[str]:
    """Files below ``<name>-<version>.<part>/`` of a wheel."""
    found = (name.partition(f".{part}/") for name in wheel.namelist())
    return {path for _, is_part, path in found if is_part}


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

"""Whether the service's user can run the program, whose Python may lie elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import needs_root
from watcher.ollama import names
from watcher.service.units import Installation, unreachable

OTHER = "54321"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can pass through, unlike those that pytest makes."""
    made = Path(tempfile.mkdtemp(dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def program(folder: Path, python: str) -> Installation:
    script = folder / "bin/ollama-watch"
    script.parent.mkdir()
    script.write_text(f"#!{python}\n")
    for path in (folder, script.parent, script):
        path.chmod(0o755)
    return Installation(str(script), user=OTHER, group=OTHER)


def python(folder: Path) -> Path:
    path = folder / "python3"
    folder.mkdir(exist_ok=True)
    path.touch()
    path.chmod(0o755)
    return path


def test_a_python_that_everybody_can_run(open_folder: Path) -> None:
    folder = open_folder / "lib"
    where = program(open_folder, str(python(folder)))
    folder.chmod(0o711)
    assert unreachable(where, cron=True) == ""


@pytest.mark.parametrize("link", [False, True], ids=["itself", "by a link"])
@pytest.mark.parametrize("mode", [0o700, 0o750, 0o744])
def test_a_python_behind_a_closed_folder(open_folder: Path, mode: int, link: bool) -> None:
    folder = open_folder / "home"
    found = python(folder)
    named = found
    if link:
        named = open_folder / "python3"
        named.symlink_to("home/python3")
    folder.chmod(mode)
    why = unreachable(program(open_folder, str(named)), cron=True)
    assert why == (f"the service's user {OTHER} can't reach {named}: {folder} is {mode:04o}")
    mine = program(open_folder / "home", str(found))._replace(user=str(os.getuid()))
    assert unreachable(mine, cron=True) == ""


def test_a_python_that_may_not_be_run(open_folder: Path) -> None:
    found = python(open_folder / "lib")
    (open_folder / "lib").chmod(0o755)
    found.chmod(0o700)
    assert "is 0700" in unreachable(program(open_folder, str(found)), cron=True)


def test_a_package_that_lies_elsewhere_than_its_python(open_folder: Path) -> None:
    closed = open_folder / "packages"
    shutil.copytree(Path(names.__file__).parents[1], closed / "watcher")
    closed.chmod(0o700)
    where = program(open_folder, os.path.realpath(sys.executable))
    if sys.base_prefix in unreachable(where, cron=True):
        pytest.skip("this Python itself lies where nobody else can reach it")
    script = """if True:
        import sys
        from watcher.service.units import unreachable
        from watcher.service.units import Installation
        print(unreachable(Installation(sys.argv[1], user=sys.argv[2]), cron=True))
    """
    done = subprocess.run(
        [sys.executable, "-c", script, where.program, OTHER],
        cwd=open_folder, env={**os.environ, "PYTHONPATH": str(closed)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    if sys.prefix in done.stdout:
        pytest.skip("this Python itself lies where nobody else can reach it")
    assert done.stdout.endswith(f"watcher/ollama/names.py: {closed} is 0700\n")


@needs_root
@pytest.mark.parametrize("cron", [False, True])
def test_a_python_in_a_home_is_not_seen_by_a_unit(open_folder: Path, cron: bool) -> None:
    home = Path(tempfile.mkdtemp(dir="/root"))
    try:
        link = open_folder / "python3"
        link.symlink_to(python(home))
        where = program(open_folder, str(link))._replace(user="root", group="root")
        why = unreachable(where, cron=cron)
        assert why == "" if cron else "is in a home (/root)" in why
    finally:
        shutil.rmtree(home)

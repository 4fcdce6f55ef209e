"""The repository's workflows: what a linter says, and that they name what the package supports."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess

import pytest

from tests.doc_tables import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_the_linter_finds_nothing() -> None:
    if shutil.which("actionlint") is None:
        pytest.skip("needs actionlint")
    done = subprocess.run(["actionlint", *WORKFLOWS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_tests_run_on_each_python_that_the_package_names() -> None:
    about = configparser.ConfigParser()
    about.read(ROOT / "setup.cfg")
    named = re.findall(r":: (3\.\d+)$", about["metadata"]["classifiers"], re.MULTILINE)
    text = (ROOT / ".github/workflows/tests.yml").read_text()
    (matrix,) = re.findall(r"python: \[(.*)\]", text)
    run = re.findall(r'"(.*?)"', matrix)
    assert run[: len(named)] == named  # and newer ones, which may be named once they have passed


def test_a_release_needs_no_stored_secret() -> None:
    assert WORKFLOWS
    assert not any("secrets." in path.read_text() for path in WORKFLOWS)

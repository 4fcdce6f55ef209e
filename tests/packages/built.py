"""The source distribution and the wheel, built as pip builds them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.doc_tables import ROOT

#: What lies about in a checkout, and what only the repository needs.
NOT_SHIPPED = (".*", "__pycache__", "*.egg-info", "build", "dist")
_BUILD = "import sys; from setuptools import build_meta as made; print(made.{}(sys.argv[1]))"


def tree(target: Path) -> Path:
    """A copy of the tree, without what lies about."""
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    return target


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def sdist(source: Path, target: Path) -> Path:
    """The source distribution, unpacked."""
    packed = _build("build_sdist", source, target)
    subprocess.run(["tar", "-xf", packed, "-C", target], check=True)
    return target / packed.name.removesuffix(".tar.gz")


def wheel(source: Path, target: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(_build("build_wheel", source, target))


def _build(kind: str, source: Path, target: Path) -> Path:
    """Build with the setuptools that is installed."""
    target.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _BUILD.format(kind), str(target)],
        cwd=source, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]

"""The recipe of the image, read."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.doc_tables import ROOT

RECIPE = ROOT / "container/Containerfile"


def instructions() -> list[tuple[str, str]]:
    """Each instruction with the rest of its line."""
    text = re.sub(r"^#.*\n", "", RECIPE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line)]


def of(kind: str) -> list[str]:
    return [rest for name, rest in instructions() if name == kind]


def copy_sources(root: Path) -> None:
    """Copy what the first stage copies, below another root."""
    for line in of("COPY"):
        *sources, target = line.split()
        place = root / target.lstrip("/")
        for name in (each for each in sources if not line.startswith("--from")):
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, place)

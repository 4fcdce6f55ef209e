"""What shells complete by, made from click's own: `python -m tests.support.completions`."""

from __future__ import annotations

from pathlib import Path

from click.shell_completion import get_completion_class

import watcher
from watcher.cli import program
from watcher.system.advice import PROGRAM

FOLDER = Path(watcher.__file__).parents[1] / "completions"
#: Each shell's file, as the shell looks for it.
FILES = {
    "bash": f"{PROGRAM}.bash",
    "zsh": f"_{PROGRAM}",
    "fish": f"{PROGRAM}.fish",
}


def scripts() -> dict[str, str]:
    """Each file's name, and its text."""
    return {file: _script(shell) for shell, file in FILES.items()}


def _script(shell: str) -> str:
    found = get_completion_class(shell)
    assert found is not None
    made = found(program, {}, PROGRAM, "_OLLAMA_WATCH_COMPLETE")
    return (made.source_template % made.source_vars()).strip() + "\n"


def write() -> None:
    """Write all of them anew."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in scripts().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    write()

"""``demo``: the whole story on a store of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from watcher.commands.context import complain
from watcher.demo import scenes
from watcher.errors import Exit, SettingsError
from watcher.ollama import names
from watcher.system import privileges


def demo(*, keep: bool, pictures: Path | None) -> Exit:
    """Play the scenes. FAILED where one did not come to what it shows.

    `pictures`: a folder for ``audit.svg``, ``repair.svg`` and ``pull.svg``.
    """
    if pictures is not None and not pictures.is_dir():
        raise SettingsError(f"--svg: no folder: {names.printable(str(pictures))}", "make it first")
    if os.geteuid() == 0:
        privileges.give_on(0)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    try:
        audit = None if pictures is None else pictures / "audit.svg"
        told = scenes.play(_say, color=color, keep=keep, picture=audit)
    except scenes.DemoError as error:
        complain(f"ollama-watch: the demo broke off: {error}")
        return Exit.FAILED
    if pictures is not None:
        from watcher.show import text as shown

        for name, text in told.items():
            svg = shown.picture(text, title=f"ollama-watch {name}")
            (pictures / f"{name}.svg").write_text(svg, encoding="utf-8")
    return Exit.HEALTHY


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()

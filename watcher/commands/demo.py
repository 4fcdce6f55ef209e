"""``demo``: the whole story on a store of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from watcher.commands.context import complain
from watcher.demo import scenes
from watcher.errors import Exit


def demo(*, keep: bool, picture: Path | None) -> Exit:
    """Play the scenes. FAILED where one did not come to what it shows."""
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    try:
        scenes.play(_say, color=color, keep=keep, picture=picture)
    except scenes.DemoError as error:
        complain(f"ollama-watch: the demo broke off: {error}")
        return Exit.FAILED
    return Exit.HEALTHY


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()

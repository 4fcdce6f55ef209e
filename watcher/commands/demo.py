"""``demo``: the whole story on a store of its own."""

import functools
import os
import sys
from pathlib import Path

import click

from watcher.commands import declare
from watcher.commands.context import Context, complain
from watcher.errors import Exit, SettingsError
from watcher.ollama import names
from watcher.system import advice


@declare.command(
    settings=False, examples=["demo", "demo --svg ."], read_on="README.md explains its pictures"
)
@click.option("--keep", is_flag=True, help="Keep the demo's folder.")
@click.option(
    "--svg",
    "pictures",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Save its pictures there.",
)
def demo(context: Context, keep: bool, pictures: Path | None) -> Exit:
    """Show what ollama-watch does, on a temporary store, in half a minute.

    The settings of this machine do not apply.
    """
    from watcher.demo import scenes
    from watcher.system import privileges

    advice.introduce()
    if pictures is not None and not pictures.is_dir():
        missing = names.printable(str(pictures))
        raise SettingsError(f"--svg: the folder {missing} does not exist", "create it first")
    if os.geteuid() == 0:
        privileges.give_on(0)
    color = not context.no_color and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    try:
        texts = scenes.play(functools.partial(print, flush=True), color=color, keep=keep)
    except scenes.DemoError as error:
        complain(f"ollama-watch: the demo failed: {error}")
        return Exit.FAILED
    if pictures is not None:
        from watcher.show import text

        for name, drawn in texts.items():
            svg = text.picture(drawn, name)
            (pictures / f"{name}.svg").write_text(svg, encoding="utf-8")
    return Exit.HEALTHY

"""The manual pages, made from what declares the commands: `python -m tests.support.man_pages`."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
from click_man.man import ManPage  # type: ignore[import-untyped]

import watcher
from watcher.cli import program
from watcher.commands.declare import Command, Group, rows_of
from watcher.system.advice import PROGRAM

ROOT = Path(watcher.__file__).parents[1]
FOLDER = ROOT / "man"
#: They change with the program, and no date says when.
_DATE = f"{PROGRAM} {watcher.__version__}"


def pages() -> dict[str, str]:
    """Each page's file name, and its text."""
    return dict(_pages(click.Context(program, info_name=PROGRAM, color=False, terminal_width=78)))


def _pages(at: click.Context) -> Iterator[tuple[str, str]]:
    yield f"{at.command_path.replace(' ', '-')}.1", _page(at)
    if isinstance(at.command, Group):
        for name in at.command.list_commands(at):
            command = at.command.get_command(at, name)
            assert command is not None
            yield from _pages(click.Context(command, info_name=name, parent=at))


def _page(at: click.Context) -> str:
    command = at.command
    page = ManPage(at.command_path)
    page.version, page.date = watcher.__version__, _DATE
    page.short_help = command.short_help or ""
    page.synopsis = " ".join(command.collect_usage_pieces(at))
    page.description = _escaped(inspect.cleandoc(command.help or ""))
    page.options = [(name, _escaped(text)) for name, text in rows_of(at, command.params)]
    if isinstance(command, Group):
        found = {name: command.get_command(at, name) for name in command.list_commands(at)}
        page.commands = [(name, each.short_help) for name, each in found.items() if each]
    assert isinstance(command, Command | Group)
    examples = "".join(f"{PROGRAM} {_escaped(each)}\n" for each in command.examples)
    read_on = _escaped(command.read_on)
    return f"{page}.SH EXAMPLES\n.nf\n{examples}.fi\n.SH SEE ALSO\n{read_on}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-")


def write() -> None:
    """Write all pages anew."""
    made = pages()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for name, text in made.items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    write()

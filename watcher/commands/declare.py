"""How a command is declared: its options, its examples, and the words that lead to it.

Neither this module nor the top of a command's module loads the rooms that work on a store, so that
help is quick.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from watcher import config
from watcher.commands.context import Context
from watcher.ollama import names
from watcher.system import advice
from watcher.system.advice import PROGRAM

#: The name of a command, the command, and the words behind it, as click has them.
Resolved = tuple[str | None, click.Command | None, list[str]]
_CLOSE = 0.7
#: Commands that remove something: no word leads to them that only looks like theirs.
_DELETING = frozenset({"clean", "reset", "purge", "rm", "uninstall"})
SETTINGS = {"help_option_names": ["-h", "--help"]}  #: what click does the same way in every command


class GlobalOption(click.Option):
    """An option that each command takes; its value goes to the `Context`."""

    def __init__(self, *names: str, **more: Any) -> None:
        super().__init__(names, expose_value=False, callback=self._remember, **more)

    def _remember(self, at: click.Context, _: click.Parameter, value: Any) -> None:
        context = at.ensure_object(Context)
        if self.name == "stores":
            context.stores += value
        elif value:
            setattr(context, self.name or "", value)


def _folders(_: click.Context, __: click.Parameter, start: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(start, type="dir")]


_flag = functools.partial(GlobalOption, is_flag=True)
_stores = functools.partial(GlobalOption, multiple=True, metavar="DIR", shell_complete=_folders)
_file = functools.partial(GlobalOption, type=click.Path(path_type=Path), metavar="FILE")
#: The same ones for all commands: none keeps anything of a call.
_GLOBAL_OPTIONS = (
    _stores("--store", "stores", help="Models folder; repeat it for several."),
    _file("--config", "config_file", help="Settings file."),
    _flag("-v", "--verbose", help="Show notices, too, and the traceback of a bug."),
    _flag("-q", "--quiet", help="Print nothing if all is well (for cron)."),
    _flag("--json", help="Print one JSON document on stdout."),
    _flag("--no-color", help="No colors (NO_COLOR does the same)."),
    _flag("--staged", hidden=True, help="For the demo, which starts all writers."),
)


class Read(click.ParamType[Any]):
    """A value that a function reads from what people write, or refuses by ValueError."""

    def __init__(self, name: str, read: Callable[[Any], Any]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._read(value)
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


FILE = click.Path(dir_okay=False, path_type=Path)
duration = functools.partial(click.option, type=Read("duration", config.duration), metavar="TIME")
dry_run = click.option("-n", "--dry-run", is_flag=True, help="Show the plan and change nothing.")
yes = click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation.")
offline = click.option("--offline", is_flag=True, help="Do not ask registries.")
host = click.option("--host", metavar="URL", help="The server (default: OLLAMA_HOST).")
insecure = click.option("--insecure", is_flag=True, help="Also allow registries over plain http.")


class _Helped(click.Command):
    """A command whose help has examples and names where to read on."""

    def __init__(
        self, *names: Any, examples: Sequence[str] = (), read_on: str = "", **more: Any
    ) -> None:
        super().__init__(*names, **more)
        self.examples = examples
        self.read_on = read_on
        self.short_help = (self.help or "").partition("\n")[0]
        self.params += _GLOBAL_OPTIONS

    def format_options(self, at: click.Context, formatter: click.HelpFormatter) -> None:
        own = (each for each in self.get_params(at) if not isinstance(each, GlobalOption))
        with formatter.section("Options"):
            formatter.write_dl(rows_of(at, own))
        self.format_global_options(at, formatter)

    def format_global_options(self, _: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section(f"Options of every command ({PROGRAM} --help)"):
            formatter.write("  --store DIR, --config FILE, -v, -q, --json, --no-color\n")

    def format_epilog(self, _: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {PROGRAM} {each}\n" for each in self.examples))
        if self.read_on:
            with formatter.section("Read on"):
                formatter.write(click.wrap_text(self.read_on, formatter.width, "  ", "  ") + "\n")


def rows_of(at: click.Context, params: Iterable[click.Parameter]) -> list[tuple[str, str]]:
    options = (each for each in params if isinstance(each, click.Option))
    return [row for each in options if (row := each.get_help_record(at)) is not None]


class Command(_Helped):
    """A command. Its function gets the `Context` first, with `settings` unless that is False."""

    def __init__(self, *names: Any, settings: bool = True, **more: Any) -> None:
        super().__init__(*names, **more)
        self._settings = settings

    def invoke(self, at: click.Context) -> Any:
        assert self.callback is not None
        context = at.ensure_object(Context)
        context.begin()
        if self._settings:
            context.load()
        return at.invoke(self.callback, context, **at.params)


class Group(_Helped, click.Group):
    """Commands of one name. `near`: of each command, the words that people try for it."""

    command_class = Command

    def __init__(self, *names: Any, near: Mapping[str, str], **more: Any) -> None:
        super().__init__(*names, **more)
        self._near = near

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        if isinstance(cmd, _Helped):
            cmd.read_on = cmd.read_on or self.read_on
        super().add_command(cmd, name)

    def format_options(self, at: click.Context, formatter: click.HelpFormatter) -> None:
        _Helped.format_options(self, at, formatter)
        self.format_commands(at, formatter)

    def resolve_command(self, at: click.Context, words: list[str]) -> Resolved:
        """The command that is meant. Raises UsageError, which names what was perhaps meant."""
        word, *rest = words
        command = self.get_command(at, word)
        if command is not None or at.resilient_parsing or word.startswith("-"):
            return super().resolve_command(at, words)
        where = "" if at.parent is None else f" of {self.name}"
        hints = "".join(f"\n  -> {self._hint(at, name, rest)}" for name in self._meant(at, word))
        perhaps = f"\n  did you mean{hints}" if hints else ""
        raise click.UsageError(f"unknown command{where}: {names.printable(word)}{perhaps}", at)

    def _meant(self, at: click.Context, word: str) -> Sequence[str]:
        """Commands that are perhaps meant: none that deletes by mere likeness of its name."""
        if known := [name for name, near in self._near.items() if word.lower() in near.split()]:
            return known
        import difflib

        alike = [name for name in self.list_commands(at) if name not in _DELETING]
        return difflib.get_close_matches(word.lower(), alike, n=2, cutoff=_CLOSE)

    def _hint(self, at: click.Context, name: str, rest: Sequence[str]) -> str:
        command = self.get_command(at, name)
        assert command is not None
        arguments = [each for each in command.params if isinstance(each, click.Argument)]
        plain = bool(arguments) and not any(word.startswith("-") for word in rest)
        words = [name, *(rest if plain else ())]
        is_short = len(words) == 1 and any(each.required for each in arguments)
        if name in _DELETING and any("--dry-run" in each.opts for each in command.params):
            words.append("--dry-run")
        elif is_short or isinstance(command, click.Group):
            words.append("--help")
        group = () if at.parent is None else (self.name or "",)
        options = at.ensure_object(Context).words
        return advice.line(*advice.caller().program, *options, *group, *words)


command = functools.partial(click.command, cls=Command)


def group(**more: Any) -> Callable[[Callable[..., Any]], Group]:
    """Declare commands of one name: `more` is what `Group` takes."""
    return click.group(cls=Group, **more)

"""The command line: a group of commands, and the one place that maps errors to exit codes."""

import contextlib
import errno
import importlib
import io
import os
import sys
import warnings
from typing import Any

import click

from watcher import __version__
from watcher.commands.context import Context
from watcher.commands.declare import SETTINGS, GlobalOption, Group, Resolved, rows_of
from watcher.errors import Exit, OutputError, WatchError, named
from watcher.system import advice, stopping, terminal
from watcher.system.advice import PROGRAM

#: Every command, as help lists them. Each is declared in the module of `commands` with its name.
COMMANDS = {
    "Everyday": ("status", "audit", "pull", "repair", "clean", "df"),
    "Upkeep": ("verify", "quarantine", "log", "queue", "mirror", "reset"),
    "Service": ("daemon", "web", "service", "prepare", "config"),
    "Demo": ("demo",),
}
#: Of each command, what people type for it.
NEAR = {
    "status": "list ls ps show",
    "df": "list ls du",
    "audit": "show doctor check scan inspect",
    "repair": "resume continue recover fix",
    "clean": "prune gc rm remove delete cleanup",
    "pull": "download get fetch",
    "verify": "hash",
    "log": "logs history events",
    "mirror": "push upload",
    "daemon": "watch run serve",
    "web": "page dashboard http ui",
    "service": "install",
    "config": "settings",
}


class _Program(Group):
    """The program: it loads the module of a command once that is meant."""

    def list_commands(self, _: click.Context) -> list[str]:
        return [name for names in COMMANDS.values() for name in names]

    def get_command(self, at: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(at):
            return None
        found = getattr(importlib.import_module(f"watcher.commands.{name}"), name)
        assert isinstance(found, click.Command)
        return found

    def resolve_command(self, at: click.Context, words: list[str]) -> Resolved:
        # `help COMMAND` is `COMMAND --help`.
        if words[0] == "help":
            if len(words) == 1:
                click.echo(at.get_help(), color=at.color)
                at.exit()
            words = [*words[1:], "--help"]
        return super().resolve_command(at, words)

    def format_commands(self, at: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in COMMANDS.items():
            found = [each for name in names if (each := self.get_command(at, name))]
            with formatter.section(title):
                formatter.write_dl([(each.name or "", each.short_help or "") for each in found])

    def format_global_options(self, at: click.Context, formatter: click.HelpFormatter) -> None:
        rows = rows_of(at, (each for each in self.params if isinstance(each, GlobalOption)))
        with formatter.section("Options of every command, before its name or after it"):
            formatter.write_dl(rows)


@click.group(
    cls=_Program,
    context_settings=SETTINGS,
    near=NEAR,
    examples=["audit", "repair", "audit --help"],
    read_on="README.md, and docs/reference/commands.md: every command",
)
@click.version_option(__version__, prog_name=PROGRAM)
def program() -> None:
    """Repair interrupted downloads in Ollama's model store.

    Without --store, it takes the first of these: the setting `store` (OLLAMA_WATCH_STORE),
    OLLAMA_MODELS, a running server's store, that of the unit ollama.service,
    /usr/share/ollama/.ollama/models, /var/lib/ollama/models, ~/.ollama/models.
    """


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and give back its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    stopping.withdraw()
    try:
        _open_streams()
        code = _run(words, own=arguments is None)
        sys.stdout.flush()
    except (OutputError, MemoryError) as error:
        # So that the end of a stream that can't be written is quiet.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, MemoryError):
            _complain(f"ollama-watch: {named(error)}")
        elif error.errno != errno.EPIPE:  # else whoever read our output has gone
            _complain(f"ollama-watch: writing the output failed: {error.strerror}")
        return int(Exit.FAILED)
    return code


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _open_streams() -> None:
    """Give every stream that was closed a place to go, and let none fail on a character."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            # The next file that is opened would get the number, and what goes to the stream.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
        stream = getattr(sys, name)
        if name != "stdin" and isinstance(getattr(stream, "buffer", None), io.BufferedWriter):
            # Another text stream on the same descriptor, with the same encoding and buffering.
            stream.flush()
            stream = io.TextIOWrapper(
                io.BufferedWriter(_Stream(number, "w", closefd=False)),
                encoding=stream.encoding,
                line_buffering=os.isatty(number) or number == 2,
            )
            setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Stream(io.FileIO):
    """A stream whose failures differ from those of all other files."""

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from None


def _run(words: list[str], *, own: bool) -> int:
    context = Context(own=own)
    try:
        how: dict[str, Any] = {"obj": context, "terminal_width": terminal.width()}
        return int(program.main(words, PROGRAM, standalone_mode=False, **how) or 0)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except SystemExit as stop:
        # So click ends what completes a word; and with 1 where who read our output has gone.
        return int(Exit.FAILED if stop.code else Exit.HEALTHY)
    except (click.Abort, KeyboardInterrupt):
        # A library that was interrupted while it connected leaves its socket to the collector.
        warnings.simplefilter("ignore", ResourceWarning)
        _complain("\nollama-watch: interrupted; no change is left half done")
        return int(Exit.INTERRUPTED)
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            # Click's hint calls this program as it was called, and as a shell finds it.
            error.ctx.find_root().info_name = advice.line(*advice.caller().program)
        error.show()
        return int(Exit.USAGE)
    except WatchError as error:
        _complain(f"ollama-watch: {error}")
        return int(error.exit_code)
    except OutputError:
        raise
    except Exception as error:
        return _failed(error, verbose=context.verbose)


def _failed(error: Exception, *, verbose: bool) -> int:
    """What no command has expected: named, where it is the machine that refuses."""
    failure = named(error)
    if verbose:
        import traceback

        traceback.print_exception(error)
    if failure is None:
        step = "this is a bug in ollama-watch; run it again with -v and report it"
        step = "please report this bug" if verbose else step
        again = "" if verbose else advice.again("", "-v", root=False)
        failure = WatchError(f"{type(error).__name__}: {error}", step, again)
    _complain(f"ollama-watch: {failure}")
    return int(failure.exit_code)

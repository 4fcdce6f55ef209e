"""The command line: parse, call, exit. The one place that maps errors to exit codes."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import click

from watcher import __version__
from watcher.errors import Exit, OutputError, WatchError, named
from watcher.system import stopping

#: Handed to the group by a process that runs one command and nothing else.
_OWN = object()
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 80}


def _json_option(command: Any) -> Any:
    """``--json`` is taken before and behind the command's name."""

    def remember(given: click.Context, _: click.Parameter, value: bool) -> None:
        if value and given.obj is not None:
            given.obj.json = True

    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="One JSON document on stdout, everything else on stderr.",
    )(command)


class _Read(click.ParamType[Any]):
    """A value that a function reads from what people write, or says what is wrong by ValueError."""

    def __init__(self, name: str, read: Callable[[Any], Any]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._read(value)
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


def _size(value: Any) -> int:
    from watcher import config

    return config.size(value)


def _duration(value: Any) -> float:
    from watcher import config

    return config.duration(value)


def _moment(value: Any) -> float:
    from watcher import config

    return config.moment(str(value), time.time())


def _priority(value: Any) -> int:
    from watcher.pull import queue

    return value if isinstance(value, int) else queue.priority(value)


def _time_of_day(value: Any) -> str:
    """As it was written: when that is next is told when it goes into the queue."""
    from watcher.pull import queue

    queue.next_time(value, 0.0)
    return str(value)


_PATH = click.Path(dir_okay=False, path_type=Path)


@click.group(context_settings=_CONTEXT)
@click.option("--store", "stores", multiple=True, metavar="DIR", help="Models folder (repeatable).")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="Settings file.")
@click.option("-v", "--verbose", is_flag=True, help="Tell what is only for information, too.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing when all is well (for cron).")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--no-color", is_flag=True, help="No colours (NO_COLOR does the same).")
@click.option("--staged", is_flag=True, hidden=True, help="For the demo, which starts all writers.")
@click.version_option(__version__, prog_name="ollama-watch")
@click.pass_context
def group(
    given: click.Context,
    stores: tuple[str, ...],
    config_file: Path | None,
    verbose: bool,
    quiet: bool,
    as_json: bool,
    no_color: bool,
    staged: bool,
) -> None:
    """Watch an Ollama model store: mend what died, clean what is stale.

    Without --store: the setting `store` (OLLAMA_WATCH_STORE), OLLAMA_MODELS, a running server's
    store, the unit ollama.service, /usr/share/ollama/.ollama/models, /var/lib/ollama/models,
    ~/.ollama/models.
    """
    from watcher import config
    from watcher.commands.context import Context
    from watcher.system import advice, privileges

    advice.introduce(config_file)
    settles, given.obj = given.obj is _OWN, None
    if settles and os.geteuid() != 0:
        privileges.lower()
    if verbose and quiet:
        raise click.UsageError("-v and -q exclude each other")
    if given.invoked_subcommand == "demo":
        return  # it has its own store, whatever the settings of this machine say
    settings = config.load(config_file, os.environ)
    given.obj = Context(
        settings=settings,
        config_file=config_file,
        stores=stores or settings.stores,
        stores_by="--store" if stores else settings.stores_by,
        json=as_json,
        quiet=quiet,
        verbose=verbose,
        color=False if no_color else None,
        settles=settles,
        staged=staged,
    )


@group.command()
@click.option(
    "--fail-on",
    type=click.Choice(["info", "warning", "error"]),
    default="warning",
    show_default=True,
    help="Exit with 1 from this severity on.",
)
@click.option("--svg", type=_PATH, metavar="FILE", help="Save what is shown as a picture, too.")
@_json_option
@click.pass_context
def audit(given: click.Context, fail_on: str, svg: Path | None) -> Exit:
    """Look at the store and tell; writes nothing to it."""
    from watcher.commands.audit import audit as body
    from watcher.model import Severity

    return body(given.obj, Severity(fail_on), svg)


@group.command()
@_json_option
@click.pass_context
def df(given: click.Context) -> Exit:
    """Where the space is: models, downloads, orphans."""
    from watcher.commands.df import df as body

    return body(given.obj)


@group.command()
@click.argument("targets", nargs=-1, metavar="[MODEL|DIGEST]...")
@click.option("-n", "--dry-run", is_flag=True, help="Show the plan and do nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do it without asking.")
@click.option(
    "--stale-after",
    type=_Read("duration", _duration),
    metavar="TIME",
    help="Such as 7d (the default).",
)
@click.option(
    "--until-free", type=_Read("size", _size), metavar="SIZE", help="No more than for 50GB free."
)
@_json_option
@click.pass_context
def clean(
    given: click.Context,
    targets: tuple[str, ...],
    dry_run: bool,
    yes: bool,
    stale_after: float | None,
    until_free: int | None,
) -> Exit:
    """Free what is worth nothing: stale downloads, orphans."""
    from watcher.commands.acting import clean as body

    if stale_after is not None:
        given.obj.settings = replace(given.obj.settings, stale_after=stale_after)
    return body(given.obj, targets, dry_run=dry_run, yes=yes, until_free=until_free)


@group.command()
@click.argument("targets", nargs=-1, metavar="[MODEL|DIGEST]...")
@click.option("-n", "--dry-run", is_flag=True, help="Show the plan and do nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do it without asking.")
@click.option("--wait", is_flag=True, help="Wait until what changed lately is quiet.")
@click.option("--offline", is_flag=True, help="Ask no registry.")
@_json_option
@click.pass_context
def repair(
    given: click.Context,
    targets: tuple[str, ...],
    dry_run: bool,
    yes: bool,
    wait: bool,
    offline: bool,
) -> Exit:
    """Make interrupted downloads go on where they broke."""
    from watcher.commands.acting import repair as body

    return body(given.obj, targets, dry_run=dry_run, yes=yes, wait=wait, offline=offline)


@group.command()
@click.argument("targets", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--max-duration", type=_Read("duration", _duration), metavar="TIME", help="Stop after so long."
)
@_json_option
@click.pass_context
def verify(given: click.Context, targets: tuple[str, ...], max_duration: float | None) -> Exit:
    """Hash blobs; a second run hashes only what changed."""
    from watcher.commands.acting import verify as body

    return body(given.obj, targets, max_duration)


@group.group()
def quarantine() -> None:
    """Damaged files that were perhaps the only copy, kept aside."""


@quarantine.command("ls")
@_json_option
@click.pass_context
def quarantine_ls(given: click.Context) -> Exit:
    """List what lies in quarantine."""
    from watcher.commands.quarantine import ls as body

    return body(given.obj)


@quarantine.command("restore")
@click.argument("labels", nargs=-1, required=True, metavar="LABEL...")
@click.option("-n", "--dry-run", is_flag=True, help="Show the plan and do nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do it without asking.")
@_json_option
@click.pass_context
def quarantine_restore(
    given: click.Context, labels: tuple[str, ...], dry_run: bool, yes: bool
) -> Exit:
    """Put files back into their place."""
    from watcher.commands.quarantine import restore as body

    return body(given.obj, labels, dry_run=dry_run, yes=yes)


@quarantine.command("purge")
@click.argument("labels", nargs=-1, metavar="[LABEL]...")
@click.option("-n", "--dry-run", is_flag=True, help="Show the plan and do nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do it without asking.")
@_json_option
@click.pass_context
def quarantine_purge(
    given: click.Context, labels: tuple[str, ...], dry_run: bool, yes: bool
) -> Exit:
    """Remove files for good: those named, else those that a good one has replaced."""
    from watcher.commands.quarantine import purge as body

    return body(given.obj, labels, dry_run=dry_run, yes=yes)


@group.group()
def queue() -> None:
    """Models that are to be downloaded one after the other."""


@queue.command("add")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--priority",
    type=_Read("priority", _priority),
    default=0,
    metavar="high|normal|low|N",
    help="The higher, the sooner (normal).",
)
@click.option(
    "--after",
    type=_Read("time", _time_of_day),
    metavar="22:00",
    help="Not before that time of day.",
)
@_json_option
@click.pass_context
def queue_add(
    given: click.Context, models: tuple[str, ...], priority: int, after: str | None
) -> Exit:
    """Put models into the line; one that is there takes the new priority and time."""
    from watcher.commands.queue import add as body

    return body(given.obj, models, priority, after)


@queue.command("ls")
@_json_option
@click.pass_context
def queue_ls(given: click.Context) -> Exit:
    """List the line, and what is done."""
    from watcher.commands.queue import ls as body

    return body(given.obj)


@queue.command("rm")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@_json_option
@click.pass_context
def queue_rm(given: click.Context, models: tuple[str, ...]) -> Exit:
    """Take models out of the queue; what is there of them stays."""
    from watcher.commands.queue import rm as body

    return body(given.obj, models)


@queue.command("move")
@click.argument("model")
@click.argument("place", type=click.IntRange(min=1))
@_json_option
@click.pass_context
def queue_move(given: click.Context, model: str, place: int) -> Exit:
    """Put a model at a place of the line, 1 being the first."""
    from watcher.commands.queue import move as body

    return body(given.obj, model, place)


@queue.command("pause")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@_json_option
@click.pass_context
def queue_pause(given: click.Context, models: tuple[str, ...]) -> Exit:
    """Let models wait until they are resumed; without one, the whole queue."""
    from watcher.commands.queue import pause as body

    return body(given.obj, models)


@queue.command("resume")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@_json_option
@click.pass_context
def queue_resume(given: click.Context, models: tuple[str, ...]) -> Exit:
    """Let models go on that are paused or have failed; without one, the whole queue."""
    from watcher.commands.queue import resume as body

    return body(given.obj, models)


@queue.command("run")
@click.option("--host", metavar="URL", help="The server; else OLLAMA_HOST.")
@click.option("--insecure", is_flag=True, help="Registries over plain http, too.")
@click.option("--leashed", is_flag=True, hidden=True, help="For a daemon, which holds its stdin.")
@_json_option
@click.pass_context
def queue_run(given: click.Context, host: str | None, insecure: bool, leashed: bool) -> Exit:
    """Download one after the other until nothing is left to begin."""
    from watcher.commands import pull, queue, queue_drive
    from watcher.pull.driver import Options

    if leashed:
        return queue.run_leashed(given.obj)
    wanted = pull.PullOptions(host, options=Options(insecure=insecure))
    return queue.run(given.obj, queue_drive.queued(given.obj, wanted))


@group.command("pull")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--until-done", is_flag=True, help="Try for ever, over whatever may pass.")
@click.option("--parallel", type=click.IntRange(1, 16), default=1, help="So many at once.")
@click.option("--verify", is_flag=True, help="Hash layers that were there before, too.")
@click.option("--insecure", is_flag=True, help="Registries over plain http, too.")
@click.option("--host", metavar="URL", help="The server; else OLLAMA_HOST.")
@click.option(
    "--stall", type=_Read("duration", _duration), metavar="TIME", help="Mend after so long (30s)."
)
@_json_option
@click.pass_context
def pull_models(
    given: click.Context,
    models: tuple[str, ...],
    until_done: bool,
    parallel: int,
    verify: bool,
    insecure: bool,
    host: str | None,
    stall: float | None,
) -> Exit:
    """Download models to the end, over resets and crashes."""
    from watcher.commands import pull
    from watcher.pull.driver import Options
    from watcher.pull.speed import STALL_SECONDS

    options = Options(insecure, until_done, verify, STALL_SECONDS if stall is None else stall)
    return pull.pull(given.obj, models, pull.PullOptions(host, parallel, options))


@group.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("-y", "--yes", is_flag=True, help="Do it without asking.")
@click.option("--offline", is_flag=True, help="Ask no registry.")
@_json_option
@click.pass_context
def reset(given: click.Context, models: tuple[str, ...], yes: bool, offline: bool) -> Exit:
    """Forget a download and remove what there is of it."""
    from watcher.commands.reset import reset as body

    return body(given.obj, models, yes=yes, offline=offline)


@group.command()
@_json_option
@click.pass_context
def prepare(given: click.Context) -> Exit:
    """For the server's unit, just before it starts.

    Exits with 0 whatever the store is like; only a wrong setting is 2.
    """
    from watcher.commands.acting import prepare as body

    return body(given.obj)


@group.command()
@_json_option
@click.pass_context
def daemon(given: click.Context) -> Exit:
    """The service: watch, mend at once what dies, and tell."""
    from watcher.commands.daemon import run as body

    return body(given.obj)


@group.group("config")
def settings() -> None:
    """The settings: what counts, and who has set it."""


@settings.command("show")
@_json_option
@click.pass_context
def settings_show(given: click.Context) -> Exit:
    """Show each setting with its value, and where that comes from."""
    from watcher.commands.config import show as body

    named = given.find_root().params
    return body(given.obj, named["config_file"], named["stores"])


@settings.command("check")
@_json_option
@click.pass_context
def settings_check(given: click.Context) -> Exit:
    """Tell a bad setting, with exit code 2."""
    from watcher.commands.config import check as body

    return body(given.obj, given.find_root().params["config_file"])


@group.group()
def service() -> None:
    """The service's files: write, show and remove them."""


def _target_options(command: Any) -> Any:
    """Where an installation's files go, and the settings file that it names."""
    root = click.Path(exists=True, file_okay=False, readable=False, resolve_path=True)
    command = click.option("--user", is_flag=True, help="Your own systemd, not the system's.")(
        command
    )
    return click.option("--root", type=root, metavar="DIR", help="A system that does not run.")(
        command
    )


def _wish_options(command: Any) -> Any:
    """What is to be installed."""
    for option in (
        click.option("--cron", is_flag=True, help="For cron, on a machine without systemd."),
        click.option("--store", metavar="DIR", help="Models folder."),
        click.option(
            "--clean", type=click.Choice(["daily", "weekly", "monthly"]), help="Clean, too."
        ),
    ):
        command = option(command)
    return command


def _target(root: str | None, user: bool, cron: bool = False) -> Any:
    from watcher.commands.service import Target

    if user and (root is not None or cron):
        raise click.UsageError("--user goes with neither --root nor --cron")
    if root == "/":
        raise click.UsageError("--root is for another system than this one: leave it away")
    return Target(root or "", user)


def _wish(given: click.Context, store: str | None, clean: str | None, cron: bool) -> Any:
    from watcher.commands.service import InstallOptions

    config = given.find_root().params["config_file"]
    return InstallOptions(store, clean, cron, config and str(config))


@service.command("install")
@_target_options
@_wish_options
@click.option("-y", "--yes", is_flag=True, help="Do it without asking.")
@_json_option
@click.pass_context
def service_install(
    given: click.Context,
    root: str | None,
    user: bool,
    clean: str | None,
    store: str | None,
    cron: bool,
    yes: bool,
) -> Exit:
    """Write the files for systemd (or cron), and start the service."""
    from watcher.commands.service import install as body

    target, options = _target(root, user, cron), _wish(given, store, clean, cron)
    return body(given.obj, target, options, yes=yes)


@service.command("uninstall")
@_target_options
@click.option("-y", "--yes", is_flag=True, help="Do it without asking.")
@_json_option
@click.pass_context
def service_uninstall(given: click.Context, root: str | None, user: bool, yes: bool) -> Exit:
    """Stop the service, and remove what `install` has written."""
    from watcher.commands.service import uninstall as body

    return body(given.obj, _target(root, user), yes=yes)


@service.command("show")
@_target_options
@_wish_options
@_json_option
@click.pass_context
def service_show(
    given: click.Context,
    root: str | None,
    user: bool,
    clean: str | None,
    store: str | None,
    cron: bool,
) -> Exit:
    """Print the files that `install` writes."""
    from watcher.commands.service import show as body

    return body(given.obj, _target(root, user, cron), _wish(given, store, clean, cron))


@group.command()
@click.option("-w", "--watch", is_flag=True, help="Again and again, until ctrl-C.")
@_json_option
@click.pass_context
def status(given: click.Context, watch: bool) -> Exit:
    """What is being pulled and how fast, and what lies broken."""
    from watcher.commands.status import status as body

    return body(given.obj, watch=watch)


@group.command()
@click.argument("target", required=False, metavar="[MODEL|DIGEST]")
@click.option(
    "--since", type=_Read("moment", _moment), metavar="WHEN", help="Such as 2h, or 2026-11-24."
)
@click.option("--type", "types", multiple=True, metavar="TYPE", help="Of this type (repeatable).")
@click.option("-f", "--follow", is_flag=True, help="And what comes, until ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(min=0), metavar="N", help="The last N.")
@_json_option
@click.pass_context
def log(
    given: click.Context,
    target: str | None,
    since: float | None,
    types: tuple[str, ...],
    follow: bool,
    lines: int | None,
) -> Exit:
    """What happened to a model, or at all; no daemon need run."""
    from watcher.commands.log import LogOptions
    from watcher.commands.log import log as body

    return body(given.obj, LogOptions(target, since, types, lines), follow=follow)


@group.command()
@click.option("--keep", is_flag=True, help="Leave the demo's folder for a look.")
@click.option("--svg", type=click.Path(path_type=Path), metavar="DIR", help="Save pictures there.")
def demo(keep: bool, svg: Path | None) -> Exit:
    """Show all of it on a store of its own, in under half a minute."""
    from watcher.commands.demo import demo as body

    return body(keep=keep, pictures=svg)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and give back its exit code."""
    # Looking for cycles every 700 allocations costs an audit of a large store a tenth of its time.
    gc.set_threshold(50_000)
    words = sys.argv[1:] if arguments is None else arguments
    stopping.withdraw()
    try:
        _open_streams()
        code = _run(words, own=arguments is None)
        sys.stdout.flush()
    except OutputError as error:
        _drop(sys.stdout)
        # Who read our output may have gone; then there is nobody left to tell.
        if error.errno != errno.EPIPE:
            _say(f"ollama-watch: the output can't be written: {error.strerror}")
        return int(Exit.FAILED)
    except MemoryError as error:
        _drop(sys.stdout)
        _say(f"ollama-watch: {named(error)}")
        return int(Exit.FAILED)
    return code


def _say(text: str) -> None:
    """Print to stderr, if anybody hears it."""
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
            stream = _Stream.over(number, stream)
            setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Stream(io.FileIO):
    """A stream whose failures are told from those of all other files."""

    @classmethod
    def over(cls, number: int, stream: TextIO) -> TextIO:
        """A text stream on the same descriptor, with the same encoding and buffering."""
        stream.flush()
        return io.TextIOWrapper(
            io.BufferedWriter(cls(number, "w", closefd=False)),
            encoding=stream.encoding,
            line_buffering=os.isatty(number) or number == 2,
        )

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from None


def _drop(stream: TextIO) -> None:
    """Let a stream that can't be written end in the null device, so that its end is quiet."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(words: list[str], *, own: bool) -> int:
    """Run a command; every error becomes its message and its exit code.

    `own`: in a process of its own, which may change its user.
    """
    try:
        code = group.main(words, "ollama-watch", standalone_mode=False, obj=_OWN if own else None)
        return int(code or 0)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except SystemExit:
        return int(Exit.FAILED)  # so click ends where who read our output has gone
    except (click.Abort, KeyboardInterrupt):
        _say("\nollama-watch: interrupted; nothing is left half done")
        return int(Exit.INTERRUPTED)
    except click.ClickException as error:
        _call_by_name(error)
        error.show()
        return int(Exit.USAGE)
    except WatchError as error:
        _say(f"ollama-watch: {error}")
        return int(error.exit_code)
    except OutputError:
        raise
    except Exception as error:
        return _failed(error, words)


def _call_by_name(error: click.ClickException) -> None:
    """Let click's hint call this program as it was called, and as a shell finds it."""
    from watcher.system import advice

    if isinstance(error, click.UsageError) and error.ctx is not None:
        error.ctx.find_root().info_name = advice.line(*advice.caller().program)


def _failed(error: Exception, words: list[str]) -> int:
    """What no command has expected: named, where it is the machine that refuses."""
    told = named(error)
    if "-v" in words or "--verbose" in words:
        import traceback

        traceback.print_exception(error)
        told = told or WatchError(f"{type(error).__name__}: {error}", "please report this")
    if told is None:
        from watcher.system import advice

        fault = "this is a fault of ollama-watch; run it again with -v for the details"
        told = WatchError(f"{type(error).__name__}: {error}", fault, advice.in_detail())
    _say(f"ollama-watch: {told}")
    return int(told.exit_code)

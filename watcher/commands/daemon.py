"""``daemon``: the service in the foreground, as systemd wants it."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from watcher import config
from watcher.commands import declare
from watcher.commands.context import Context, complain
from watcher.errors import Exit, SettingsError, WatchError, named
from watcher.system import advice

if TYPE_CHECKING:
    from watcher.state.event_log import Event


@declare.command(
    examples=["daemon", "daemon --store /srv/models --json"],
    read_on="docs/service.md: systemd, cron, containers; docs/metrics.md",
)
def daemon(context: Context) -> Exit:
    """Watch the store, log events, repair downloads as they break.

    Watches one store until SIGTERM or Ctrl-C. A store named with --store need not exist yet.
    """
    from dataclasses import replace

    from watcher.observe import place
    from watcher.service import daemon as service
    from watcher.system import privileges

    why = "each needs a daemon of its own"
    given = context.only_store(why)
    path = None if given is None else os.path.abspath(given)
    if path is None or (os.path.lexists(path) and not os.path.isdir(path)):
        found = context.only_place(why)
    else:
        context.settle(path)
        found = place.Found(path, "--store")
    host = replace(context.host(found), report=_printer(context))
    first = [context.settings]  # as root has read them, before it became the owner

    def settings() -> config.Settings:
        return first.pop() if first else _read_again(context)

    file = context.config_file or config.SYSTEM_FILE
    page = context.settings.web_listen
    if _reads_settings(file) and privileges.can_start_anew():
        given_file = [] if context.config_file is None else ["--config", os.path.abspath(file)]
        isolated = ["-I"] if sys.flags.isolated else []
        ours = [sys.executable, *isolated, "-m", "watcher", *given_file]
        ours += ["--store", found.path, "-q"]
        web = page and [*ours, "web", "--listen", config.spelled(*page), "--leashed"]
        runs = service.Children([*ours, "queue", "run", "--leashed"], web)
        service.run(host, settings, runs)
        return Exit.HEALTHY
    # The user whom root has become can't start us again, or not with the same settings.
    from watcher.system.leash import Starter  # not needed by all, and takes memory

    with contextlib.ExitStack() as opened:
        own = replace(context, stores=(found.path,), stores_by="--store", quiet=True, json=False)

        def starter(run: Callable[[Context], int]) -> Starter:
            return opened.enter_context(contextlib.closing(Starter(lambda: _run_leashed(run, own))))

        web_starter = starter(_serve_page) if page else None
        service.run(host, settings, service.Children(starter(_run_queue), web_starter))
    return Exit.HEALTHY


def _read_again(context: Context) -> config.Settings:
    """The settings as they are now. Raises SettingsError with what helps."""
    try:
        return config.load(context.config_file, os.environ)
    except SettingsError as error:
        from watcher.observe import processes
        from watcher.system import privileges

        file = context.config_file or config.SYSTEM_FILE
        if not privileges.was_root() or _reads_settings(file):
            raise
        # What could be kept open from root's time may be another file than the one there now.
        unit = processes.unit_of("/proc", "self")
        command = advice.as_root("systemctl", "restart", unit) if unit else ""
        why = f"{file} can only be read by root, and this daemon is user id {os.geteuid()} by now"
        how = "it reads them when it is restarted as root"
        raise SettingsError(f"{why}; {how}", command=command) from error


def _reads_settings(file: Path) -> bool:
    """Whether this user can read the settings, or sees that there are none."""
    try:
        file.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return os.access(file, os.R_OK)


def _run_leashed(run: Callable[[Context], int], context: Context) -> int:
    """Run a command for a daemon, in a process that was forked."""
    try:
        return run(context)
    except WatchError as error:
        complain(f"ollama-watch: {error}")
        return error.exit_code
    except Exception as error:
        complain(f"ollama-watch: {named(error) or f'{type(error).__name__}: {error}'}")
        return Exit.FAILED


def _run_queue(context: Context) -> int:
    from watcher.commands import queueing

    return queueing.run_leashed(context)


def _serve_page(context: Context) -> int:
    from watcher.commands import web
    from watcher.service import listener

    assert context.settings.web_listen is not None
    with listener.bound(*context.settings.web_listen, "web_listen") as bound:
        (host,) = context.hosts()
        web.serve(context, host, bound, leashed=True)
    return Exit.HEALTHY


def _printer(context: Context) -> Callable[["Event"], None]:
    """Where events go besides the logs: stdout as JSON, the journal as JSON, or a terminal."""
    if context.json or "JOURNAL_STREAM" in os.environ:
        fd = (sys.stdout if context.json else sys.stderr).fileno()

        def write(event: "Event") -> None:
            os.write(fd, event.line)

        return write
    from watcher.show import log

    text = log.printer(color=sys.stderr.isatty())

    def report(event: "Event") -> None:
        complain(text(event).removesuffix("\n"))

    return report

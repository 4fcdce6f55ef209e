"""``status``: what is going on just now."""

import sys
import time
from typing import TYPE_CHECKING

import click

from watcher.commands import declare
from watcher.commands.context import Context
from watcher.errors import Exit
from watcher.ollama import names

if TYPE_CHECKING:
    from watcher.reconcile import Report

_WATCH_SECONDS = 2.0  #: how often `--watch` looks
_CLEAR = "\033[H\033[2J"


@declare.command(
    examples=["status", "status --watch", "status --health"],
    read_on="docs/reference/conditions.md: what each condition means; docs/service.md",
)
@click.option("-w", "--watch", is_flag=True, help="Refresh until Ctrl-C.")
@click.option("--health", is_flag=True, help="Say only whether a daemon watches the store.")
def status(context: Context, watch: bool, health: bool) -> Exit:
    """Show running and broken downloads, the daemon and the queue.

    Exits with 4 if something can't be read. With --health, exits with 1 unless a daemon watches.
    """
    from watcher.show import status as drawn

    if health:
        if watch:
            raise click.UsageError("use either --watch or --health")
        return _say_health(context)
    redraws = watch and not context.json and sys.stdout.isatty()
    hosts = context.hosts(again=_WATCH_SECONDS if watch else None)
    before: dict[str, Report] = {}
    while True:
        shown = [drawn.Status(host, context.settings, before.get(host.store)) for host in hosts]
        if redraws and not context.turn:
            sys.stdout.write(_CLEAR)
        for each in shown:
            if context.json:
                context.document(drawn.document(each))
            else:
                context.show(drawn.table(each, verbose=context.verbose))
        if watch and context.turn is not None:
            return Exit.HEALTHY
        if not watch:
            return Exit.FAILED if any(each.unseen for each in shown) else Exit.HEALTHY
        before = {each.report.evidence.place.path: each.report for each in shown}
        time.sleep(_WATCH_SECONDS)


def _say_health(context: Context) -> Exit:
    """Whether each store is watched, without a scan."""
    from watcher.show import status as drawn

    code = Exit.HEALTHY
    for host in context.hosts():
        why = drawn.unhealthy(host)
        code = max(code, Exit.FINDINGS if why else Exit.HEALTHY)
        if context.json:
            context.document(drawn.health(host.store, why))
        elif why or not context.quiet:
            sys.stdout.write(f"{names.printable(host.store)}: {why or 'a daemon watches it'}\n")
    return code

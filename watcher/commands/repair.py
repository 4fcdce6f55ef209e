"""``repair``: make interrupted downloads resumable."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from watcher.commands import complete, declare
from watcher.errors import WatchError

if TYPE_CHECKING:
    from watcher.commands.context import Context
    from watcher.errors import Exit


@declare.command(
    examples=["repair", "repair llama3", "repair -n sha256-3102ddefe309"],
    read_on="docs/reference/conditions.md: what repair does with each condition; docs/safety.md",
)
@click.argument("targets", nargs=-1, metavar="[MODEL|DIGEST]...", shell_complete=complete.targets)
@declare.dry_run
@declare.yes
@click.option("--wait", is_flag=True, help="Wait for writes to stop.")
@declare.offline
def repair(
    context: Context,
    targets: tuple[str, ...],
    dry_run: bool,
    yes: bool,
    wait: bool,
    offline: bool,
) -> Exit:
    """Repair interrupted downloads so that the next pull resumes them.

    Shows the plan and asks. Asks a model's registry where a length is lost or a blob is damaged.
    """
    from watcher.commands.acting import Request, act
    from watcher.decide import modes

    mode = modes.offline(modes.REPAIR) if offline else modes.REPAIR
    code = act(context, Request("repair", mode, targets, dry_run, yes, wait))
    if not dry_run:
        _finish_claims(context)
    return code


def _finish_claims(context: Context) -> None:
    """Bring to the disk what others have claimed ahead of it; who can't may leave that to them."""
    from watcher.act import durability

    for host in context.hosts(changes=True):
        with contextlib.suppress(WatchError, OSError):
            durability.sync_noted(host, context.settings)

"""``clean``: remove what no pull needs."""

from typing import Any

import click

from watcher import config
from watcher.commands import complete, declare
from watcher.commands.context import Context
from watcher.errors import Exit


@declare.command(
    examples=["clean -n", "clean --yes --stale-after 14d", "clean --until-free 50GB"],
    read_on="docs/safety.md: what is never removed",
)
@complete.TARGETS
@declare.dry_run
@declare.yes
@declare.duration("--stale-after", help="Time without bytes that makes it stale (default 7d).")
@click.option(
    "--until-free",
    type=declare.Read("size", config.size),
    metavar="SIZE",
    help="Stop removing when this much is free, such as 50GB.",
)
def clean(
    context: Context, targets: tuple[str, ...], stale_after: float | None, **how: Any
) -> Exit:
    """Remove stale downloads and orphaned blobs.

    Shows the plan and asks. Never removes what a process has open, what a manifest names or what a
    pull could still need.
    """
    from dataclasses import replace

    from watcher.commands.acting import Request, act
    from watcher.decide import modes

    if stale_after is not None:
        context.settings = replace(context.settings, stale_after=stale_after)
    return act(context, Request("clean", modes.CLEAN, targets, **how))

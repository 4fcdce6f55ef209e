"""``pull``: downloads through the server, to their end."""

from typing import Any

import click

from watcher.commands import complete, declare
from watcher.commands.context import Context
from watcher.errors import Exit


@declare.command(
    examples=["pull llama3", "pull llama3 qwen3:32b --until-done"],
    read_on="docs/pull.md: what pull repairs on the way, and what stops it",
)
@complete.MODELS
@click.option("--until-done", is_flag=True, help="Retry temporary failures without limit.")
@click.option(
    "--parallel",
    type=click.IntRange(1, 16),
    default=1,
    metavar="N",
    help="Models at the same time.",
)
@click.option("--verify", is_flag=True, help="Also hash layers that were on disk before.")
@declare.insecure
@declare.host
@declare.duration(
    "--stall", "stall_seconds", help="Repair after so long without bytes (default 30s)."
)
def pull(
    context: Context, models: tuple[str, ...], host: str | None, parallel: int, **how: Any
) -> Exit:
    """Download models and repair them on the way.

    Continues after resets, stalls and server restarts. After Ctrl-C, the same command continues.
    """
    from watcher.commands.pulling import pull_all
    from watcher.pull.driver import Options

    given = {name: value for name, value in how.items() if value is not None}
    return pull_all(context, models, host, parallel, Options(**given))

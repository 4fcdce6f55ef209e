"""``pull``: downloads, to their end."""

from typing import Any

import click

from watcher import config
from watcher.commands import complete, declare
from watcher.commands.context import Context
from watcher.errors import Exit


@declare.command(
    examples=["pull llama3", "pull llama3 qwen3:32b --until-done", "pull llama3 --rate 5MB/s"],
    read_on="docs/pull.md: what a pull waits for, and what ends it; docs/transfers.md",
)
@complete.MODELS
@click.option("--until-done", is_flag=True, help="Retry temporary failures without limit.")
@click.option(
    "--parallel",
    type=click.IntRange(1, 16),
    default=1,
    metavar="N",
    help="Models at the same time (default 1).",
)
@click.option("--verify", is_flag=True, help="Also hash layers that were on disk before.")
@declare.insecure
@declare.host
@click.option(
    "--stall",
    "stall_seconds",
    type=declare.Read("duration", config.stall),
    metavar="TIME",
    help="Replace a connection after so long without bytes (default 30s).",
)
@click.option(
    "--connections",
    type=declare.Read("connections", config.connections),
    metavar="N",
    help="Connections to a registry (default 8; up to 16 where each is slow by itself).",
)
@click.option(
    "--rate",
    type=declare.Read("rate", config.rate),
    metavar="RATE",
    help="Limit for all downloads of the store together, such as 5MB/s (default none).",
)
@click.option(
    "--no-wait",
    "wait",
    is_flag=True,
    default=True,
    flag_value=False,
    help="Also download the layers that a server is downloading now.",
)
def pull(
    context: Context, models: tuple[str, ...], host: str | None, parallel: int, **how: Any
) -> Exit:
    """Download models, with or without a running server.

    Continues after resets, stalls, kills and restarts. After Ctrl-C, the same command continues.
    """
    from watcher.commands.pulling import pull_all
    from watcher.pull.account import Options
    from watcher.transfer.rate import Limit

    settings = context.settings
    given: dict[str, Any] = {"connections": settings.connections, "rate": settings.rate}
    given |= {name: value for name, value in how.items() if value is not None}
    limit = Limit(given.pop("rate"))
    return pull_all(context, models, host, parallel, Options(**given, limit=limit))

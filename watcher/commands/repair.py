"""``repair``: make interrupted downloads resumable."""

import contextlib
from importlib.util import find_spec

import click

from watcher.commands import complete, declare
from watcher.commands.context import Context
from watcher.errors import Exit, WatchError


@declare.command(
    examples=["repair", "repair llama3", "repair -n sha256-3102ddefe309"],
    read_on="docs/reference/conditions.md: what repair does with each condition; docs/safety.md",
)
@complete.TARGETS
@declare.dry_run
@declare.yes
@click.option("--wait", is_flag=True, help="Wait until writes to the files have stopped.")
@click.option(
    "--give-back", is_flag=True, help="Let the server resume what ollama-watch has of a model."
)
@click.option("--fetch", is_flag=True, help="Download what is wrong of damaged and missing blobs.")
@click.option(
    "--prove", is_flag=True, help="Compare what is on disk with its registry's sums of its chunks."
)
@declare.offline
def repair(
    context: Context, targets: tuple[str, ...], give_back: bool, fetch: bool, **how: bool
) -> Exit:
    """Repair interrupted downloads so that the next pull resumes them.

    If a length is lost or a blob is damaged, it asks the model's registry, and it hashes what is in
    doubt. Then it shows the plan and asks once, with the bytes that it downloads: y does all of it,
    w all but the downloads. With --yes, it downloads only if --fetch or the setting `fetch` says
    so. Where the sums of its chunks are known, only the wrong bytes of a damaged blob are
    downloaded.
    With --give-back, it repairs nothing: unfinished downloads of ollama-watch become downloads that
    the server resumes.
    """
    from watcher.act import durability
    from watcher.commands.acting import Request, act
    from watcher.decide import modes

    online = not how.pop("offline")
    # Without a word for it bytes are fetched only after a prompt that names them.
    fetches = fetch or context.settings.fetch
    fetches |= not how["yes"] and find_spec("pycurl") is not None
    mode = modes.REPAIR._replace(online=online, fetch=online and fetches, prove=how.pop("prove"))
    mode = modes.GIVE_BACK if give_back else mode
    code = act(context, Request("repair", mode, targets, **how))
    if not how["dry_run"]:
        for host in context.hosts(changes=True):
            # Brings to the disk what others have claimed ahead of it; who can't may leave it.
            with contextlib.suppress(WatchError, OSError):
                durability.sync_noted(host, context.settings)
    return code

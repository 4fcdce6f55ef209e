"""``queue``: download models one after the other."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from watcher.commands import complete, declare
from watcher.commands.context import Context
from watcher.errors import Exit
from watcher.ollama import names

if TYPE_CHECKING:
    from watcher.pull.queue import Queue


def _queues() -> Any:
    from watcher.pull import queue  # help does not load it

    return queue


def _change(context: Context, changed: "Callable[[Any, Queue], Queue]") -> None:
    from watcher.commands import queueing

    queueing.change(context, lambda before: changed(_queues(), before))


_models = complete.several(
    "models", required=True, metavar="MODEL...", shell_complete=complete.queued
)
_any_models = complete.several("models", metavar="[MODEL]...", shell_complete=complete.queued)


@declare.group(
    near={
        "ls": "list show status",
        "run": "start",
        "add": "pull put",
        "pause": "stop",
        "rm": "remove delete",
        "resume": "continue",
        "move": "mv",
    },
    examples=["queue add llama3 --after 22:00", "queue run"],
    read_on="docs/pull.md: the order of the queue, and its retries",
)
def queue() -> None:
    """Download models one after the other.

    `queue run` downloads them; with `queue = true` in the settings, the daemon does.
    """


@queue.command(examples=["queue add llama3", "queue add llama3 --priority high"])
@complete.MODELS
@click.option(
    "--priority",
    type=declare.Read("priority", lambda value: _queues().priority(value)),
    default="normal",
    metavar="high|normal|low|N",
    help="Higher goes first (default normal).",
)
@click.option(
    "--after",
    type=declare.Read("time", lambda value: _queues().next_time(value, time.time())),
    metavar="22:00",
    help="Not before this time of day.",
)
def add(context: Context, models: tuple[str, ...], priority: int, after: float | None) -> None:
    """Add models to the queue, or change their priority and time."""
    from watcher.commands.queueing import change, in_words

    def added(before: "Queue") -> "Queue":
        for model in models:
            before = _queues().add(before, model, priority, after or 0.0, time.time())
        return before

    kept = change(context, added)
    for model in models:
        place = _queues().position(kept, names.to_model(model).shown)
        context.note(f"{place + 1} of {len(kept.line)}: {in_words(kept.line[place])}")


@queue.command(examples=["queue ls", "queue ls --json"])
def ls(context: Context) -> None:
    """List the queue."""
    from watcher.commands.queueing import show
    from watcher.state import folders

    for found in context.places():
        with folders.opened_store(found.path) as store:
            show(context, found, store, _queues().FILE.read(store))


@queue.command(examples=["queue rm llama3"])
@_models
def rm(context: Context, models: tuple[str, ...]) -> None:
    """Remove models from the queue; their data stays."""
    _change(context, lambda queues, before: queues.remove(before, models))


@queue.command(examples=["queue move llama3 1"])
@click.argument("model", shell_complete=complete.queued)
@click.argument("place", type=click.IntRange(min=1))
def move(context: Context, model: str, place: int) -> None:
    """Move a model to a place in the queue (1 is first)."""
    _change(context, lambda queues, before: queues.move(before, model, place))


@queue.command(examples=["queue pause", "queue pause llama3"])
@_any_models
def pause(context: Context, models: tuple[str, ...]) -> None:
    """Pause models, or the whole queue."""
    _change(context, lambda queues, before: queues.pause(before, models, time.time()))


@queue.command(examples=["queue resume", "queue resume llama3"])
@_any_models
def resume(context: Context, models: tuple[str, ...]) -> None:
    """Resume paused or failed models, or the whole queue."""
    _change(context, lambda queues, before: queues.resume(before, models, time.time()))


@queue.command(examples=["queue run", "queue run --host http://127.0.0.1:11434"])
@declare.host
@declare.insecure
@click.option("--leashed", is_flag=True, hidden=True, help="For a daemon, which holds its stdin.")
def run(context: Context, host: str | None, insecure: bool, leashed: bool) -> Exit:
    """Download queued models until none is left that can start."""
    from watcher.commands import queueing

    if leashed:
        return queueing.run_leashed(context)
    return queueing.run(context, queueing.queued(context, host, insecure=insecure))

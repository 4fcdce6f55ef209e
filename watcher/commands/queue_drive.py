"""What drives an item of the queue: a pull, until it has ended or has to make place."""

from __future__ import annotations

import os
from collections.abc import Callable

from watcher.commands import pull
from watcher.commands.context import Context
from watcher.observe.host import Host
from watcher.ollama import names, server
from watcher.pull import queue, target
from watcher.pull.driver import Options, Pull
from watcher.pull.failures import Again, Cause
from watcher.pull.queue import Driven, Result
from watcher.pull.running import Drive, Why
from watcher.pull.target import Target
from watcher.show import progress
from watcher.system import stopping


def queued(context: Context, wanted: pull.PullOptions) -> Drive:
    """What drives an item of the queue."""
    return _driver(
        context, pull.site_of(context, wanted.host), lambda _: wanted.options, lambda: False
    )


def leashed(context: Context, host: Host, ended: Callable[[], bool]) -> Drive:
    """The same for a daemon, until `ended` says that it is gone.

    Nobody is there to name a server: it is the one that has the store, unless the environment says
    otherwise. A registry on this machine is asked over http, as everywhere.
    """
    found = target.find(target.url_of_store(host, os.environ), host, context.settings)
    if found.host is None and not os.environ.get("OLLAMA_HOST"):
        # What it would pull would come into somebody else's store.
        return lambda _, __: Driven(Result.FAILED, f"not pulled: {found.why}")

    def options(model: str) -> Options:
        return Options(insecure=server.is_loopback(names.to_model(model).host))

    return _driver(context, found, options, ended)


def _driver(
    context: Context, found: Target, options: Callable[[str], Options], ended: Callable[[], bool]
) -> Drive:
    def drive(model: str, why_stop: Why) -> Driven:
        with pull.cancelled_by_signals() as signalled:

            def asked() -> bool:
                return signalled() or ended()

            one = Pull(found, model, options(model), lambda: asked() or bool(why_stop()))
            color = context.colored()
            with progress.display(json=context.json, quiet=context.quiet, color=color) as shown:
                pull.drive(one, shown)
        # Not before signals have their usual meaning again: none is lost between the two.
        if asked():
            stopping.ask()
            raise KeyboardInterrupt  # what was driven is put back, and the run ends
        cause = one.end.cause
        if cause is None:
            return Driven(Result.DONE)
        if cause is Cause.INTERRUPTED:
            return Driven(Result.STOPPED, why_stop())
        pause = queue.HOURLY if cause.again is Again.HOURLY else None
        why = "; ".join(filter(None, (one.end.text, cause.step, one.command)))
        return Driven(Result.FAILED, why, cause.again is not Again.NEVER, pause)

    return drive

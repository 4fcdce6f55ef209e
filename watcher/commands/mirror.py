"""``mirror``: fills a registry that other machines pull from."""

import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from watcher import config
from watcher.commands import complete, declare
from watcher.commands.context import Context, complain, transient
from watcher.errors import Exit, RefusedError, TargetError
from watcher.ollama import names, server
from watcher.system import advice

if TYPE_CHECKING:
    from watcher.transfer.values import Event

_SHOW_SECONDS = 0.25


@declare.group(
    near={"push": "fill upload copy"},
    examples=["mirror push llama3 https://registry.lan"],
    read_on="docs/mirror.md: one download for a whole team",
)
def mirror() -> None:
    """Fill a registry that other machines pull from."""


def _address(value: str) -> str:
    """The address of a registry; without a scheme, as in the name of a model."""
    if "://" not in value:
        value = f"{'http' if server.is_loopback(value) else 'https'}://{value}"
    return config.mirrors(value)[0]


@mirror.command(
    examples=["mirror push llama3 https://registry.lan", "mirror push me/llama3:8b localhost:5000"]
)
@click.argument("model", shell_complete=complete.models)
@click.argument("registry", type=declare.Read("registry", _address))
@declare.insecure
def push(context: Context, model: str, registry: str, insecure: bool) -> Exit:
    """Push a model to a plain registry.

    Sends only what the registry lacks, the manifest last. Each layer is hashed while it is sent,
    and a damaged one does not get there.
    """
    from watcher.observe import targets
    from watcher.show import mirror as shown
    from watcher.transfer.push import Order, Push
    from watcher.transfer.values import Cause, Options, TransferError

    found = context.only_place("a push is from one")
    order = Order(found.path, names.to_model(model), registry, insecure)
    words = ("mirror", "push", model, registry, *(("--insecure",) if insecure else ()))
    if not (insecure or _is_allowed(registry, context.settings.mirrors)):
        why = f"{registry} is not encrypted, and the setting `mirrors` does not name it"
        allowed = advice.on(found.path, found.by, *words, "--insecure")
        raise RefusedError(why, "use https, or allow it", allowed)
    try:
        done = Push(order, Options(), _Shown().take).run()
    except FileNotFoundError:
        known = targets.known(found.path)
        why = f"{order.model.shown} is not in {names.printable(found.path)}"
        near = targets.not_seen([known]) or targets.perhaps(order.model.shown, known.models)
        raise TargetError(why, near) from None
    except TransferError as error:
        again = ("verify", model) if error.cause is Cause.DAMAGED_BLOB else words
        error.command = advice.on(found.path, found.by, *again)
        raise
    finally:
        transient("")
    if context.json:
        context.document(shown.document(order, done))
    context.note(shown.line(order, done))
    return Exit.HEALTHY


def _is_allowed(registry: str, mirrors: tuple[str, ...]) -> bool:
    parts = urlsplit(registry)
    return parts.scheme == "https" or registry in mirrors or server.is_loopback(parts.netloc)


class _Shown:
    """Shows on a terminal how far a layer is, and on stderr what is waited for."""

    def __init__(self) -> None:
        self._digest, self._began, self._next = "", 0.0, 0.0

    def take(self, event: "Event") -> None:
        from watcher.show.text import part_of, size
        from watcher.transfer.values import Progress, Waiting

        now = time.monotonic()
        if isinstance(event, Waiting):
            wait = advice.duration(event.seconds)
            complain(f"{event.reason}; trying again in {wait} (try {event.attempt})")
        elif isinstance(event, Progress) and now >= self._next:
            if event.digest != self._digest or event.arrived == 0:
                self._digest, self._began = event.digest, now
            self._next = now + _SHOW_SECONDS
            rate = event.arrived / max(now - self._began, _SHOW_SECONDS)
            done = f"{names.short(event.digest)}: sent {part_of(event.arrived, event.total)}"
            transient(f"{done}, {size(round(rate))}/s")

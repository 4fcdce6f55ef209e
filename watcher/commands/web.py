"""``web``: a page that shows the store, served over HTTP."""

import ipaddress
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import click

from watcher import config
from watcher.commands import declare
from watcher.commands.context import Context
from watcher.errors import Exit, SettingsError

if TYPE_CHECKING:
    from watcher.observe.host import Host

_LEAST_TOKEN = 16  #: characters: a shorter one can be guessed


@declare.command(
    examples=["web", "web --listen 127.0.0.1:8080"],
    read_on="docs/web.md: the page, other machines, a reverse proxy; docs/reference/json.md",
)
@click.option(
    "--listen",
    "address",
    type=declare.Read("address", config.endpoint),
    default="127.0.0.1:9465",
    metavar="ADDRESS:PORT",
    show_default=True,
    help="Where to serve it; port 0 takes any that is free.",
)
@click.option(
    "--allow-remote",
    is_flag=True,
    help="Also listen on an address that is not of loopback. It takes a token.",
)
@click.option(
    "--token-file",
    type=declare.FILE,
    metavar="FILE",
    help="Answer only to who has the token that is in this file.",
)
@click.option("--leashed", is_flag=True, hidden=True, help="For a daemon, which holds its stdin.")
def web(
    context: Context,
    address: tuple[str, int],
    allow_remote: bool,
    token_file: Path | None,
    leashed: bool,
) -> Exit:
    """Serve a page that shows the store: downloads, risks, space, events.

    Read-only, for one store, until SIGTERM or Ctrl-C.
    """
    from watcher.service import listener

    # As root, where it is: the store's owner may do neither.
    token = "" if token_file is None else _token(token_file)
    if not ipaddress.ip_address(address[0]).is_loopback:
        _check_remote(address[0], token, allowed=allow_remote)
    with listener.bound(*address, "--listen") as bound:
        context.only_store("each needs a page of its own")
        (host,) = context.hosts()
        serve(context, host, bound, token, leashed=leashed)
    return Exit.HEALTHY


def serve(
    context: Context, host: "Host", bound: socket.socket, token: str = "", *, leashed: bool = False
) -> None:
    """Serve the page of a store on a socket; `leashed`: until stdin ends."""
    from watcher.web import looks, server
    from watcher.web.app import App

    def ready() -> None:
        context.note(f"http://{config.spelled(*bound.getsockname()[:2])}/ (Ctrl-C ends it)")

    server.serve(App(looks.Looks(host, context.settings), token), bound, ready, leashed=leashed)


def _check_remote(host: str, token: str, *, allowed: bool) -> None:
    if not allowed:
        why = f"--listen {host} is reachable from other machines, which would see the store's names"
        step = (
            "add --allow-remote and --token-file FILE, or listen on 127.0.0.1 for a reverse proxy"
        )
        raise SettingsError(why, step)
    if not token:
        why = f"--listen {host} is reachable from other machines, and there is no token"
        step = "make one, then add --token-file FILE:"
        raise SettingsError(why, step, "(umask 077; openssl rand -hex 32 > ollama-watch.token)")


def _token(file: Path) -> str:
    from watcher.errors import shown

    try:
        token = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not ASCII"
        raise SettingsError(f"reading {shown(file)} failed: {why}", "name another file") from None
    if len(token) < _LEAST_TOKEN or not token.isprintable():
        why = f"{shown(file)}: expected a token of at least {_LEAST_TOKEN} characters"
        step, command = "make one:", f"(umask 077; openssl rand -hex 32 > {shown(file)})"
        raise SettingsError(why, step, command)
    return token

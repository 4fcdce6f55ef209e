"""Which server pulls, and whether its store can be mended from here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from watcher.errors import RefusedError, SettingsError
from watcher.model import Policy, ServerState
from watcher.observe import processes
from watcher.observe.host import World
from watcher.ollama import environment, names, server
from watcher.state import folders, state_folder


@dataclass(frozen=True, slots=True)
class Site:
    """The server that pulls, and its store where that can be mended from here."""

    url: str
    policy: Policy
    #: None where the store is not here, or may not be changed; `why` says so.
    world: World | None = None
    why: str = ""
    #: The store that was named or found here, whoever's it is.
    named: World | None = None
    #: It is the server's, be it that it can't be changed from here.
    is_its: bool = False
    #: The folder whose records are kept, where that is not the store.
    records: str = ""


def server_url(host: str | None, variables: Mapping[str, str]) -> str:
    """The server's URL by ``--host``, else by ``OLLAMA_HOST``, else the usual one.

    Raises SettingsError for what is no address.
    """
    source, given = ("--host", host) if host else ("OLLAMA_HOST", variables.get("OLLAMA_HOST", ""))
    try:
        return environment.server_url(given)
    except ValueError as error:
        raise SettingsError(
            f"{source} = {names.printable(given)!r}: no address of a server: {error}"
        ) from None


def url_of_store(world: World, environment: Mapping[str, str]) -> str:
    """The URL by ``OLLAMA_HOST``, else of the one server that is seen to have a store.

    Where there is none such, or several are, the usual one.
    """
    if not environment.get("OLLAMA_HOST"):
        seen = processes.see(world, (), network=False, writers_visible=False, ours_only=True)
        urls = [
            each.url
            for each in seen.servers
            if each.ours
            and not each.elsewhere
            and each.url
            and each.state is not ServerState.UNREACHABLE
        ]
        if len(urls) == 1:
            return urls[0]
    return server_url(None, environment)


def find(url: str, world: World | None, policy: Policy) -> Site:
    """The site of a server; `world` is the store that is taken for its own, where there is one."""
    why = _why_not_its(url, world)
    if why or world is None:
        return Site(url, policy, None, why, world)
    why = _why_not_changed(world)
    return Site(url, policy, None if why else world, why, world, is_its=True)


def _why_not_its(url: str, world: World | None) -> str:
    """Why the store of the server at `url` is not known to be here; "" where it is."""
    parts = urlsplit(url)
    if not server.is_loopback(parts.netloc):
        return f"the server is on another machine ({parts.hostname})"
    if world is None:
        return "no store was found here"
    shown = names.printable(world.store)
    servers = processes.see(world, (), network=False, writers_visible=False).servers
    there = [each for each in servers if each.url and urlsplit(each.url).port == parts.port]
    if any(each.ours is False or each.elsewhere for each in there):
        return f"the server at {url} has another store than {shown}"
    others = [
        each.url for each in servers if each.ours and not each.elsewhere and each not in there
    ]
    if others and not there:
        return f"the server of {shown} is at {others[0]}, and not at {url}"
    return ""


def _why_not_changed(world: World) -> str:
    """Why a server's store can't be mended by us; "" where it can."""
    try:
        state_folder.check(world.store)
    except RefusedError as error:
        return error.message
    if not _may_change(world.store):
        return f"{names.printable(world.store)} can't be changed by this user"
    return ""


def _may_change(store: str) -> bool:
    try:
        with folders.opened_store(store) as opened:
            return os.access(".", os.W_OK | os.X_OK, dir_fd=opened)
    except OSError:
        return False

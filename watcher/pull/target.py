"""Which server pulls, and whether its store can be repaired from here."""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from watcher.config import Settings
from watcher.errors import RefusedError, SettingsError
from watcher.model import Server, ServerState
from watcher.observe import processes
from watcher.observe.host import Host
from watcher.ollama import environment, names, server
from watcher.pull import disk
from watcher.state import folders, state_folder


@dataclass(frozen=True, slots=True)
class Target:
    """The server that pulls, and its store where that can be repaired from here."""

    #: "" where no server has the store.
    url: str
    settings: Settings
    #: None where the store is not here, or may not be changed; `why` has the reason.
    host: Host | None = None
    why: str = ""
    #: The store that was named or found here, whoever's it is.
    named: Host | None = None
    #: It is the server's, even if it can't be changed from here.
    is_its: bool = False
    #: The folder whose records are kept, where that is not the store.
    records: str = ""

    @property
    def its(self) -> Host | None:
        """The server's store, even if it can't be changed from here."""
        return self.host or (self.named if self.is_its else None)


def server_url(host: str | None, variables: Mapping[str, str]) -> str:
    """The URL by ``--host``, ``OLLAMA_HOST``, or the usual one. Raises SettingsError."""
    source, given = ("--host", host) if host else ("OLLAMA_HOST", variables.get("OLLAMA_HOST", ""))
    try:
        return environment.server_url(given)
    except ValueError as error:
        why = f"{source} = {names.printable(given)!r}: no address of a server: {error}"
        raise SettingsError(why) from None


def url_of_store(host: Host, environment: Mapping[str, str]) -> str:
    """The URL by ``OLLAMA_HOST``, or of the one server seen to have a store; "" for another's."""
    url = server_url(None, environment)
    servers = _servers(host)
    if not environment.get("OLLAMA_HOST"):
        ours = [each for each in servers if each.ours and not each.elsewhere]
        urls = [each.url for each in ours if each.state is not ServerState.UNREACHABLE and each.url]
        if len(urls) == 1:
            return urls[0]
    return "" if _has_another_store(url, servers) else url


def of_store(host: Host, settings: Settings, environment: Mapping[str, str]) -> Target:
    """The target where only the store was named: a pull is into that. Raises SettingsError."""
    return find(url_of_store(host, environment), host, settings)


def find(url: str, host: Host | None, settings: Settings) -> Target:
    """The target of a server (`url` "": of none), whose store is taken for that of `host`."""
    why = _why_not_its(url, host) if url else ""
    if why or host is None:
        return Target(url, settings, None, why, host)
    why = _why_not_changed(host)
    return Target(url, settings, None if why else host, why, host, is_its=True)


def _why_not_its(url: str, host: Host | None) -> str:
    """Why the store of the server at `url` is not known to be here; "" where it is."""
    parts = urlsplit(url)
    if not server.is_loopback(parts.netloc):
        return f"the server is on another machine ({parts.hostname})"
    if host is None:
        return "no store was found here"
    shown = names.printable(host.store)
    servers = _servers(host)
    if _has_another_store(url, servers):
        return f"the server at {url} has another store than {shown}"
    its = [each.url for each in servers if each.ours and not each.elsewhere]
    if its and not _at(url, servers):
        return f"the server of {shown} is at {its[0]}, and not at {url}"
    return ""


def _servers(host: Host) -> tuple[Server, ...]:
    return processes.see(host, ()).servers


def _at(url: str, servers: Iterable[Server]) -> list[Server]:
    port = urlsplit(url).port
    return [each for each in servers if each.url and urlsplit(each.url).port == port]


def _has_another_store(url: str, servers: Iterable[Server]) -> bool:
    """Whether the server at `url`, of those seen on this machine, has not the store."""
    if not server.is_loopback(urlsplit(url).netloc):
        return False
    return any(each.ours is False or each.elsewhere for each in _at(url, servers))


def _why_not_changed(host: Host) -> str:
    try:
        state_folder.check(host.store)
    except RefusedError as error:
        return error.message
    if why := disk.read_only(host.store):
        return why
    with suppress(OSError), folders.opened_store(host.store) as store:
        if os.access(".", os.W_OK | os.X_OK, dir_fd=store):
            return ""
    return f"{names.printable(host.store)} can't be changed by this user"

"""Other stores whose blobs lie in the same folder: what their manifests name is no orphan.

Seen are the store beside the real folder, where ``blobs`` is a symlink, and those of servers.
"""

import os
from collections.abc import Iterable, Iterator

from watcher.model import BLINDING, BlobCensus, Server, Sharing
from watcher.observe import scan
from watcher.ollama import names
from watcher.state import folders, fs


def look(store: int, servers: Iterable[Server] = ()) -> Sharing:
    """The other stores, as far as they are seen, and what their manifests name."""
    stores: dict[str, None] = {}
    named: set[str] = set()
    unread: list[str] = []
    for path, folder in _others(store, servers):
        stores[path] = None
        if folder is None:
            unread.append(path)
            continue
        found = scan.scan_manifests(folder)
        named.update(found.digests)
        unread.extend(f"{path}/{each}" for each in found.unlisted)
        unread.extend(f"{path}/{each.path}" for each in found.unseen)
        unread.extend(f"{path}/{odd.path}" for odd in found.odd if odd.fault in BLINDING)
    return Sharing(tuple(stores), frozenset(named), tuple(unread))


def apart(census: BlobCensus, shared: Sharing) -> BlobCensus:
    """The census with what another store's manifests name distinguished from what none does."""
    named = {names.blob(digest) for digest in shared.named}
    if not named:
        return census
    return census._replace(
        unnamed=tuple(each for each in census.unnamed if each.name not in named),
        elsewhere=tuple(each for each in census.unnamed if each.name in named),
    )


def _others(store: int, servers: Iterable[Server]) -> Iterator[tuple[str, int | None]]:
    blobs = folders.look_at_blobs(store)
    if blobs.status is None:
        return
    met = [os.fstat(store)]
    if blobs.linked:
        try:
            with (
                folders.opened_blobs(store, foreign_too=True) as there,
                fs.closing(os.open("..", folders.UNLISTED, dir_fd=there)) as beside,
            ):
                met.append(os.fstat(beside))
                if scan.look("manifests", beside) is not None:
                    yield os.path.dirname(os.path.realpath(f"/proc/self/fd/{there}")), beside
        except OSError as error:
            yield f"the folder beside blobs/ ({error.strerror})", None
    for server in servers:
        if not server.elsewhere or server.store is None:
            continue
        shown = f"{names.printable(server.store)} (pid {server.pid})"
        try:
            with fs.closing(os.open(server.store, folders.UNLISTED)) as folder:
                found, its_blobs = os.fstat(folder), folders.look_at_blobs(folder).status
                same = its_blobs is not None and os.path.samestat(its_blobs, blobs.status)
                if not same or not any(os.path.samestat(found, each) for each in met):
                    yield shown, folder if same else None
        except OSError:
            yield shown, None

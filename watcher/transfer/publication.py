"""From verified layers to names: when they may be given, what a server does meanwhile, and what is
remembered of it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence

from watcher.act import journal
from watcher.config import Settings
from watcher.decide import safety
from watcher.errors import LockedError
from watcher.model import RefusalKind, Scope
from watcher.observe import scan
from watcher.observe.host import Host
from watcher.ollama import names, server
from watcher.ollama.pull_stream import PullStream, ServerGoneError
from watcher.reconcile import Reconciler, Report
from watcher.state import folders, fs, hashes, records
from watcher.state.hashes import Hashed
from watcher.state.records import State
from watcher.transfer.ledger import Identity
from watcher.transfer.model import Fetched
from watcher.transfer.store import Published, Store, Verified
from watcher.transfer.taking_over import live
from watcher.transfer.values import StoppedError

_LOOK_SECONDS, _TICK_SECONDS = 1.0, 0.2
_LOCK_SECONDS = 5.0
#: A start that takes longer is waited for no longer: the process may be a server by its name alone,
#: and a real one removes a new layer only if it is older than 0.21 and reads `manifests/` in the
#: instant between the layer's name and the manifest.
_START_SECONDS = 5.0
#: A server that is silent for so long is waited for no longer: it has nothing to download.
_SILENT_SECONDS = 120.0


class Publication:
    """What is done about the names of layers. Its generators give notes, and a result.

    They raise StoppedError where somebody wants that.
    """

    def __init__(self, host: Host, settings: Settings, cancelled: Callable[[], bool]) -> None:
        self._host, self._settings, self._cancelled = host, settings, cancelled

    def until_allowed(self) -> Generator[str, None, safety.Why | None]:
        """Wait a while for a server's start to end, since it removes blobs that no manifest names.

        Returns why names can't be given, if so.
        """
        until = time.monotonic() + _START_SECONDS
        while True:
            why = safety.store_forbids(self._look(frozenset()).evidence)
            if why is None or why.kind is RefusalKind.SERVER_RUNS:
                return None  # it can't be led astray by a name that it lacks
            if why.kind is not RefusalKind.SERVER_STARTS:
                return why
            if time.monotonic() >= until:
                return None
            yield f"{why.reason}: waiting for its start to end"
            self._rest(_LOOK_SECONDS)

    def named(self, target: Store, verified: Sequence[Verified]) -> Generator[str, None, Published]:
        """Give layers their names, once no other process has one."""
        while True:
            try:
                return target.publish(verified, self._go_on)
            except fs.BusyError as error:
                yield f"another process is working on one of its layers: {error.owner}".rstrip(": ")
                self._rest(_TICK_SECONDS)

    def with_manifest(
        self, target: Store, fetched: Fetched, url: str, model: str, insecure: bool
    ) -> Generator[str, None, None]:
        """Have a running server write the manifest; else, or where it can't, write it here."""
        if server.version(url) is not None:
            why = self._by_server(PullStream(url, model, insecure=insecure), fetched)
            if not why:
                return
            yield f"the server at {url} {why}; ollama-watch writes the manifest itself"
        target.place_manifest(names.to_model(model), fetched.manifest)

    def _by_server(self, asked: PullStream, fetched: Fetched) -> str:
        """Ask a server to pull what is all here; why that does not lead to the manifest."""
        ours, heard_at = {each.layer.digest for each in fetched.verified}, time.monotonic()
        try:
            with asked as stream:
                while time.monotonic() - heard_at < _SILENT_SECONDS and not self._cancelled():
                    status = stream.next(_TICK_SECONDS)
                    if status is None:
                        continue
                    heard_at = time.monotonic()
                    if status.error:
                        return f"fails: {status.error}"
                    if records.of_status(status.text) is State.COMPLETED:
                        return ""
                    if status.digest in ours and status.completed < status.total:
                        return "does not see this store"
        except ServerGoneError as error:
            return f"is gone: {error}"
        return "is silent"

    def until_settled(
        self, target: Store, named: Sequence[Verified]
    ) -> Generator[str, None, frozenset[str]]:
        """Wait while a server still pulls a layer; the digests of which it has left something.

        It renames its file over ours, hashes it then, and removes the name if it is wrong.
        """
        left = target.settle(named)
        quiet = frozenset[str]()
        while left:
            digests = frozenset(each.layer.digest for each in left)
            quiet |= digests - {each.digest for each in live(self._look(digests))}
            left = target.settle(left, quiet)
            if not left or self._cancelled():
                break
            yield f"complete; the server is still downloading {names.short(left[0].layer.digest)}"
            time.sleep(_LOOK_SECONDS)
        return quiet

    def remember(self, named: Sequence[Verified], boot: str) -> None:
        """Keep that the hashes are right, as the files are now that they have their names."""
        found = dict[str, Hashed]()
        with (
            contextlib.suppress(OSError, LockedError),
            folders.opened_store(self._host.store) as opened,
        ):
            with folders.opened_blobs(opened) as blobs:
                for layer, identity in named:
                    name, digest = names.blob(layer.digest), layer.digest.lower()
                    seen = scan.look(name, blobs)
                    if seen and Identity(*seen.identity, seen.size, seen.mtime_ns) == identity:
                        found[name] = Hashed(seen.inode, seen.size, seen.ctime_ns, digest, boot)
            if found and boot:
                with journal.locked(opened, _LOCK_SECONDS):
                    hashes.keep(opened, found)

    def _look(self, digests: frozenset[str]) -> Report:
        return Reconciler(self._host, self._settings).inspect(scope=Scope(digests))

    def _rest(self, seconds: float) -> None:
        self._go_on()
        time.sleep(seconds)

    def _go_on(self) -> None:
        if self._cancelled():
            raise StoppedError

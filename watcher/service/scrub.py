"""Hashes, in the background and at low priority, blobs that may not match their names.

A blob that was finished on our progress files may rest on a false claim, and one of another size
than in its manifest may be cut short; only a hash decides. Registries are asked here, too, whether
a damaged blob can be downloaded again; if so, it is quarantined, or what is wrong of it is fetched.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from watcher import reconcile
from watcher.config import Settings
from watcher.decide import modes
from watcher.errors import EndedError
from watcher.model import HOUR, ActionKind, Plan
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.system.worker import Worker

if TYPE_CHECKING:
    from watcher.transfer.mending import Mender

#: What is done about a blob in doubt; nobody waits for how much of it is wrong.
_KINDS = (reconcile.QUESTIONS - {ActionKind.PROVE}) | {
    ActionKind.QUARANTINE_BLOB,
    ActionKind.FETCH_CHUNKS,
}
_LOWEST = 19
_AGAIN_SECONDS = HOUR


class Scrub:
    """One thread at most, which hashes the blobs it is given and quarantines damaged ones."""

    def __init__(self, host: Host, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._worker = Worker("scrub", self._scrub)
        self._host = replace(host, stops=self._worker.is_stopped)
        self._settings = Settings()
        self._mender: Mender | None = None  #: what fetches, once something is fetched
        self._lock = threading.Lock()
        self._waiting: frozenset[str] = frozenset()
        self._tried: dict[str, float] = {}  #: what was tried, and when; on the monotonic clock

    def want(self, digests: frozenset[str], settings: Settings) -> None:
        """Verify the blobs `digests`; those that fail are tried again in an hour."""
        latest = time.monotonic() - _AGAIN_SECONDS
        with self._lock:
            self._tried = {each: at for each, at in self._tried.items() if at > latest}
            self._waiting = digests - self._tried.keys()
            self._settings = settings
            if self._mender is not None:
                self._mender.limit.per_second = settings.rate
            is_any = bool(self._waiting)
        if is_any:
            self._worker.wake()

    def forget(self, digests: frozenset[str]) -> None:
        """Those not among all that are unverified now were verified, and may be in doubt again."""
        with self._lock:
            self._tried = {each: at for each, at in self._tried.items() if each in digests}

    def stop(self) -> None:
        """End within a scan, or the reading of a few MiB; what was not hashed stays unverified."""
        self._worker.stop()

    def _scrub(self) -> None:
        # This thread, and those that it starts, have the lowest priority; a unit may deny either.
        import psutil  # a daemon that hashes nothing does without its 2 MB

        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, _LOWEST)
        with contextlib.suppress(OSError, psutil.Error):
            psutil.Process(thread).ionice(psutil.IOPRIO_CLASS_IDLE)
        with self._lock:
            digests, self._waiting = self._waiting, frozenset()
            self._tried |= dict.fromkeys(digests, time.monotonic())
        if not digests:
            return
        try:
            self._verify(digests, self._settings)
        except Exception as error:
            # It survives whatever one scan of a strange machine meets, as the daemon does.
            self._warn(f"verifying a finished blob failed: {error}")

    def _verify(self, digests: frozenset[str], settings: Settings) -> None:
        is_hashed = False

        def approve(planned: Plan) -> Plan:
            nonlocal is_hashed
            agreed = planned.filtered(
                lambda each: (
                    each.kind in _KINDS
                    and (names.parse_blob(each.subject).digest or each.subject) in digests
                )
            )
            is_hashed |= any(each.kind is ActionKind.HASH for each in agreed.actions)
            # The result of a hash is reported first; another scan finds everything else again.
            if self._worker.is_stopped() and not is_hashed:
                raise EndedError
            return agreed

        host, mode = self._host, modes.SCRUB
        if settings.fetch:
            from watcher.transfer.mending import Mender

            mode = mode._replace(fetch=True)
            self._mender = Mender(host, settings)
            host = replace(host, fetch=self._mender.fetch)
        with contextlib.suppress(EndedError):
            reconcile.Reconciler(host, settings).reconcile(mode, approve=approve)

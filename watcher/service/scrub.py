"""Hashing, in the background and at low priority, blobs that may not be what their names say.

What was finished on sidecars of ours may rest on a false claim, and what has another size than its
manifest says may be cut short; only a hash tells. It takes minutes for a large one, in which the
daemon has to go on watching. Registries are asked here, too, whether what is damaged can be had
again; it is put aside if so.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import psutil

from watcher import reconcile
from watcher.config import Settings
from watcher.decide import modes
from watcher.errors import EndedError
from watcher.model import HOUR, ActionKind, Plan
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.reconcile import Reconciler
from watcher.system.worker import Worker

#: What is done about a blob in doubt.
_VERBS = reconcile.QUESTIONS | {ActionKind.QUARANTINE_BLOB}
_LOWEST = 19
_AGAIN_SECONDS = HOUR


class Scrub:
    """One thread at most, that hashes the blobs it is given and puts damaged ones aside."""

    def __init__(self, host: Host, trouble: Callable[[str], None]) -> None:
        self._trouble = trouble
        self._worker = Worker("proofs", self._scrub)
        self._host = replace(host, stops=self._worker.is_stopped)
        self._settings = Settings()
        self._lock = threading.Lock()
        self._waiting: frozenset[str] = frozenset()
        #: What was tried, and when; on the monotonic clock.
        self._tried: dict[str, float] = {}

    def want(self, digests: frozenset[str], settings: Settings) -> None:
        """Prove all blobs that are `digests` now; what could not be is tried again in an hour."""
        latest = time.monotonic() - _AGAIN_SECONDS
        with self._lock:
            self._tried = {each: at for each, at in self._tried.items() if at > latest}
            self._waiting = digests - self._tried.keys()
            self._settings = settings
            is_any = bool(self._waiting)
        if is_any:
            self._worker.wake()

    def forget(self, digests: frozenset[str]) -> None:
        """What is not among all that is unproven now was proved: it may come to be so once more."""
        with self._lock:
            self._tried = {each: at for each, at in self._tried.items() if each in digests}

    def stop(self) -> None:
        """End within a look, or the reading of a few MiB; what was not hashed stays unproven."""
        self._worker.stop()

    def _scrub(self) -> None:
        _yield_to_others()
        with self._lock:
            digests, self._waiting = self._waiting, frozenset()
            self._tried |= dict.fromkeys(digests, time.monotonic())
        if not digests:
            return
        try:
            self._prove(digests, self._settings)
        except Exception as error:
            # It outlives whatever one look at a strange machine brings up, as the daemon does.
            self._trouble(f"a finished blob can't be proved: {error}")

    def _prove(self, digests: frozenset[str], settings: Settings) -> None:
        is_hashed = False

        def approve(planned: Plan) -> Plan:
            nonlocal is_hashed
            agreed = planned.filtered(
                lambda each: each.kind in _VERBS and _digest(each.subject) in digests
            )
            is_hashed |= any(each.kind is ActionKind.HASH for each in agreed.actions)
            # What a hash has found is told first; all else another look finds again.
            if self._worker.is_stopped() and not is_hashed:
                raise EndedError
            return agreed

        with contextlib.suppress(EndedError):
            Reconciler(self._host, settings).reconcile(modes.SCRUB, approve=approve)


def _digest(subject: str) -> str:
    return names.parse_blob(subject).digest or subject


def _yield_to_others() -> None:
    """Give this thread, and those that it starts, the lowest priority."""
    thread = threading.get_native_id()
    # A unit may deny either.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, _LOWEST)
    with contextlib.suppress(OSError, psutil.Error):
        psutil.Process(thread).ionice(psutil.IOPRIO_CLASS_IDLE)

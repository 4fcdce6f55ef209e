"""The download of one layer, shared by all requests that want it at the same time."""

from __future__ import annotations

import os
import random
import threading

from watcher.demo.server.client import Answer, ask_registry
from watcher.demo.server.context import Context
from watcher.demo.server.errors import EngineError, told
from watcher.demo.server.files import remove
from watcher.demo.server.goglob import glob
from watcher.demo.server.gojson import int64
from watcher.demo.server.log import log
from watcher.demo.server.parts import Part, fresh_parts
from watcher.demo.server.settings import direct_seconds
from watcher.demo.server.statuses import Emit, progress, short_digest
from watcher.demo.server.store import blob_path
from watcher.demo.server.transfer import Transfer

PROGRESS_SECONDS = 0.06


class Downloads:
    """The downloads under way, by digest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_digest: dict[str, Download] = {}

    def bring(self, context: Context, digest: str, url: str, emit: Emit) -> None:
        """Join the download of a digest, or begin it, and wait for its end. Raises EngineError."""
        with self._lock:
            known = self._by_digest.get(digest)
            download = self._by_digest[digest] = known or Download(digest, url)
        if not known:
            try:
                download.prepare(context)
            except EngineError:
                self._forget(download)
                raise
            threading.Thread(target=self._run, args=(download,), daemon=True).start()
        download.wait(context, emit)

    def _run(self, download: Download) -> None:
        error = download.run()
        self._forget(download)  # first, so that who is told of its end can begin it anew
        download.finish(error)

    def _forget(self, download: Download) -> None:
        with self._lock:
            self._by_digest.pop(download.digest, None)

    def all(self) -> list[Download]:
        """Those under way."""
        with self._lock:
            return list(self._by_digest.values())


class Download:
    """Prepared and run by the request that began it, waited for by all that joined."""

    def __init__(self, digest: str, url: str) -> None:
        self.digest = digest
        self._url = url
        self._path = blob_path(digest)
        self._partial = self._path + "-partial"
        self._parts: list[Part] = []
        self._total = 0
        self._completed = 0
        self._done = False
        self._error: EngineError | None = None
        self._waiting = 0
        self._changed = threading.Condition()
        self._context = Context()
        self._transfer = Transfer(self._partial, short_digest(digest), self._count)

    def prepare(self, context: Context) -> None:
        """Believe every sidecar that is found, in lexical order; without any, ask for the length
        and write fresh ones. Nothing is opened before the last sidecar is read."""
        for path in glob(self._partial + "-*"):
            part = Part.read(self._partial, path)
            self._total = int64(self._total + part.size)
            self._completed = int64(self._completed + part.completed)
            self._parts.append(part)
        if not self._parts:
            with ask_registry(context, "HEAD", self._url) as answer:
                self._total = answer.length
            for part in fresh_parts(self._partial, self._total):
                part.write()
                self._parts.append(part)
        log(f"downloading {short_digest(self.digest)} in {len(self._parts)} part(s)")

    def run(self) -> EngineError | None:
        """Bring it; what went wrong."""
        try:
            self._bring()
        except EngineError as error:
            return error
        except Exception as error:
            # A defect of this engine must not look like a finished download.
            return EngineError(repr(error))
        return None

    def _bring(self) -> None:
        with self._transfer.opened(self._total):
            self._transfer.run(self._context, direct_url(self._context, self._url), self._parts)
        for number in range(len(self._parts)):
            remove(f"{self._partial}-{number}")
        with told("rename", f"{self._partial} {self._path}"):
            os.rename(self._partial, self._path)

    def _count(self, size: int) -> None:
        with self._changed:
            self._completed += size

    def finish(self, error: EngineError | None) -> None:
        """Tell all who wait how it went."""
        self._error = error
        self._done = True
        self._wake()

    def wait(self, context: Context, emit: Emit) -> None:
        """Report until it is done. The last one to leave gives the download up."""
        with self._changed:
            self._waiting += 1
        take_back = context.on_cancel(self._wake)
        try:
            while not self._wait_done(context):
                context.check()
                emit(progress(self.digest, self._total, self._completed))
            if self._error:
                raise self._error
        finally:
            take_back()
            with self._changed:
                self._waiting -= 1
                last = self._waiting == 0
            if last:
                self.give_up()

    def _wait_done(self, context: Context) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._done or context.canceled, PROGRESS_SECONDS)
            return self._done

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def give_up(self) -> None:
        """What comes of it when the last request for it is closed."""
        self._context.cancel()

    @property
    def writing(self) -> list[Part]:
        """Parts that are being fetched."""
        return self._transfer.writing


def direct_url(context: Context, url: str) -> str:
    """Where the data is: the first redirect to another host name."""
    with (
        Context(context, timeout=direct_seconds()) as limited,
        _ask_again_and_again(limited, url) as answer,
    ):
        if answer.status not in (200, 307):
            raise EngineError(f"unexpected status code {answer.status}")
        if not answer.redirect:
            raise EngineError("http: no Location header in response")
        return answer.redirect


def _ask_again_and_again(context: Context, url: str) -> Answer:
    tries = 0
    while True:
        try:
            return ask_registry(context, "GET", url, same_host=True)
        except EngineError as error:
            log(f"failed to get direct URL; backing off and retrying: {error}")
            context.check()
        tries += 1
        context.wait(min(tries * tries * 0.01, 10.0) * (random.random() + 0.5))

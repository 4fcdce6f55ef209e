"""Transfers from a small registry into a store of the test's own."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from watcher.demo.registry import Layer, Model, Registry
from watcher.model import MIB, Ranges
from watcher.ollama import names
from watcher.state import transfers
from watcher.transfer import ledger, store, values
from watcher.transfer.model import Fetched, Transfer

BOOT = "this start"
SECONDS = 120.0
CONNECTIONS = 8
#: Small pieces and short waits; a reserve that no test's disk lacks.
QUICK = values.Options(
    CONNECTIONS, piece=2 * MIB, first_pause=0.01, longest_pause=0.05, sync_bytes=8 * MIB, reserve=0
)


class Here:
    """A store, a registry with one model, and what a transfer between them reports."""

    def __init__(self, path: Path, registry: Registry, size: int, *, extras: bool = False) -> None:
        self.path, self.registry = path, registry
        for name in ("blobs", "manifests"):
            (path / name).mkdir(parents=True, exist_ok=True)
        self.model: Model = registry.add_model("demo", "1b", [Layer(size)], extras=extras)
        self.size = size
        self.digest = self.model.digests[0].removeprefix("sha256:")
        self.events: list[values.Event] = []

    @property
    def name(self) -> names.ModelName:
        return names.to_model(self.model.name)

    @property
    def folder(self) -> Path:
        """Where the layer arrives."""
        return self.path / ".ollama-watch" / transfers.FOLDER / self.digest

    @property
    def blob(self) -> Path:
        return self.path / "blobs" / f"sha256-{self.digest}"

    @property
    def manifest(self) -> Path:
        return self.path / "manifests" / self.name.path

    def transfer(self, options: values.Options = QUICK, **more: object) -> Transfer:
        order = values.Order(str(self.path), self.name, BOOT)
        changed = order._replace(**more)  # type: ignore[arg-type]
        return Transfer(changed, options, self.events.append)

    def fetch(self, options: values.Options = QUICK, **more: object) -> Fetched:
        return self.transfer(options, **more).run()

    def publish(self, fetched: Fetched) -> None:
        with store.opened(str(self.path)) as opened:
            published = opened.publish(fetched.verified)
            assert not published.changed
            opened.place_manifest(self.name, fetched.manifest)
            opened.settle(published.named)

    def pull(self, options: values.Options = QUICK, **more: object) -> None:
        """All of it, and a look whether it is right."""
        self.publish(self.fetch(options, **more))
        self.check()

    def fill(self) -> None:
        """Have the store hold the model, without a pull."""
        for digest in {*self.model.digests, self.model.config}:
            content = self.registry.content(digest)
            blob = self.path / "blobs" / digest.replace(":", "-")
            blob.write_bytes(content.read(0, content.size))
        self.manifest.parent.mkdir(parents=True, exist_ok=True)
        self.manifest.write_bytes(self.model.manifest)

    def check(self) -> None:
        for digest in {*self.model.digests, self.model.config}:
            blob = self.path / "blobs" / digest.replace(":", "-")
            with blob.open("rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == digest[7:]
        assert self.manifest.read_bytes() == self.model.manifest
        assert not self.folder.exists()

    # What is on the disk

    def believed(self, boot: str = BOOT) -> Ranges:
        """What the next run takes for here."""
        with self.ledger(boot) as found:
            return found.arrived

    @contextmanager
    def ledger(self, boot: str = BOOT) -> Iterator[ledger.Ledger]:
        with store.opened(str(self.path)) as opened:
            layer = values.Layer(self.digest, self.size)
            with opened.ledger(layer, boot) as found:
                yield found

    @contextmanager
    def opened(self) -> Iterator[store.Store]:
        with store.opened(str(self.path)) as found:
            yield found

    def moved(self, path: Path) -> Here:
        """The same on a copy of the disk."""
        other = copy.copy(self)
        other.path, other.events = path, []
        return other

    def content(self) -> bytes:
        return self.registry.content(f"sha256:{self.digest}").read(0, self.size)

    def arrived(self) -> int:
        """As another process sees it."""
        with self.opened() as found:
            return found.peek(values.Layer(self.digest, self.size), BOOT)

    def durable(self) -> int:
        """As the ledger says at this moment."""
        try:
            found = json.loads((self.folder / transfers.LEDGER).read_bytes())
        except FileNotFoundError:
            return 0
        return sum(end - start for start, end in found["durable"])

    def written_if_any(self) -> int:
        try:
            return self.written()
        except FileNotFoundError:
            return 0

    def written(self) -> int:
        """Bytes of the layer in the data file: they hold no zeros."""
        data = (self.folder / transfers.DATA).read_bytes()
        return len(data) - data.count(0)

    def check_right(self, claimed: Ranges) -> None:
        """All that is claimed is there, byte for byte."""
        data = (self.folder / transfers.DATA).read_bytes()
        content = self.registry.content(f"sha256:{self.digest}")
        for start, end in claimed:
            assert data[start:end] == content.read(start, end)

    @property
    def served(self) -> int:
        """Bytes of the layer that the registry has sent, but for the one that its address costs."""
        return self.registry.bytes_served(f"sha256:{self.digest}")

    def asked(self, since: int) -> int:
        """Bytes of the layer that requests asked for, from the `since`th request on."""
        spans = [
            re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range", ""))
            for path, headers in self.registry.asked[since:]
            if path.startswith(f"/data/sha256:{self.digest}")
        ]
        sizes = [int(span[2]) + 1 - int(span[1]) for span in spans if span is not None]
        return sum(size for size in sizes if size > 1)  # one byte is asked for to find the address

    def waits(self) -> list[values.Waiting]:
        return [each for each in self.events if isinstance(each, values.Waiting)]

    def notices(self) -> str:
        return "\n".join(each.text for each in self.events if isinstance(each, values.Noticed))


def wait_for(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it does not come about"
        time.sleep(0.005)


class Background:
    """A transfer in a thread."""

    def __init__(self, work: Transfer) -> None:
        self.work = work
        self.error: BaseException | None = None
        self.fetched: Fetched | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.work.stop()
        self.join()

    def _run(self) -> None:
        try:
            self.fetched = self.work.run()
        except BaseException as error:  # the test looks at it
            self.error = error

    def join(self) -> None:
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    def result(self) -> Fetched:
        self.join()
        if self.error is not None:
            raise self.error
        assert self.fetched is not None
        return self.fetched


class Process:
    """A pull in a process of its own."""

    def __init__(
        self,
        here: Here,
        options: values.Options = QUICK,
        boot: str = BOOT,
        count: Path | None = None,
        *,
        mirrors: tuple[str, ...] = (),
    ) -> None:
        names_of = set(values.Options.__slots__) - {"budget"}
        changed = {name: getattr(options, name) for name in names_of}
        changed["limit"] = options.limit.per_second
        order = {
            "store": str(here.path),
            "model": here.model.name,
            "options": changed,
            "boot": boot,
            "mirrors": mirrors,
            **({"count": str(count)} if count else {}),
        }
        self._out = os.memfd_create("printed")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.transfer.pulling", json.dumps(order)],
            stdout=self._out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)},
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        os.close(self._out)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def printed(self) -> str:
        return os.pread(self._out, 1 << 20, 0).decode()

    def end(self) -> None:
        assert self._process.wait(SECONDS) == 0, self.printed()


def with_options(**changed: object) -> values.Options:
    return replace(QUICK, **changed)  # type: ignore[arg-type]

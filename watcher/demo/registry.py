"""A small model registry with made-up models, and with faults on demand.

It speaks as much of the registry protocol (v2 manifests, blobs by HEAD and ranged GET) as a pull
needs. The real Ollama server takes a layer's data only from an address that a redirect to *another*
host name gave it: it follows redirects within one host name itself, and fails where the last answer
has no Location. So a blob asked for under `localhost` is redirected to `127.0.0.1` and the other
way round (seen on a real server).

In a thread:

    with Registry() as registry:
        model = registry.add_model("demo", "1b", [Layer(262_144_000)])
        registry.add_fault(Fault("reset", after=20_000_000))

As a process: `python -m watcher.demo.registry --port 0` prints its URL; `POST /_control` takes what
`Registry.control` describes, `GET /_stats` answers what `Registry.stats` returns.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
import select
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

BLOCK = 1 << 20
STRIDE = 4093
SLICE = 1 << 18
MODEL = "application/vnd.ollama.image.model"
TEMPLATE = "application/vnd.ollama.image.template"
LICENSE = "application/vnd.ollama.image.license"
PARAMS = "application/vnd.ollama.image.params"
CONFIG = "application/vnd.docker.container.image.v1+json"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
PAGE = "<html><head><title>502 Bad Gateway</title></head><body>" + "gateway error " * 300

Kind = Literal[
    "reset", "stall", "truncate", "page", "ignore_range", "hang",
    "other_range", "wrong_total", "gzip", "crawl", "endless", "flip",
]  # fmt: skip
Step = Literal["manifest", "head", "direct", "data", "sums"]


@dataclass(frozen=True)
class Layer:
    """One layer to be made up.

    `size` bytes of noise drawn from `seed` without a single zero byte (so that a hole in a copy is
    always telling), or exactly `data`. `zeros` are `(start, end)` ranges that really hold zeros.
    """

    size: int = 0
    media_type: str = MODEL
    seed: int | None = None
    data: bytes | None = None
    zeros: tuple[tuple[int, int], ...] = ()


@dataclass
class Fault:
    """What goes wrong, where and how often.

    kind          what happens
    reset         after `after` bytes of the body the connection is reset (a real RST)
    stall         after `after` bytes nothing more comes, until the fault is removed
    truncate      after `after` bytes the connection ends in order, too early
    page          the answer is `body` with `status`, and `headers` besides; with `cut`, more is
                  promised than comes
    ignore_range  the answer is 200 and the whole blob from its first byte on
    hang          no answer at all, until the fault is removed
    other_range   206 with the range one block further on, and its bytes
    wrong_total   206 with the total one byte too large
    gzip          206 that says its body is compressed
    crawl         the body comes with `rate` bytes per second
    flip          a byte of the body is wrong, after `after` bytes; another one each time
    endless       a body without a length and an end; with `status`, of words

    `on` says which request (`manifest`, `head`: the length, `direct`: the redirect, `data`,
    `sums`), `digest` of which blob, `begin`/`end` from which first bytes (`begin <= first < end`),
    `every` of how many of those it hits one, `times` how often before it is spent (None: always).
    """

    kind: Kind
    on: Step = "data"
    digest: str | None = None
    after: int = 0
    status: int = 500
    body: str = PAGE
    cut: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    rate: int = 1000
    begin: int = 0
    end: int | None = None
    every: int = 1
    times: int | None = None
    #: Requests that it fits so far.
    met: int = 0

    def fits(self, step: Step, digest: str | None, first: int) -> bool:
        """Whether a request of this step, for this digest, from this byte on, is hit."""
        return (
            self.on == step
            and self.times != 0
            and self.digest in (None, digest)
            and first >= self.begin
            and (self.end is None or first < self.end)
        )


@dataclass
class Manners:
    """How a registry is; the default is as registry.ollama.ai, without what expires.

    `plain`: layers are served at their own address, as a plain OCI registry does. `lifetime`: the
    address of a layer's data is good for so many requests, then it answers 403 with an XML body.
    `same`: the registry goes on giving that address.
    `wants`: 401 to who has no token (`bearer`), whose realm wants it signed for (`signed`); `signs`
    is given the ``Authorization`` and the URL that it is for. `uses`: a token is good for so many
    requests. `realm`: where tokens are, if elsewhere. `data`: the host of the layers' data,
    if elsewhere. `newer`: manifests are answered with 412.
    `sums`: how the sums of chunks of `chunk` bytes are answered: all of them, without the last one,
    those of other bytes, or at another host; "": with 404.
    """

    plain: bool = False
    lifetime: int | None = None
    same: bool = False
    wants: Literal["", "bearer", "signed"] = ""
    uses: int | None = None
    signs: Callable[[str, str], bool] = lambda _, __: False
    realm: str = ""
    data: str = ""
    newer: bool = False
    sums: Literal["", "complete", "short", "other", "host"] = ""
    chunk: int = 4 * BLOCK


@dataclass(frozen=True)
class Gate:
    """Holds back a layer's data: per connection after `after` bytes, or at the offsets `at`."""

    after: int | None = None
    at: tuple[int, ...] = ()

    def limit(self, first: int, position: int, stop: int) -> int:
        """Where a connection that began at `first` and is at `position` is held next."""
        limits = [offset for offset in self.at if offset >= position]
        if self.after is not None and first + self.after >= position:
            limits.append(first + self.after)
        return min([*limits, stop])


@dataclass(frozen=True)
class Model:
    """A model of the registry: `name` to pull it by, `manifest` as served, digests in order."""

    name: str
    manifest: bytes
    digests: tuple[str, ...]
    config: str


class Content:
    """The bytes of one blob, made up as they are asked for: `size`, `digest` ("sha256:<hex>")."""

    def __init__(self, layer: Layer, seed: int) -> None:
        self._data = layer.data
        self._zeros = layer.zeros
        self._seed = seed
        self.size = layer.size if layer.data is None else len(layer.data)
        self.digest = _digest_of(self.size, layer.data, layer.zeros, seed)

    def slices(self, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes `[start, stop)` in slices of at most 256 KiB."""
        return _slices(start, stop, self._data, self._zeros, self._seed)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes `[start, stop)` at once."""
        return b"".join(self.slices(start, stop))

    def sums(self, chunk: int, *, is_other: bool) -> Iterator[str]:
        """A line for each chunk: its digest, first and last byte."""
        for start in range(0, self.size, chunk):
            stop = min(start + chunk, self.size)
            sha = hashlib.sha256(b"other" * is_other)
            for piece in self.slices(start, stop):
                sha.update(piece)
            yield f"sha256:{sha.hexdigest()} {start}-{stop - 1}\n"


@lru_cache(maxsize=8)
def _noise(seed: int) -> memoryview:
    """A block of random bytes without zeros."""
    return memoryview(random.Random(seed).randbytes(BLOCK).replace(b"\0", b"\x5a"))


def _slices(
    start: int, stop: int, data: bytes | None, zeros: Sequence[tuple[int, int]], seed: int
) -> Iterator[memoryview]:
    if data is not None:
        yield memoryview(data)[start:stop]
        return
    noise = _noise(seed)
    while start < stop:
        # Each block is the same noise turned by another amount, so no two blocks are alike.
        turned = (start + start // BLOCK * STRIDE) % BLOCK
        length = min(SLICE, stop - start, BLOCK - turned, BLOCK - start % BLOCK)
        piece = noise[turned : turned + length]
        yield _with_zeros(piece, start, zeros)
        start += length


def _with_zeros(piece: memoryview, start: int, zeros: Sequence[tuple[int, int]]) -> memoryview:
    stop = start + len(piece)
    inside = [(max(a, start), min(b, stop)) for a, b in zeros if a < stop and b > start]
    if not inside:
        return piece
    mixed = bytearray(piece)
    for a, b in inside:
        mixed[a - start : b - start] = bytes(b - a)
    return memoryview(mixed)


@lru_cache(maxsize=256)
def _digest_of(size: int, data: bytes | None, zeros: tuple[tuple[int, int], ...], seed: int) -> str:
    sha = hashlib.sha256()
    for piece in _slices(0, size, data, zeros, seed):
        sha.update(piece)
    return "sha256:" + sha.hexdigest()


class Registry:
    """A registry on loopback; a context manager that serves while it is entered.

    `port` 0 takes a free one. All methods may be called while requests are served.
    """

    def __init__(self, port: int = 0) -> None:
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.registry = self
        self._changed = threading.Condition()
        self._blobs: dict[str, Content] = {}
        self._tags: dict[tuple[str, str], list[bytes]] = {}
        self._turns: dict[tuple[str, str], int] = {}
        self._faults: list[Fault] = []
        self._gates: dict[str, Gate] = {}
        self._held: dict[str, list[int]] = {}
        self._bytes: dict[str, int] = {}
        self._requests: dict[str, int] = {}
        #: How it is; may be changed while requests are served.
        self.manners = Manners()
        #: The path and the headers of each request.
        self.asked: list[tuple[str, dict[str, str]]] = []
        self._leases: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self._wire = 0
        self._rate: float | None = None
        self._next_send = 0.0
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        return int(self._server.server_address[1])

    @property
    def host(self) -> str:
        """Its host as it stands in model names and in folders of manifests."""
        return f"localhost:{self.port}"

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://{self.host}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.serve, daemon=True, name="registry")
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def serve(self) -> None:
        """Serve until `close` (in this thread)."""
        self._server.serve_forever(poll_interval=0.05)

    def close(self) -> None:
        """End every held connection and stop listening."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        if self._thread:
            self._thread.join(timeout=5)

    # Models

    def add_model(
        self,
        name: str,
        tag: str,
        layers: Sequence[Layer],
        *,
        seed: int = 0,
        extras: bool = True,
        namespace: str = "library",
    ) -> Model:
        """Make up a model and serve it under `<namespace>/<name>:<tag>`.

        With `extras` a small template, license and parameters layer follow, as models have them.
        Added again under the same name, it replaces the former.
        """
        wanted = [*layers, *(_extras(name, tag, seed) if extras else [])]
        contents = [
            Content(layer, _seed_of(seed, name, tag, number) if layer.seed is None else layer.seed)
            for number, layer in enumerate(wanted)
        ]
        digests = tuple(content.digest for content in contents)
        config = Content(Layer(data=_config(digests)), 0)
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": config.digest, "size": config.size},
            "layers": [
                {"mediaType": layer.media_type, "digest": content.digest, "size": content.size}
                for layer, content in zip(wanted, contents, strict=True)
            ],
        }
        data = json.dumps(manifest).encode()
        with self._changed:
            self._blobs |= {content.digest: content for content in [*contents, config]}
            self._tags[f"{namespace}/{name}", tag] = [data]
        pull_name = f"http://{self.host}/{namespace}/{name}:{tag}"
        return Model(pull_name, data, digests, config.digest)

    def set_manifests(self, name: str, tag: str, manifests: Sequence[bytes]) -> None:
        """Serve these bodies for `name` ("library/demo") and tag in turn, one a request."""
        with self._changed:
            self._tags[name, tag] = list(manifests)
            self._turns.pop((name, tag), None)

    def remove_tag(self, name: str, tag: str) -> None:
        """From now on the manifest of `name` ("library/demo") is answered with 404."""
        with self._changed:
            self._tags.pop((name, tag), None)

    def content(self, digest: str) -> Content:
        """The bytes behind `sha256:<hex>`; KeyError where there are none."""
        with self._changed:
            return self._blobs[digest]

    # Faults

    def add_fault(self, fault: Fault) -> Fault:
        """Let something go wrong from now on; the last one added goes first."""
        with self._changed:
            self._faults.insert(0, fault)
            return fault

    def remove_fault(self, fault: Fault) -> None:
        """Undo `add_fault`: those who wait go on."""
        with self._changed:
            self._faults.remove(fault)
            self._changed.notify_all()

    def clear_faults(self) -> None:
        """Remove all faults."""
        with self._changed:
            self._faults.clear()
            self._changed.notify_all()

    def throttle(self, bytes_per_second: float | None) -> None:
        """The most that all connections together send per second; None: no limit."""
        with self._changed:
            self._rate = bytes_per_second
            self._next_send = 0.0

    def hold(self, digest: str, *, after: int | None = None, at: Sequence[int] = ()) -> None:
        """Hold the data of `digest` back: see `Gate`."""
        with self._changed:
            self._gates[digest] = Gate(after, tuple(at))
            self._changed.notify_all()

    def release(self, digest: str | None = None) -> None:
        """Let the data of `digest` (None: of all) flow again."""
        with self._changed:
            if digest is None:
                self._gates.clear()
            else:
                self._gates.pop(digest, None)
            self._changed.notify_all()

    # What was seen

    def held(self, digest: str) -> list[int]:
        """The offsets at which connections of `digest` are held now, sorted."""
        with self._changed:
            return sorted(self._held.get(digest, []))

    def wait_held(self, digest: str, count: int, timeout: float = 120.0) -> list[int]:
        """Wait until `count` connections of `digest` are held; their offsets.

        What they sent has left the registry, and is not yet on the receiver's disk for certain.
        Raises TimeoutError.
        """
        with self._changed:
            if not self._changed.wait_for(
                lambda: len(self._held.get(digest, [])) >= count, timeout
            ):
                raise TimeoutError(f"{len(self._held.get(digest, []))} of {count} held")
            return sorted(self._held[digest])

    def bytes_served(self, digest: str) -> int:
        """Bytes of this blob's data that went out so far, pages of errors not counted."""
        with self._changed:
            return self._bytes.get(digest, 0)

    @property
    def sent(self) -> int:
        """Bytes of all bodies that went out so far, pages of errors included."""
        with self._changed:
            return self._wire

    def stats(self) -> dict[str, Any]:
        """`{"bytes": {digest: n}, "requests": {step: n}, "held": {digest: [at]}, "sent": n}`."""
        with self._changed:
            return {
                "sent": self._wire,
                "bytes": dict(self._bytes),
                "requests": dict(self._requests),
                "held": {digest: sorted(at) for digest, at in self._held.items() if at},
            }

    def reset_stats(self) -> None:
        """Count from 0 again."""
        with self._changed:
            self._bytes.clear()
            self._requests.clear()
            self._wire = 0

    def control(self, order: dict[str, Any]) -> dict[str, Any]:
        """What `POST /_control` does: one or more of these keys, done in this order.

        `model {name, tag, layers [{size, …}], seed, extras}`, `remove_tag [name, tag]`,
        `clear_faults`, `fault {kind, …}`, `throttle n|null`, `hold {digest, after, at}`,
        `release digest|null`, `manners {plain, lifetime}`, `reset_stats`. Answers `stats()`, and
        `model` where one was added.
        Raises KeyError, TypeError or ValueError where the order makes no sense.
        """
        answer: dict[str, Any] = {}
        if "model" in order:
            answer["model"] = self._add_from(dict(order["model"]))
        if "remove_tag" in order:
            self.remove_tag(*order["remove_tag"])
        if "clear_faults" in order:
            self.clear_faults()
        if "fault" in order:
            self.add_fault(Fault(**order["fault"]))
        if "throttle" in order:
            self.throttle(order["throttle"])
        if "hold" in order:
            self.hold(**order["hold"])
        if "release" in order:
            self.release(order["release"])
        if "manners" in order:
            self.manners = Manners(**order["manners"])
        if "reset_stats" in order:
            self.reset_stats()
        return answer | self.stats()

    def _add_from(self, order: dict[str, Any]) -> dict[str, Any]:
        layers = [
            Layer(**layer | {"zeros": tuple(map(tuple, layer.get("zeros", ())))})
            for layer in order.pop("layers")
        ]
        model = self.add_model(layers=layers, **order)
        return {"name": model.name, "digests": list(model.digests), "config": model.config}

    # For the handler

    def manifest(self, name: str, tag: str) -> bytes | None:
        """The next body to serve for a tag, None where it has vanished."""
        with self._changed:
            bodies = self._tags.get((name, tag))
            if not bodies:
                return None
            turn = self._turns.get((name, tag), 0)
            self._turns[name, tag] = turn + 1
            return bodies[turn % len(bodies)]

    def blob(self, digest: str) -> Content | None:
        """The blob of that digest, if there is one."""
        with self._changed:
            return self._blobs.get(digest)

    def count(self, step: Step) -> None:
        """Count a request."""
        with self._changed:
            self._requests[step] = self._requests.get(step, 0) + 1

    def fault_for(self, step: Step, digest: str | None, first: int) -> Fault | None:
        """The fault that hits this request, if any; it is used up once."""
        with self._changed:
            for fault in self._faults:
                if fault.fits(step, digest, first):
                    fault.met += 1
                    if fault.met % fault.every:
                        continue
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
            return None

    def wait_over(self, fault: Fault, gone: Callable[[], bool]) -> None:
        """Wait until a fault is removed, the client is gone, or the registry closes."""
        with self._changed:
            while fault in self._faults and not self._closed and not gone():
                self._changed.wait(0.1)

    def wait_gate(
        self, digest: str, first: int, position: int, stop: int, gone: Callable[[], bool]
    ) -> int:
        """How far a connection may send now; waits while it may not send at all.

        Raises ConnectionAbortedError where the client goes away meanwhile.
        """
        with self._changed:
            limit = self._limit(digest, first, position, stop)
            if limit > position:
                return limit
            held = self._held.setdefault(digest, [])
            held.append(position)
            self._changed.notify_all()
            try:
                while (limit := self._limit(digest, first, position, stop)) == position:
                    self._changed.wait(0.1)
                    if self._closed or gone():
                        raise ConnectionAbortedError("held until its end")
            finally:
                held.remove(position)
            return limit

    def _limit(self, digest: str, first: int, position: int, stop: int) -> int:
        gate = self._gates.get(digest)
        return stop if gate is None else gate.limit(first, position, stop)

    def pace(self, size: int) -> None:
        """Wait for this connection's turn to send `size` bytes under the throttle."""
        with self._changed:
            if self._rate is None:
                return
            now = time.monotonic()
            turn = max(self._next_send, now)
            self._next_send = turn + size / self._rate
        time.sleep(max(0.0, turn - now))

    def slice_size(self) -> int:
        """How much to send at once: little under a throttle, so that it flows evenly."""
        with self._changed:
            return SLICE if self._rate is None else max(4096, min(SLICE, int(self._rate / 100)))

    @contextlib.contextmanager
    def sending(self, digest: str, size: int) -> Iterator[None]:
        """Count bytes of a blob, unless they can't be sent.

        They are counted first: who has received them must find them counted.
        """
        self._count_bytes(digest, size)
        try:
            yield
        except BaseException:
            self._count_bytes(digest, -size)
            raise

    def _count_bytes(self, digest: str, size: int) -> None:
        with self._changed:
            self._bytes[digest] = self._bytes.get(digest, 0) + size
            self._wire += size

    def count_page(self, size: int) -> None:
        """Count bytes of a body that is no blob's."""
        with self._changed:
            self._wire += size

    def note(self, path: str, headers: dict[str, str]) -> None:
        """Remember a request."""
        with self._changed:
            self.asked.append((path, headers))

    def lease(self) -> str:
        """A new signature of an address that expires."""
        with self._changed:
            if self.manners.same and self._leases:
                return next(iter(self._leases))
            made = f"{len(self._leases):04d}{os.urandom(8).hex()}"
            self._leases[made] = self.manners.lifetime or 0
            return made

    def use_lease(self, signature: str) -> bool:
        """Use an address once; False where it has expired."""
        with self._changed:
            left = self._leases.get(signature, 0)
            self._leases[signature] = max(0, left - 1)
            return left > 0

    def token(self) -> str:
        """A new token."""
        with self._changed:
            made = f"token-{os.urandom(8).hex()}"
            self._tokens[made] = -1 if self.manners.uses is None else self.manners.uses
            return made

    def use_token(self, token: str) -> bool:
        """Use a token once; False where it is none, or no longer."""
        with self._changed:
            left = self._tokens.get(token, 0)
            self._tokens[token] = left - 1 if left > 0 else left
            return left != 0


def _seed_of(seed: int, name: str, tag: str, number: int) -> int:
    text = f"{seed} {name} {tag} {number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def _extras(name: str, tag: str, seed: int) -> list[Layer]:
    mark = format(_seed_of(seed, name, tag, -1) >> 32, "08x")
    return [
        Layer(media_type=TEMPLATE, data=f"{{{{ .Prompt }}}} {mark}".encode()),
        Layer(media_type=LICENSE, data=f"a licence {mark}".encode()),
        Layer(media_type=PARAMS, data=json.dumps({"stop": [mark]}).encode()),
    ]


def _config(digests: Sequence[str]) -> bytes:
    config = {
        "model_format": "gguf",
        "model_family": "llama",
        "model_families": ["llama"],
        "model_type": "1B",
        "file_type": "Q4_0",
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": list(digests)},
    }
    return json.dumps(config).encode()


def _flipped(piece: memoryview, at: int, turn: int) -> memoryview:
    if not 0 <= at < len(piece):
        return piece
    mixed = bytearray(piece)
    mixed[at] ^= 1 + turn % 255
    return memoryview(mixed)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    registry: Registry

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is what this registry is for."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@dataclass
class _Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    @property
    def registry(self) -> Registry:
        return self.server.registry

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: the counters tell it."""

    def do_HEAD(self) -> None:
        self.registry.note(self.path, dict(self.headers.items()))
        digest = self._blob_digest()
        content = self.registry.blob(digest)
        self.registry.count("head")
        if self._fails("head", digest):
            return
        if content is None:
            self._answer(_Answer(404))
            return
        self.send_response(200)
        self.send_header("Content-Length", str(content.size))
        self.end_headers()

    def do_GET(self) -> None:
        self.registry.note(self.path, dict(self.headers.items()))
        if self.path.startswith("/v2/") and not self._may():
            return
        if self.path.startswith("/token"):
            self._get_token()
        elif self.path == "/_stats":
            self._answer(_Answer(200, body=json.dumps(self.registry.stats()).encode()))
        elif match := re.fullmatch(r"/v2/(.+)/manifests/([^/]+)", self.path):
            self._get_manifest(match[1], match[2])
        elif re.fullmatch(r"(/v2/.+/chunksums|/sums)/[^/]+", self.path):
            self._get_sums(self._blob_digest())
        elif self.path.startswith("/data/"):
            self._get_data(self.path.removeprefix("/data/"))
        elif re.fullmatch(r"/v2/.+/blobs/[^/]+", self.path) and self.registry.manners.plain:
            self._get_data(self._blob_digest())
        elif re.fullmatch(r"/v2/.+/blobs/[^/]+", self.path):
            self._redirect(self._blob_digest())
        else:
            self._answer(_Answer(404))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/_control":
            self._answer(_Answer(404))
            return
        try:
            answer = self.registry.control(json.loads(body))
        except (KeyError, TypeError, ValueError) as error:
            self._answer(_Answer(400, body=repr(error).encode()))
            return
        self._answer(_Answer(200, body=json.dumps(answer).encode()))

    def _may(self) -> bool:
        if not self.registry.manners.wants:
            return True
        kind, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if kind == "Bearer" and self.registry.use_token(token):
            return True
        host = self.headers.get("Host")
        realm = self.registry.manners.realm or f"http://{host}/token"
        asks = f'Bearer realm="{realm}",service="{host}",scope="repository:x:pull a:b:c"'
        self._answer(_Answer(401, {"WWW-Authenticate": asks}, b'{"errors":[{"code":"DENIED"}]}'))
        return False

    def _get_token(self) -> None:
        signed = self.headers.get("Authorization") or ""
        url = f"http://{self.headers.get('Host')}{self.path}"
        manners = self.registry.manners
        if manners.wants == "signed" and not manners.signs(signed, url):
            self._answer(_Answer(401, body=b"unauthorized"))
            return
        self._answer(_Answer(200, body=json.dumps({"token": self.registry.token()}).encode()))

    def _blob_digest(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    def _get_manifest(self, name: str, tag: str) -> None:
        self.registry.count("manifest")
        if self._fails("manifest", None):
            return
        body = self.registry.manifest(name, tag)
        if self.registry.manners.newer:
            error = b'{"errors":[{"message":"this model requires a newer version of Ollama"}]}'
            self._answer(_Answer(412, body=error))
            return
        if body is None:
            self._answer(_Answer(404, body=b'{"errors":[{"code":"MANIFEST_UNKNOWN"}]}'))
            return
        self._answer(_Answer(200, {"Content-Type": MANIFEST}, body))

    def _get_sums(self, digest: str) -> None:
        self.registry.count("sums")
        if self._fails("sums", digest):
            return
        content, manners = self.registry.blob(digest), self.registry.manners
        if content is None or not manners.sums:
            self._answer(_Answer(404))
        elif manners.sums == "host" and self.path.startswith("/v2/"):
            self._answer(_Answer(307, {"Location": f"{self._other_host()}/sums/{digest}"}))
        else:
            lines = list(content.sums(manners.chunk, is_other=manners.sums == "other"))
            body = "".join(lines[:-1] if manners.sums == "short" else lines).encode()
            location = f"{self._other_host()}/data/{digest}"
            self._answer(_Answer(200, {"Content-Location": location}, body))

    def _other_host(self) -> str:
        host = (self.headers.get("Host") or "").partition(":")[0]
        other = "127.0.0.1" if host == "localhost" else "localhost"
        return f"http://{other}:{self.registry.port}"

    def _redirect(self, digest: str) -> None:
        self.registry.count("direct")
        if self._fails("direct", digest):
            return
        location = f"{self.registry.manners.data or self._other_host()}/data/{digest}"
        if self.registry.manners.lifetime is not None:
            location += f"?X-Amz-Signature={self.registry.lease()}"
        self._answer(_Answer(307, {"Location": location}))

    def _get_data(self, digest: str) -> None:
        self.registry.count("data")
        digest, _, query = digest.partition("?")
        if query and not self.registry.use_lease(query.partition("=")[2]):
            self._answer(_Answer(403, body=b"<Error><Code>ExpiredRequest</Code></Error>"))
            return
        content = self.registry.blob(digest)
        if content is None:
            self._answer(_Answer(404))
            return
        first, stop = self._range(content.size)
        fault = self.registry.fault_for("data", digest, first)
        kind = fault.kind if fault else ""
        if fault and (kind in ("page", "hang") or (kind == "endless" and fault.status != 206)):
            self._fail(fault)
            return
        if kind == "ignore_range":
            first, stop = 0, content.size
        if kind == "other_range":
            first, stop = (first + BLOCK) % content.size, min(stop + BLOCK, content.size)
        if first >= stop > 0:
            self._answer(_Answer(416, {"Content-Range": f"bytes */{content.size}"}))
            return
        partial = "Range" in self.headers and kind != "ignore_range"
        self.send_response(206 if partial else 200)
        if kind == "endless":
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(stop - first))
        if kind == "gzip":
            self.send_header("Content-Encoding", "gzip")
        if partial:
            total = content.size + (kind == "wrong_total")
            self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{total}")
        self.end_headers()
        self._send_data(content, first, stop, fault)
        if fault and kind == "endless":
            self._send_words(fault)

    def _range(self, size: int) -> tuple[int, int]:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not match:
            return 0, size
        return int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)

    def _send_data(self, content: Content, first: int, stop: int, fault: Fault | None) -> None:
        breaks = fault is not None and fault.kind in ("reset", "stall", "truncate")
        end = min(stop, first + fault.after) if fault and breaks else stop
        position = first
        while position < end:
            limit = self.registry.wait_gate(content.digest, first, position, end, self._gone)
            step = min(limit, position + self.registry.slice_size())
            if fault and fault.kind == "crawl":
                step = min(step, position + max(1, fault.rate // 10))
                time.sleep(0.1)
            for piece in content.slices(position, step):
                if fault and fault.kind == "flip":
                    piece = _flipped(piece, first + fault.after - position, fault.met)
                self.registry.pace(len(piece))
                with self.registry.sending(content.digest, len(piece)):
                    self.connection.sendall(piece)
                position += len(piece)
        if fault and breaks and end < stop:
            self._fail(fault)

    def _fails(self, step: Step, digest: str | None) -> bool:
        fault = self.registry.fault_for(step, digest, 0)
        if fault:
            self._fail(fault)
        return fault is not None

    def _fail(self, fault: Fault) -> None:
        match fault.kind:
            case "page":
                self._send_page(fault)
            case "endless":
                self.send_response(fault.status)
                self.end_headers()
                self.close_connection = True
                self._send_words(fault)
            case "reset":
                self._reset()
            case "stall" | "hang":
                self.registry.wait_over(fault, self._gone)
                self.close_connection = True
            case _:
                self.close_connection = True

    def _send_words(self, fault: Fault) -> None:
        """Words without an end, until the client has enough."""
        body = fault.body.encode()
        while True:
            self.registry.count_page(len(body))
            self.wfile.write(body)

    def _send_page(self, fault: Fault) -> None:
        body = fault.body.encode()
        self.send_response(fault.status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body) * (2 if fault.cut else 1)))
        for name, value in fault.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.registry.count_page(len(body))
            self.wfile.write(body)
        self.close_connection = fault.cut

    def _reset(self) -> None:
        self.close_connection = True
        self._wait_arrived()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # The handler's files keep the socket open, so it is closed beneath them.
        os.close(self.connection.detach())

    def _wait_arrived(self) -> None:
        """Wait until the client's kernel has all that was sent: a reset drops the rest."""
        until = time.monotonic() + 5
        with contextlib.suppress(OSError):
            while time.monotonic() < until:
                waiting = fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))
                if waiting == bytes(4):
                    return
                time.sleep(0.001)

    def _gone(self) -> bool:
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if not poll.poll(0):
            return False
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _answer(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve as a process until it is killed; the first line of stdout is the URL."""
    parser = argparse.ArgumentParser(prog="registry", description="a small model registry")
    parser.add_argument("--port", type=int, default=0)
    registry = Registry(parser.parse_args(argv).port)
    sys.stdout.write(registry.url + "\n")
    sys.stdout.flush()
    try:
        registry.serve()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""An HTTP listener that serves the metrics, usually on loopback, in one thread of its own.

Clients can't keep the daemon from its work: the number of connections, the length of a request and
its time are limited, and the oldest connection gives way to a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from watcher import config
from watcher.errors import ListenError, with_step
from watcher.system import advice

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_REQUEST_SECONDS = 10.0  #: for a whole request and its answer
_MOST_CONNECTIONS = 32
_MOST_WAITING = 512  #: clients that the kernel lets wait to be accepted: they take no descriptor
_LONGEST_REQUEST = 16 * 1024
_PAUSE_SECONDS = 1.0  #: where no client can be accepted, new ones wait for so long
_REQUEST_LINE = re.compile(r"([A-Z]+) (\S+) HTTP/(1\.[01])")
_STATUS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 405: "Method Not Allowed"}


@contextlib.contextmanager
def listening(
    host: str, port: int, registry: CollectorRegistry, complain: Callable[[str], None]
) -> Iterator[int]:
    """Answer scrapes until the context ends; the port (`port` 0: any that is free).

    It sleeps until a client connects. `complain` gets, once for each reason, why none can be
    accepted. Raises ListenError, which names the address.
    """
    listener = bound(host, port, "metrics_listen")
    loop, ending = asyncio.new_event_loop(), asyncio.Event()

    def serve() -> None:
        loop.run_until_complete(_serve(listener, registry, ending, complain))

    thread = threading.Thread(target=serve, name="metrics", daemon=True)
    with contextlib.closing(loop), listener:
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            loop.call_soon_threadsafe(ending.set)
            thread.join()


def bound(host: str, port: int, by: str) -> socket.socket:
    """A socket that listens there; `by`: what has named the address. Raises ListenError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_MOST_WAITING)
    except OSError as error:
        # create_server adds the address to the reason.
        why = (error.strerror or str(error)).partition(" (while")[0]
        step, command = "choose another address", ""
        if error.errno == errno.EADDRINUSE:
            step = "choose another port, or stop the process that uses it"
            command = advice.as_root("ss", "-ltnp", f"sport = :{port}")
        failed = f"{by}: listening on {config.spelled(host, port)} failed: {why}"
        raise ListenError(failed, step, command) from None


async def _serve(
    listener: socket.socket,
    registry: CollectorRegistry,
    ending: asyncio.Event,
    complain: Callable[[str], None],
) -> None:
    listener.setblocking(False)
    tasks = {asyncio.create_task(_accept(listener, registry, complain))}
    await ending.wait()
    tasks |= asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _accept(
    listener: socket.socket, registry: CollectorRegistry, complain: Callable[[str], None]
) -> None:
    answering: dict[asyncio.Task[None], None] = {}  #: in the order in which the clients connected
    told: set[int | None] = set()
    while True:
        try:
            client, _ = await asyncio.get_running_loop().sock_accept(listener)
        except OSError as error:
            # Whatever it is, it may last; others go on, and the end is not kept waiting.
            if error.errno not in told:
                told.add(error.errno)
                why = error.strerror or str(error)
                complain(with_step(f"metrics_listen: no client can connect: {why}", error.errno))
            await asyncio.sleep(_PAUSE_SECONDS)
            continue
        if len(answering) >= _MOST_CONNECTIONS:
            oldest = next(iter(answering))
            del answering[oldest]
            oldest.cancel()
        task = asyncio.create_task(_converse(client, registry))
        answering[task] = None
        task.add_done_callback(lambda ended: answering.pop(ended, None))
        await asyncio.sleep(0)  # it begins, and others go on


async def _converse(client: socket.socket, registry: CollectorRegistry) -> None:
    loop = asyncio.get_running_loop()
    request = b""
    client.setblocking(False)
    # A web page can reach loopback from this machine's browsers only.
    local = ipaddress.ip_address(client.getsockname()[0]).is_loopback
    # It may disconnect, or take too long.
    with client, contextlib.suppress(OSError):
        async with asyncio.timeout(_REQUEST_SECONDS):
            while b"\r\n\r\n" not in request:
                piece = await loop.sock_recv(client, 4096)
                if not piece or len(request) > _LONGEST_REQUEST:
                    return
                request += piece
            head = request.partition(b"\r\n\r\n")[0].decode("latin-1")
            await loop.sock_sendall(client, _answer(head, registry, local=local))
            client.shutdown(socket.SHUT_WR)


def _answer(head: str, registry: CollectorRegistry, *, local: bool = True) -> bytes:
    """The response to a request; one that came over loopback must be for this machine."""
    first, *lines = head.split("\r\n")
    request = _REQUEST_LINE.fullmatch(first)
    headers: dict[str, list[str]] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers.setdefault(name.strip().lower(), []).append(value.strip())
    if request is None:
        return _response(400, "no request of HTTP/1")
    method, target, version = request.groups()
    hosts = headers.get("host", [])
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        return _response(400, "expected one Host")
    try:
        parts = urlsplit(target)
    except ValueError:
        return _response(400, "no address")
    named = [*hosts, parts.netloc] if "://" in target else hosts
    if local and not all(map(is_here, named)):
        # A web page that is sent here by DNS rebinding has the name of its own host.
        return _response(403, "served to this machine alone: ask for localhost")
    if method not in ("GET", "HEAD"):
        return _response(405, "only GET")
    kind, body = _metrics(parts.query, headers.get("accept", [""])[0], registry)
    return _response(200, body, kind, only_head=method == "HEAD")


def is_here(host: str) -> bool:
    """Whether a ``Host`` is a name or an address of loopback; the port does not matter."""
    name = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(:[0-9]*)?", host)
    if name is None:
        return False
    plain = name[1].lower().removesuffix(".")
    if plain in ("localhost", "ip6-localhost", "localhost.localdomain"):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(plain.strip("[]")).is_loopback
    return False


def _metrics(query: str, accept: str, registry: CollectorRegistry) -> tuple[str, bytes]:
    from prometheus_client.exposition import choose_encoder

    names = parse_qs(query).get("name[]")
    wanted = registry.restricted_registry(names) if names else registry
    try:
        encode, kind = choose_encoder(accept)
    except (TypeError, ValueError):
        encode, kind = choose_encoder("")  # the library reads no odd version
    return kind, encode(wanted)


def _response(
    status: int, body: bytes | str, kind: str = "text/plain", *, only_head: bool = False
) -> bytes:
    raw = f"{body}\n".encode() if isinstance(body, str) else body
    head = (
        f"HTTP/1.1 {status} {_STATUS[status]}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if only_head else raw)

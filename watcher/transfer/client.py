"""HTTP by libcurl in an asyncio loop: one request, one answer, nothing on its own.

No redirect is followed and no credential kept here, so that each is decided where it is known whom
it is for. libcurl connects (to whichever of IPv6 and IPv4 answers first), resolves, finds proxies
in the environment and keeps connections for the next request.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, Self
from urllib.parse import unquote_to_bytes, urlsplit

import pycurl

from watcher.errors import without_secrets
from watcher.ollama import server
from watcher.transfer import certificates
from watcher.transfer.answers import Head
from watcher.transfer.values import Cause, TryError

#: Of a body that nobody wants so much is read, for its first words.
_WORDS = 4096
_BUFFER = 256 * 1024
#: CURLOPT_QUICK_EXIT (libcurl 7.87), for which pycurl has no name: a request that ends does not
#: wait for the resolver, which gives a silent name server many seconds.
_QUICK_EXIT = 322
#: What libcurl says of a proxy that wants a user and a password.
_NO_PASSWORD = "response 407"  # noqa: S105 - no password


class Body(Protocol):
    """What is sent."""

    #: Bytes.
    size: int

    def begin(self) -> None:
        """Begin with the first byte, perhaps again."""

    def read(self, size: int) -> bytes:
        """Give the next bytes. What it raises ends the request, and is raised there."""


class Request(NamedTuple):
    """A GET, unless it says otherwise."""

    url: str
    headers: tuple[str, ...] = ()
    #: The bytes asked for, ``[start, end)``.
    range: tuple[int, int] | None = None
    #: The most of a body that is read where no sink wants it.
    limit: int = _WORDS
    #: Over a connection of its own.
    fresh: bool = False
    #: Take unknown certificates.
    insecure: bool = False
    #: Seconds for an answer that no sink takes. Who has a sink sees how it goes.
    seconds: float = 30.0
    #: Seconds to connect at most.
    connect: float = 15.0
    method: str = "GET"
    #: What is sent; with it `seconds` is how long nothing may move.
    body: Body | None = None


class Answer(NamedTuple):
    """An answer: its head, and of its body what no sink took."""

    head: Head
    body: bytes


class Sink(Protocol):
    """Where a body goes."""

    def begin(self, head: Head) -> bool:
        """Whether the body is wanted; called before its first byte."""

    def wait(self, size: int) -> float:
        """In how many seconds to ask again for the next `size` bytes; 0: they may be written."""

    def write(self, data: bytes) -> None:
        """Take the next bytes. What it raises ends the request, and is raised there."""


class Client:
    """Connections that are shared by the requests of one loop."""

    def __init__(self, connections: int) -> None:
        self._trust = certificates.find()
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch_socket)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        self._multi.setopt(pycurl.M_MAXCONNECTS, connections + 2)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._watched: set[int] = set()
        #: A request ended before its host's name was resolved.
        self._is_resolving = False
        self._under_way: dict[pycurl.Curl, asyncio.Future[tuple[int, str]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_resolving:
            # libcurl 8.20 and later would wait for the resolver here: it goes with the process.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._multi))
        else:
            self._multi.close()
        self._set_timer(-1)
        for fd in self._watched:
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)

    async def ask(self, request: Request, sink: Sink | None = None) -> Answer:
        """Ask, and hand the body to `sink` if that wants it. Raises TryError, and what it raises.

        Canceled, it closes the connection.
        """
        exchange = _Exchange(sink, request)
        with self._handle(request, exchange) as handle:
            ended = self._under_way[handle] = self._loop.create_future()
            self._multi.add_handle(handle)
            code, text = pycurl.E_OPERATION_TIMEDOUT, "canceled"
            try:
                code, text = await ended
            finally:
                del self._under_way[handle]
                self._is_resolving |= _is_resolving(handle, code)
                self._multi.remove_handle(handle)
        if exchange.raised is not None:
            raise exchange.raised
        if code != pycurl.E_OK and not exchange.is_enough:
            raise self._failure(request, exchange, code, text)
        return Answer(exchange.head, bytes(exchange.body))

    @contextlib.contextmanager
    def _handle(self, request: Request, exchange: _Exchange) -> Iterator[pycurl.Curl]:
        handle = pycurl.Curl()
        exchange.go_on_in = functools.partial(self._go_on_in, handle)
        host = urlsplit(request.url).netloc.rpartition("@")[2]
        options: dict[int, Any] = {
            pycurl.URL: request.url,
            pycurl.HTTPHEADER: ["Accept-Encoding: identity", *request.headers],
            pycurl.USERAGENT: "ollama-watch",
            pycurl.HEADERFUNCTION: exchange.take_header,
            pycurl.WRITEFUNCTION: exchange.take_body,
            pycurl.PROTOCOLS: pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS,
            pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
            pycurl.BUFFERSIZE: _BUFFER,
            pycurl.NOSIGNAL: 1,
            pycurl.TCP_KEEPALIVE: 1,
            pycurl.CONNECTTIMEOUT_MS: int(1000 * min(request.connect, request.seconds)),
            pycurl.FRESH_CONNECT: int(request.fresh),
            pycurl.SSL_VERIFYPEER: int(not request.insecure),
            pycurl.SSL_VERIFYHOST: 0 if request.insecure else 2,
            **({pycurl.CAINFO: self._trust.file} if self._trust.file else {}),
            **({pycurl.CAPATH: self._trust.folder} if self._trust.folder else {}),
            # This machine itself is asked without a proxy, as everywhere in this program.
            **({pycurl.NOPROXY: "*"} if server.is_loopback(host) else _proxy(request.url)),
        }
        if request.range is not None:
            options[pycurl.RANGE] = f"{request.range[0]}-{request.range[1] - 1}"
        if request.body is not None:
            request.body.begin()
            options |= {
                pycurl.UPLOAD: 1,
                pycurl.INFILESIZE_LARGE: request.body.size,
                pycurl.READFUNCTION: exchange.give_body,
                pycurl.LOW_SPEED_LIMIT: 1,
                pycurl.LOW_SPEED_TIME: math.ceil(request.seconds),
            }
        elif exchange.sink is None:
            options[pycurl.TIMEOUT_MS] = int(1000 * request.seconds)
        if request.method == "HEAD":
            options[pycurl.NOBODY] = 1
        elif request.method != "GET":
            options[pycurl.CUSTOMREQUEST] = request.method
        try:
            for option, value in options.items():
                handle.setopt(option, value)
            with contextlib.suppress(pycurl.error):
                handle.setopt(_QUICK_EXIT, 1)
            yield handle
        finally:
            handle.close()

    def _go_on_in(self, handle: pycurl.Curl, seconds: float) -> None:
        def go_on() -> None:
            if handle in self._under_way:
                handle.pause(pycurl.PAUSE_CONT)
                self._go_on(pycurl.SOCKET_TIMEOUT, 0)

        self._loop.call_later(seconds, go_on)

    def _failure(self, request: Request, exchange: _Exchange, code: int, text: str) -> TryError:
        host = urlsplit(request.url).hostname
        is_untrusted = code in (pycurl.E_PEER_FAILED_VERIFICATION, pycurl.E_SSL_CACERT_BADFILE)
        cause = Cause.CERTIFICATE if is_untrusted else Cause.NETWORK
        final = is_untrusted or _NO_PASSWORD in text
        found = TryError(f"{host}: {without_secrets(text)}", cause, final=final)
        found.is_unreached = not (final or exchange.head.status)
        return found

    # ------------------------------------------------------------ libcurl's sockets and timer

    def _watch_socket(self, what: int, fd: int, *_: object) -> None:
        self._watched.add(fd)
        if what in (pycurl.POLL_IN, pycurl.POLL_INOUT):
            self._loop.add_reader(fd, self._go_on, fd, pycurl.CSELECT_IN)
        else:
            self._loop.remove_reader(fd)
        if what in (pycurl.POLL_OUT, pycurl.POLL_INOUT):
            self._loop.add_writer(fd, self._go_on, fd, pycurl.CSELECT_OUT)
        else:
            self._loop.remove_writer(fd)
        if what == pycurl.POLL_REMOVE:
            self._watched.discard(fd)

    def _set_timer(self, milliseconds: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if milliseconds >= 0:
            again = pycurl.SOCKET_TIMEOUT
            self._timer = self._loop.call_later(milliseconds / 1000, self._go_on, again, 0)

    def _go_on(self, fd: int, what: int) -> None:
        self._multi.socket_action(fd, what)
        left = 1
        while left:
            left, done, failed = self._multi.info_read()
            for handle in done:
                self._end(handle, pycurl.E_OK, "")
            for handle, code, text in failed:
                self._end(handle, code, text)

    def _end(self, handle: pycurl.Curl, code: int, text: str) -> None:
        ended = self._under_way.get(handle)
        if ended is not None and not ended.done():
            ended.set_result((code, text))


def _is_resolving(handle: pycurl.Curl, code: int) -> bool:
    """Whether a request was given up, with that code, before its host's name was resolved."""
    is_known = handle.getinfo(pycurl.NAMELOOKUP_TIME) or handle.getinfo(pycurl.PRIMARY_IP)
    return code == pycurl.E_OPERATION_TIMEDOUT and not is_known


def _proxy(url: str) -> dict[int, bytes]:
    """The proxy that the environment names, as options; none where libcurl finds it as well.

    libcurl takes no user and password with characters that end an address.
    """
    variable = f"{urlsplit(url).scheme}_proxy"
    found = os.environ.get(variable) or os.environ.get(variable.upper(), "")
    user, _, address = found.rpartition("@")
    if not user:
        return {}
    scheme, is_named, rest = user.partition("://")
    name, _, password = (rest if is_named else user).partition(":")
    return {
        pycurl.PROXY: os.fsencode(f"{scheme if is_named else 'http'}://{address}"),
        pycurl.PROXYUSERNAME: unquote_to_bytes(os.fsencode(name)),
        pycurl.PROXYPASSWORD: unquote_to_bytes(os.fsencode(password)),
    }


class _Exchange:
    """One answer as it comes in."""

    def __init__(self, sink: Sink | None, request: Request) -> None:
        self.sink, self._limit, self._sent = sink, request.limit, request.body
        self._headers: dict[str, str] = {}
        self.head = Head(0, self._headers)
        self.body = bytearray()
        #: What the sink, or the body that is sent, has raised.
        self.raised: BaseException | None = None
        #: Called where the body has to wait, with the seconds.
        self.go_on_in: Callable[[float], None] = lambda _: None
        #: The rest of the body was refused.
        self.is_enough = False
        self._is_wanted: bool | None = None

    def take_header(self, line: bytes) -> None:
        text = line.decode("latin-1").strip()
        if text.startswith("HTTP/"):
            status = text.split(" ", 2)[1:2]
            self._headers = {}
            code = int(status[0]) if status and status[0].isdecimal() else 0
            self.head = Head(code, self._headers)
        elif ":" in text:
            name, _, value = text.partition(":")
            self._headers[name.strip().lower()] = value.strip()

    def give_body(self, size: int) -> bytes | int:
        """The next bytes that are sent."""
        assert self._sent is not None
        try:
            return self._sent.read(size)
        except BaseException as error:
            self.raised = error
            return pycurl.READFUNC_ABORT

    def take_body(self, data: bytes) -> int:
        """How many bytes were taken; fewer than there are end the request."""
        try:
            return self._taken(data)
        except BaseException as error:
            self.raised = error
            return 0

    def _taken(self, data: bytes) -> int:
        if self._is_wanted is None:
            self._is_wanted = self.sink is not None and self.sink.begin(self.head)
        if self._is_wanted and self.sink is not None:
            seconds = self.sink.wait(len(data))
            if seconds > 0:
                self.go_on_in(seconds)
                return pycurl.WRITEFUNC_PAUSE  # the same data is given again
            self.sink.write(data)
            return len(data)
        self.body += data[: self._limit - len(self.body)]
        self.is_enough = len(self.body) >= self._limit
        return 0 if self.is_enough else len(data)

"""Serves the page over HTTP: so many clients at once, each for so long."""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from types import FrameType
from typing import Any, NoReturn

from watcher.system import stopping
from watcher.web.app import App

_MOST_CONNECTIONS = 64  #: each with a thread, so that none keeps another from its answer
_IDLE_SECONDS = 15  #: a connection without a byte is closed
_TURN_SECONDS = 5  #: so often that is looked for, at least
_LONGEST_HEADER, _LONGEST_BODY = 16 * 1024, 1024
_IN_MEMORY = 64 * 1024 * 1024  #: an answer up to so many bytes makes no temporary file
_UNREAD = 64 * 1024  #: a client with so many bytes to read gets no further answer


class _Bounded:
    """Closes what waitress leaves open: where there are too many, the oldest makes room.

    Waitress lets new clients wait then; a few that send a byte now and then, or read nothing of
    their answers, would keep all others out.
    """

    def __init__(self, server: Any) -> None:
        self._server, self._close_idle = server, server.maintenance

    def __call__(self, now: float) -> None:
        self._close_idle(now)
        for channel in [*self._server.active_channels.values()][:-_MOST_CONNECTIONS]:
            channel.will_close = True
            with suppress(OSError):  # the client may have ended it
                channel.socket.shutdown(socket.SHUT_RDWR)


def serve(
    app: App, listener: socket.socket, ready: Callable[[], None], *, leashed: bool = False
) -> None:
    """Answer until SIGINT or SIGTERM; `leashed`: or until stdin ends, which a daemon holds.

    `ready` is called once each of them ends it in order.
    """
    server = made(app, listener)
    if leashed:
        threading.Thread(target=_wait_for_the_end, name="leash", daemon=True).start()
    with (
        closing(server),
        suppress(KeyboardInterrupt),
        stopping.handling({signal.SIGTERM: _end}),
    ):
        ready()
        server.run()


def made(app: App, listener: socket.socket) -> Any:
    """The server, with its limits."""
    from waitress import create_server

    logging.getLogger("waitress").setLevel(logging.ERROR)
    server = create_server(
        app,
        sockets=[listener],
        threads=_MOST_CONNECTIONS,
        connection_limit=2 * _MOST_CONNECTIONS,
        channel_timeout=_IDLE_SECONDS,
        cleanup_interval=0,
        asyncore_loop_timeout=_TURN_SECONDS,
        asyncore_use_poll=True,
        max_request_header_size=_LONGEST_HEADER,
        max_request_body_size=_LONGEST_BODY,
        outbuf_overflow=_IN_MEMORY,
        outbuf_high_watermark=_UNREAD,
        clear_untrusted_proxy_headers=True,
        log_socket_errors=False,
        ident="",
    )
    server.maintenance = _Bounded(server)
    return server


def _wait_for_the_end() -> None:
    with suppress(OSError), open(sys.stdin.fileno(), "rb", closefd=False) as leash:
        leash.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _end(_: int, __: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt

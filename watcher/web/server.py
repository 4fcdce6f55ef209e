"""Serves the page over HTTP: so many clients at once, each for so long."""

import logging
import os
import signal
import socket
import sys
import threading
from contextlib import closing, suppress
from types import FrameType
from typing import Any, NoReturn

from watcher.system import stopping
from watcher.web.app import App

_THREADS = 4
_MOST_CONNECTIONS = 64
_CLEAN_SECONDS = 5  #: so often connections are looked through
_IDLE_SECONDS = 15  #: a connection without a byte is closed
#: Any other one, too, so that nobody holds it with a byte now and then; and one in the middle of an
#: answer.
_CONNECTION_SECONDS, _ANSWER_SECONDS = 60.0, 120.0
_LONGEST_HEADER, _LONGEST_BODY = 16 * 1024, 1024
_IN_MEMORY = 64 * 1024 * 1024  #: an answer up to so many bytes makes no temporary file


class _Bounded:
    """Closes what waitress leaves open: connections that have lasted for long."""

    def __init__(self, server: Any) -> None:
        self._server, self._close_idle = server, server.maintenance

    def __call__(self, now: float) -> None:
        self._close_idle(now)
        for channel in self._server.active_channels.values():
            is_answered = bool(channel.requests or channel.total_outbufs_len)
            longest = _ANSWER_SECONDS if is_answered else _CONNECTION_SECONDS
            if now - channel.creation_time > longest:
                channel.will_close = True


def serve(app: App, listener: socket.socket, *, leashed: bool = False) -> None:
    """Answer until SIGINT or SIGTERM; `leashed`: or until stdin ends, which a daemon holds."""
    server = made(app, listener)
    if leashed:
        threading.Thread(target=_wait_for_the_end, name="leash", daemon=True).start()
    with closing(server), stopping.handling({signal.SIGTERM: _end}):
        server.run()


def made(app: App, listener: socket.socket) -> Any:
    """The server, with its limits."""
    from waitress import create_server

    logging.getLogger("waitress").setLevel(logging.ERROR)
    server = create_server(
        app,
        sockets=[listener],
        threads=_THREADS,
        connection_limit=_MOST_CONNECTIONS,
        channel_timeout=_IDLE_SECONDS,
        cleanup_interval=_CLEAN_SECONDS,
        asyncore_loop_timeout=_CLEAN_SECONDS,
        asyncore_use_poll=True,
        max_request_header_size=_LONGEST_HEADER,
        max_request_body_size=_LONGEST_BODY,
        outbuf_overflow=_IN_MEMORY,
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

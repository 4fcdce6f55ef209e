"""An HTTP listener on loopback that hands out a registry's metrics, in a thread of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from watcher.errors import ListenError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

#: A client that says nothing for so long is let go.
_SILENT_SECONDS = 10


@contextlib.contextmanager
def listening(host: str, port: int, registry: CollectorRegistry) -> Iterator[int]:
    """Answer scrapes until the context ends; the port (`port` 0: any that is free).

    It sleeps until somebody connects. Raises ListenError, which names the address.
    """
    from http.server import ThreadingHTTPServer
    from socketserver import TCPServer

    from prometheus_client import MetricsHandler

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def server_bind(self) -> None:
            # HTTPServer's asks for the name of the address, which may take a resolver's time-out.
            TCPServer.server_bind(self)

        def handle_error(self, *_: object) -> None:
            """A client that goes away in the middle is nothing to tell."""

    handler = MetricsHandler.factory(registry)
    handler.timeout = _SILENT_SECONDS  # type: ignore[attr-defined]
    try:
        server = Server((host, port), handler)
    except OSError as error:
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        raise ListenError(
            f"metrics_listen: {shown} can't be listened at: {error.strerror}",
            "name another port, or end what has it: ss -ltnp",
        ) from None
    # Without an interval: no wake-ups. The end shuts the socket down, which wakes it.
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": None}, daemon=True
    )
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.socket.shutdown(socket.SHUT_RDWR)
        server.shutdown()
        thread.join()
        server.server_close()

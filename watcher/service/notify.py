"""Notifies systemd of the service's state (``sd_notify(3)``): one datagram a message."""

from __future__ import annotations

import contextlib
import os
import socket
import time

READY = "READY=1"
STOPPING = "STOPPING=1"
ALIVE = "WATCHDOG=1"


def notify(*lines: str) -> None:
    """Send assignments such as `READY` to systemd, if it started us."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"  # an abstract socket
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)  # a full queue must not stop the service
        sender.sendto("\n".join(lines).encode(errors="replace"), address)


def reloading() -> None:
    """Report that the settings are reread; `READY` ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def status(text: str) -> None:
    """One line for ``systemctl status``; and that the service is alive."""
    notify(ALIVE, f"STATUS={text}")

"""One pull in this process, as an order on the command line says: for tests that kill it."""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
import time

import pycurl

from watcher.ollama import names
from watcher.state import fs
from watcher.transfer import client, store
from watcher.transfer.model import Transfer
from watcher.transfer.rate import Limit
from watcher.transfer.values import Event, Options, Order, Progress


def show(event: Event) -> None:
    if not isinstance(event, Progress) or event.shared:
        sys.stdout.write(f"{event}\n")
        sys.stdout.flush()


def count(path: str) -> None:
    """Count the bytes of all bodies in a file, so that a kill loses none of them."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.truncate(fd, 8)
    counted = mmap.mmap(fd, 8)
    real = client._Exchange.take_body

    def take(self: client._Exchange, data: bytes) -> int:
        before = counted[:]
        counted[:] = struct.pack("q", *(each + len(data) for each in struct.unpack("q", before)))
        taken = real(self, data)
        if taken == pycurl.WRITEFUNC_PAUSE:
            counted[:] = before  # they are given again
        return taken

    client._Exchange.take_body = take  # type: ignore[method-assign]


def main() -> None:
    order = json.loads(sys.argv[1])
    if "count" in order:
        count(order["count"])
    model, path = names.to_model(order["model"]), order["store"]
    boot = order["boot"]
    options = Options(**order["options"] | {"limit": Limit(order["options"].get("limit", 0))})
    order_of = Order(path, model, boot, mirrors=tuple(order.get("mirrors", ())))
    fetched = Transfer(order_of, options, show).run()
    with store.opened(path) as opened:
        while True:
            try:
                published = opened.publish(fetched.verified)
                break
            except fs.BusyError:
                time.sleep(0.05)
        opened.place_manifest(model, fetched.manifest)
        opened.settle(published.named)


if __name__ == "__main__":
    main()

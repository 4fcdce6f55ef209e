"""One pull in this process, as an order on the command line says: for tests that kill it."""

from __future__ import annotations

import json
import sys
import time

from watcher.ollama import names
from watcher.state import fs
from watcher.transfer import store
from watcher.transfer.model import Transfer
from watcher.transfer.rate import Limit
from watcher.transfer.values import Event, Options, Order, Progress


def show(event: Event) -> None:
    if not isinstance(event, Progress) or event.shared:
        sys.stdout.write(f"{event}\n")
        sys.stdout.flush()


def main() -> None:
    order = json.loads(sys.argv[1])
    model, path = names.to_model(order["model"]), order["store"]
    boot = order["boot"]
    options = Options(**order["options"] | {"limit": Limit(order["options"].get("limit", 0))})
    fetched = Transfer(Order(path, model, boot), options, show).run()
    with store.opened(path) as opened:
        while True:
            try:
                published = opened.publish(fetched.verified, boot)
                break
            except fs.BusyError:
                time.sleep(0.05)
        opened.place_manifest(model, fetched.manifest)
        opened.settle(published.named)


if __name__ == "__main__":
    main()

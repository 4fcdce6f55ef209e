"""What came of a push to a mirror."""

from typing import Any

from watcher.ollama import names
from watcher.show.text import count, size
from watcher.transfer.push import Order, Pushed


def document(order: Order, done: Pushed) -> dict[str, Any]:
    return {
        "schema": "ollama-watch/mirror-push/1",
        "store": names.exact(order.store),
        "model": order.model.shown,
        "registry": order.registry,
        "manifest": {"digest": f"sha256:{done.digest}", "sent": done.is_new},
        "layers": [
            {"digest": f"sha256:{layer.digest}", "size_bytes": layer.size, "sent": is_sent}
            for layer, is_sent in done.layers
        ],
        "sent_bytes": _sent(done),
    }


def line(order: Order, done: Pushed) -> str:
    sent = sum(is_sent for _, is_sent in done.layers)
    there = len(done.layers) - sent
    what = f"sent {count(sent, 'layer')} ({size(_sent(done))})" if sent else "sent no layer"
    return f"{order.model.shown} is at {order.registry}: {what}, {there:,} were there"


def _sent(done: Pushed) -> int:
    return sum(layer.size for layer, is_sent in done.layers if is_sent)

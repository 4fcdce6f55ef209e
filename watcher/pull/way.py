"""Who moves the bytes of a pull: we do, or the server, and then why."""

import contextlib
import importlib
import os

from watcher.observe.host import Host
from watcher.ollama import names
from watcher.ollama.names import ModelName
from watcher.pull.account import By
from watcher.pull.target import Target
from watcher.state import folders

TRANSFER, SERVER = "transfer", "server"


def choose(target: Target, model: ModelName) -> By:
    """Our own transfer wherever it can be, since it fetches no byte twice."""
    reason = why_server(target, model)
    return By(SERVER, reason) if reason else By(TRANSFER)


def why_server(target: Target, model: ModelName) -> str:
    """Why the server moves the bytes; "" where we can."""
    if model.tag.lower().endswith("cloud"):
        return "it runs in the cloud"
    if target.host is None:
        return target.why
    return _of_blobs(target.host) or _of_python()


def _of_blobs(host: Host) -> str:
    """Why what is fetched beside ``blobs/`` can't be renamed into it."""
    with contextlib.suppress(OSError), folders.opened_store(host.store) as store:
        blobs = folders.look_at_blobs(store)
        if blobs.foreign is not None:
            return names.of_link(blobs.foreign)
        if blobs.status is not None and blobs.status.st_dev != os.fstat(store).st_dev:
            return "blobs/ is on another file system than the store"
    return ""


def _of_python() -> str:
    """What this Python lacks for it."""
    try:
        importlib.import_module("pycurl")
    except ImportError as error:
        return f"pycurl can't be loaded ({error}): pip install pycurl"
    return ""

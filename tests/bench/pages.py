"""The page: how soon it is there, how soon it shows a kill, and what it costs at rest."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import psutil

from tests.support.browser import PROGRAM, Browser, Tab
from tests.support.pages import served

from .benches import Setting
from .measure import US, Daemon, Row, make, megabytes, milliseconds
from .servers import connection, post, process

_BLOBS, _MODELS = 10_000, 500
_DRAWN = (
    "document.querySelector('#asof time') && document.getElementById('timeline')"
    f" && document.querySelectorAll('.uses tr').length >= {_MODELS}"
)
_LIVE = "document.getElementById('downloads').textContent.includes('in use')"


def page(setting: Setting) -> Iterator[Row]:
    """From the address to everything drawn, of a store of some size; and the daemon beside it."""
    store = setting.folder / "page"
    make("healthy", str(store), str(_BLOBS), str(_MODELS))
    for path in (store / "blobs").iterdir():
        with path.open("r+b") as blob:
            blob.write(b"x")  # it takes space
    if PROGRAM is not None:
        with served(store) as shown, Browser() as browser:
            times = [_drawn(browser, shown.url) for _ in range(setting.rounds + 1)][1:]
            memory = psutil.Process(shown.process.pid).memory_info().rss
        yield Row(
            f"page of {_BLOBS:,} blobs and {_MODELS} models: from its address to drawn",
            "1 s",
            milliseconds(median(times)),
            median(times) <= 1,
        )
        yield Row("the same: memory of the process that serves it", "", megabytes(memory))
    config = setting.folder / "page.toml"
    config.write_text('web_listen = "127.0.0.1:19465"\n')
    with Daemon(store, (*US, "--config", str(config))) as daemon:
        before = daemon.wakeups()
        time.sleep(setting.rest_seconds)
        woken, memory = daemon.wakeups() - before, daemon.memory()["Rss"]
    yield Row(
        f"idle daemon that has it served: resident memory; wakeups in {setting.rest_seconds:.0f} s",
        "35 MB; 0",
        f"{megabytes(memory)}; {woken}",
        memory <= 35e6 and woken == 0,
    )


def _drawn(browser: Browser, url: str) -> float:
    time.sleep(1)  # so that it looks anew
    tab = browser.open(url)
    tab.wait(_DRAWN, "the page")
    took = tab.value("performance.now()")
    tab.close()
    return float(took) / 1000


def page_kill(setting: Setting) -> Iterator[Row]:
    """From SIGKILL of a pulling server to the page that shows it."""
    if PROGRAM is None:
        return
    store = setting.folder / "page-kill"
    for name in ("blobs", "manifests"):
        (store / name).mkdir(parents=True)
    with (
        process("watcher.demo.registry", "--port", "0", until="http://") as (_, line),
        served(store) as shown,
        Browser() as browser,
    ):
        registry = line.strip()
        layers = [{"size": 160_000_000}]
        post(registry, "/_control", {"model": {"name": "m", "tag": "1b", "layers": layers}})
        post(registry, "/_control", {"throttle": 10_000_000})
        tab = browser.open(shown.url)
        model = f"{registry}/library/m:1b"
        times = [_killed(tab, store, model) for _ in range(setting.kills)]
    yield Row(
        "from SIGKILL of a server that pulls 16 parts to the page that shows it",
        "2 s",
        f"at most {milliseconds(max(times))} of {len(times)}"
        f" (median {milliseconds(median(times))})",
        max(times) <= 2,
    )


def _killed(tab: Tab, store: Path, model: str) -> float:
    more = {
        "OLLAMA_MODELS": str(store),
        "OLLAMA_HOST": "127.0.0.1:0",
        "DEMO_PART_BYTES": "10000000",
    }
    with process("watcher.demo.engine", "serve", until="Listening on", more=more) as (server, line):
        asked = connection(f"http://{line.split('Listening on ')[1].split()[0]}")
        asked.request("POST", "/api/pull", json.dumps({"model": model, "insecure": True}))
        answer = asked.getresponse()
        tab.wait(_LIVE, "the pull")
        time.sleep(1 + os.urandom(1)[0] / 256)  # at any moment between two looks
        at = time.perf_counter()
        server.kill()
        tab.wait(f"!{_LIVE}", "the kill")
        took = time.perf_counter() - at
        answer.close()
        asked.close()
    for path in (store / "blobs").iterdir():
        path.unlink()
    return took


ALL: dict[str, Callable[[Setting], Iterator[Row]]] = {"page": page, "page_kill": page_kill}

"""What is measured of pulls that we drive; each function gives lines of the table."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tests.support.servers import EngineServer, RealServer, Server, wait_until

from .benches import Setting
from .measure import US, Row, environment, megabytes, middle, milliseconds, run
from .servers import connection, post, process

_SIZE = 300_000_000
_RESET_AFTER = 20_000_000
_RATE = 40_000_000
#: Bytes served at which the server is killed.
_KILLS = (60_000_000, 130_000_000, 200_000_000)
_TRIES_ALONE = 3
_HEALTHY = 1_000_000_000
_FAST = 100_000_000
_SETTLED_SECONDS = 2.0


def _server(store: Path) -> Server:
    """The real one where there is one; it comes back at its port."""
    kind = RealServer if "OLLAMA_BIN" in os.environ else EngineServer
    server = kind(store).start().wait_ready()
    server.stop()
    return kind(store, {"OLLAMA_HOST": f"127.0.0.1:{server.port}"})


def _who() -> str:
    return "Ollama" if "OLLAMA_BIN" in os.environ else "the demo's server"


@contextlib.contextmanager
def _registry(name: str, size: int, rate: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """A registry's URL, and its only model."""
    with process("watcher.demo.registry", "--port", "0", until="http://") as (_, line):
        url = line.strip()
        order = {"name": name, "tag": "1b", "layers": [{"size": size}], "extras": False}
        model = post(url, "/_control", {"model": order, "throttle": rate})["model"]
        yield url, model


def _served(registry: str, digest: str) -> int:
    return int(post(registry, "/_control", {})["bytes"].get(digest, 0))


def _is_right(store: Path, digest: str) -> bool:
    path = store / "blobs" / digest.replace(":", "-")
    if not path.exists():
        return False
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" == digest


def _words(server: Server, model: str) -> list[str]:
    return [*US, "--store", str(server.store), "pull", "--insecure", "--host", server.url, model]


def _alone(server: Server, model: str) -> bool:
    """A pull by the bare API; whether it has succeeded."""
    asked = connection(server.url)
    last: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError), contextlib.closing(asked):
        asked.request("POST", "/api/pull", json.dumps({"model": model, "insecure": True}))
        for line in asked.getresponse():
            last = json.loads(line)
    return last.get("status") == "success"


# ---------------------------------------------------------------- through resets and kills


def arrival(setting: Setting) -> Iterator[Row]:
    """A registry that resets each connection and a server that is killed: ours, and it alone."""
    ours = _arrival(setting, "ours", _driven)
    alone = _arrival(setting, "alone", _tried)
    work = (
        f"pull of {megabytes(_SIZE)} by {_who()}, each connection reset after"
        f" {megabytes(_RESET_AFTER)}, the server killed {len(_KILLS)} times: downloaded"
    )
    yield Row(
        work,
        "115 %",
        f"{ours[0] / _SIZE:.1%}, {'done' if ours[1] else 'not done'} in {ours[2]:.0f} s",
        ours[1] and ours[0] <= 1.15 * _SIZE,
    )
    yield Row(
        f"the same with Ollama alone, asked {_TRIES_ALONE} times after the last kill",
        "",
        f"{alone[0] / _SIZE:.0%}, {'done' if alone[1] else 'not done'} in {alone[2]:.0f} s",
    )


def _arrival(
    setting: Setting, name: str, pull: Callable[[Server, str, threading.Thread], None]
) -> tuple[int, bool, float]:
    """Bytes downloaded, whether the layer has arrived, and seconds."""
    store = setting.folder / "arrival"
    with _registry(name, _SIZE, _RATE) as (registry, model), _server(store) as server:
        (digest,) = model["digests"]
        post(registry, "/_control", {"fault": {"kind": "reset", "after": _RESET_AFTER}})
        server.start().wait_ready()
        ended = threading.Event()
        killer = threading.Thread(target=_kill, args=(server, registry, digest, ended))
        began = time.perf_counter()
        killer.start()
        pull(server, model["name"], killer)
        seconds = time.perf_counter() - began
        ended.set()
        killer.join()
        found = _served(registry, digest), _is_right(store, digest), seconds
    shutil.rmtree(store)
    return found


def _kill(server: Server, registry: str, digest: str, ended: threading.Event) -> None:
    for at in _KILLS:
        while _served(registry, digest) < at:
            if ended.wait(0.02):
                return
        server.kill()
        time.sleep(1)
        server.start().wait_ready()


def _driven(server: Server, model: str, _: threading.Thread) -> None:
    run(_words(server, model))


def _tried(server: Server, model: str, killer: threading.Thread) -> None:
    tries = 0
    while tries < _TRIES_ALONE:
        tries += not killer.is_alive()
        if _alone(server, model):
            return
        wait_until(lambda: _answers(server), "the server to come back")


def _answers(server: Server) -> bool:
    with contextlib.suppress(OSError):
        return server.request("GET", "/")[0] == 200
    return False


# ---------------------------------------------------------------- a healthy pull


def healthy(setting: Setting) -> Iterator[Row]:
    """A pull that nothing disturbs: beside the bare API, and what it costs us."""
    store = setting.fast / "healthy"
    size = _HEALTHY
    with _registry("healthy", size, None) as (registry, model), _server(store) as server:
        server.start().wait_ready()

        def timed(pull: Callable[[], object]) -> float:
            began = time.perf_counter()
            pull()
            seconds = time.perf_counter() - began
            server.request("DELETE", "/api/delete", {"model": model["name"]})
            return seconds

        def ours() -> None:
            run(_words(server, model["name"]))

        def alone() -> None:
            if not _alone(server, model["name"]):
                raise RuntimeError("the pull by the bare API has failed")

        turns = [(timed(alone), timed(alone), timed(ours)) for _ in range(max(3, setting.rounds))]
        one, two, three = zip(*turns[1:], strict=True)
        work = f"healthy pull of {size / 1e9:g} GB by {_who()}"
        yield Row(
            f"{work}: whole process, compared with the bare API",
            "",
            f"{_pairs(three, one):.3f} × (two runs of the API: {_pairs(two, one):.3f} ×;"
            f" {median(one):.2f} s, {median(three) - median(one):+.2f} s)",
        )
        post(registry, "/_control", {"throttle": _FAST})
        load = _load(_words(server, model["name"]))
        yield Row(f"{work} at 100 MB/s: CPU", "1 % of a core", f"{load:.2%}", load <= 0.01)
        post(registry, "/_control", {"throttle": None})
        # All of it is there by now.
        runs = [run(_words(server, model["name"])) for _ in range(setting.rounds)]
        yield Row(
            "pull of an unchanged model, whole process",
            "300 ms",
            milliseconds(middle(runs)),
            middle(runs) <= 0.3,
        )
    shutil.rmtree(store)


def _pairs(ours: tuple[float, ...], theirs: tuple[float, ...]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def _load(words: list[str]) -> float:
    """CPU seconds a second of a process, once it has started."""
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment(), cwd="/"
    )
    time.sleep(_SETTLED_SECONDS)
    began, first = time.perf_counter(), _cpu(process.pid)
    # It is still there to be read when it has ended, until somebody waits for it.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    used, seconds = _cpu(process.pid) - first, time.perf_counter() - began
    process.wait()
    return used / seconds


def _cpu(pid: int) -> float:
    """CPU seconds so far, those of threads that have ended included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


ALL: dict[str, Callable[[Setting], Iterator[Row]]] = {"arrival": arrival, "healthy": healthy}

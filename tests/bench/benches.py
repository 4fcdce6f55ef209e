"""What is measured, one function each; each gives lines of the table."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from .measure import (
    PYTHON,
    US,
    Daemon,
    Row,
    Run,
    environment,
    interleaved,
    make,
    megabytes,
    middle,
    milliseconds,
    ratio,
    run,
    share,
)
from .servers import connection, post, process
from .stores import sidecar

_BLOBS, _MODELS = 100_000, 2_000
_UNFINISHED = 10_000
_MANIFESTS = 20_000
_FIND = "%p %s %b %i %T@\\n"


class Setting(NamedTuple):
    """How much is done, and where: `folder` on a disk, `fast` in memory where there is such."""

    folder: Path
    fast: Path
    rounds: int
    pull_bytes: int
    rest_seconds: float
    kills: int

    def large_store(self) -> Path:
        """A healthy store of 100,000 blobs and 2,000 manifests, made once."""
        store = self.folder / "large"
        if not store.exists():
            make("healthy", str(store), str(_BLOBS), str(_MODELS))
        return store


def audit(setting: Setting) -> Iterator[Row]:
    """An audit of a large store beside a bare script and find."""
    store = str(setting.large_store())
    ours, bare, find = interleaved(
        (
            lambda: run((*US, "--store", store, "audit")),
            lambda: run((PYTHON, str(Path(__file__).with_name("bare.py")), store)),
            lambda: run(("find", store, "-printf", _FIND)),
        ),
        setting.rounds,
    )
    work = f"audit of {_BLOBS:,} blobs and {_MODELS:,} manifests, whole process"
    times = ratio(ours, bare)
    yield Row(
        f"{work}, compared with a bare script",
        "1.5 ×",
        f"{times:.2f} × ({milliseconds(middle(ours))} to {milliseconds(middle(bare))})",
        times <= 1.5,
    )
    times = ratio(ours, find)
    yield Row(
        "the same, compared with `find` printing name, size, blocks, inode and mtime",
        "3.5 ×",
        f"{times:.2f} × ({milliseconds(middle(ours))} to {milliseconds(middle(find))})",
        times <= 3.5,
    )
    yield _peak("the same: peak memory", ours, 100e6)


def _peak(work: str, runs: list[Run], most: float) -> Row:
    peak = max(each.peak for each in runs)
    return Row(work, megabytes(most).replace(".0", ""), megabytes(peak), peak <= most)


def unfinished(setting: Setting) -> Iterator[Row]:
    """An audit of very many unfinished downloads."""
    store = setting.folder / "unfinished"
    if not store.exists():
        make("unfinished", str(store), str(_UNFINISHED))
    ours, find = interleaved(
        (
            lambda: run((*US, "--store", str(store), "audit"), codes=(0, 1)),
            lambda: run(("find", str(store), "-printf", _FIND)),
        ),
        max(3, setting.rounds // 3),
    )
    times = ratio(ours, find)
    yield Row(
        f"audit of {_UNFINISHED:,} unfinished downloads of 16 parts each, compared with `find`",
        "10 ×",
        f"{times:.1f} × ({milliseconds(middle(ours))} to {milliseconds(middle(find))})",
        times <= 10,
    )
    yield Row("the same: peak memory", "", megabytes(max(each.peak for each in ours)))


def space(setting: Setting) -> Iterator[Row]:
    """What `df` costs beside `audit`, of very many blobs and of very many manifests."""
    stores = {f"{_BLOBS:,} blobs": setting.large_store()}
    manifests = setting.folder / "manifests"
    if not manifests.exists():
        make("healthy", str(manifests), str(_MANIFESTS), str(_MANIFESTS))
    stores[f"{_MANIFESTS:,} manifests"] = manifests
    for what, store in stores.items():
        df, audit = interleaved(
            [partial(run, (*US, "--store", str(store), word)) for word in ("df", "audit")],
            setting.rounds,
        )
        yield _times(f"`df` of {what}: beside `audit`", 1.3, (df, audit))
        yield _peak("the same: most memory", df, 80e6)


def usual(setting: Setting) -> Iterator[Row]:
    """An audit of a usual host, most of which is its start."""
    store = setting.folder / "usual"
    if not store.exists():
        make("unfinished", str(store), "20")
        make("healthy", str(store), "5000", "500")
    ours, bare = interleaved(
        (
            lambda: run((*US, "--store", str(store), "audit"), codes=(0, 1)),
            lambda: run((PYTHON, str(Path(__file__).with_name("bare.py")), str(store))),
        ),
        setting.rounds,
    )
    work = "audit of 500 models, 5,000 blobs, 20 downloads: beside a bare script"
    yield _times(work, 2.0, (ours, bare))


def _times(work: str, most: float, runs: tuple[list[Run], list[Run]]) -> Row:
    times = ratio(*runs)
    shown = f"{times:.2f} × ({milliseconds(middle(runs[0]))} to {milliseconds(middle(runs[1]))})"
    return Row(work, f"{most:g} ×", shown, times <= most)


def start(setting: Setting) -> Iterator[Row]:
    """How long a user waits for --help."""
    (runs,) = interleaved((lambda: run((*US, "--help")),), 2 * setting.rounds)
    yield Row("`ollama-watch --help`", "100 ms", milliseconds(middle(runs)), middle(runs) <= 0.1)


def rest(setting: Setting) -> Iterator[Row]:
    """The daemon when nothing happens, after a full look at a large store."""
    with Daemon(setting.large_store()) as daemon:
        before = daemon.wakeups()
        time.sleep(setting.rest_seconds)
        woken = daemon.wakeups() - before
        memory = daemon.memory()
    work = f"idle daemon on {_BLOBS:,} blobs"
    yield Row(
        f"{work}: resident memory (proportional share)",
        "35 MB",
        f"{megabytes(memory['Rss'])} ({megabytes(memory['Pss'])})",
        memory["Rss"] <= 35e6,
    )
    yield Row(f"{work}: wakeups in {setting.rest_seconds:.0f} s", "0", f"{woken}", woken == 0)


# ---------------------------------------------------------------- a pull


def pull(setting: Setting) -> Iterator[Row]:
    """Watching 16 writers: what it costs the daemon, and what it costs the writers."""
    size = setting.pull_bytes
    gigabytes = size / 1e9
    store = setting.fast / "pull"
    for name in ("blobs", "manifests"):
        (store / name).mkdir(parents=True, exist_ok=True)

    def write(rate: int = 0) -> float:
        words = [PYTHON, "-m", "tests.bench.writers", str(store), str(size), str(rate)]
        done = subprocess.run(
            words, env=environment(), stdout=subprocess.PIPE, check=True, text=True
        )
        return float(done.stdout)

    rate = size // 10
    with Daemon(store) as daemon:
        before = daemon.cpu()
        write(rate)
        daemon.settle()
        cpu = (daemon.cpu() - before) / gigabytes
    count = setting.folder / "events"
    with Daemon(store, (PYTHON, "-m", "tests.bench.counted", str(count))):
        write(rate)
        time.sleep(1)
    events = int(count.read_text()) / gigabytes
    work = f"watching a pull of {gigabytes:g} GB by 16 writers"
    yield Row(f"{work}: CPU", "5 ms/GB", f"{cpu * 1000:.1f} ms/GB", cpu <= 0.005)
    yield Row(f"{work}: file events read", "50/GB", f"{events:.1f}/GB", events <= 50)

    alone, again, watched = [], [], []
    write()
    for _ in range(max(3, setting.rounds // 2)):
        alone.append(write())
        again.append(write())
        with Daemon(store):
            watched.append(write())
    yield Row(
        f"{work}: the writers' time at full speed",
        "",
        f"{_pairs(watched, alone):.3f} × the time without a daemon "
        f"(two runs without: {_pairs(again, alone):.3f} ×; {median(alone):.2f} s)",
    )


def _pairs(ours: list[float], theirs: list[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------- one change


def change(setting: Setting) -> Iterator[Row]:
    """One download that changes in a large store: when it is told, and what that costs."""
    store = setting.large_store()
    data = store / "blobs" / f"sha256-{os.urandom(32).hex()}-partial"
    waits: list[float] = []
    with ExitStack() as left:
        for number in range(16):
            path = Path(f"{data}-{number}")
            path.write_text(sidecar(number, 1_000_000))
            left.callback(path.unlink)
        fd = os.open(data, os.O_RDWR | os.O_CREAT)
        left.callback(data.unlink)
        os.ftruncate(fd, 16_000_000)
        os.close(fd)
        with Daemon(store) as daemon:
            before = daemon.cpu()
            for _ in range(setting.kills):
                fd = os.open(data, os.O_RDWR)
                at = time.perf_counter()
                os.close(os.open(data, os.O_RDWR))
                waits.append(daemon.wait("download_resumed") - at)
                at = time.perf_counter()
                os.close(fd)
                waits.append(daemon.wait("download_interrupted") - at)
            daemon.settle()
            cpu = (daemon.cpu() - before) / len(waits)
    work = f"one changed download in a store of {_BLOBS:,} blobs, daemon running"
    slow = share(waits, 0.99)
    yield Row(
        f"{work}: from the change to its event line, including 20 ms of collecting events "
        "(p50, p99)",
        "40 ms",
        f"{milliseconds(median(waits))}, {milliseconds(slow)}",
        slow <= 0.04,
    )
    yield Row(f"{work}: CPU per scan", "", milliseconds(cpu))


# ---------------------------------------------------------------- a kill


def kill(setting: Setting) -> Iterator[Row]:
    """From SIGKILL of a pulling server to the line that tells it, and to repaired sidecars."""
    store = setting.folder / "kill"
    for name in ("blobs", "manifests"):
        (store / name).mkdir(parents=True, exist_ok=True)
    with process("watcher.demo.registry", "--port", "0", until="http://") as (_, line):
        registry = line.strip()
        layers = [{"size": 160_000_000}]
        post(registry, "/_control", {"model": {"name": "m", "tag": "1b", "layers": layers}})
        post(registry, "/_control", {"throttle": 40_000_000})
        with Daemon(store) as daemon:
            model = f"{registry}/library/m:1b"
            waits = [_killed(daemon, store, model) for _ in range(setting.kills)]
    told, mended = zip(*waits, strict=True)
    for what, times in (
        ("the line `download_interrupted`", told),
        ("repaired progress files", mended),
    ):
        yield Row(
            f"from SIGKILL of a server that pulls 16 parts to {what}",
            "500 ms",
            f"at most {milliseconds(max(times))} of {len(times)} "
            f"(median {milliseconds(median(times))})",
            max(times) <= 0.5,
        )


def _killed(daemon: Daemon, store: Path, model: str) -> tuple[float, float]:
    """Seconds from the kill to the line that tells it, and to the one that tells of the repair."""
    settings = {
        "OLLAMA_MODELS": str(store),
        "OLLAMA_HOST": "127.0.0.1:0",
        "DEMO_PART_BYTES": "10000000",
    }
    with process("watcher.demo.engine", "serve", until="Listening on", more=settings) as (
        server,
        line,
    ):
        url = f"http://{line.split('Listening on ')[1].split()[0]}"
        asked = connection(url)
        asked.request("POST", "/api/pull", json.dumps({"model": model, "insecure": True}))
        for raw in asked.getresponse():
            if json.loads(raw).get("completed", 0) > 40_000_000:
                break
        else:
            raise RuntimeError("the pull has ended before it was killed")
        at = time.perf_counter()
        server.kill()
        told = daemon.wait("download_interrupted") - at
        mended = daemon.wait("download_repaired") - at
        asked.close()
    for path in (store / "blobs").iterdir():
        path.unlink()
    daemon.wait("partial_removed")
    return told, mended


ALL: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "audit": audit,
    "unfinished": unfinished,
    "space": space,
    "usual": usual,
    "start": start,
    "rest": rest,
    "change": change,
    "kill": kill,
    "pull": pull,
}

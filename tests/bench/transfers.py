"""What is measured of transfers of our own; each function gives lines of the table."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.support.servers import EngineServer, RealServer, sidecar
from watcher.state import sums

from .benches import Setting
from .measure import PYTHON, ROOT, US, Daemon, Row, Run, environment, megabytes, middle, ratio, run
from .servers import post, process

_BAD = 600_000_000
_KILLS = 5
_CONNECTIONS = 8
_CRAWL = 1_000_000_000
_SPEED = 12_000_000
_RATE = 20_000_000
_MIB = 1 << 20
_GIB2 = 2 << 30
_MODEL = 262_144_000
_OPTIONS = {"reserve": 0, "first_pause": 0.2, "tries": None}


def _words(store: Path, model: str, *, count: str = "", **options: object) -> list[str]:
    order: dict[str, object] = {"store": str(store), "model": model, "boot": "this start"}
    order |= {"count": count} if count else {}
    order |= {"options": {**_OPTIONS, **options}}
    return [PYTHON, "-m", "tests.transfer.pulling", json.dumps(order)]


def _cleared(store: Path) -> None:
    shutil.rmtree(store, ignore_errors=True)
    for name in ("blobs", "manifests"):
        (store / name).mkdir(parents=True)


@contextlib.contextmanager
def _pulled(store: Path, size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """A registry's URL and its model of one layer, which a pull of ours has brought to a store."""
    _cleared(store)
    with process("watcher.demo.registry", "--port", "0", until="http://") as (_, line):
        url = line.strip()
        order = {"name": store.name, "tag": "1b", "layers": [{"size": size}], "extras": False}
        model = post(url, "/_control", {"model": order})["model"]
        run(_words(store, model["name"]))
        yield url, model
    shutil.rmtree(store)


# ---------------------------------------------------------------- a healthy pull


def transfer(setting: Setting) -> Iterator[Row]:
    """2 GiB over loopback: ours, the server's own pull and sync, and aria2c, sync and openssl."""
    store, source = setting.folder / "transfer", setting.fast / "source"
    with process("tests.bench.files", str(source), until="http://") as (_, line):
        url, model, _digest = line.split()
        size = source.stat().st_size

        def ours() -> Run:
            _cleared(store)
            return run(_words(store, model))

        def theirs() -> Run:
            _cleared(store)
            return _timed(lambda: _served(store, model))

        def aria() -> Run:
            _cleared(store)
            out = ["aria2c", "-q", f"-x{_CONNECTIONS}", f"-s{_CONNECTIONS}", "-k8M", "-d", store]
            return _together(
                [*map(str, out), "--file-allocation=none", "-o", "out", url],
                ["sync", str(store / "out")],
                ["openssl", "dgst", "-sha256", str(store / "out")],
            )

        def limited() -> Run:
            _cleared(store)
            with _unit() as tasks:
                return run(["sh", "-c", _LIMITED, tasks, *_words(store, model)])

        works: list[Callable[[], Run]] = [ours, theirs, limited]
        if shutil.which("aria2c"):
            works.append(aria)
        runs = [[work() for work in works] for _ in range(max(3, setting.rounds))]
        mine, server, within, *others = zip(*runs, strict=True)
        times, slow = ratio(mine, server), ratio(within, server)
        yield Row(
            f"transfer of {size / 1e9:.2f} GB, whole process, compared with the server's own pull"
            " and `sync`",
            "1.1 ×",
            f"{times:.2f} × ({middle(mine):.1f} s to {middle(server):.1f} s)",
            times <= 1.1,
        )
        yield Row(
            "the same within the limits of the service's unit (512 MB with what is cached of files,"
            " nice 5, idle I/O)",
            "1.1 ×",
            f"{slow:.2f} × ({middle(within):.1f} s)",
            slow <= 1.1,
        )
        peak = max(each.peak for each in mine)
        yield Row("the same: memory", "80 MB", megabytes(peak), peak <= 80e6)
        if others:
            cpu, more = (median(each.cpu for each in runs) for runs in (mine, others[0]))
            yield Row(
                "the same, compared with `aria2c -x8`, `sync` and `openssl dgst`",
                "",
                f"{ratio(mine, others[0]):.2f} × ({middle(others[0]):.1f} s)",
            )
            yield Row(
                "the same: CPU for each GB, hashing included",
                f"{more / size * 1e9:.2f} s, theirs",
                f"{cpu / size * 1e9:.2f} s",
                cpu <= more,
            )
    shutil.rmtree(store)
    source.unlink()


def rates(setting: Setting) -> Iterator[Row]:
    """2 GiB on lines that are slower than the machine, beside the server's own pull and sync."""
    for text, limits in (
        ("at 200 MB per second in all", (200_000_000, 0)),
        ("at 10 MB per second and connection", (0, 10_000_000)),
    ):
        yield from _rated(setting, text, limits)
    (setting.fast / "source").unlink()


def _rated(setting: Setting, text: str, limits: tuple[int, int]) -> Iterator[Row]:
    store, source = setting.folder / "transfer", setting.fast / "source"
    words = ["tests.bench.files", str(source), *map(str, limits)]
    with process(*words, until="http://") as (_, line):
        url, model, _digest = line.split()
        mine, server, ends = [], [], []
        for _ in range(3):
            _cleared(store)
            mine.append(run(_words(store, model)))
            ended = time.monotonic()
            with urllib.request.urlopen(urllib.parse.urljoin(url, "/last")) as answer:
                ends.append(ended - float(answer.read()))
            _cleared(store)
            server.append(_timed(lambda: _served(store, model)))
        times, end = ratio(mine, server), median(ends)
        yield Row(
            f"transfer of {source.stat().st_size / 1e9:.2f} GB {text}, compared with the server's"
            " own pull and `sync`",
            "1.05 ×",
            f"{times:.2f} × ({middle(mine):.1f} s to {middle(server):.1f} s)",
            times <= 1.05,
        )
        yield Row(
            "the same: from the last byte that was sent to the end",
            "0.5 s",
            f"{end:.2f} s",
            end <= 0.5,
        )
    shutil.rmtree(store)


def _served(store: Path, model: str) -> None:
    kind = RealServer if "OLLAMA_BIN" in os.environ else EngineServer
    with kind(store) as server:
        server.start().wait_ready()
        began = time.perf_counter()
        asked = server.pull(model, timeout=600)
        if asked[-1] != {"status": "success"}:
            raise RuntimeError(f"the server's pull has failed: {asked[-1]}")
        subprocess.run(["sync", "--file-system", str(store)], check=True)
        _took.append(time.perf_counter() - began)


#: The server's start does not count: the last pull's seconds.
_took: list[float] = []


def _timed(work: Callable[[], None]) -> Run:
    work()
    return Run(_took.pop(), 0.0, 0)


def _together(*commands: list[str]) -> Run:
    done = [run(words) for words in commands]
    seconds, cpu = sum(each.seconds for each in done), sum(each.cpu for each in done)
    return Run(seconds, cpu, max(each.peak for each in done))


#: A process that joins a group of the kernel's first.
_LIMITED = 'echo $$ >"$0" && exec nice -n 5 ionice -c 3 "$@"'


@contextlib.contextmanager
def _unit() -> Iterator[str]:
    """A group with the unit's limit of memory; the file that a process joins it by."""
    old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    above, limit = (old, "memory.limit_in_bytes") if old.exists() else (new, "memory.max")
    group = above / f"ollama-watch-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text("512M")
        yield str(group / "cgroup.procs")
    finally:
        group.rmdir()


# ---------------------------------------------------------------- a bad line


def bad_line(setting: Setting) -> Iterator[Row]:
    """Resets, error pages, kills, addresses that expire and a crawling connection."""
    store = setting.folder / "bad"
    _cleared(store)
    with process("watcher.demo.registry", "--port", "0", until="http://") as (_, line):
        url = line.strip()
        layers = [{"size": _BAD}]
        order = {"name": "bad", "tag": "1b", "layers": layers, "extras": False}
        model = post(url, "/_control", {"model": order, "throttle": 40_000_000})["model"]
        post(url, "/_control", {"manners": {"lifetime": 30}})
        crawl = {"kind": "crawl", "rate": 50_000, "begin": 100_000_000, "times": 1}
        for fault in (
            {"kind": "reset", "after": 10_000_000, "begin": 1},
            {"kind": "page", "begin": 1, "every": 5},
            crawl,
        ):
            post(url, "/_control", {"fault": fault})
        words = _words(store, model["name"], slow_seconds=5.0)
        began = time.perf_counter()
        chance = random.Random(1)
        for number in range(_KILLS):
            at = int(_BAD * (number + chance.random()) / _KILLS)
            _killed(words, lambda at=at: _sent(url) >= at)  # type: ignore[misc]
        run(words)
        seconds, sent = time.perf_counter() - began, _sent(url)
        most = 1.02 * _BAD + _KILLS * _CONNECTIONS * _MIB
        yield Row(
            f"transfer of {megabytes(_BAD)} through resets after 10 MB, one answer in five an error"
            f" page, {_KILLS} SIGKILLs, addresses that expire, one connection crawling: received,"
            " with what the kernels held at the kills",
            megabytes(most),
            f"{megabytes(sent)}, in {seconds:.0f} s",
            sent <= most,
        )
    shutil.rmtree(store)


def _sent(url: str) -> int:
    return int(post(url, "/_control", {})["sent"])


def _killed(words: list[str], when: Callable[[], bool]) -> None:
    pulling = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(), cwd=ROOT
    )
    while not when() and pulling.poll() is None:
        time.sleep(0.01)
    pulling.send_signal(signal.SIGKILL)
    pulling.wait()


def crawling(setting: Setting) -> Iterator[Row]:
    """One connection of eight that crawls, beside none."""
    store = setting.fast / "crawling"
    with process("watcher.demo.registry", "--port", "0", until="http://") as (_, line):
        url = line.strip()
        layers = [{"size": _CRAWL}]
        order = {"name": "crawl", "tag": "1b", "layers": layers, "extras": False}
        model = post(url, "/_control", {"model": order, "throttle": _SPEED})["model"]
        took = []
        for faults in ([], [{"kind": "crawl", "rate": 30_000, "begin": 1, "times": 1}]):
            _cleared(store)
            post(url, "/_control", {"clear_faults": True})
            for fault in faults:
                post(url, "/_control", {"fault": fault})
            took.append(run(_words(store, model["name"])).seconds)
        times = took[1] / took[0]
        yield Row(
            f"transfer of {megabytes(_CRAWL)} at {megabytes(_SPEED)} per second, one connection of"
            " eight crawling: time",
            "1.15 × without",
            f"{times:.2f} × ({took[1]:.0f} s to {took[0]:.0f} s)",
            times <= 1.15,
        )
    shutil.rmtree(store)


# ---------------------------------------------------------------- sums of chunks


def flipped(setting: Setting) -> Iterator[Row]:
    """One answer in ten has a wrong byte, and the registry has the sums of its chunks."""
    store = setting.fast / "flipped"
    _cleared(store)
    counted, chunk, every = store / "count", 16 * _MIB, 10
    with process("watcher.demo.registry", "--port", "0", until="http://") as (_, line):
        url = line.strip()
        layers = [{"size": _BAD}]
        order = {"name": "flipped", "tag": "1b", "layers": layers, "extras": False}
        model = post(url, "/_control", {"model": order})["model"]
        fault = {"kind": "flip", "after": 70_000, "begin": 1, "every": every}
        post(url, "/_control", {"manners": {"sums": "complete", "chunk": chunk}, "fault": fault})
        seconds = run(_words(store, model["name"], count=str(counted))).seconds
        answers = post(url, "/_control", {})["requests"]["data"]
    received, most = _counted(counted), _BAD + answers // every * chunk + 64 * 1024
    yield Row(
        f"transfer of {megabytes(_BAD)}, one answer in {every} of {answers} with a wrong byte, sums"
        f" of chunks of {megabytes(chunk)}: received",
        megabytes(most),
        f"{megabytes(received)}, in {seconds:.0f} s",
        received <= most,
    )
    shutil.rmtree(store)


def taken_over(setting: Setting) -> Iterator[Row]:
    """A wrong byte in what a server has left of a layer, with its registry's sums and without."""
    store, chunk, missing = setting.folder / "taken", 16 * _MIB, 40_000_000
    ours = (*US, "--store", str(store))
    with _pulled(store, _BAD) as (url, model):
        blob = store / "blobs" / model["digests"][0].replace(":", "-")
        for sums_are, most, text in (
            ("complete", missing + chunk + _MIB, f"sums of chunks of {megabytes(chunk)}"),
            ("", _BAD + _MIB, "no sums"),
        ):
            post(url, "/_control", {"manners": {"sums": sums_are, "chunk": chunk}})
            _left(blob, missing)
            before = _sent(url)
            seconds = run((*ours, "pull", model["name"])).seconds
            sent = _sent(url) - before
            yield Row(
                f"a wrong byte in the {megabytes(_BAD - missing)} of {megabytes(_BAD)} that a"
                f" server has left and `pull` takes over, {text}: fetched, with the rest",
                megabytes(most),
                f"{megabytes(sent)}, in {seconds:.0f} s",
                sent <= most,
            )


def _left(blob: Path, missing: int) -> None:
    """Make a finished layer what a server has left of it, with a wrong byte in its middle."""
    for name in (".ollama-watch", "manifests"):
        shutil.rmtree(blob.parent.parent / name, ignore_errors=True)
    data, size = blob.with_name(f"{blob.name}-partial"), blob.stat().st_size
    blob.rename(data)
    os.truncate(data, size - missing)
    os.truncate(data, size)
    with data.open("r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, size // 2)
        os.pwrite(file.fileno(), bytes([byte ^ 1]), size // 2)
    progress = data.with_name(f"{data.name}-0")
    progress.write_text(sidecar(0, 0, size, size - missing))
    for path in (data, progress):
        os.utime(path, (time.time() - 3600,) * 2)


# ---------------------------------------------------------------- a rate


def rate(setting: Setting) -> Iterator[Row]:
    """What one transfer, and three together, take in 10 s."""
    store = setting.fast / "rate"
    for count in (1, 3):
        _cleared(store)
        counts = [store / f"count{number}" for number in range(count)]
        serving = process("watcher.demo.registry", "--port", "0", until="http://")
        with serving as (_, line), contextlib.ExitStack() as running:
            url = line.strip()
            for each in counts:
                layers = [{"size": 20 * _RATE}]
                order = {"name": each.name, "tag": "1b", "layers": layers, "extras": False}
                model = post(url, "/_control", {"model": order})["model"]
                words = _words(store, model["name"], limit=_RATE, count=str(each))
                pulling = subprocess.Popen(words, env=environment(), cwd=ROOT)
                running.callback(pulling.wait)
                running.callback(pulling.kill)
            while min(map(_counted, counts)) < _RATE / count:
                time.sleep(0.01)
            began, before = time.perf_counter(), sum(map(_counted, counts))
            time.sleep(10)
            came = sum(map(_counted, counts)) - before
            found = came / (time.perf_counter() - began)
        yield Row(
            f"rate of {megabytes(_RATE)} per second over 10 s, transfers: {count}",
            "5 % more or less",
            f"{found / 1e6:.2f} MB per second",
            abs(found / _RATE - 1) <= 0.05,
        )
    shutil.rmtree(store)


def mending(setting: Setting) -> Iterator[Row]:
    """One flipped byte in a blob of 2 GiB whose chunks have sums of ours."""
    store = setting.folder / "mending"
    ours = (*US, "--store", str(store))
    with _pulled(store, _GIB2) as (url, model):
        blob = store / "blobs" / model["digests"][0].replace(":", "-")
        with blob.open("r+b") as file:
            (byte,) = os.pread(file.fileno(), 1, _GIB2 // 2)
            os.pwrite(file.fileno(), bytes([byte ^ 1]), _GIB2 // 2)
        run((*ours, "verify"), codes=(1,))
        before = _sent(url)
        mended = run((*ours, "repair", "--yes", "--fetch"))
        sent = _sent(url) - before
        yield Row(
            f"one flipped byte in a blob of {_GIB2 / 1e9:.2f} GB, sums of ours: fetched",
            megabytes(sums.CHUNK + _MIB),
            f"{megabytes(sent)}, in {mended.seconds:.0f} s",
            sent <= sums.CHUNK + _MIB,
        )
        run((*ours, "verify"))


def discarded(setting: Setting) -> Iterator[Row]:
    """An error page inside of a layer, which the server's own pull discards; a daemon runs."""
    for sums_of in ("complete", ""):
        store = setting.folder / "discarded"
        _cleared(store)
        with process("watcher.demo.registry", "--port", "0", until="http://") as (_, line):
            url, ours = line.strip(), (*US, "--store", str(store))
            order = {"name": "discarded", "tag": "1b", "layers": [{"size": _MODEL}]}
            model = post(url, "/_control", {"model": order})["model"]
            page = {"kind": "page", "status": 200, "begin": 1, "cut": True, "times": 1}
            post(url, "/_control", {"manners": {"sums": sums_of, "chunk": 16 * _MIB}})
            kind = RealServer if "OLLAMA_BIN" in os.environ else EngineServer
            with kind(store) as server, Daemon(store) as daemon:
                server.start().wait_ready()
                post(url, "/_control", {"fault": {**page, "digest": model["digests"][0]}})
                assert "mismatch" in server.pull(model["name"])[-1]["error"]
                daemon.wait("download_discarded")
                plan = json.loads(_told((*ours, "--json", "repair", "-n", model["name"])))
                *_, action = plan["plan"]["actions"]  # after the comparison with the sums
                before = _sent(url)
                mended = run((*ours, "repair", "--yes", "--fetch", model["name"]))
                assert server.pull(model["name"])[-1] == {"status": "success"}
                sent = _sent(url) - before
        whose = "registry's" if sums_of else "no"
        yield Row(
            f"a mismatch of the server's own pull of {megabytes(_MODEL)}, an error page inside,"
            f" daemon running, {whose} sums: fetched until the server's pull succeeds",
            megabytes(20e6) if sums_of else "the reason and a plan",
            f"{megabytes(sent)}, in {mended.seconds:.0f} s; the plan: {action['because']},"
            f" at most {megabytes(action['fetches_bytes'])}",
            sent <= 20e6 if sums_of else action["fetches_bytes"] == _MODEL,
        )
        shutil.rmtree(store)


def _told(words: Sequence[str]) -> str:
    """What a plan's command prints."""
    return subprocess.run(words, env=environment(), stdout=subprocess.PIPE, text=True).stdout


def _counted(path: Path) -> int:
    """What a transfer says that it has received."""
    return int.from_bytes(path.read_bytes(), "little") if path.exists() else 0


ALL: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "transfer": transfer,
    "rates": rates,
    "bad_line": bad_line,
    "crawling": crawling,
    "flipped": flipped,
    "taken_over": taken_over,
    "rate": rate,
    "mending": mending,
    "discarded": discarded,
}

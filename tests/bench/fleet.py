"""A thousand hosts, simulated: what two real daemons export, served under a thousand names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.support import fleet as dashboard
from tests.support.driving import Daemon, HealthyStore, holding
from tests.support.fleet import RULES, make_ill
from tests.support.prometheus import Prometheus, free_port, prometheus
from tests.support.servers import wait_until

from .benches import Setting
from .measure import PYTHON, Row, megabytes, milliseconds

_HOSTS, _ILL = 1000, 10
_SHOWN = 5  #: panels
_MODELS = 20
_SCRAPED_EVERY = 15
_MEASURED_SECONDS = 60.0
_ADDED = 5  #: series that Prometheus itself adds for each target
_TICK = os.sysconf("SC_CLK_TCK")


class _Documents(NamedTuple):
    """What daemons answer to a scrape: a healthy store's, one with more models, a broken one's."""

    well: str
    larger: str
    ill: str
    cpu: float  #: seconds that a daemon takes for one


def fleet(setting: Setting) -> Iterator[Row]:
    """Series, scrapes, queries and alerts of a thousand hosts on one Prometheus."""
    if shutil.which("prometheus") is None:
        yield Row("a thousand hosts on one Prometheus", "", "not measured: needs prometheus")
        return
    folder = setting.folder / "fleet"
    folder.mkdir()
    made = _documents(folder)
    yield from _series(made)
    with ExitStack() as left:
        port = free_port()
        words = (PYTHON, "-m", "http.server", str(port), "--bind", "127.0.0.1")
        served = folder / "served"
        served.mkdir()
        for name in ("well", "ill"):
            (folder / f"{name}.txt").write_text(getattr(made, name))
        for number in range(_HOSTS):
            _show(served, number, "well")
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(words, cwd=served, stdout=quiet, stderr=quiet)
        left.callback(process.wait)
        left.callback(process.kill)
        server = left.enter_context(prometheus(folder, _settings(port)))
        scraped = f"count(count_over_time(up[5m]) >= 2) == {_HOSTS}"
        wait_until(lambda: server.query(scraped), "two scrapes of each", 300)
        yield from _at_work(server)
        for number in range(_ILL):
            _show(served, number, "ill")
        yield _first_alert(server)
        yield from _queries(server, setting.rounds)


def _documents(folder: Path) -> _Documents:
    stores = {name: HealthyStore(folder / name / "models") for name in _Documents._fields[:3]}
    for number in range(_MODELS):
        layer = stores["larger"].text_blob(f"layer {number}")
        stores["larger"].manifest_of(f"model{number}", layer, layer)
    make_ill(stores["ill"])
    held = stores["ill"].partial(stores["ill"].download("stale and open"))
    found: dict[str, str] = {}
    cpu = 0.0
    with holding(held):
        for name, store in stores.items():
            port = free_port()
            env = {"OLLAMA_WATCH_METRICS_LISTEN": f"127.0.0.1:{port}"}
            with Daemon(store.path, {**env, "OLLAMA_WATCH_CLEAN": "true"}) as daemon:
                # A host stays the same when something breaks there.
                found[name] = _get(port).replace(str(store.path), "/srv/models")
                before = _cpu(daemon.pid)
                for _ in range(200):
                    _get(port)
                cpu = (_cpu(daemon.pid) - before) / 200
    return _Documents(**found, cpu=cpu)


def _get(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _memory(pid: int) -> int:
    (kilobytes,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kilobytes) * 1024


def _samples(document: str) -> int:
    return sum(not line.startswith("#") for line in document.splitlines())


def _series(made: _Documents) -> Iterator[Row]:
    most = max(map(_samples, made[:3])) + _ADDED
    each = f"{_samples(made.well) + _ADDED} healthy, {_samples(made.ill) + _ADDED} with a damaged"
    text = f"{each} model, a blocked, a paused and a held download"
    yield Row("series of a host, with 5 of Prometheus' own", "150", text, most <= 150)
    grown = (_samples(made.larger) - _samples(made.well)) / _MODELS
    yield Row("series of a model", "10", f"{grown:.0f}", grown <= 10)
    text = f"{len(made.ill) / 1e3:.1f} kB, {milliseconds(made.cpu)} of CPU"
    yield Row("one scrape of a daemon", "", text)


def _show(served: Path, number: int, name: str) -> None:
    """Let a host answer with another document from now on."""
    new = served / "new"
    new.symlink_to(f"../{name}.txt")
    new.rename(served / f"gpu{number:04}.txt")


def _settings(port: int) -> dict[str, object]:
    targets = [f"gpu{number:04}" for number in range(_HOSTS)]
    return {
        "global": {"scrape_interval": f"{_SCRAPED_EVERY}s", "evaluation_interval": "15s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": "ollama-watch",
                "static_configs": [{"targets": targets}],
                "relabel_configs": [
                    {"source_labels": ["__address__"], "target_label": "instance"},
                    {
                        "source_labels": ["__address__"],
                        "target_label": "__metrics_path__",
                        "replacement": "/$1.txt",
                    },
                    {"target_label": "__address__", "replacement": f"127.0.0.1:{port}"},
                ],
            }
        ],
    }


def _at_work(server: Prometheus) -> Iterator[Row]:
    before, began = _cpu(server.pid), time.monotonic()
    time.sleep(_MEASURED_SECONDS)
    busy = (_cpu(server.pid) - before) / (time.monotonic() - began)
    series = int(server.get("status/tsdb")["headStats"]["numSeries"])
    text = f"{series:,} series, {megabytes(_memory(server.pid))}, {busy:.1%} of a core"
    work = f"Prometheus with {_HOSTS:,} hosts, each scraped every {_SCRAPED_EVERY} s"
    yield Row(f"{work}, and the alerts evaluated", "", text)
    ((_, duration),) = server.query("quantile(0.5, scrape_duration_seconds)")
    ((_, longest),) = server.query("quantile(0.99, scrape_duration_seconds)")
    yield Row(
        "the same: a scrape (p50, p99)", "", f"{milliseconds(duration)}, {milliseconds(longest)}"
    )
    groups = server.get("rules")["groups"]
    total = sum(each["evaluationTime"] for each in groups)
    yield Row("the same: all alerts evaluated once", "", milliseconds(total))


def _first_alert(server: Prometheus) -> Row:
    began, seen = time.monotonic(), dict[str, float]()

    def active(state: str) -> set[str]:
        alerts = server.get("alerts")["alerts"]
        return {each["labels"]["alertname"] for each in alerts if each["state"] == state}

    def noted() -> bool:
        for name in active("firing"):
            seen.setdefault(name, time.monotonic() - began)
        expected = {"OllamaBlobCorrupt", "OllamaWatchRefuses"} <= seen.keys()
        return expected and "OllamaDownloadInterrupted" in active("pending")

    wait_until(noted, "alerts", 300)
    fired = ", ".join(f"{name} after {seconds:.0f} s" for name, seconds in seen.items())
    pending = ", ".join(sorted(active("pending")))
    work = f"the first alerts after {_ILL} hosts show what is wrong"
    return Row(work, "", f"{fired}; then by their time: {pending}")


def _queries(server: Prometheus, rounds: int) -> Iterator[Row]:
    """The queries of the dashboard, those of a panel together: the dearest panels, and all."""
    costs: dict[str, float] = {}
    for each in dashboard.queries(host="gpu0001", __range="1h", datasource=""):
        costs.setdefault(each.panel, 0)
        costs[each.panel] += median(_timed(_asking(server, each)) for _ in range(rounds))
    for panel, seconds in sorted(costs.items(), key=lambda item: -item[1])[:_SHOWN]:
        yield Row(f"the dashboard's panel *{panel}*", "", milliseconds(seconds))
    yield Row(f"all {len(costs)} panels together", "", milliseconds(sum(costs.values())))


def _asking(server: Prometheus, query: dashboard.Query) -> Callable[[], object]:
    if query.instant:
        return lambda: server.get("query", query=query.expression)
    now = time.time()
    span = {"start": str(now - 3600), "end": str(now), "step": "15"}
    return lambda: server.get("query_range", query=query.expression, **span)


def _timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


ALL = {"fleet": fleet}

"""The dashboard and the alerts, on a real Prometheus that scrapes two daemons."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from tests.support.driving import Daemon, HealthyStore, holding
from tests.support.fleet import DASHBOARD, RULES, Query, make_ill, queries
from tests.support.prometheus import Prometheus, free_port, prometheus
from tests.support.servers import ROOT, wait_until

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs prometheus (Debian: prometheus)"
)
RUNBOOKS = ROOT / "docs/runbooks"
WELL, ILL = "gpu1:9464", "gpu2:9464"


class Fleet(NamedTuple):
    """What runs, and the store with everything wrong."""

    server: Prometheus
    daemons: dict[str, Daemon]
    ill: HealthyStore


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    stores = {name: HealthyStore(folder / name[:4] / "models") for name in (WELL, ILL)}
    make_ill(stores[ILL])
    ports = {name: free_port() for name in stores}
    targets = [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"instance": name}}
        for name, port in ports.items()
    ]
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "ollama-watch", "static_configs": targets}],
    }
    with ExitStack() as left:
        daemons = {}
        for name, store in stores.items():
            env = {"OLLAMA_WATCH_METRICS_LISTEN": f"127.0.0.1:{ports[name]}"}
            daemon = Daemon(store.path, {**env, "OLLAMA_WATCH_CLEAN": "true"})
            daemons[name] = left.enter_context(daemon)
        server = left.enter_context(prometheus(folder, settings))
        scraped_again(server)
        # What happens after the first scrape is what `increase` counts.
        digest = stores[ILL].download("stale and open")
        left.enter_context(holding(stores[ILL].partial(digest)))
        daemons[ILL].wait_event("refused")
        scraped_again(server)
        yield Fleet(server, daemons, stores[ILL])


def scraped_again(server: Prometheus) -> None:
    """Wait until each target was scraped twice more, so that both have what is there now."""
    scrapes = "min(count_over_time(up[1h])) and on () count(up == 1) == 2"
    before = sum(value for _, value in server.query(scrapes))

    def are_scraped() -> bool:
        return any(value >= before + 2 for _, value in server.query(scrapes))

    wait_until(are_scraped, "two scrapes of each daemon")


def asked(host: str) -> list[Query]:
    return queries(host=host, __range="1h", datasource="")


def column(fleet: Fleet, letter: str) -> dict[str, float]:
    """A column of the table of hosts, in the order in which it is answered."""
    table = "Hosts, the worst first"
    (query,) = (each for each in asked(ILL) if (each.panel, each.letter) == (table, letter))
    return {labels["instance"]: value for labels, value in fleet.server.query(query.expression)}


def one(fleet: Fleet, panel: str) -> float:
    (query,) = (each for each in asked(ILL) if each.panel == panel)
    ((_, value),) = fleet.server.query(query.expression)
    return value


def test_each_query_of_each_panel_is_answered(fleet: Fleet) -> None:
    empty = [each for each in asked(ILL) if not fleet.server.query(each.expression)]
    assert empty == []


def test_a_host_without_a_download_leaves_one_panel_empty(fleet: Fleet) -> None:
    empty = {each.panel for each in asked(WELL) if not fleet.server.query(each.expression)}
    assert empty == {"Waiting longest", "Findings"}


def test_the_worst_host_is_the_first(fleet: Fleet) -> None:
    risk = column(fleet, "A")
    assert list(risk) == [ILL, WELL]
    assert risk[WELL] == 0
    assert risk[ILL] >= 20, "a blob that is cut short, and a blocked download"


def test_the_numbers_are_those_of_the_stores(fleet: Fleet) -> None:
    blobs = fleet.ill.blobs
    free = shutil.disk_usage(blobs).free
    assert one(fleet, "Hosts") == 2
    assert one(fleet, "Not scanned for half an hour") == 0
    assert one(fleet, "Refusals") > 0
    assert column(fleet, "E")[WELL] == 0
    assert column(fleet, "C") == {WELL: 0, ILL: one(fleet, "Downloaded again without a repair")}
    assert column(fleet, "C")[ILL] > 0
    assert column(fleet, "F")[ILL] == pytest.approx(free, rel=0.2)
    assert column(fleet, "G")[ILL] < column(fleet, "F")[ILL]


def test_the_variable_has_the_hosts(fleet: Fleet) -> None:
    found = re.search(r'"label_values\((\w+), (\w+)\)"', DASHBOARD.read_text())
    assert found is not None
    hosts = fleet.server.get(f"label/{found[2]}/values", **{"match[]": found[1]})
    assert hosts == [WELL, ILL]


def test_each_alert_is_evaluated_and_the_first_fires_at_once(fleet: Fleet) -> None:
    def firing() -> set[str]:
        alerts = fleet.server.get("alerts")["alerts"]
        return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}

    wait_until(lambda: {"OllamaBlobCorrupt", "OllamaWatchRefuses"} <= firing(), "alerts")
    about = [each["labels"] for each in fleet.server.get("alerts")["alerts"]]
    seen = {each["instance"] for each in about if "sight" not in each}
    assert seen == {ILL}, "the other host is healthy, but for what can't be seen from here"
    groups = fleet.server.get("rules")["groups"]
    assert len(groups) == 3
    for rule in (rule for group in groups for rule in group["rules"]):
        assert rule["health"] == "ok", rule
        page = RUNBOOKS / rule["annotations"]["runbook_url"].rpartition("/")[2]
        assert page.name == f"{rule['name']}.md"
        assert re.search(r"^ +(sudo )?(ollama-watch|systemctl) ", page.read_text(), re.MULTILINE)


def test_a_daemon_that_is_gone_is_the_worst(fleet: Fleet) -> None:
    fleet.daemons[WELL].kill(signal.SIGKILL)
    wait_until(lambda: next(iter(column(fleet, "A"))) == WELL, "the host that does not answer")
    assert column(fleet, "A")[WELL] == 1000

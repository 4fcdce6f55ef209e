"""Each alert has a page that says what to run, and what it says can be run."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
import yaml

from tests.support.command_line import understand
from tests.support.fleet import DASHBOARD
from watcher import model
from watcher.decide import finding_kinds
from watcher.state.event_log import EventType

ROOT = Path(__file__).parents[2]
RULES = (ROOT / "deploy/prometheus/ollama-watch.rules.yml").read_text()
ALERTS = re.findall(r"alert: (\w+)", RULES)
PAGES = sorted((ROOT / "docs/runbooks").glob("*.md"))
URGENCY = {"critical": "page", "warning": "ticket", "info": "info"}


def test_each_alert_has_its_page_and_each_page_its_alert() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (docs,) = re.findall(r"Documentation = (\S+)", setup["metadata"]["project_urls"])
    urls = re.findall(r"runbook_url: (\S+)", RULES)
    assert urls == [f"{docs}/runbooks/{alert}.md" for alert in ALERTS]
    assert {page.stem for page in PAGES} == set(ALERTS)


def test_each_page_has_the_urgency_of_its_alert() -> None:
    groups = re.split(r"- name: ollama-watch-", RULES)[1:]
    for group in groups:
        urgency = group.partition("\n")[0]
        assert {URGENCY[each] for each in re.findall(r"severity: (\w+)", group)} == {urgency}
        for alert in re.findall(r"alert: (\w+)", group):
            text = (ROOT / "docs/runbooks" / f"{alert}.md").read_text()
            assert f"\n*Urgency: {urgency}.* " in text


def test_what_alerts_and_panels_ask_for_is_there() -> None:
    """A kind that has another name in the program would keep its alert silent."""
    known = {
        "kind": {row.kind for row in finding_kinds.TABLE},
        "condition": {*model.Condition},
        "sight": {*model.Visibility},
        "type": {*EventType},
        "severity": {*model.Severity},
    }
    text = RULES + DASHBOARD.read_text().replace(r"\"", '"')
    asked = re.findall(rf'\b({"|".join(known)})!?=~?"(\w*?)\(?([\w|]+)\)?"', text)
    assert {label for label, _, _ in asked} == {*known}
    for label, prefix, rest in asked:
        assert {f"{prefix}{each}" for each in rest.split("|")} <= known[label]


def test_each_alert_is_tested_when_it_fires_and_when_not() -> None:
    """`promtool test rules` runs these cases."""
    tests = yaml.safe_load((ROOT / "deploy/prometheus/ollama-watch.test.yml").read_text())["tests"]
    cases = {(case["alertname"], "exp_alerts" in case) for each in tests
             for case in each["alert_rule_test"]}  # fmt: skip
    assert cases == {(alert, fires) for alert in ALERTS for fires in (True, False)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_each_runbook_are_commands_of_ours(page: Path) -> None:
    text = page.read_text()
    lines = re.findall(r"^(?: {4,}|.*`)(?:sudo )?ollama-watch ([^`\n]+)", text, re.MULTILINE)
    assert lines or "systemctl " in text
    for line in lines:
        understand(line)

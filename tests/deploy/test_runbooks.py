"""Each alert has a page that says what to run, and what it says can be run."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

from tests.support.command_line import understand

ROOT = Path(__file__).parents[2]
RULES = (ROOT / "deploy/prometheus/ollama-watch.rules.yml").read_text()
PAGES = sorted((ROOT / "docs/runbooks").glob("*.md"))
URGENCY = {"critical": "page", "warning": "ticket", "info": "info"}


def test_each_alert_has_its_page_and_each_page_its_alert() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (docs,) = re.findall(r"Documentation = (\S+)", setup["metadata"]["project_urls"])
    alerts = re.findall(r"alert: (\w+)", RULES)
    urls = re.findall(r"runbook_url: (\S+)", RULES)
    assert urls == [f"{docs}/runbooks/{alert}.md" for alert in alerts]
    assert {page.stem for page in PAGES} == set(alerts)


def test_each_page_has_the_urgency_of_its_alert() -> None:
    groups = re.split(r"- name: ollama-watch-", RULES)[1:]
    for group in groups:
        urgency = group.partition("\n")[0]
        assert {URGENCY[each] for each in re.findall(r"severity: (\w+)", group)} == {urgency}
        for alert in re.findall(r"alert: (\w+)", group):
            text = (ROOT / "docs/runbooks" / f"{alert}.md").read_text()
            assert f"\n*Urgency: {urgency}.* " in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_commands_are_ours(page: Path) -> None:
    text = page.read_text()
    lines = re.findall(r"^(?: {4,}|.*`)(?:sudo )?ollama-watch ([^`\n]+)", text, re.MULTILINE)
    assert lines or "systemctl " in text
    for line in lines:
        understand(line)

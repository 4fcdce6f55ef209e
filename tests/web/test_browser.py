"""The page in a real browser: what moves, what is seen of a kill, and who can use it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import commands, driving
from tests.support.browser import PROGRAM, Browser, Tab
from tests.support.driving import HealthyStore
from tests.support.pages import Page, served
from watcher.demo.registry import Layer, Registry
from watcher.show.text import size
from watcher.system import advice

from .conftest import CONTROLS, HOSTILE
from .test_served import TOKEN

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no chromium")
#: Where axe-core is: as npm installs it (https://www.npmjs.com/package/axe-core).
AXE = Path(os.environ.get("AXE_CORE", "/usr/share/nodejs/axe-core/axe.min.js"))
RATE = 3_000_000
LIVE = "document.querySelector('#downloads article')?.textContent.includes('in use')"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def tab(browser: Browser, page: Page) -> Tab:
    """The page, drawn by its script."""
    tab = browser.open(page.url)
    tab.wait("document.querySelector('#timeline li')", "the events")
    tab.wait("document.querySelector('svg.map') && document.querySelector('.uses')", "the rest")
    return tab


def test_it_runs_without_an_error(tab: Tab, page: Page) -> None:
    """A violation of the policy, such as a style in an attribute, is one."""
    drawn = "document.querySelector('#asof time').dateTime"
    before = tab.value(drawn)
    tab.wait(f"{drawn} !== {json.dumps(before)}", "the next look")
    assert tab.errors == []
    assert tab.value("document.title") == "ollama-watch"


def test_names_are_text(tab: Tab) -> None:
    assert tab.value("document.querySelectorAll('img').length") == 0
    assert HOSTILE in tab.value("document.querySelector('#events').textContent")
    assert HOSTILE in tab.value("document.querySelector('#quarantine').textContent")
    assert CONTROLS[0] not in tab.value("document.body.textContent")


def test_it_writes_values_as_the_commands_do(tab: Tab) -> None:
    seconds = [0, 1.4, 58, 58.3, 61, 3491, 3493, 5500, 86_400, 170_000, 200_000]
    assert tab.value(f"{seconds}.map(duration)") == [*map(advice.duration, seconds)]
    sizes = [0, 1, 999, 1000, 999_949, 999_951, 999_999, 123_456_789, 10**15]
    assert tab.value(f"{sizes}.map(size)") == [*map(size, sizes)]


def test_nothing_makes_markup_of_text(tab: Tab) -> None:
    """The policy refuses it, even to the page's own script."""
    tried = "(() => { try { document.body.innerHTML = 'x' } catch (e) { return e.name } })()"
    assert tab.value(tried) == "TypeError"
    tab.errors.clear()


def test_events_are_filtered_by_model(tab: Tab) -> None:
    lines = "document.querySelectorAll('#timeline .event').length"
    every = tab.value(lines)
    tab.value(
        "(() => { const choice = document.getElementById('model');"
        f" choice.value = {json.dumps(HOSTILE)}; choice.dispatchEvent(new Event('change')); }})()"
    )
    assert 0 < tab.value(lines) <= every
    tab.value(
        "(() => { const choice = document.getElementById('model');"
        " choice.value = ''; choice.dispatchEvent(new Event('change')); })()"
    )
    assert tab.value(lines) == every


MANY = pytest.mark.slow("two of the six widths and colors have all that the style changes")


@pytest.mark.parametrize(
    ("width", "dark"),
    [
        *((360, False), (1600, True)),
        *(pytest.param(*each, marks=MANY) for each in ((360, True), (800, False), (800, True))),
        pytest.param(1600, False, marks=MANY),
    ],
)
def test_it_fits_and_can_be_used_by_all(tab: Tab, width: int, dark: bool) -> None:
    tab.looks(width, dark=dark)
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert wrong(tab) == []


def wrong(tab: Tab) -> list[Any]:
    """What an accessibility checker finds that is serious; nothing where there is none."""
    if not AXE.is_file():
        pytest.skip("there is no axe-core: AXE_CORE names its axe.min.js")
    if not tab.value("Boolean(window.axe)"):
        tab.value(AXE.read_text())
    found = tab.value("axe.run().then(found => found.violations)")
    return [
        (each["id"], [node["html"] for node in each["nodes"]])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


def test_it_can_be_used_by_keyboard(tab: Tab) -> None:
    seen = []
    tab.value("document.body.focus()")
    for _ in range(4):
        for kind in ("keyDown", "keyUp"):
            tab.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab",
                     windowsVirtualKeyCode=9)  # fmt: skip
        seen.append(tab.value("document.activeElement.tagName"))
    assert seen[0] == "A"
    assert {"BUTTON", "SELECT"} & {*seen}


def test_without_a_script_it_says_the_same(browser: Browser, page: Page) -> None:
    tab = browser.open(page.url, script=False)
    tab.looks(360)
    deadline = time.monotonic() + 120
    while not (found := body(tab)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "50 % on disk" in found
    assert "Without JavaScript" in found
    assert tab.errors == []


def test_a_password_in_the_address_does_no_harm(browser: Browser, tmp_path: Path) -> None:
    """A script can't ask for an address with a password in it, as its own page's may be."""
    token, store = tmp_path / "token", HealthyStore(tmp_path / "models")
    token.write_text(TOKEN)
    with served(store.path, "--token-file", str(token)) as page:
        tab = browser.open(page.url.replace("://", f"://any:{TOKEN}@"))
        tab.wait("document.querySelector('.uses')", "the page")
        assert tab.errors == []
        tab.close()


def body(tab: Tab) -> str:
    """The text of a page whose script can't run."""
    found = tab.call("DOM.getDocument", depth=-1)["root"]
    return str(tab.call("DOM.getOuterHTML", nodeId=found["nodeId"])["outerHTML"])


def test_a_pull_moves_and_a_kill_shows(browser: Browser, tmp_path: Path) -> None:
    store = HealthyStore(tmp_path / "models")
    with Registry() as registry, served(store.path) as page:
        model = registry.add_model("demo", "1b", [Layer(30 * RATE)], extras=False)
        registry.throttle(RATE)
        words = ["--store", str(store.path), "pull", "--insecure", model.name]
        pull = commands.start(words, driving.environment(store.path))
        try:
            tab = browser.open(page.url)
            tab.wait(LIVE, "the download")
            present = "parseFloat(document.querySelector('#downloads article p').textContent)"
            first = tab.value(present)
            tab.wait(f"{present} > {first}", "more bytes")
            tab.wait("document.querySelector('svg.rate path')", "the rate")
            tab.wait("/ left, written by ollama-watch/.test(document.body.textContent)", "words")
            pull.kill()
            pull.wait()
            tab.wait(f"!({LIVE})", "the kill")
            assert tab.errors == []
        finally:
            pull.kill()
            pull.wait()

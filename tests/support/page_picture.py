"""The picture of the page in the README: `python -m tests.support.page_picture docs/page.png`.

A real run on the demo's stage: a download that was canceled twelve days ago, one whose server was
killed, and one that goes on, with a daemon that watches. Other widths and colors:
`--width 360 --dark`.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.browser import Browser, Tab
from watcher.demo import scenes
from watcher.demo.scenes import Stage

_US = str(Path(sys.executable).with_name("ollama-watch"))
_CHAT_BYTES, _CHAT_RATE = 900_000_000, 14_000_000
_LIVE_SECONDS = 15  #: so long the rate is drawn
#: Has the page show what it would for a store and a registry in their usual places.
_AS_USUAL = """(() => {
  document.querySelector("noscript").remove();
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode())
    texts.currentNode.data = texts.currentNode.data
      .replaceAll(/(localhost|127\\.0\\.0\\.1):\\d+\\/library\\//g, "")
      .replaceAll(STORE, "/usr/share/ollama/.ollama/models");
})()"""


def main() -> None:
    """Play the scenes, open the page, and save its picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    with scenes.staged(lambda _: None, color=False, keep=False) as stage:
        stage.store = stage.folder / ".ollama/models"
        with _played(stage) as url, Browser() as browser:
            tab = browser.open(url)
            tab.looks(given.width, dark=given.dark, height=400)
            tab.wait("document.querySelector('svg.rate path')", "the rate")
            rate = "document.querySelector('svg.rate path').getAttribute('d').split('L').length"
            tab.wait(f"{rate} > {_LIVE_SECONDS}", "a rate of some seconds")
            _save(tab, stage, given.file)


@contextlib.contextmanager
def _played(stage: Stage) -> Iterator[str]:
    scenes._an_old_download(stage)
    for name, size in (("small", 21_000_000), ("code", 64_000_000), ("chat", _CHAT_BYTES)):
        model = {"name": name, "tag": "7b", "layers": [{"size": size}]}
        scenes._order(stage.registry_url, {"model": model})
    for name in ("small", "code"):
        connection, _ = scenes._pull(stage.server_url, stage.model(name), None)
        connection.close()
    _, told = stage.start_daemon()
    scenes._a_pull_that_dies(stage, told)
    scenes._order(stage.registry_url, {"throttle": _CHAT_RATE})
    with contextlib.ExitStack() as running:
        running.callback(_end, _started(stage, "pull", "--insecure", stage.model("chat")))
        with tempfile.NamedTemporaryFile() as out:
            page = _started(stage, "web", "--listen", "127.0.0.1:0", stdout=out.file.fileno())
            running.callback(_end, page)
            scenes.wait_for(lambda: b"/ (" in Path(out.name).read_bytes(), "the page")
            address = re.match(r"http://\S+", Path(out.name).read_text())
        assert address
        yield address[0]


def _started(
    stage: Stage, *words: str, stdout: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    environment = {**stage._environment(), "PATH": f"{Path(_US).parent}:/usr/bin:/bin"}
    return subprocess.Popen([_US, *words], env=environment, stdout=stdout)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait()


def _save(tab: Tab, stage: Stage, file: Path) -> None:
    tab.value(_AS_USUAL.replace("STORE", repr(str(stage.store))))
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    tab.picture(file)


if __name__ == "__main__":
    main()

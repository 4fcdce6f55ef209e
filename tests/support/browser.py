"""A real browser: Debian's Chromium, driven over the DevTools protocol through two pipes.

with Browser() as browser:
    tab = browser.open("http://127.0.0.1:9465/")
    tab.wait("document.querySelector('h1')", "the heading")
    assert tab.errors == []
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

from tests.support.servers import TIMEOUT

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
_THEIR_READS, _THEIR_WRITES = 3, 4  #: the descriptors that the protocol is spoken over
_OPTIONS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking"),
    *("--disable-component-update", "--disable-gpu", "--hide-scrollbars", "--mute-audio"),
    *("--disable-features=OptimizationHints,MediaRouter,Translate", "--password-store=basic"),
)


class Browser:
    """A browser with a profile of its own, ended with the context."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self._number = 0
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._tabs: dict[str, Tab] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        assert PROGRAM is not None
        # It goes on writing for a moment after its end.
        profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        folder = self._held.enter_context(profile)
        (reads, ours), (answers, writes) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (reads, writes)]
        os.close(reads)
        os.close(writes)

        def arrange() -> None:
            os.dup2(theirs[0], _THEIR_READS)
            os.dup2(theirs[1], _THEIR_WRITES)

        self._process = subprocess.Popen(
            [PROGRAM, *_OPTIONS, f"--user-data-dir={folder}", "about:blank"],
            env={**os.environ, "HOME": folder, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(_THEIR_READS, _THEIR_WRITES),
            preexec_fn=arrange,  # noqa: PLW1509
            start_new_session=True,
        )
        for fd in theirs:
            os.close(fd)
        self._out = self._held.enter_context(open(ours, "wb", buffering=0))
        self._in = open(answers, "rb")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        self._in.close()
        self._held.close()

    def call(self, method: str, session: str | None = None, **params: object) -> dict[str, Any]:
        """Send a command of the protocol; its result. Raises AssertionError with its error."""
        with self._lock:
            self._number += 1
            number = self._number
            answer = self._answers[number] = queue.SimpleQueue()
            message: dict[str, object] = {"id": number, "method": method, "params": params}
            if session is not None:
                message["sessionId"] = session
            self._out.write(json.dumps(message).encode() + b"\0")
        found = answer.get(timeout=TIMEOUT)
        assert "error" not in found, f"{method}: {found['error']}"
        return dict(found["result"])

    def open(self, url: str, *, script: bool = True) -> Tab:
        """Open a page in a tab; without `script` it can run none."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call("Emulation.setScriptExecutionDisabled", value=not script)
        tab.call("Page.navigate", url=url)
        return tab

    def _read(self) -> None:
        rest = b""
        while piece := self._in.read1(1 << 20):
            *messages, rest = (rest + piece).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers.pop(message["id"]).put(message)
                elif message.get("sessionId") in self._tabs:
                    self._tabs[message["sessionId"]].heard(message["method"], message["params"])


class Tab:
    """A page that is open."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target
        #: What the console has said that is wrong, violations of the policy included.
        self.errors: list[str] = []

    def heard(self, method: str, params: dict[str, Any]) -> None:
        """Take in an event of the protocol."""
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(json.dumps(params["args"]))

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """Send a command of the protocol to this page."""
        return self._browser.call(method, self._session, **params)

    def close(self) -> None:
        """Close the tab."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def value(self, expression: str) -> Any:
        """What an expression has as its value in the page, once that is settled."""
        how = {"awaitPromise": True, "returnByValue": True}
        found = self.call("Runtime.evaluate", expression=expression, **how)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, what: str, timeout: float = TIMEOUT) -> None:
        """Wait until an expression is true in the page. Raises TimeoutError naming `what`."""
        until = time.monotonic() + timeout
        while not self.value(f"Boolean({expression})"):
            if time.monotonic() > until:
                raise TimeoutError(f"waited {timeout} s for {what}; {self.errors}")
            time.sleep(0.02)

    def looks(self, width: int, *, dark: bool = False, height: int = 900) -> None:
        """Show it in a window of this width, in the colors of day or night."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, file: Path) -> None:
        """Save the whole page as a PNG."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))

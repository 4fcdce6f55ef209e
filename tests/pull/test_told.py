"""Every sequence of statuses that a real server gave leads through legal states to its end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from watcher.pull import by_server
from watcher.pull.failures import Cause, End, of_error
from watcher.pull.target import Target
from watcher.state.records import State

from .driven import POLICY, drive

TRUTH = Path(__file__).parents[1] / "fidelity" / "truth"
#: Nobody answers for it: the manifest is known to the server alone.
MODEL = "http://127.0.0.1:1/library/demo:1b"
TOTAL = 1000


def lines(statuses: list[str]) -> list[dict[str, Any]]:
    """What the server streamed, as far as a recording keeps it."""
    told: list[dict[str, Any]] = []
    for text in statuses:
        if text.startswith("error: "):
            told.append({"error": text.removeprefix("error: ")})
            continue
        first, _, digits = text.partition(" ")
        if first == "pulling" and len(digits) == 12:
            layer = {"status": text, "digest": f"sha256:{digits:0<64}", "total": TOTAL}
            told.extend({**layer, "completed": done} for done in (0, TOTAL // 2, TOTAL))
        else:
            told.append({"status": text})
    return told


def recorded() -> Iterator[Any]:
    for path in sorted(TRUTH.glob("*.json")):
        found = json.loads(path.read_text())
        if "stream" in found:
            yield pytest.param(found["stream"], id=path.stem)
        if "statuses" in found:
            yield pytest.param(lines(found["statuses"]), id=path.stem)
        for number, pull in enumerate(found.get("pulls", ())):
            yield pytest.param(lines(pull["statuses"]), id=f"{path.stem}-{number}")


@pytest.fixture
def answers() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server's URL, and the lines that it streams."""
    told: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            for line in told:
                self.wfile.write(json.dumps(line).encode() + b"\n")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", told
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("streamed", list(recorded()))
def test_a_recorded_pull(
    streamed: list[dict[str, Any]],
    answers: tuple[str, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(by_server, "TRIES", 1)
    url, told = answers
    told.extend(streamed)
    seen = drive(Target(url, POLICY.settings), MODEL)
    error = streamed[-1].get("error")
    if error is None:
        assert seen.end.cause is None
        assert seen.states[-2:] == [State.WRITING_MANIFEST, State.COMPLETED]
        sizes = {line["digest"]: line["total"] for line in streamed if "digest" in line}
        last = seen.updates[-1].record
        assert last.total_bytes == last.downloaded_bytes == sum(sizes.values())
    else:
        assert seen.end == End(of_error(error), error)
        assert seen.updates[-1].record.error == error
    steps = [each for each in seen.states if each.active]
    assert steps == sorted(steps, key=list(State).index) or State.VERIFYING in steps


def test_only_some_of_many_progress_lines_are_shown(
    answers: tuple[str, list[dict[str, Any]]],
) -> None:
    url, told = answers
    layer = {"status": f"pulling {'a' * 12}", "digest": f"sha256:{'a' * 64}", "total": TOTAL}
    told.append({"status": "pulling manifest"})
    told.extend({**layer, "completed": done} for done in range(TOTAL))
    told.extend({"status": text} for text in ("writing manifest", "success"))
    seen = drive(Target(url, POLICY.settings), MODEL)
    assert seen.end.cause is None
    assert len(seen.updates) < TOTAL / 4


def test_the_transfer_path(answers: tuple[str, list[dict[str, Any]]]) -> None:
    """Its sum is that of all layers; no layer of that name."""
    url, told = answers
    whole = {"status": "pulling model", "digest": "sha256:model", "total": TOTAL}
    told.append({"status": "pulling manifest"})
    told.extend({**whole, "completed": done} for done in (100, 400, TOTAL))
    told.extend({"status": text} for text in ("writing manifest", "success"))
    seen = drive(Target(url, POLICY.settings), MODEL)
    assert seen.end.cause is None
    assert seen.states[1:] == [
        State.STARTING,
        State.PULLING_MANIFEST,
        State.DOWNLOADING,
        State.WRITING_MANIFEST,
        State.COMPLETED,
    ]
    assert {each.record.total_bytes for each in seen.updates} == {None, 0, TOTAL}
    assert max(each.record.downloaded_bytes for each in seen.updates) == TOTAL


@pytest.mark.parametrize(
    "line",
    [
        {"status": "pulling abc", "digest": "sha256:" + "a" * 64, "total": 2**64 - 1},
        {"status": "pulling abc", "digest": "sha256:" + "a" * 64, "completed": 2**63},
        {"status": "pulling abc", "digest": "x\u001b" * 999, "total": True, "completed": 1.5},
        {"status": None, "digest": None},
        {},
    ],
)
def test_nonsense_ends_in_an_error_and_no_traceback(
    line: dict[str, Any],
    answers: tuple[str, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(by_server, "TRIES", 1)
    url, told = answers
    told.extend([line, {"error": "\u001b[31mbroken"}])
    seen = drive(Target(url, POLICY.settings), MODEL)
    assert seen.end.cause is Cause.UNKNOWN
    assert seen.end.text.isprintable()

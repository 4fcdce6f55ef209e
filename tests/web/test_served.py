"""The page over HTTP: what it answers, to whom, and what it never does."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NOBODY, needs_root
from tests.support import driving
from tests.support.driving import OLD, HealthyStore, host
from tests.support.pages import Page, served
from tests.support.runs import rules
from tests.support.servers import wait_until
from watcher.web.looks import Looks

from .conftest import CONTROLS, HOSTILE, fill

#: What differs from one look to the next.
PASSING = {"time", "age_seconds", "quiet_seconds", "free_bytes", "free_inodes", "looked_at", "due"}
TOKEN = "0123456789abcdef0123"


def lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: lasting(each) for key, each in value.items() if key not in PASSING}
    return [*map(lasting, value)] if isinstance(value, list) else value


@pytest.mark.parametrize("words", ["status", "audit", "df", "queue ls", "quarantine ls"])
def test_a_document_is_that_of_its_command(page: Page, store: HealthyStore, words: str) -> None:
    command = words.split()[0]
    printed = json.loads(driving.run(store.path, "--json", *words.split()).stdout)
    assert lasting(page.document(command)) == lasting(printed)
    assert page.ask(f"/{command}.json").body.endswith(b"}\n")


def test_the_events_are_the_lines_of_the_log(page: Page, store: HealthyStore) -> None:
    assert page.ask("/log.jsonl").body.decode() == driving.run(store.path, "--json", "log").stdout


def test_the_events_are_those_of_the_log_that_is_there(tmp_path: Path) -> None:
    """Not those of one that was deleted, or cut, as well."""
    store = HealthyStore(tmp_path / "models")
    fill(store)
    log = store.ours / "logs" / "events.jsonl"
    line = log.read_bytes()
    events = Looks(host(store), rules().settings)
    for content in (line, line * 3, line * 2, None, line):
        if content is None:
            log.unlink()
        else:
            log.write_bytes(content)
        assert events._read().printed["log"] == (content or b"")


def test_what_is_the_same_is_not_sent_again(page: Page) -> None:
    first = page.ask("/log.jsonl")
    again = page.ask("/log.jsonl", if_none_match=first.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    assert page.ask("/log.jsonl", if_none_match='"other"').body == first.body


def test_names_from_the_store_are_text(page: Page) -> None:
    """`html.escape` left out of a piece of the summary fails here."""
    body = page.ask().body.decode()
    assert "<img" not in body
    assert CONTROLS[0] not in body
    assert body.count(html.escape(HOSTILE)) >= 3  # a label, and an event's type and message
    assert HOSTILE in json.dumps(page.document("audit"), ensure_ascii=False).replace('\\"', '"')


def test_the_page_says_all_without_a_script(page: Page) -> None:
    body = page.ask().body.decode()
    for words in (
        "50 % on disk",
        "The next server start",
        "orphaned blobs",
        "daemon: not running",
        "resumable",
        "demo",
    ):
        assert words in body
    assert re.search(r" free, at <time datetime=", body)  # another look than that above
    assert "style=" not in body
    assert " on" not in {each[:3] for each in body.split("<")}
    assert body.count("<script") == 1


PATHS = ["/", "/page.js", "/page.css", "/icon.svg", "/audit.json", "/nothing", "/log.jsonl"]


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_is_confined(page: Page, path: str) -> None:
    headers = page.ask(path).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers


@pytest.mark.parametrize("path", PATHS)
def test_head_is_get_without_a_body(page: Page, path: str) -> None:
    got, head = page.ask(path), page.ask(path, "HEAD")
    assert (head.status, head.body) == (got.status, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_nothing_but_get_and_head(page: Page, method: str) -> None:
    answer = page.ask("/audit.json", method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "path",
    [
        "/../setup.cfg",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/page.html",
        "/app.py",
        "/blobs/",
        "/manifests",
        "/.ollama-watch/state.json",
        "/page.js/",
        "/%00",
        "/audit.json/x",
    ],
)
def test_there_is_nothing_else(page: Page, path: str) -> None:
    assert page.ask(path).status == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "10.0.0.1", "0.0.0.0", "localhost, evil"]
)
def test_other_hosts_are_refused(page: Page, host: str) -> None:
    """A web page that is led here by DNS rebinding would read names and paths."""
    for path in ("/", "/audit.json", "/page.js", "/nothing"):
        answer = page.ask(path, host=host)
        assert (answer.status, b"sha256" in answer.body) == (403, False)


def test_requests_that_are_none_do_no_harm(page: Page) -> None:
    for raw in (
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET audit.json HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n",
        b"\0\0\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", page.port), timeout=120) as client:
            client.sendall(raw)
            assert client.recv(100).split(b" ")[1][:1] == b"4"
    assert page.ask().status == 200


def test_many_clients_share_a_look(page: Page) -> None:
    with ThreadPoolExecutor(16) as clients:
        answers = [*clients.map(lambda _: page.ask("/audit.json"), range(100))]
    assert {each.status for each in answers} == {200}
    assert len({each.headers["etag"] for each in answers}) < 50


# ---------------------------------------------------------------- who may look


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--listen", "0.0.0.0:0"], "add --allow-remote and --token-file FILE"),
        (["--listen", "[::]:0", "--allow-remote"], "openssl rand -hex 32"),
        (["--listen", "0.0.0.0:0", "--token-file", "/dev/null"], "at least 16 characters"),
        (["--listen", "nowhere"], "expected an address and a port"),
        (["--token-file", "/nothing"], "reading /nothing failed: No such file or directory"),
    ],
)
def test_what_would_be_open_is_not_served(
    models: HealthyStore, words: list[str], says: str
) -> None:
    done = driving.run(models.path, "web", *words)
    assert (done.returncode, says in done.stderr) == (2, True), done.stderr


def test_a_port_that_is_taken_is_named(page: Page, store: HealthyStore) -> None:
    done = driving.run(store.path, "web", "--listen", f"127.0.0.1:{page.port}")
    assert done.returncode == 4
    assert done.stderr.startswith(
        f"ollama-watch: --listen: listening on 127.0.0.1:{page.port} failed: Address already in use"
    )


def test_other_machines_need_the_token(models: HealthyStore, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    words = ("--listen", "0.0.0.0:0", "--allow-remote", "--token-file", str(file))

    def basic(text: str) -> str:
        return f"Basic {base64.b64encode(text.encode()).decode()}"

    with served(models.path, *words) as page:
        wrong = ["", "Bearer", f"Bearer {TOKEN}x", basic(f"{TOKEN}:"), "Basic \xff", "Basic !"]
        for given in wrong:
            answer = page.ask("/audit.json", authorization=given)
            assert (answer.status, b"schema" in answer.body) == (401, False)
            assert answer.headers["www-authenticate"].startswith("Basic ")
        for right in (f"Bearer {TOKEN}", f"bearer {TOKEN}", basic(f"any:{TOKEN}")):
            assert page.ask("/", authorization=right, host="gpu1.lan").status == 200


@needs_root
def test_root_serves_it_as_the_owner_of_the_store(models: HealthyStore) -> None:
    for path in (models.path, *models.path.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    with served(models.path) as page:
        assert page.ask("/audit.json").status == 200
        status = Path(f"/proc/{page.process.pid}/status").read_text()
        assert f"Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}" in status
        assert "CapEff:\t0000000000000000" in status


# ---------------------------------------------------------------- what changes beneath


def is_in(text: str, page: Page, path: str) -> bool:
    return text in page.ask(path).body.decode()


def test_a_store_that_is_gone_is_said_and_comes_back(tmp_path: Path) -> None:
    store = HealthyStore(tmp_path / "models")
    with served(store.path) as page:
        assert page.ask("/audit.json").status == 200
        aside = tmp_path / "aside"
        shutil.move(store.path, aside)
        wait_until(lambda: page.ask("/audit.json").status == 503, "the error")
        gone = f"there is no store at {store.path} any more"
        for path in ("/audit.json", "/queue.json"):
            wait_until(partial(is_in, gone, page, path), path)
        body = page.ask().body.decode()
        assert 'data-tone="bad"' in body
        shutil.move(aside, store.path)
        wait_until(lambda: page.ask("/audit.json").status == 200, "the store")


def test_what_was_not_seen_is_not_said_to_be_empty(tmp_path: Path) -> None:
    """And it hides nothing else: each document fails alone."""
    store = HealthyStore(tmp_path / "models")
    fill(store)
    shut = {
        store.blobs: ("No unfinished downloads, as far as visible", "Not inspected: blobs"),
        store.ours / "quarantine": ("Not inspected: .ollama-watch/quarantine",),
        store.ours / "logs": ("permission denied",),
        store.ours / "queue.json": ("queue.json can&#x27;t be read: Permission denied. Run",),
    }
    for path in shut:
        path.chmod(0)
    with served(store.path) as page:
        body = page.ask().body.decode()
        answered = {
            name: page.ask(f"/{name}").status
            for name in ("status.json", "audit.json", "df.json", "queue.json", "log.jsonl")
        }
    for path in shut:
        path.chmod(0o700)
    for word in (each for words in shut.values() for each in words):
        assert word in body
    assert "empty" not in body
    assert "It deletes nothing." not in body
    assert answered == dict.fromkeys(("status.json", "audit.json", "df.json"), 200) | dict.fromkeys(
        ("queue.json", "log.jsonl"), 503
    )


def test_requests_of_every_path_leave_the_store_unchanged(tmp_path: Path) -> None:
    store = HealthyStore(tmp_path / "models")
    store.download("a", aged=OLD)
    before = store.tree()
    with served(store.path) as page:
        for path in PATHS:
            page.ask(path)
    assert store.tree() == before
    assert not store.ours.exists()


def test_a_signal_right_after_its_address_ends_it_in_order(models: HealthyStore) -> None:
    """With the address printed before signals are handled, this ends by SIGTERM."""
    with served(models.path):
        pass

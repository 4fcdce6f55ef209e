"""Manifests asked from a registry, and kept for when nobody answers."""

from __future__ import annotations

import base64
import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from watcher.demo import registry as demo
from watcher.ollama import manifests, names
from watcher.ollama.names import ModelName
from watcher.state import registry_cache
from watcher.state.memory import FOLDER
from watcher.transfer import questions

A, B = "a" * 64, "b" * 64


def text(*sizes: int) -> bytes:
    """A manifest of a layer and a config."""
    layer, config = sizes
    return json.dumps(
        {
            "config": {"digest": f"sha256:{B}", "size": config},
            "layers": [{"digest": f"sha256:{A}", "size": layer}] * 2,
        }
    ).encode()


class Served:
    """A registry of one manifest that answers as it is told to."""

    def __init__(self) -> None:
        self.status, self.body, self.etag = 200, text(7, 3), '"one"'
        self.length = "42"
        self.asked: list[str] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                known = self.headers.get("If-None-Match", "")
                served.asked.append(known)
                same = served.status == 200 and known == served.etag != ""
                body = b"" if same else served.body
                self.send_response(304 if same else served.status)
                if served.etag:
                    self.send_header("ETag", served.etag)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", served.length)
                self.end_headers()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def model(self) -> ModelName:
        return names.to_model(f"http://localhost:{self._server.server_port}/library/demo:1b")

    def close(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.close()


def test_a_manifest_is_cached_and_not_sent_again_while_it_is_unchanged(
    served: Served, folder: int
) -> None:
    for _ in range(2):
        assert questions.manifest(folder, served.model) == registry_cache.Answer(text(7, 3))
    assert served.asked == ["", '"one"']
    served.body, served.etag = text(8, 3), '"two"'
    assert questions.manifest(folder, served.model).raw == text(8, 3)
    assert registry_cache.cached(folder)[served.model.key].etag == '"two"'


def test_without_validators_it_is_sent_each_time(served: Served, folder: int) -> None:
    served.etag = ""
    for _ in range(2):
        assert questions.manifest(folder, served.model) == registry_cache.Answer(text(7, 3))
    assert served.asked == ["", ""]


def test_without_a_store_nothing_is_kept(served: Served) -> None:
    for _ in range(2):
        assert questions.manifest(None, served.model) == registry_cache.Answer(text(7, 3))
    assert served.asked == ["", ""]


def test_offline_the_kept_one_is_given_and_said_so(served: Served, folder: int) -> None:
    questions.manifest(folder, served.model)
    served.close()
    answer = questions.manifest(folder, served.model)
    assert answer.raw == text(7, 3)
    assert "does not answer" in answer.problem


def test_offline_with_nothing_kept(served: Served, folder: int) -> None:
    served.close()
    answer = questions.manifest(folder, served.model)
    assert answer.raw is None
    assert "does not answer" in answer.problem


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_a_registry_in_trouble(served: Served, folder: int, status: int) -> None:
    questions.manifest(folder, served.model)
    served.status = status
    answer = questions.manifest(folder, served.model)
    assert answer.raw == text(7, 3)
    assert str(status) in answer.problem


def test_a_model_that_is_gone_is_not_given_from_what_was_kept(served: Served, folder: int) -> None:
    questions.manifest(folder, served.model)
    served.status = 404
    answer = questions.manifest(folder, served.model)
    assert answer.raw is None


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"7", b'{"layers":7}', text(7, 3)[:40]])
def test_an_invalid_manifest_is_not_cached(served: Served, folder: int, body: bytes) -> None:
    questions.manifest(folder, served.model)
    served.body, served.etag = body, '"other"'
    answer = questions.manifest(folder, served.model)
    assert answer.raw is None
    assert "invalid manifest" in answer.problem
    served.close()
    assert questions.manifest(folder, served.model).raw == text(7, 3)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b'{"schema":"ollama-watch/registry-cache/1"}',
        b'{"schema":"ollama-watch/registry-cache/1","models":[]}',
        b'{"schema":"ollama-watch/registry-cache/1","models":{"a/b:c":["x","y"]}}',
        b'{"schema":"ollama-watch/registry-cache/1","models":{"demo":["no manifest","e",1.0]}}',
        b'{"schema":"ollama-watch/registry-cache/9","models":{}}',
    ],
)
def test_a_damaged_file_is_as_good_as_none(
    served: Served, folder: int, tmp_path: Path, damage: bytes
) -> None:
    questions.manifest(folder, served.model)
    path = tmp_path / "folder" / FOLDER / registry_cache.NAME
    path.write_bytes(damage)
    assert registry_cache.cached(folder) == {}
    assert questions.manifest(folder, served.model).raw == text(7, 3)
    assert list(registry_cache.cached(folder)) == [served.model.key]


def test_a_304_that_nobody_asked_for_is_no_manifest(served: Served, folder: int) -> None:
    served.status, served.body = 304, b""
    answer = questions.manifest(folder, served.model)
    assert answer.raw is None
    assert "304" in answer.problem


def test_those_asked_for_last_stay(folder: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_cache, "_MOST", 3)
    for number in range(5):
        registry_cache.keep(folder, names.to_model(f"m{number}"), text(7, 3), "", float(number))
    assert sorted(key.rpartition("/")[2] for key in registry_cache.cached(folder)) == [
        "m2:latest",
        "m3:latest",
        "m4:latest",
    ]


def test_a_digest_that_is_named_twice_counts_once() -> None:
    assert manifests.sizes(text(7, 3)) == {A: 7, B: 3}


# ---------------------------------------------------------------- asking


class Proxy:
    """Passes on what comes by its URL, and tunnels nothing; `asked` has the first lines."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                word = self.headers.get("Proxy-Authorization", "")
                proxy.asked.append((self.command, self.path, word))
                self.send_response(502 if self.command == "CONNECT" else 200)
                self.send_header("Content-Length", "42")
                self.end_headers()

            def do_CONNECT(self) -> None:
                self.do_HEAD()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    made = Proxy()
    url = f"http://me:a%20b@127.0.0.1:{made.server.server_port}"
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, url)
    monkeypatch.delenv("no_proxy", raising=False)
    yield made
    made.server.shutdown()
    made.server.server_close()
    made.thread.join()


@pytest.mark.parametrize("asks", ["length", "manifest"])
def test_the_environment_s_proxy_is_asked_for_both(proxy: Proxy, asks: str) -> None:
    model = names.to_model("registry.invalid/library/demo:1b")
    if asks == "length":
        with pytest.raises(OSError, match="502"):
            questions.length(model, A)
    else:
        assert "502" in questions.manifest(None, model).problem
    assert proxy.asked == [("CONNECT", "registry.invalid:443", "Basic bWU6YSBi")]


def test_a_redirect_to_plain_http_goes_through_the_proxy_as_well(proxy: Proxy) -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.send_response(307)
            self.send_header("Location", "http://data.invalid/it?key=1")
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        host = f"127.0.0.1:{server.server_port}"
        assert questions.length(ModelName(host, "library", "demo", "1b"), A) == 42
        server.shutdown()
        thread.join()
    assert proxy.asked == [("HEAD", "http://data.invalid/it?key=1", "Basic bWU6YSBi")]


def test_loopback_and_what_is_excepted_go_past_the_proxy(
    served: Served, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert questions.manifest(None, served.model).raw == text(7, 3)
    monkeypatch.setenv("no_proxy", ".invalid")
    with pytest.raises(OSError, match=r"."):
        questions.length(names.to_model("registry.invalid/library/demo:1b"), A)
    assert proxy.asked == []


def test_an_installation_without_libcurl_reports_it_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "watcher.transfer.client", None)
    monkeypatch.delattr("watcher.transfer.client", raising=False)
    with pytest.raises(OSError, match="can't be loaded"):
        questions.length(names.to_model("registry.invalid/library/demo:1b"), A)


def test_redirects_in_a_circle_end() -> None:
    asked: list[str] = []

    class Round(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Round) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        host = f"127.0.0.1:{server.server_port}"
        answer = questions.manifest(None, ModelName(host, "library", "demo", "1b"))
        server.shutdown()
        thread.join()
    assert "redirects" in answer.problem
    assert len(asked) == 6


@pytest.mark.parametrize(
    ("told", "believed"),
    [("42", 42), ("0", 0), ("-1", None), ("x", None), ("9" * 19, None), ("9" * 400, None)],
)
def test_a_length_that_no_layer_has_is_no_length(
    served: Served, told: str, believed: int | None
) -> None:
    served.length = told
    found = None
    with contextlib.suppress(OSError):  # what is no number is no answer
        found = questions.length(served.model, A)
    assert found == believed


@pytest.mark.parametrize("password", ["a/b", "a@b", "a:b", "a?b#c", "a b", "%zz", "[x", "ä"])
def test_a_proxy_s_password_has_any_characters(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    url = f"http://me:{password}@127.0.0.1:{proxy.server.server_port}"
    monkeypatch.setenv("https_proxy", url)
    with pytest.raises(OSError, match="502"):
        questions.length(names.to_model("registry.invalid/library/demo:1b"), A)
    word = base64.b64encode(f"me:{password}".encode()).decode()
    assert proxy.asked == [("CONNECT", "registry.invalid:443", f"Basic {word}")]


@pytest.mark.parametrize("address", ["127.0.0.1:no/x", "[::1", "h:99999", "ftp://h", ":"])
def test_a_proxy_that_is_none_is_reported_without_its_password(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://me:s3cr3t/x@{address}")
    monkeypatch.delenv("no_proxy", raising=False)
    answer = questions.manifest(None, names.to_model("registry.invalid/library/demo:1b"))
    assert answer.raw is None
    assert answer.problem
    assert "s3cr3t" not in answer.problem


def test_a_redirect_to_an_address_with_a_password_is_reported_without_it() -> None:
    with demo.Registry() as served:
        model = names.to_model(served.add_model("m", "1b", []).name)
        headers = {"Location": "http://me:s3cr3t/x@h:no/"}
        served.add_fault(demo.Fault("page", on="manifest", status=307, headers=headers))
        answer = questions.manifest(None, model)
    assert answer.raw is None
    assert "s3cr3t" not in answer.problem

"""The bundle of certificates is found with no variable set."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import certifi
import pytest

from watcher.transfer import certificates
from watcher.transfer.certificates import Trust
from watcher.transfer.client import Client, Request
from watcher.transfer.values import Cause, TryError


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_the_systems_comes_first_then_certifis(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.touch()
    assert certificates.find(("/nowhere", str(bundle))) == Trust(str(bundle))
    assert certificates.find(("/nowhere",)) == Trust(certifi.where())


def test_certificates_named_in_the_environment_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/mine.pem")
    assert certificates.find() == Trust("/mine.pem")
    monkeypatch.setenv("SSL_CERT_DIR", "/mine")
    assert certificates.find() == Trust("/mine.pem", "/mine")


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An https address of this machine, and the bundle that has its authority."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    words = f"req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {key} -out {certificate}".split()
    words += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    made = subprocess.run(["openssl", *words], capture_output=True)
    if made.returncode:
        pytest.skip("needs openssl")
    server = HTTPServer(("127.0.0.1", 0), _Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"https://localhost:{server.server_port}/", certificate


def ask(url: str, *, insecure: bool = False) -> bytes:
    async def go() -> bytes:
        with Client(1) as client:
            return (await client.ask(Request(url, insecure=insecure))).body

    return asyncio.run(go())


def test_a_known_authority_is_trusted(
    secure: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, bundle = secure
    monkeypatch.setattr(certificates, "find", lambda: Trust(str(bundle)))
    assert ask(url) == b"ok"


def test_an_unknown_one_is_an_error_that_no_retry_cures(secure: tuple[str, Path]) -> None:
    with pytest.raises(TryError) as caught:
        ask(secure[0])
    assert caught.value.cause is Cause.CERTIFICATE
    assert caught.value.final
    assert ask(secure[0], insecure=True) == b"ok"

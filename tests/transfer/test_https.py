"""By https: a registry, its realm and its data on three hosts, whose authority the user names."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pull.driven import POLICY, Seen, drive
from tests.support.driving import is_right
from watcher.demo.registry import Layer, Manners, Model, Registry
from watcher.observe.host import Host
from watcher.pull.account import Options
from watcher.pull.failures import Cause
from watcher.pull.target import Target
from watcher.transfer.questions import asking

MB = 1_000_000
SIZE = 24 * MB
HOSTS = ("registry.test", "auth.test", "cdn.test")


def openssl(words: str) -> None:
    if subprocess.run(["openssl", *words.split()], capture_output=True).returncode:
        pytest.skip("needs openssl 3")


class Secure:
    """A registry that speaks https for `HOSTS`, and a proxy that leads each address to it."""

    def __init__(self, folder: Path, registry: Registry) -> None:
        self.authority, chain = folder / "authority.pem", folder / "chain.pem"
        self._port = registry.port
        made = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test"
        openssl(f"{made} -keyout {folder}/authority.key -out {self.authority}")
        names = ",".join(f"DNS:{host}" for host in HOSTS)
        signed = f" -CA {self.authority} -CAkey {folder}/authority.key"
        usage = f" -addext basicConstraints=critical,CA:FALSE -addext subjectAltName={names}"
        openssl(f"{made} -keyout {folder}/chain.key -out {chain}{signed}{usage}")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain, folder / "chain.key")
        served = registry._server
        served.socket = context.wrap_socket(
            served.socket, server_side=True, do_handshake_on_connect=False
        )
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.asked: set[str] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            self.asked.add(client.recv(65536).split()[1].decode())
            client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            with socket.create_connection(("127.0.0.1", self._port)) as served:
                back = threading.Thread(target=copy, args=(served, client))
                back.start()
                copy(client, served)
                back.join()


def copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def secure(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[Secure]:
    made = Secure(tmp_path, registry)
    monkeypatch.setenv("https_proxy", made.url)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.authority))
    registry.manners = Manners(
        wants="bearer", uses=6, lifetime=3, realm="https://auth.test/token", data="https://cdn.test"
    )
    yield made
    made.close()


def pull(store: Path, registry: Registry) -> tuple[Model, Seen]:
    (store / "blobs").mkdir(parents=True)
    model = registry.add_model("demo", "1b", [Layer(SIZE)])
    named = Model(f"{HOSTS[0]}/library/demo:1b", model.manifest, model.digests, model.config)
    target = Target("http://127.0.0.1:1", POLICY.settings, asking(Host(str(store))))
    return named, drive(target, named, Options())


def test_a_model_arrives(tmp_path: Path, registry: Registry, secure: Secure) -> None:
    model, seen = pull(tmp_path / "models", registry)
    assert seen.end.cause is None, seen.end
    assert is_right(tmp_path / "models", model.digests[0])
    assert secure.asked == {f"{host}:443" for host in HOSTS}
    assert registry.bytes_served(model.digests[0]) <= SIZE + 64 * 1024
    with_token = {head["Host"] for _, head in registry.asked if "Authorization" in head}
    assert with_token == {HOSTS[0]}


def test_an_unknown_authority_ends_it_before_anything_is_asked(
    tmp_path: Path, registry: Registry, secure: Secure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    _, seen = pull(tmp_path / "models", registry)
    assert seen.end.cause is Cause.CERTIFICATE
    assert not registry.asked


@pytest.mark.parametrize("leads", ["realm", "data"])
def test_a_reference_to_http_ends_the_pull_and_is_not_followed(
    tmp_path: Path, registry: Registry, secure: Secure, leads: str
) -> None:
    setattr(registry.manners, leads, f"http://127.0.0.1:{registry.port}")
    _, seen = pull(tmp_path / "models", registry)
    assert "refers to http, which is not encrypted" in seen.end.text
    assert {head["Host"] for _, head in registry.asked} <= {*HOSTS}

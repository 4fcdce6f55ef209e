"""A real registry as the source, and a real Ollama that takes the store for its own work."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.pull.conftest import SERVERS
from tests.pull.driven import POLICY, drive
from tests.support.servers import Server
from watcher.demo.registry import Registry
from watcher.model import MIB
from watcher.observe.host import Host
from watcher.ollama import ranges
from watcher.pull.failures import Cause
from watcher.pull.target import Target
from watcher.transfer import values
from watcher.transfer.push import Order, Push, Pushed
from watcher.transfer.questions import asking

from .driven import QUICK, Background, Here, wait_for, with_options

CONFIG = """\
version: 0.1
storage: {{filesystem: {{rootdirectory: "{folder}"}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@pytest.fixture
def docker(tmp_path: Path) -> Iterator[str]:
    """The address of a real registry, as Debian has it."""
    binary = shutil.which("docker-registry")
    if binary is None:
        pytest.skip("needs docker-registry")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tmp_path / "docker.yml"
    config.write_text(CONFIG.format(folder=tmp_path / "docker", port=port))
    process = subprocess.Popen([binary, "serve", str(config)], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: answers(port))
        yield f"localhost:{port}"
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def push(host: str, full: Here) -> Pushed:
    """Push the model of a store that has it there."""
    return Push(Order(str(full.path), full.name, f"http://{host}"), QUICK, full.events.append).run()


@pytest.fixture
def full(here: Here, tmp_path: Path) -> Here:
    """Another store, which has the model."""
    full = here.moved(tmp_path / "full")
    (full.path / "blobs").mkdir(parents=True)
    full.fill()
    return full


def test_a_model_arrives_from_a_real_plain_registry(here: Here, full: Here, docker: str) -> None:
    push(docker, full)
    here.model = dataclasses.replace(here.model, name=f"http://{docker}/library/demo:1b")
    target = Target("http://127.0.0.1:1", POLICY.settings, asking(Host(str(here.path))))
    stopped = drive(target, here.model, cancelled=lambda: here.written_if_any() > MIB)
    assert stopped.end.cause in (Cause.INTERRUPTED, None)  # it may be done before that is seen
    assert drive(target, here.model).end.cause is None
    here.check()


@pytest.mark.parametrize("is_there", [True, False])
def test_a_real_plain_registry_is_a_mirror(
    here: Here, full: Here, docker: str, is_there: bool
) -> None:
    push(docker, full)
    if not is_there:
        here.registry.close()
    settings = dataclasses.replace(POLICY.settings, mirrors=(f"http://{docker}",))
    seen = drive(Target("http://127.0.0.1:1", settings, Host(str(here.path))), here.model)
    assert seen.end.cause is None
    here.check()
    assert not here.registry.stats()["bytes"]
    assert ("using the manifest of the mirror" in " ".join(seen.notes)) is not is_there


def test_a_push_that_was_killed_goes_on_and_a_damaged_blob_is_not_taken(
    full: Here, docker: str
) -> None:
    right = full.blob.read_bytes()
    full.blob.write_bytes(right[:-1] + b"\0")
    with pytest.raises(values.TransferError, match="checksum mismatch"):
        push(docker, full)
    full.blob.write_bytes(right)
    done = push(docker, full)
    assert {layer.digest: is_sent for layer, is_sent in done.layers}[full.digest]
    assert (push(docker, full).is_new, done.is_new) == (False, True)


def test_a_team_downloads_a_model_once(here: Here, docker: str, tmp_path: Path) -> None:
    here.pull()
    of_one_host = here.registry.stats()["bytes"]
    push(docker, here)
    settings = dataclasses.replace(POLICY.settings, mirrors=(f"http://{docker}",))
    stores = [here.moved(tmp_path / str(number)) for number in range(5)]
    for store in stores:
        for name in ("blobs", "manifests"):
            (store.path / name).mkdir(parents=True)

    def pull(store: Here) -> Cause | None:
        host = Host(str(store.path))
        return drive(Target("http://127.0.0.1:1", settings, host), store.model).end.cause

    with ThreadPoolExecutor(len(stores)) as pool:
        assert [*pool.map(pull, stores)] == [None] * len(stores)
    for store in stores:
        store.check()
    assert here.registry.stats()["bytes"] == of_one_host


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, here: Here) -> Iterator[Server]:
    with request.param(here.path) as made:
        yield made


def models(server: Server) -> list[str]:
    return [each["name"] for each in json.loads(server.request("GET", "/api/tags")[1])["models"]]


def test_the_next_server_has_the_model_and_keeps_it(here: Here, server: Server) -> None:
    here.pull()
    for blob in (here.path / "blobs").iterdir():
        os.utime(blob, (1, 1))  # as old as can be: only the manifest protects it
    server.start().wait_ready()
    assert len(models(server)) == 1
    here.check()


def test_a_pull_of_a_running_server_finds_all_layers_and_writes_the_same_manifest(
    here: Here, server: Server
) -> None:
    server.start().wait_ready()
    with here.opened() as opened:
        assert not opened.publish(here.fetch().verified).changed
    here.registry.reset_stats()
    assert server.pull(here.model.name)[-1] == {"status": "success"}
    assert not here.registry.stats()["bytes"]
    here.check()
    assert len(models(server)) == 1


def test_a_transfer_is_out_of_reach_of_a_servers_start(here: Here, server: Server) -> None:
    digest = here.model.digests[0]
    here.registry.hold(digest, at=(5 * MIB,))
    with Background(here.transfer(with_options(sync_bytes=MIB))) as running:
        here.registry.wait_held(digest, 1)
        wait_for(lambda: here.durable() >= 5 * MIB)
        running.work.stop()
    left = here.size - ranges.size(here.believed())
    for path in here.folder.iterdir():
        os.utime(path, (1, 1))
    server.start().wait_ready()
    server.stop()
    here.registry.release()
    before = len(here.registry.asked)
    here.pull()
    assert 0 < here.asked(before) == left <= here.size - 5 * MIB


def test_a_servers_own_pull_meanwhile_disturbs_neither(here: Here, server: Server) -> None:
    server.start().wait_ready()
    here.registry.throttle(10_000_000)
    with Background(here.transfer()) as running:
        assert server.pull(here.model.name)[-1] == {"status": "success"}
        here.publish(running.result())
    here.check()
    for digest in here.model.digests:
        blob = here.path / "blobs" / digest.replace(":", "-")
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == digest[7:]


def test_registries_are_not_mixed_up(tmp_path: Path, here: Here) -> None:
    with Registry() as second:
        other = Here(tmp_path / "models", second, 3_000_000)
        here.pull()
        other.pull()
        here.check()

"""The registry: that it serves what it says, and that every fault does what it says."""

from __future__ import annotations

import hashlib
import http.client
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.servers import ROOT, wait_until
from watcher.demo.registry import PAGE, Fault, Layer, Model, Registry

SIZE = 3_000_000


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes
    error: Exception | None = None


def ask(
    registry: Registry, path: str, headers: Mapping[str, str] | None = None, method: str = "GET"
) -> Answer:
    """A request, and as much of the answer as came."""
    connection = http.client.HTTPConnection(registry.host, timeout=120)
    connection.request(method, path, headers=dict(headers or {}))
    response = connection.getresponse()
    body, error = b"", None
    try:
        while data := response.read1(65536):
            body += data
    except (OSError, http.client.HTTPException) as broken:
        error = broken
    connection.close()
    return Answer(response.status, dict(response.headers), body, error)


@pytest.fixture
def model(registry: Registry) -> Model:
    return registry.add_model("demo", "1b", [Layer(SIZE)])


def data(model: Model) -> str:
    return f"/data/{model.digests[0]}"


def truth(registry: Registry, model: Model) -> bytes:
    return registry.content(model.digests[0]).read(0, SIZE)


def test_manifest_names_what_is_served(registry: Registry, model: Model) -> None:
    answer = ask(registry, "/v2/library/demo/manifests/1b")
    manifest = json.loads(answer.body)
    for layer in [*manifest["layers"], manifest["config"]]:
        body = ask(registry, f"/data/{layer['digest']}").body
        assert len(body) == layer["size"]
        assert "sha256:" + hashlib.sha256(body).hexdigest() == layer["digest"]
    assert registry.stats()["requests"] == {"manifest": 1, "data": 5}
    assert registry.bytes_served(model.digests[0]) == SIZE


def test_content_is_the_same_every_time_and_from_every_offset(
    registry: Registry, model: Model
) -> None:
    with Registry() as other:
        again = other.add_model("demo", "1b", [Layer(SIZE)])
        assert again.digests == model.digests
        assert other.add_model("demo", "1b", [Layer(SIZE)], seed=1).digests[0] != model.digests[0]
    whole = truth(registry, model)
    assert b"\0" not in whole
    assert len({whole[n : n + 4096] for n in range(0, SIZE, 4096)}) == -(-SIZE // 4096)
    content = registry.content(model.digests[0])
    for start, stop in ((0, 1), (1 << 20, (1 << 20) + 1), (999_999, 2_500_001), (SIZE - 1, SIZE)):
        assert content.read(start, stop) == whole[start:stop]


def test_zeros_on_demand(registry: Registry) -> None:
    zeros = ((100, 2_000_000), (SIZE - 5, SIZE))
    model = registry.add_model("demo", "1b", [Layer(SIZE, zeros=zeros)])
    whole = truth(registry, model)
    assert all(whole[a:b] == bytes(b - a) for a, b in zeros)
    assert whole.count(0) == sum(b - a for a, b in zeros)
    assert "sha256:" + hashlib.sha256(whole).hexdigest() == model.digests[0]


def test_head_redirect_and_range(registry: Registry, model: Model) -> None:
    path = f"/v2/library/demo/blobs/{model.digests[0]}"
    head = ask(registry, path, method="HEAD")
    assert (head.status, head.headers["Content-Length"]) == (200, str(SIZE))
    redirect = ask(registry, path)
    assert redirect.status == 307
    assert redirect.headers["Location"] == f"http://127.0.0.1:{registry.port}{data(model)}"
    part = ask(registry, data(model), {"Range": "bytes=10-19"})
    assert (part.status, part.body) == (206, truth(registry, model)[10:20])
    assert part.headers["Content-Range"] == f"bytes 10-19/{SIZE}"
    assert ask(registry, data(model), {"Range": f"bytes={SIZE}-"}).status == 416


def test_unknown_things_are_404(registry: Registry, model: Model) -> None:
    registry.remove_tag("library/demo", "1b")
    for path in ("/v2/library/demo/manifests/1b", "/data/sha256:0", "/other"):
        assert ask(registry, path).status == 404
    assert ask(registry, "/v2/library/demo/blobs/sha256:0", method="HEAD").status == 404


def test_reset(registry: Registry, model: Model) -> None:
    registry.add_fault(Fault("reset", after=1_000_000))
    answer = ask(registry, data(model))
    assert isinstance(answer.error, ConnectionResetError)
    assert answer.body == truth(registry, model)[:1_000_000]
    assert registry.bytes_served(model.digests[0]) == 1_000_000


def test_truncate(registry: Registry, model: Model) -> None:
    registry.add_fault(Fault("truncate", after=1_000_000))
    answer = ask(registry, data(model))
    assert (answer.status, answer.headers["Content-Length"]) == (200, str(SIZE))
    assert answer.body == truth(registry, model)[:1_000_000]
    assert answer.error is None or isinstance(answer.error, http.client.IncompleteRead)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("status", [200, 206, 500])
def test_page(status: int, cut: bool, registry: Registry, model: Model) -> None:
    registry.add_fault(Fault("page", status=status, cut=cut))
    answer = ask(registry, data(model), {"Range": "bytes=0-99"})
    assert (answer.status, answer.body) == (status, PAGE.encode())
    promised = len(PAGE) * (2 if cut else 1)
    assert answer.headers["Content-Length"] == str(promised)
    assert registry.bytes_served(model.digests[0]) == 0


def test_ignore_range(registry: Registry, model: Model) -> None:
    registry.add_fault(Fault("ignore_range"))
    answer = ask(registry, data(model), {"Range": "bytes=100-199"})
    assert (answer.status, answer.body) == (200, truth(registry, model))


@pytest.mark.parametrize("kind", ["stall", "hang"])
def test_stall_and_hang_last_until_they_are_removed(
    kind: Any, registry: Registry, model: Model
) -> None:
    fault = registry.add_fault(Fault(kind, after=1_000_000, times=1))
    answers: list[Answer | Exception] = []

    def run() -> None:
        try:
            answers.append(ask(registry, data(model)))
        except (OSError, http.client.HTTPException) as error:
            answers.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_until(lambda: fault.times == 0, "the fault")
    if kind == "stall":
        wait_until(lambda: registry.bytes_served(model.digests[0]) == 1_000_000, "the bytes")
    thread.join(0.15)
    assert not answers
    registry.remove_fault(fault)
    thread.join(120)
    assert answers
    # The next request is well: `times` is spent.
    assert ask(registry, data(model)).body == truth(registry, model)


def test_fault_of_one_step_digest_and_range(registry: Registry, model: Model) -> None:
    registry.add_fault(Fault("page", digest=model.digests[0], begin=100, end=200, status=500))
    registry.add_fault(Fault("page", "manifest", status=503))
    assert ask(registry, "/v2/library/demo/manifests/1b").status == 503
    for first, status in ((99, 206), (100, 500), (199, 500), (200, 206)):
        assert ask(registry, data(model), {"Range": f"bytes={first}-299"}).status == status
    assert ask(registry, f"/data/{model.digests[1]}").status == 200


def test_changing_manifest(registry: Registry, model: Model) -> None:
    registry.set_manifests("library/demo", "1b", [b"1", b"2"])
    path = "/v2/library/demo/manifests/1b"
    assert [ask(registry, path).body for _ in range(3)] == [b"1", b"2", b"1"]


def test_a_throttled_registry_takes_its_time(registry: Registry, model: Model) -> None:
    registry.throttle(10_000_000)
    started = time.monotonic()
    assert ask(registry, data(model)).body == truth(registry, model)
    assert time.monotonic() - started > 0.25


@pytest.mark.parametrize(("gate", "held"), [({"after": 5}, 15), ({"at": [7, 30, 40]}, 30)])
def test_a_held_layer_is_sent_up_to_its_gate_and_goes_on_when_released(
    gate: dict[str, Any], held: int, registry: Registry, model: Model
) -> None:
    digest = model.digests[0]
    registry.hold(digest, **gate)
    answers: list[Answer] = []
    ranged = {"Range": "bytes=10-99"}
    thread = threading.Thread(
        target=lambda: answers.append(ask(registry, data(model), ranged)), daemon=True
    )
    thread.start()
    assert registry.wait_held(digest, 1) == [held]
    assert registry.bytes_served(digest) == held - 10
    registry.hold(digest, at=[50])
    wait_until(lambda: registry.held(digest) == [50], "the next gate")
    assert not answers
    registry.release(digest)
    thread.join(120)
    assert answers[0].body == truth(registry, model)[10:100]
    assert registry.held(digest) == []


@pytest.fixture
def process() -> Iterator[str]:
    """The registry as a process; its URL."""
    command = [sys.executable, "-m", "watcher.demo.registry", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        yield running.stdout.readline().strip()
        running.kill()


def test_process_is_controlled_by_http(process: str) -> None:
    def control(order: object) -> Any:
        request = urllib.request.Request(process + "/_control", json.dumps(order).encode())
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    layers = [{"size": SIZE, "zeros": [[5, 9]]}]
    model = control({"model": {"name": "demo", "tag": "1b", "layers": layers}})["model"]
    assert model["name"] == f"{process}/library/demo:1b"
    digest = model["digests"][0]
    control({"fault": {"kind": "page", "status": 503, "times": 1}, "throttle": 1e9})
    with pytest.raises(urllib.request.HTTPError):
        urllib.request.urlopen(f"{process}/data/{digest}", timeout=120)
    with urllib.request.urlopen(f"{process}/data/{digest}", timeout=120) as answer:
        assert "sha256:" + hashlib.sha256(answer.read()).hexdigest() == digest
    with urllib.request.urlopen(process + "/_stats", timeout=120) as answer:
        assert json.load(answer)["bytes"] == {digest: SIZE}
    control({"hold": {"digest": digest, "after": 10}, "release": None})
    assert control({"reset_stats": True})["bytes"] == {}
    control({"remove_tag": ["library/demo", "1b"]})
    with pytest.raises(urllib.request.HTTPError):
        control({"fault": {"kind": "page", "nonsense": 1}})

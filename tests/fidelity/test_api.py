"""Every path of the API, the process itself, and that the engine leans on nothing of ours."""

from __future__ import annotations

import ast
import hashlib
import http.client
import json
import sys
from pathlib import Path

import pytest

import watcher.demo
from tests.support.servers import EngineServer, blob, collapsed, tree, wait_until
from watcher.demo.registry import Layer, Registry

from .conftest import MakeServer

GGUF = b"GGUF" + bytes(20)
DEMO = Path(watcher.demo.__path__[0])


@pytest.mark.parametrize("path", sorted(DEMO.rglob("*.py")), ids=lambda path: path.stem)
def test_imports_only_the_standard_library_and_each_other(path: Path) -> None:
    imported = {
        name.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    others = {name for name in imported if not f"{name}.".startswith("watcher.demo.")}
    assert {name.partition(".")[0] for name in others} <= sys.stdlib_module_names


def test_process_looks_like_a_server(engine: EngineServer) -> None:
    engine.start().wait_ready()
    process = Path("/proc", str(engine.pid))
    assert (process / "comm").read_text() == "ollama\n"
    assert (process / "cmdline").read_text().rstrip("\0").split("\0")[-1] == "serve"
    assert f"Listening on 127.0.0.1:{engine.port} (version 0.0.0-demo)" in engine.log
    address = f"127.0.0.1:{engine.port}"
    with EngineServer(engine.store.with_name("other"), {"OLLAMA_HOST": address}) as other:
        assert other.start().wait_exit() == 1
        assert other.log == f"Error: listen tcp {address}: bind: address already in use\n"
    assert engine.kill(15) == 0


def test_root_version_ps_tags(make_server: MakeServer) -> None:
    server = make_server().start().wait_ready()
    assert server.request("GET", "/") == (200, b"Ollama is running")
    assert server.request("HEAD", "/") == (200, b"")
    assert list(json.loads(server.request("GET", "/api/version")[1])) == ["version"]
    assert server.request("GET", "/api/ps") == (200, b'{"models":[]}')
    assert server.request("GET", "/api/tags") == (200, b'{"models":[]}')
    assert server.request("HEAD", "/api/tags")[0] == 200
    assert server.request("GET", "/nothing")[0] == 404


def test_bad_requests(make_server: MakeServer) -> None:
    server = make_server().start().wait_ready()
    empty = (400, b'{"error":"missing request body"}')
    for method, path in (
        ("POST", "/api/pull"),
        ("DELETE", "/api/delete"),
        ("POST", "/api/copy"),
        ("POST", "/api/create"),
    ):
        assert server.request(method, path) == empty
        assert server.request(method, path, b"{")[0] == 400
    invalid = (400, b'{"error":"invalid model name"}')
    assert server.request("POST", "/api/pull", {"model": "a b"}) == invalid
    assert server.request("POST", "/api/pull", {"model": "x/y:"}) == invalid
    assert server.request("POST", "/api/pull", {"model": ""}) == invalid
    status, body = server.request("DELETE", "/api/delete", {"model": "none"})
    assert (status, body) == (404, b'{"error":"model \'none\' not found"}')
    status, body = server.request("DELETE", "/api/delete", {"name": "a b"})
    assert (status, body) == (400, b'{"error":"name \\"a b\\" is invalid"}')


def test_pull_without_stream(registry: Registry, make_server: MakeServer) -> None:
    model = registry.add_model("demo", "1b", [Layer(1000)])
    server = make_server().start().wait_ready()
    body = {"model": model.name, "insecure": True, "stream": False}
    assert server.request("POST", "/api/pull", body) == (200, b'{"status":"success"}')
    registry.remove_tag("library/demo", "1b")
    status, text = server.request("POST", "/api/pull", body)
    assert status == 500
    assert text == b'{"error":"pull model manifest: file does not exist"}'


def test_plain_http_is_not_spoken_unless_insecure(
    registry: Registry, make_server: MakeServer
) -> None:
    model = registry.add_model("demo", "1b", [Layer(1000)])
    server = make_server().start().wait_ready()
    status, body = server.request("POST", "/api/pull", {"model": model.name})
    assert status == 200
    assert b'{"error":"pull model manifest: ' in body
    assert registry.stats()["requests"] == {}


def test_tags_copy_delete(store: Path, registry: Registry, make_server: MakeServer) -> None:
    model = registry.add_model("demo", "1b", [Layer(1000)])
    server = make_server().start().wait_ready()
    server.pull(model.name)
    name = model.name.removeprefix("http://")

    def names() -> set[str]:
        models = json.loads(server.request("GET", "/api/tags")[1])["models"]
        return {model["name"] for model in models}

    assert names() == {name}
    assert server.request("POST", "/api/copy", {"source": name, "destination": "mine"})[0] == 200
    copied = store / "manifests/registry.ollama.ai/library/mine/latest"
    assert copied.read_bytes() == model.manifest
    assert names() == {name, "mine:latest"}
    status, body = server.request("POST", "/api/copy", {"source": "no", "destination": "x"})
    assert (status, body) == (404, b'{"error":"model \\"no\\" not found"}')
    assert server.request("DELETE", "/api/delete", {"model": name})[0] == 200
    assert blob(store, model.digests[0]).exists()
    # A partial is none of a model's layers: it stays.
    left = blob(store, model.digests[0], "-partial-0")
    left.write_bytes(b"")
    assert server.request("DELETE", "/api/delete", {"model": "MINE"})[0] == 200
    assert set(tree(store)) == {str(left.relative_to(store)), "manifests"}


def test_list_shows_a_model_without_its_config_until_a_restart(
    store: Path, registry: Registry, make_server: MakeServer
) -> None:
    model = registry.add_model("demo", "1b", [Layer(1000)])
    server = make_server().start().wait_ready()
    server.pull(model.name)
    blob(store, model.config).unlink()
    assert b"library/demo:1b" in server.request("GET", "/api/tags")[1]
    server.restart()
    assert server.request("GET", "/api/tags") == (200, b'{"models":[]}')


def test_blobs_are_uploaded_through_temporaries(store: Path, make_server: MakeServer) -> None:
    server = make_server().start().wait_ready()
    digest = "sha256:" + hashlib.sha256(GGUF).hexdigest()
    assert server.request("HEAD", f"/api/blobs/{digest}")[0] == 404
    assert server.request("HEAD", "/api/blobs/sha256:1")[0] == 400
    assert server.request("POST", f"/api/blobs/{digest}", GGUF)[0] == 201
    assert server.request("HEAD", f"/api/blobs/{digest}")[0] == 200
    assert server.request("POST", f"/api/blobs/{digest}", GGUF)[0] == 200
    path = blob(store, digest)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (GGUF, 0o644)
    status, body = server.request("POST", f"/api/blobs/sha256:{'0' * 64}", GGUF)
    assert status == 400
    assert b"digest mismatch, expected" in body
    assert set(tree(store)) - {"manifests"} == {str(path.relative_to(store))}


def test_upload_under_way(store: Path, engine: EngineServer) -> None:
    engine.start().wait_ready()
    connection = http.client.HTTPConnection("127.0.0.1", engine.port)
    connection.putrequest("POST", f"/api/blobs/sha256:{'0' * 64}")
    connection.putheader("Content-Length", "1000000")
    connection.endheaders()
    connection.send(bytes(400_000))

    def temporaries() -> list[Path]:
        return [path for path in (store / "blobs").iterdir() if path.name[7:].isdigit()]

    wait_until(temporaries, "the temporary")
    (temporary,) = temporaries()
    assert temporary.stat().st_mode & 0o777 == 0o600
    wait_until(lambda: engine.open_files().values(), "it to be open")
    connection.close()
    wait_until(lambda: not temporaries(), "its end")


def test_create_from_uploaded_blobs(store: Path, engine: EngineServer) -> None:
    engine.start().wait_ready()
    digest = "sha256:" + hashlib.sha256(GGUF).hexdigest()
    engine.request("POST", f"/api/blobs/{digest}", GGUF)

    def create(**more: object) -> list[str]:
        body = {"model": "mine", "files": {"a.gguf": digest}, **more}
        lines = engine.request("POST", "/api/create", body)[1].splitlines()
        return collapsed(json.loads(line) for line in lines)

    told = create(template="{{ .Prompt }}")
    assert told[0] == f"using existing layer {digest}"
    assert told[1].startswith("creating new layer sha256:")
    assert told[2:] == ["writing manifest", "success"]
    manifest = json.loads((store / "manifests/registry.ollama.ai/library/mine/latest").read_bytes())
    template = manifest["layers"][1]
    assert template["mediaType"] == "application/vnd.ollama.image.template"
    assert blob(store, template["digest"]).read_bytes() == b"{{ .Prompt }}"
    # Made again without a template, the old one's blob goes.
    assert create()[-1] == "success"
    assert not blob(store, template["digest"]).exists()
    status, _ = engine.request("POST", "/api/create", {"model": "mine"})
    assert status == 400
    lines = engine.request("POST", "/api/create", {"model": "other", "from": "mine"})[1]
    assert lines.splitlines()[-1] == b'{"status":"success"}'

"""What a server's start does to its store: statements that no recording covers."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

import pytest

from tests.support.servers import Server, tree, wait_until

from .conftest import MakeServer

NAMED = "a" * 64
CONFIG = "b" * 64
ORPHAN = "c" * 64
NAME = "registry.ollama.ai/library/demo/latest"
HOUR = 3600


def manifest(digest: str = f"sha256:{NAMED}", **extra: object) -> str:
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": 1}
    config = {"mediaType": "x", "digest": f"sha256:{CONFIG}", "size": 1}
    return json.dumps({"schemaVersion": 2, "config": config, "layers": [layer], **extra})


def old(path: Path, age: float = 2 * HOUR) -> Path:
    then = time.time() - age
    os.utime(path, (then, then), follow_symlinks=False)
    return path


def blobs(store: Path, *names: str, age: float = 2 * HOUR) -> None:
    (store / "blobs").mkdir(parents=True, exist_ok=True)
    for name in names:
        path = store / "blobs" / name
        path.write_bytes(b"x")
        old(path, age)


def put_manifest(store: Path, text: str | bytes, name: str = NAME) -> Path:
    path = store / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def left(store: Path) -> set[str]:
    """The names in blobs/ that a start has left."""
    return {path.name for path in (store / "blobs").iterdir()}


def start_and_stop(server: Server) -> None:
    server.start().wait_ready()
    server.stop()


NAMED_BLOB, ORPHAN_BLOB = f"sha256-{NAMED}", f"sha256-{ORPHAN}"
PROTECTS = {NAMED_BLOB}
NOTHING: set[str] = set()
OFF = {NAMED_BLOB, ORPHAN_BLOB}

TEXTS: dict[str, tuple[str | bytes, set[str]]] = {
    "valid": (manifest(), PROTECTS),
    "bytes-behind": (manifest() + "}}garbage", PROTECTS),
    "capital-keys": (
        manifest().replace("layers", "LAYERS").replace("digest", "Digest"),
        PROTECTS,
    ),
    "unknown-fields": (manifest(more={"a": [1.5, None]}), PROTECTS),
    "not-utf-8": (manifest(more="§").encode().replace(b"\\u00a7", b"\xff"), PROTECTS),
    "lone-surrogate": (manifest(more="\ud800"), PROTECTS),
    "blanks-first": ("\r\n\t " + manifest(), PROTECTS),
    "empty-object": ("{}", NOTHING),
    "null": ("null", NOTHING),
    "null-layers": (manifest(layers=None), NOTHING),
    "null-layer": (manifest(layers=[None]), NOTHING),
    "null-digest": (manifest(layers=[{"digest": None}]), NOTHING),
    "dash-spelling": (manifest(f"sha256-{NAMED}"), NOTHING),
    "capital-digits": (manifest(f"sha256:{NAMED.upper()}"), NOTHING),
    "empty": ("", OFF),
    "blank": (" \n", OFF),
    "half": (manifest()[:40], OFF),
    "array": ("[]", OFF),
    "string": ('"x"', OFF),
    "number": ("5", OFF),
    "garbage-first": ("x" + manifest(), OFF),
    "byte-order-mark": ("\ufeff" + manifest(), OFF),
    "layers-object": (manifest(layers={}), OFF),
    "layer-string": (manifest(layers=["x"]), OFF),
    "size-string": (manifest(layers=[{"size": "1"}]), OFF),
    "size-fraction": (manifest(layers=[{"size": 1.5}]), OFF),
    "size-exponent": ('{"layers": [{"size": 1e3}]}', OFF),
    "size-bool": (manifest(layers=[{"size": True}]), OFF),
    "size-too-large": (manifest(layers=[{"size": 2**63}]), OFF),
    "version-string": (manifest(schemaVersion="2"), OFF),
    "digest-number": (manifest(layers=[{"digest": 5}]), OFF),
    "config-array": (manifest(config=[]), OFF),
    "not-a-number": (manifest(more=float("nan")), OFF),
    "control-character": (manifest(more="@").replace("@", "\x01"), OFF),
}


@pytest.mark.parametrize("case", TEXTS)
def test_manifest_text_decides(case: str, store: Path, make_server: MakeServer) -> None:
    text, expected = TEXTS[case]
    blobs(store, NAMED_BLOB, ORPHAN_BLOB)
    put_manifest(store, text)
    start_and_stop(make_server())
    assert left(store) == expected


PLACES = {
    "one-too-shallow": ("registry.ollama.ai/library/latest", NOTHING),
    "one-too-deep": (NAME + "/more", NOTHING),
    "ds-store": ("registry.ollama.ai/library/demo/.DS_Store", OFF),
    "bad-tag": ("registry.ollama.ai/library/demo/a b", OFF),
    "tag-too-long": ("registry.ollama.ai/library/demo/" + "t" * 81, OFF),
    "bad-namespace": ("registry.ollama.ai/lib.rary/demo/latest", OFF),
    "bad-host": (".x/library/demo/latest", OFF),
    "port-in-host": ("localhost:5000/library/demo/latest", PROTECTS),
    "colon-in-tag": ("localhost/library/demo/a:b", OFF),
    "other-case": ("Registry.Ollama.AI/Library/Demo/LATEST", PROTECTS),
}


@pytest.mark.parametrize("case", PLACES)
def test_manifest_place_decides(case: str, store: Path, make_server: MakeServer) -> None:
    name, expected = PLACES[case]
    blobs(store, NAMED_BLOB, ORPHAN_BLOB)
    put_manifest(store, manifest(), name)
    start_and_stop(make_server())
    assert left(store) == expected


def test_link_to_a_manifest_protects_and_a_folder_at_tag_depth_is_passed_over(
    store: Path, make_server: MakeServer
) -> None:
    blobs(store, NAMED_BLOB, ORPHAN_BLOB)
    elsewhere = store.parent / "elsewhere"
    elsewhere.write_text(manifest())
    link = store / "manifests" / NAME
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    (link.parent / "folder").mkdir()
    start_and_stop(make_server())
    assert left(store) == PROTECTS
    assert not (link.parent / "folder").exists()


def test_an_hour_is_the_limit(store: Path, make_server: MakeServer) -> None:
    blobs(store, f"{ORPHAN_BLOB}-partial", age=HOUR - 60)
    blobs(store, f"{ORPHAN_BLOB}-partial-0", age=HOUR + 1)
    start_and_stop(make_server())
    assert left(store) == {f"{ORPHAN_BLOB}-partial"}


@pytest.mark.parametrize("value", ["1", "yes", "'true'", "0", "false", "F", ""])
def test_no_prune(value: str, store: Path, make_server: MakeServer) -> None:
    blobs(store, ORPHAN_BLOB, "foreign")
    start_and_stop(make_server({"OLLAMA_NOPRUNE": value}))
    off = value in ("1", "yes", "'true'")
    assert left(store) == ({ORPHAN_BLOB, "foreign"} if off else set())


def test_names_and_kinds_in_blobs(store: Path, make_server: MakeServer) -> None:
    digits = "d" * 64
    blobs(store, ".DS_Store", "sha256-123", f"sha256-{digits}.tmp", f"sha256-{digits}1", "\udcff")
    target = store.parent / "target"
    target.mkdir()
    for name, to, age in (("to-folder", target, 7200), ("young", target, 0), ("gone", "x", 7200)):
        (store / "blobs" / name).symlink_to(to)
        old(store / "blobs" / name, age)
    (store / "blobs/folder").mkdir()
    old(store / "blobs/folder")
    start_and_stop(make_server())
    assert left(store) == {"folder", "young"}
    assert target.is_dir()


def test_old_spelling_is_renamed_at_any_depth(store: Path, make_server: MakeServer) -> None:
    blobs(store, f"sha256:{NAMED}", f"sha256:{ORPHAN}", age=0)
    (store / "blobs/folder").mkdir()
    (store / "blobs/folder/sha256:x").write_bytes(b"")
    (store / "blobs/sha256:empty").mkdir()
    blobs(store, ORPHAN_BLOB, age=0)
    (store / "blobs" / ORPHAN_BLOB).write_bytes(b"is replaced")
    start_and_stop(make_server())
    assert left(store) == {NAMED_BLOB, ORPHAN_BLOB, "folder", "sha256-empty"}
    assert (store / "blobs" / ORPHAN_BLOB).read_bytes() == b"x"
    assert (store / "blobs/folder/sha256-x").exists()


def test_folder_in_old_spelling_with_content_stops_the_server(
    store: Path, make_server: MakeServer
) -> None:
    (store / "blobs/sha256:folder").mkdir(parents=True)
    (store / "blobs/sha256:folder/file").write_bytes(b"")
    server = make_server().start()
    assert server.wait_exit() == 1
    assert "Error: lstat" in server.log


@pytest.mark.parametrize("folder", ["blobs/folder", "manifests/registry.ollama.ai"])
def test_unreadable_folder_stops_the_server(
    folder: str, store: Path, make_server: MakeServer
) -> None:
    blobs(store, NAMED_BLOB)
    put_manifest(store, manifest())
    (store / folder).mkdir(exist_ok=True)
    (store / folder).chmod(0)
    try:
        if os.access(store / folder, os.R_OK):
            pytest.skip("this user reads every folder")
        assert make_server().start().wait_exit() == 1
    finally:
        (store / folder).chmod(0o755)
    assert left(store) == ({NAMED_BLOB, "folder"} if "blobs" in folder else set())


def test_linked_blobs_are_pruned_and_not_walked(store: Path, make_server: MakeServer) -> None:
    elsewhere = store.parent / "elsewhere"
    blobs(elsewhere, ORPHAN_BLOB, f"sha256:{NAMED}")
    store.mkdir()
    (store / "blobs").symlink_to(elsewhere / "blobs")
    put_manifest(store, manifest())
    start_and_stop(make_server())
    assert left(store) == {f"sha256:{NAMED}"}


@pytest.mark.parametrize("folder", ["mod[1]", "mod\\els", "mod?ls", "mod[", "mod[]", "mod[^x]"])
def test_glob_characters_in_the_stores_path(
    folder: str, store: Path, make_server: MakeServer
) -> None:
    odd = store.parent / folder
    blobs(odd, NAMED_BLOB, ORPHAN_BLOB)
    put_manifest(odd, manifest())
    server = make_server({"OLLAMA_MODELS": str(odd)})
    start_and_stop(server)
    # `?` matches itself, a malformed pattern keeps the clean-up off, the others find nothing.
    expected = {"mod?ls": PROTECTS, "mod[": OFF, "mod[]": OFF}.get(folder, NOTHING)
    assert left(odd) == expected


def test_empty_folders_under_manifests_go(store: Path, make_server: MakeServer) -> None:
    path = put_manifest(store, manifest())
    (path.parent.parent / "gone/deeper").mkdir(parents=True)
    (store.parent / "elsewhere").mkdir()
    (path.parent.parent / "linked").symlink_to(store.parent / "elsewhere")
    start_and_stop(make_server())
    kept = {str(p.relative_to(path.parent.parent)) for p in path.parent.parent.iterdir()}
    assert kept == {"demo", "linked"}


def test_port_opens_before_the_start_and_http_answers_after_it(
    store: Path, make_server: MakeServer
) -> None:
    blobs(store, ORPHAN_BLOB)
    pipe = store / "manifests" / NAME
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    server = make_server({"OLLAMA_HOST": f"127.0.0.1:{address[1]}"}).start()
    # The start hangs at the manifest, which is a pipe that nobody has written to yet.
    wait_until(lambda: connects(address), "the port")
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert left(store) == {ORPHAN_BLOB}
        assert "Listening on" not in server.log
        wait_until(lambda: feed(pipe, manifest()) and "Listening on" in server.log, "the start")
        connection.settimeout(120)
        assert connection.recv(4) == b"HTTP"
    assert left(store) == set()


def connects(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address).close()
    except OSError:
        return False
    return True


def feed(pipe: Path, text: str) -> bool:
    """Write to a pipe, if someone reads it just now."""
    with contextlib.suppress(OSError):
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
    return True


def test_both_folders_are_made(store: Path, make_server: MakeServer) -> None:
    start_and_stop(make_server())
    assert set(tree(store)) >= {"blobs", "manifests"}

"""Data that is all there and has another hash than its digest: once that is known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.driving import audit, is_right, run
from tests.support.notation import age
from tests.support.servers import Server, blob, collapsed, sidecar
from watcher.demo.registry import Layer, Model, Registry

from .scenes import MB, MIB, seed_of

#: One part by the server's own rule.
SIZE = 9 * MB


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as served:
        yield served


@pytest.fixture
def model(registry: Registry, tmp_path: Path) -> Model:
    return registry.add_model("demo", "1b", [Layer(SIZE, seed=seed_of(tmp_path))], extras=False)


def lay_out(store: Path, registry: Registry, digest: str, wrong_at: int, more: int = 0) -> None:
    """All of the data, some of it wrong, with `more` never written behind it; no progress files."""
    data = blob(store, digest, "-partial")
    data.parent.mkdir(parents=True)
    (store / "manifests").mkdir()
    with data.open("wb") as file:
        file.writelines(registry.content(digest).slices(0, SIZE))
        file.seek(wrong_at)
        file.write(b"<html>" * 100)
        file.truncate(SIZE + more)
    age(data, 600)


def repaired(store: Path) -> str:
    done = run(store, "repair", "--yes", "--offline")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def claim_all(store: Path, digest: str) -> None:
    """Progress files that record everything: from a backup, or of a server that was killed."""
    data = blob(store, digest, "-partial")
    for path in data.parent.glob(f"{data.name}-*"):
        path.unlink()
    part = blob(store, digest, "-partial-0")
    part.write_text(sidecar(0, 0, SIZE, SIZE))
    age(part, 600)


def the_download(store: Path) -> tuple[str, dict[str, int], str]:
    """Its condition, its bytes, and what the audit says to a person."""
    (found,) = audit(store)["downloads"]
    return found["condition"], found["bytes"], run(store, "audit").stdout


def pull(server: Server, model: Model, registry: Registry) -> int:
    """Pull once, to the end: the bytes that were served."""
    registry.reset_stats()
    server.start().wait_ready()
    assert collapsed(server.pull(model.name))[-1] == "success"
    assert is_right(server.store, model.digests[0])
    return registry.bytes_served(model.digests[0])


def test_only_what_is_doubted_is_downloaded_again(
    server: Server, model: Model, registry: Registry
) -> None:
    """An error page lies where the download began: the good bytes behind it are kept."""
    store, digest = server.store, model.digests[0]
    lay_out(store, registry, digest, wrong_at=0)
    assert "checksum mismatch" in repaired(store)
    condition, sizes, told = the_download(store)
    assert condition == "paused"
    assert sizes["trusted"] == sizes["claimed"] == SIZE - MIB
    assert "checksum mismatch: 1.0 MB must be downloaded again" in told
    assert "complete" not in told
    assert "nothing to repair" in repaired(store)
    assert pull(server, model, registry) == MIB


def test_nothing_is_kept_where_any_byte_may_be_wrong(
    server: Server, model: Model, registry: Registry
) -> None:
    store, digest = server.store, model.digests[0]
    lay_out(store, registry, digest, wrong_at=SIZE // 2)
    repaired(store)
    claim_all(store, digest)
    condition, sizes, told = the_download(store)
    assert condition == "hollow"
    assert (sizes["claimed"], sizes["trusted"], sizes["repaired"]) == (SIZE, 0, SIZE)
    assert "0 % usable" in told
    assert "checksum mismatch" in told
    assert " repair sha256-" in told
    assert "Repaired" in repaired(store)
    condition, sizes, told = the_download(store)
    assert condition == "paused"
    assert (sizes["claimed"], sizes["trusted"], sizes["alone"]) == (0, 0, SIZE)
    assert "checksum mismatch: the next pull downloads all of it again" in told
    assert " repair sha256-" not in told
    assert "nothing to repair" in repaired(store)
    assert pull(server, model, registry) == SIZE


@pytest.mark.parametrize("first", ["repair", "pull"])
def test_our_own_pull_arrives(first: str, server: Server, model: Model, registry: Registry) -> None:
    """Without a repair the server finds the mismatch, discards everything, and begins again."""
    store, digest = server.store, model.digests[0]
    lay_out(store, registry, digest, wrong_at=SIZE // 2)
    repaired(store)
    claim_all(store, digest)
    if first == "repair":
        repaired(store)
    server.start().wait_ready()
    registry.reset_stats()
    done = run(store, "pull", "--host", server.url, "--insecure", model.name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert is_right(store, digest)
    assert registry.bytes_served(digest) <= SIZE + 1, "a byte finds out the address"


def test_a_download_with_a_wrong_hash_is_not_protected_from_pruning(
    server: Server, model: Model, registry: Registry
) -> None:
    """Nothing of it is worth a command, and none is advised for it."""
    store, digest = server.store, model.digests[0]
    lay_out(store, registry, digest, wrong_at=SIZE // 2)
    repaired(store)
    claim_all(store, digest)
    repaired(store)
    data = blob(store, digest, "-partial")
    for path in data.parent.glob(f"{data.name}-*"):
        age(path, 2 * 3600)
    assert "nothing to repair" in repaired(store)
    assert "download_at_risk" not in {each["kind"] for each in audit(store)["findings"]}
    assert pull(server, model, registry) == SIZE


@pytest.mark.parametrize("hashed", [False, True])
def test_the_hash_of_a_longer_file_proves_nothing_about_the_layer(
    hashed: bool, server: Server, model: Model, registry: Registry
) -> None:
    """The server cuts what lies beyond the parts before it hashes."""
    store, digest = server.store, model.digests[0]
    lay_out(store, registry, digest, wrong_at=0, more=MB)
    blob_of = blob(store, digest, "-partial")
    with blob_of.open("r+b") as file:
        file.writelines(registry.content(digest).slices(0, MB))
    age(blob_of, 600)
    host, name = model.name.removeprefix("http://").split("/", 1)
    path = store / "manifests" / host / name.replace(":", "/")
    path.parent.mkdir(parents=True)
    path.write_bytes(model.manifest)
    if hashed:
        repaired(store)
    claim_all(store, digest)
    condition, sizes, told = the_download(store)
    assert condition == "whole"
    assert (sizes["claimed"], sizes["trusted"]) == (SIZE, SIZE)
    assert "mismatch" not in told
    assert " repair localhost" not in told
    assert "nothing to repair" in repaired(store)
    assert pull(server, model, registry) == 0


def test_audit_advises_a_pull_for_a_download_that_is_recorded_as_complete(
    server: Server, model: Model, registry: Registry
) -> None:
    """A server that was killed before it gave it its final name."""
    store, digest = server.store, model.digests[0]
    lay_out(store, registry, digest, wrong_at=0)
    with blob(store, digest, "-partial").open("r+b") as file:
        file.writelines(registry.content(digest).slices(0, MB))
    claim_all(store, digest)
    assert " repair sha256-" not in the_download(store)[2]
    assert "nothing to repair" in repaired(store)
    assert pull(server, model, registry) == 0

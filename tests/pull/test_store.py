"""Pulls into stores that are full, blocked, damaged, or have all of it."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import needs_root
from tests.support.driving import lay_out
from tests.support.servers import Line, Server, blob
from watcher.demo.registry import Model, Registry
from watcher.pull.account import Options, Update
from watcher.pull.failures import Cause
from watcher.state.records import State

from .driven import MB, SIZE, add, arrived, drive, site

RATE = 40 * MB
VERIFY = Options(insecure=True, verify=True)


def cut_off(server: Server, registry: Registry) -> Model:
    """A model whose layer has come by a quarter and more, and the server is dead."""
    model = add(registry, server)
    registry.throttle(RATE)
    server.start().wait_ready()

    def kill(line: Line) -> None:
        if line.get("completed", 0) > SIZE // 4:
            server.kill()

    pull = server.start_pull(model.name, kill)
    pull.result()
    registry.throttle(None)
    return model


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[None]:
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@needs_root
def test_a_disk_that_is_too_small_is_reported_before_anything_comes(
    server: Server, registry: Registry
) -> None:
    with small_disk(server.store, 60):
        model = add(registry, server)
        server.start().wait_ready()
        seen = drive(site(server), model)
        server.stop()
        assert seen.end.cause is Cause.DISK_FULL
        assert registry.bytes_served(model.digests[0]) == 0


@needs_root
def test_a_disk_that_is_too_small_for_all_together_is_reported_and_the_pull_goes_on(
    server: Server, registry: Registry
) -> None:
    with small_disk(server.store, 200):
        other = add(registry, server, name="other").digests[0]
        lay_out(registry, server.store, other, aged=600)
        model = add(registry, server)
        server.start().wait_ready()
        seen = drive(site(server), model)
        server.stop()
        assert seen.end.cause is None, (seen.notes, seen.end)
        (told,) = [note for note in seen.notes if "the disk has" in note]
        assert told.endswith(f"for other unfinished downloads ({SIZE // 2 / MB:.1f} MB)")


def test_a_complete_model_is_up_to_date_without_asking_the_server(
    server: Server, registry: Registry
) -> None:
    model = add(registry, server, 3 * MB)
    server.start().wait_ready()
    assert drive(site(server), model).end.cause is None
    server.stop()
    seen = drive(site(server), model)
    assert seen.end.cause is None
    assert seen.notes == ["up to date"]
    assert seen.states == [State.STARTING, State.PULLING_MANIFEST, State.COMPLETED]


@pytest.mark.parametrize("what", ["layer", "manifest", "config"])
def test_a_missing_layer_is_fetched(server: Server, registry: Registry, what: str) -> None:
    model = add(registry, server, 3 * MB)
    server.start().wait_ready()
    drive(site(server), model)
    if what == "manifest":
        for path in (server.store / "manifests").rglob("1b"):
            path.unlink()
    else:
        blob(server.store, model.digests[0] if what == "layer" else model.config).unlink()
    assert drive(site(server), model).end.cause is None
    assert arrived(server, model)


def damage(server: Server, digest: str) -> None:
    with blob(server.store, digest).open("r+b") as file:
        file.seek(MB)
        byte = file.read(1)
        file.seek(MB)
        file.write(bytes([byte[0] ^ 1]))


def test_verify_fetches_a_corrupt_layer_again_once(server: Server, registry: Registry) -> None:
    model = add(registry, server, 3 * MB)
    server.start().wait_ready()
    drive(site(server), model)
    damage(server, model.digests[0])
    seen = drive(site(server), model)
    assert seen.notes == ["up to date"]
    seen = drive(site(server), model, VERIFY)
    assert seen.end.cause is None, (seen.notes, seen.end)
    assert State.VERIFYING in seen.states
    assert any("quarantine" in note for note in seen.notes)
    assert arrived(server, model)
    assert registry.bytes_served(model.digests[0]) <= 2 * 3 * MB + 2


def test_verify_of_what_is_right_prints_nothing_more(server: Server, registry: Registry) -> None:
    model = add(registry, server, 3 * MB)
    server.start().wait_ready()
    drive(site(server), model)
    seen = drive(site(server), model, VERIFY)
    assert (seen.end.cause, seen.notes) == (None, ["up to date"])


@pytest.mark.parametrize("layers", [b"[]", b"null"])
def test_a_model_that_runs_elsewhere(server: Server, registry: Registry, layers: bytes) -> None:
    model = registry.add_model("cloudy", "1b", [], extras=False)
    body = model.manifest.replace(b'"layers": []', b'"layers": ' + layers)
    registry.set_manifests("library/cloudy", "1b", [body])
    server.start().wait_ready()
    seen = drive(site(server), model)
    assert seen.end.cause is None, (seen.notes, seen.end)
    assert json.loads(next((server.store / "manifests").rglob("1b")).read_bytes())
    assert drive(site(server), model).notes == ["up to date"]


def test_an_update_of_a_model_fetches_what_is_new(server: Server, registry: Registry) -> None:
    old = add(registry, server, 3 * MB)
    server.start().wait_ready()
    drive(site(server), old)
    new = add(registry, server, 4 * MB, seed="new")
    totals: set[int | None] = set()

    def note(update: Update) -> None:
        totals.add(update.record.total_bytes)

    assert drive(site(server), new, on_update=note).end.cause is None
    assert arrived(server, new)
    assert len(totals - {None}) == 1

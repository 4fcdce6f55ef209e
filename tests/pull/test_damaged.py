"""Pulls of a model of which a layer is there that is not what its name says."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.servers import Server, blob
from watcher.demo.registry import Fault, Model, Registry
from watcher.pull import target as sites
from watcher.pull.account import Options
from watcher.pull.failures import Cause
from watcher.state.records import State

from .driven import MB, add, arrived, drive, site

VERIFY = Options(insecure=True, verify=True)
PLAIN = Options(insecure=True)


def _cut(path: Path) -> None:
    os.truncate(path, MB)


def _emptied(path: Path) -> None:
    os.truncate(path, 0)


def _longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _lost(path: Path) -> None:
    path.unlink()


def _to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _to_a_folder(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent.parent)


def _to_other_bytes(path: Path) -> None:
    aside = path.parent.parent / "other bytes"
    aside.write_bytes(b"x" * MB)
    path.unlink()
    path.symlink_to(aside)


DAMAGES = [_cut, _emptied, _longer, _lost, _to_nowhere, _to_a_folder, _to_other_bytes]
damages = pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__[1:])


def pulled(server: Server, registry: Registry) -> Model:
    model = add(registry, server, 3 * MB)
    server.start().wait_ready()
    assert drive(site(server), model).end.cause is None
    return model


@damages
@pytest.mark.parametrize("what", ["layer", "config"])
def test_a_damaged_layer_is_fetched_again(
    server: Server, registry: Registry, damage: Callable[[Path], None], what: str
) -> None:
    model = pulled(server, registry)
    path = blob(server.store, model.digests[0] if what == "layer" else model.config)
    damage(path)
    seen = drive(site(server), model, PLAIN)
    assert seen.end.cause is None, (seen.notes, seen.end)
    assert arrived(server, model)
    assert not path.is_symlink()
    assert drive(site(server), model, VERIFY).notes == ["up to date"]


@damages
def test_pull_fails_if_the_registry_lacks_a_damaged_layer(
    server: Server, registry: Registry, damage: Callable[[Path], None]
) -> None:
    model = pulled(server, registry)
    damage(blob(server.store, model.digests[0]))
    registry.add_fault(Fault("page", on="head", status=404))
    registry.add_fault(Fault("page", on="direct", status=404))
    for options in (PLAIN, VERIFY):
        seen = drive(site(server), model, options)
        assert seen.end.cause is not None, seen.notes
        assert seen.states[-1] is State.ERROR
        assert seen.end.text


def test_a_layer_that_was_found_corrupt_is_not_up_to_date(
    server: Server, registry: Registry
) -> None:
    model = pulled(server, registry)
    path = blob(server.store, model.digests[0])
    with path.open("r+b") as file:
        file.write(b"wrong bytes")
    registry.add_fault(Fault("page", on="head", status=404))
    assert drive(site(server), model, VERIFY).end.cause is Cause.DAMAGED
    seen = drive(site(server), model, PLAIN)
    assert seen.end.cause is Cause.DAMAGED
    assert "up to date" not in seen.notes


def test_pull_verify_fails_if_the_store_can_not_be_read(server: Server, registry: Registry) -> None:
    model = pulled(server, registry)
    far = replace(sites.find(site(server).url, None, site(server).settings), why="it is far away")
    seen = drive(far, model, VERIFY)
    assert seen.end.cause is Cause.UNVERIFIED
    assert "far away" in seen.end.text
    assert drive(far, model, PLAIN).end.cause is None


def test_a_link_to_the_right_bytes_is_taken_for_the_layer(
    server: Server, registry: Registry
) -> None:
    model = pulled(server, registry)
    path = blob(server.store, model.digests[0])
    aside = server.store / "kept once"
    path.rename(aside)
    path.symlink_to(aside)
    assert drive(site(server), model, PLAIN).notes == ["up to date"]
    assert drive(site(server), model, VERIFY).notes == ["up to date"]
    assert path.is_symlink()

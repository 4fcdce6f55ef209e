"""Pulls over networks and registries that break."""

from __future__ import annotations

import pytest

from tests.fidelity.harness import Server
from watcher.demo.registry import Fault, Registry

from .driven import MB, MIB, SIZE, add, arrived, drive, site


@pytest.mark.parametrize("after", [5, 20, 50])
def test_resets_every_so_often(server: Server, registry: Registry, after: int) -> None:
    model = add(registry, server)
    registry.add_fault(Fault("reset", after=after * MB))
    server.start().wait_ready()
    seen = drive(site(server), model)
    print(seen.notes, seen.end, registry.bytes_served(model.digests[0]) / MB)
    assert seen.end.cause is None
    assert arrived(server, model)
    assert registry.bytes_served(model.digests[0]) <= 1.15 * SIZE + 16 * MIB

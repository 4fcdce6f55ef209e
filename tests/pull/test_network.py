"""Pulls over networks and registries that break."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.servers import Server
from watcher.demo.registry import Fault, Model, Registry
from watcher.pull.account import Options, Update
from watcher.pull.failures import Cause
from watcher.pull.layers import ModelProgress

from .driven import MB, MIB, OPTIONS, SIZE, Seen, add, arrived, drive, site

#: Slow enough that the server tells of what comes and goes, which it does 16 times a second.
RATE = 40 * MB


#: 120 MB at a slow rate.
ALIKE = pytest.mark.slow("another fault of a kind that stands beside it")


def told(seen: Seen) -> str:
    return f"{seen.notes} {seen.end}"


def _without_losses(note: Callable[[ModelProgress, str, int, int], int]) -> Callable[..., int]:
    def noted(bar: ModelProgress, digest: str, total: int, completed: int) -> int:
        note(bar, digest, total, completed)
        return 0

    return noted


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault("page", status=500, times=3), marks=ALIKE),
        Fault("page", status=502, begin=50 * MB, cut=True, times=2),
        pytest.param(Fault("truncate", after=10 * MB, times=4), marks=ALIKE),
        Fault("reset", on="direct", times=1),
        Fault("page", on="manifest", status=503, times=2),
        pytest.param(Fault("page", on="manifest", status=429, times=3), marks=ALIKE),
        pytest.param(Fault("page", on="head", status=500, times=1), marks=ALIKE),
        pytest.param(Fault("reset", on="manifest", times=1), marks=ALIKE),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.on}-{fault.status}",
)
def test_passing_faults_are_outlasted(server: Server, registry: Registry, fault: Fault) -> None:
    model = add(registry, server)
    registry.throttle(2 * RATE)
    registry.add_fault(Fault(**vars(fault)))
    server.start().wait_ready()
    seen = drive(site(server), model)
    assert seen.end.cause is None, told(seen)
    assert arrived(server, model)
    # A page may be taken for data, which costs the layer.
    assert registry.bytes_served(model.digests[0]) <= 2 * SIZE + 16 * MIB


def test_a_registry_that_ignores_ranges_is_given_up(server: Server, registry: Registry) -> None:
    """Each part gets the first bytes of all; only the hash tells."""
    model = add(registry, server)
    registry.add_fault(Fault("ignore_range"))
    server.start().wait_ready()
    seen = drive(site(server), model, Options(insecure=True, until_done=True))
    assert seen.end.cause is Cause.MISMATCH, told(seen)
    assert not arrived(server, model)
    assert registry.bytes_served(model.digests[0]) <= 7 * SIZE


def test_a_registry_that_is_down_and_comes_back(server: Server, registry: Registry) -> None:
    model = add(registry, server)
    registry.add_fault(Fault("page", on="manifest", status=503))
    server.start().wait_ready()

    def back(_: object) -> None:
        if registry.stats()["requests"].get("manifest", 0) > 6:
            registry.clear_faults()

    seen = drive(site(server), model, OPTIONS, on_update=back)
    assert seen.end.cause is None, told(seen)
    assert arrived(server, model)


def test_a_registry_that_stays_down(server: Server, registry: Registry) -> None:
    model = add(registry, server)
    server.start().wait_ready()
    registry.close()
    seen = drive(site(server), model)
    assert seen.end.cause is Cause.NO_NETWORK, told(seen)


def test_a_model_that_the_registry_lacks_ends_the_pull(server: Server, registry: Registry) -> None:
    server.start().wait_ready()
    seen = drive(site(server), f"http://{registry.host}/library/nothing:1b")
    assert seen.end.cause is Cause.NO_MODEL


def test_a_manifest_that_changes_between_tries(server: Server, registry: Registry) -> None:
    server._extra |= {"DEMO_RETRY_SECONDS": "0.01"}
    old = add(registry, server)
    registry.throttle(RATE)
    fault = registry.add_fault(Fault("reset", after=20 * MB))
    server.start().wait_ready()
    made: list[Model] = []

    def change(update: Update) -> None:
        if update.waiting is not None and not made:
            made.append(add(registry, server, SIZE // 2, seed="another"))
            registry.remove_fault(fault)

    seen = drive(site(server), old, on_update=change)
    assert seen.end.cause is None, told(seen)
    assert arrived(server, made[0])
    assert seen.updates[-1].record.total_bytes == SIZE // 2 + len(
        registry.content(made[0].config).read(0, registry.content(made[0].config).size)
    )

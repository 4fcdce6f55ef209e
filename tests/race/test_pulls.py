"""A pull that begins in the middle of a removal: at worst it fails once, the next one is well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SERVERS
from tests.support.driving import OLD, POLICY, is_right, lay_out, private_proc
from tests.support.notation import age
from tests.support.runs import one_run
from tests.support.servers import Server, collapsed
from watcher.demo.registry import Layer, Model, Registry
from watcher.model import Result
from watcher.observe.host import Host
from watcher.reconcile import Report

SIZE = 3_000_000


@dataclass
class Scene:
    """A server that runs, and a stale download of a model that it can pull."""

    registry: Registry
    server: Server
    model: Model
    layout: str

    @property
    def digest(self) -> str:
        """The model's large layer, `sha256:…`."""
        return self.model.digests[0]

    @property
    def store(self) -> Path:
        """The models folder."""
        return self.server.store

    def lay_out(self) -> None:
        """Break the download anew, as `layout` says."""
        lay_out(self.registry, self.store, self.digest)
        blobs = self.store / "blobs"
        name = f"{self.digest.replace(':', '-')}-partial"
        if self.layout == "unclaimed":
            for sidecar in blobs.glob(f"{name}-*"):
                sidecar.unlink()
        elif self.layout == "sidecars alone":
            (blobs / name).unlink()

    def clean(self, at_sleep: Callable[[], object] | None = None) -> Report:
        """Clean; `at_sleep` is called while the guard waits."""

        def sleep(seconds: float) -> None:
            assert seconds >= 2
            if at_sleep is not None:
                at_sleep()

        return one_run(self.host(sleep=sleep), POLICY)

    def host(self, **more: Any) -> Host:
        """The store, and of the machine's processes the server alone."""
        proc = private_proc(self.store.with_name("proc"), self.server.pid)
        return Host(str(self.store), proc=proc, **more)

    def partials(self) -> list[str]:
        """What is left of the download."""
        return sorted(path.name for path in self.store.glob("blobs/*-partial*"))


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with request.param(tmp_path / "models") as made:
        yield made.start().wait_ready()


@pytest.fixture(params=["stale", "unclaimed", "sidecars alone"])
def scene(request: pytest.FixtureRequest, server: Server) -> Iterator[Scene]:
    with Registry() as registry:
        model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
        made = Scene(registry, server, model, request.param)
        made.lay_out()
        yield made


def test_a_pull_under_the_guard_fails_once_and_the_next_one_is_right(scene: Scene) -> None:
    told: list[str] = []
    report = scene.clean(lambda: told.extend(collapsed(scene.server.pull(scene.model.name))))
    assert told[-1] == "error: EOF"
    assert [outcome.result for outcome in report.outcomes] == [Result.DONE]
    assert scene.partials() == []
    assert collapsed(scene.server.pull(scene.model.name))[-1] == "success"
    assert is_right(scene.store, scene.digest)
    assert scene.registry.bytes_served(scene.digest) == SIZE


def test_a_pull_that_goes_on_before_the_guard_keeps_its_download(scene: Scene) -> None:
    """It has read the sidecars and opened the data: the removal gives way to it."""
    if scene.layout == "sidecars alone":
        pytest.skip("a pull of it ends in a mismatch by itself")
    scene.registry.hold(scene.digest, after=0)
    pulls = []

    def pull_first(event: object) -> None:
        if getattr(event, "event_type", "") == "act_started":
            pulls.append(scene.server.start_pull(scene.model.name))
            scene.registry.wait_held(scene.digest, 1)

    here = scene.host(sleep=lambda _: None, report=pull_first)
    report = one_run(here, POLICY)
    scene.registry.release()
    assert collapsed(pulls[0].result())[-1] == "success"
    assert [outcome.result for outcome in report.outcomes] == [Result.REFUSED]
    assert is_right(scene.store, scene.digest)
    assert scene.partials() == []


def test_a_download_that_was_removed_is_pulled_from_the_start(scene: Scene) -> None:
    assert [outcome.result for outcome in scene.clean().outcomes] == [Result.DONE]
    assert collapsed(scene.server.pull(scene.model.name))[-1] == "success"
    assert is_right(scene.store, scene.digest)


@pytest.mark.parametrize("scene", ["stale"], indirect=True)
def test_orphans_are_refused_while_the_server_runs(scene: Scene) -> None:
    orphan = scene.store / "blobs" / f"sha256-{'ab' * 32}"
    orphan.write_text("orphan")
    age(orphan, OLD)
    scene.server.pull(scene.model.name)
    report = scene.clean()
    assert [str(each.kind) for each in report.plan.refusals] == ["server_runs"]
    assert orphan.exists()

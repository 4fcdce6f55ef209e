"""A transfer of ours, given back: a real server's pull downloads only what is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.driving import audit, is_right, run
from tests.support.notation import age
from tests.support.servers import RealServer, collapsed
from tests.transfer.driven import QUICK, Here
from watcher.demo.registry import Registry
from watcher.model import HOUR, MIB, Ranges
from watcher.observe import place
from watcher.observe.host import Host
from watcher.ollama import ranges
from watcher.transfer import values
from watcher.transfer.values import Progress, StoppedError

pytestmark = pytest.mark.skipif("OLLAMA_BIN" not in os.environ, reason="OLLAMA_BIN is not set")

SIZE, ENOUGH = 240_000_000, 90_000_000


def broken_off(here: Here) -> Ranges:
    """What a transfer that was stopped in its middle has; pieces are out of order."""
    boot = place.boot(Host(str(here.path)))
    transfer = here.transfer(QUICK, boot=boot)

    def stops(event: values.Event) -> None:
        if isinstance(event, Progress) and event.arrived >= ENOUGH:
            transfer.stop()

    transfer._emit = stops
    with pytest.raises(StoppedError):
        transfer.run()
    return here.believed(boot)


@pytest.mark.parametrize("running", [False, True], ids=["stopped", "running"])
def test_a_real_pull_goes_on_with_it(running: bool, tmp_path: Path, registry: Registry) -> None:
    here = Here(tmp_path / "models", registry, SIZE)
    had = broken_off(here)
    assert ENOUGH <= ranges.size(had) < SIZE
    age(here.folder / "data", 2 * HOUR)
    with RealServer(here.path) as server:
        if running:
            server.start().wait_ready()
        done = run(here.path, "repair", "--give-back", "--yes", here.digest)
        assert done.returncode == 0, done.stdout + done.stderr
        if not running:
            server.start().wait_ready()
        found = audit(here.path)["downloads"]  # the config may have arrived, too
        (download,) = [each for each in found if each["digest"].endswith(here.digest)]
        assert not download["ours"]
        assert ranges.size(had) - download["bytes"]["claimed"] < 16 * MIB
        registry.reset_stats()
        assert collapsed(server.pull(here.model.name))[-1] == "success"
    assert is_right(here.path, here.model.digests[0])
    missing = SIZE - download["bytes"]["claimed"]
    assert registry.bytes_served(here.model.digests[0]) == missing

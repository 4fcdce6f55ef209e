"""A real server's pull that ends in a mismatch, or never, while the daemon runs beside it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.driving import Daemon, is_right, run
from tests.support.notation import age
from tests.support.servers import RealServer, blob, collapsed, wait_until
from watcher.demo.registry import Fault, Layer, Manners, Model, Registry
from watcher.model import HOUR, MIB

pytestmark = pytest.mark.skipif("OLLAMA_BIN" not in os.environ, reason="OLLAMA_BIN is not set")

SIZE, CHUNK = 262_144_000, 16 * MIB
REPAIRS = {"OLLAMA_WATCH_REPAIR": "true"}


class Here:
    """A server and a daemon on one store, and a model of two layers."""

    def __init__(self, path: Path, registry: Registry, size: int) -> None:
        self.path, self.registry = path / "models", registry
        self.model: Model = registry.add_model("demo", "1b", [Layer(size), Layer(2000)])
        self.digest = self.model.digests[0]
        self.blob = blob(self.path, self.digest)
        self.server, self.daemon = RealServer(self.path), Daemon(self.path, REPAIRS)

    @property
    def second(self) -> Path:
        return self.path / ".ollama-watch/transfers" / self.digest[7:] / "data"

    def repair(self) -> int:
        """Repair it as the finding says; how many bytes of the layer that fetches."""
        self.registry.reset_stats()
        done = run(self.path, "repair", "--yes", "--fetch", self.model.name)
        assert done.returncode == 0, done.stdout + done.stderr
        assert is_right(self.path, self.digest)
        fetched = self.registry.bytes_served(self.digest)
        assert collapsed(self.server.pull(self.model.name))[-1] == "success"
        assert self.registry.bytes_served(self.digest) == fetched
        wait_until(lambda: not self.second.exists(), "the end of the second name")
        assert self.blob.stat().st_nlink == 1
        return fetched


@pytest.fixture
def here(tmp_path: Path, registry: Registry, request: pytest.FixtureRequest) -> Iterator[Here]:
    found = Here(tmp_path, registry, request.param)
    for name in ("blobs", "manifests"):
        (found.path / name).mkdir(parents=True)
    with found.server, found.daemon:
        found.server.start().wait_ready()
        found.daemon.wait_event("check_started")
        yield found


@pytest.mark.parametrize("here", [SIZE], indirect=True)
@pytest.mark.parametrize("by", ["complete", ""])
def test_an_error_page_inside_of_a_layer_costs_a_chunk(here: Here, by: str) -> None:
    here.registry.manners = Manners(sums=by, chunk=CHUNK)  # type: ignore[arg-type]
    page = Fault("page", status=200, cut=True, digest=here.digest, begin=1, times=1)
    here.registry.add_fault(page)
    assert "digest mismatch" in collapsed(here.server.pull(here.model.name))[-1]
    here.daemon.wait_event("download_discarded")
    assert not here.blob.exists()
    assert here.second.stat().st_nlink == 1
    assert here.repair() <= (CHUNK + 1 if by else SIZE + 1)


@pytest.mark.parametrize("here", [3_000_000], indirect=True)
def test_killed_between_the_name_and_the_manifest_nothing_is_left(here: Here) -> None:
    """The server, the daemon; and a start of the server prunes the layer, which was right."""
    other = here.model.digests[1]
    here.registry.hold(other)
    pull = here.server.start_pull(here.model.name)
    wait_until(here.second.exists, "the second name")
    assert here.second.samefile(here.blob)
    here.server.kill()
    pull.close()
    here.registry.release()
    here.daemon.kill(signal.SIGKILL)
    here.daemon.start()
    here.daemon.wait_event("check_started")
    assert here.second.samefile(here.blob)
    age(here.blob, 2 * HOUR)
    here.server.start().wait_ready()
    wait_until(lambda: not here.blob.exists(), "the pruning")
    wait_until(lambda: not here.second.exists(), "the end of the second name")
    assert not here.daemon.of("download_discarded")
    assert collapsed(here.server.pull(here.model.name))[-1] == "success"
    wait_until(lambda: here.blob.stat().st_nlink == 1, "the end of the next one's")


@pytest.mark.parametrize("here", [3_000_000], indirect=True)
def test_a_layer_that_a_killed_server_did_not_hash_is_hashed(here: Here) -> None:
    """To the next server's pull the layer is there, and it says success."""
    other = here.model.digests[1]
    here.registry.add_fault(Fault("page", status=200, cut=True, digest=here.digest, times=1))
    here.registry.hold(other, after=0)
    pull = here.server.start_pull(here.model.name)
    wait_until(here.second.exists, "the second name")
    here.server.kill()
    pull.close()
    here.registry.release()
    here.server.start().wait_ready()
    assert collapsed(here.server.pull(here.model.name))[-1] == "success"
    assert not is_right(here.path, here.digest)
    here.daemon.wait_event("blob_corrupt")
    assert not here.second.exists()


@pytest.mark.parametrize("here", [3_000_000], indirect=True)
def test_a_daemon_that_was_away_makes_it_and_lets_it_go(here: Here) -> None:
    other = here.model.digests[1]
    here.daemon.kill(signal.SIGKILL)
    here.registry.hold(other, after=0)
    pull = here.server.start_pull(here.model.name)
    wait_until(here.blob.exists, "the name of the first layer")
    assert not here.second.exists()
    here.daemon.start()
    wait_until(here.second.exists, "the second name")
    here.daemon.kill(signal.SIGKILL)
    here.registry.release()
    assert collapsed(pull.result())[-1] == "success"
    assert here.second.samefile(here.blob)
    here.daemon.start()
    wait_until(lambda: not here.second.exists(), "the end of the second name")
    assert is_right(here.path, here.digest)

"""Every state, mended, and then pulled to its end: right, and at little cost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.driving import is_right, run
from tests.support.servers import Server, blob, collapsed
from watcher.demo.registry import Layer, Model, Registry
from watcher.model import DAY

from .scenes import MB, MIB, PART, SIZE, STATES, Download, seed_of

#: Real zeros of the content, on blocks and not; a copy makes holes of those of a MiB.
ZEROS = ((12 * MIB, 14 * MIB + 77), (40 * MIB + 5, 40 * MIB + 5000))
#: With `prepare` these only; all of them where there is time.
PREPARED = {"killed", "empty", "all-lost", "old", "whole-with-sidecars-at-0"}
ALIKE = pytest.mark.slow("what `repair` makes of the same state stands beside it")
CASES = [
    *(("repair", name) for name in STATES),
    *(("prepare", name) for name in STATES if name in PREPARED),
    *(pytest.param("prepare", name, marks=ALIKE) for name in STATES if name not in PREPARED),
]


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as served:
        yield served


@pytest.fixture(scope="module")
def model(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Model:
    layer = Layer(SIZE, zeros=ZEROS, seed=seed_of(tmp_path_factory.getbasetemp()))
    return registry.add_model("demo", "1b", [layer], extras=False)


def unfinished(it: Download) -> int:
    """Sidecars that are not complete; 1 at least."""
    texts = (path.read_text() for path in it.data.parent.glob(f"{it.data.name}-*"))
    return sum('"Completed":' in text for text in texts) or 1


def pull(server: Server, it: Download, registry: Registry) -> int:
    """Pull to the end: the bytes that were served."""
    registry.reset_stats()
    server.start().wait_ready()
    assert collapsed(server.pull(it.model.name))[-1] == "success"
    assert is_right(it.store, it.digest)
    assert not list(it.data.parent.glob("*-partial*"))
    return registry.bytes_served(it.digest)


@pytest.mark.parametrize(("command", "name"), CASES)
def test_a_repaired_download_ends_right_at_little_cost(
    command: str, name: str, registry: Registry, model: Model, server: Server
) -> None:
    it = Download(server.store, model, registry.content(model.digests[0]))
    STATES[name](it)
    (it.store / "manifests").mkdir()
    words = ("repair", "--yes") if command == "repair" else ("prepare",)
    done = run(it.store, *words, env={"OLLAMA_WATCH_REPAIR": "true"})
    assert done.returncode == 0, done.stdout + done.stderr
    parts = unfinished(it)
    again = run(it.store, *words, env={"OLLAMA_WATCH_REPAIR": "true"})
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Repaired" not in again.stdout, "twice is once"
    served = pull(server, it, registry)
    assert served <= it.missing + 1.1 * MIB * parts, f"{served - it.missing} too many"


@pytest.mark.parametrize("name", ["all-lost", "first-missing", "middle-missing", "last-missing"])
def test_lost_sidecars_are_made_up_for_from_memory(
    name: str, registry: Registry, model: Model, server: Server
) -> None:
    """Parts that no rule has made: a first repair wrote them, and only the memory has them now."""
    it = Download(server.store, model, registry.content(model.digests[0]))
    it.lay_out()
    (it.store / "manifests").mkdir()
    assert run(it.store, "repair", "--yes").returncode == 0
    sidecars = sorted(it.data.parent.glob(f"{it.data.name}-*"))
    before = {path.name: path.read_bytes() for path in sidecars}
    gone = {
        "all-lost": sidecars,
        "first-missing": sidecars[:1],
        "middle-missing": sidecars[1:2],
        "last-missing": sidecars[-1:],
    }
    for path in gone[name]:
        path.unlink()
    done = run(it.store, "repair", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    after = sorted(it.data.parent.glob(f"{it.data.name}-*"))
    if name == "all-lost":
        assert {path.name: path.read_bytes() for path in after} == before
    served = pull(server, it, registry)
    assert served <= it.missing + 2 * 1.1 * MIB * len(before)


def test_data_that_was_cut_is_whole_again_where_the_manifest_has_its_length(
    registry: Registry, model: Model, server: Server
) -> None:
    """A pull with a sidecar missing has cut the data; an older pull's manifest names the layer."""
    it = Download(server.store, model, registry.content(model.digests[0]))
    it.claimed = (PART, 0, 0)
    it.lay_out()
    it.part(1).unlink()
    os.truncate(it.data, SIZE - PART)
    host, name = model.name.removeprefix("http://").split("/", 1)
    path = it.store / "manifests" / host / name.replace(":", "/")
    path.parent.mkdir(parents=True)
    path.write_bytes(model.manifest)
    done = run(it.store, "repair", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert pull(server, it, registry) <= SIZE - PART - 6_000_000 + 5 * 1.1 * MIB


@pytest.mark.parametrize("memory", ["kept", "lost"])
def test_a_copy_without_holes_of_what_was_repaired(
    memory: str, registry: Registry, model: Model, server: Server
) -> None:
    """A part that the repair has made holds, far behind its start, the beginning of an old one."""
    it = Download(server.store, model, registry.content(model.digests[0]))
    it.present = 40 * MB, 500_000, 0
    it.lay_out()
    (it.store / "manifests").mkdir()
    assert run(it.store, "repair", "--yes").returncode == 0
    it.copied("never")
    it.aged(600)
    if memory == "lost":
        shutil.rmtree(it.store / ".ollama-watch")
    done = run(it.store, "repair", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = unfinished(it)
    assert pull(server, it, registry) <= it.missing + 1.1 * MIB * parts


def test_data_that_was_cut_and_that_a_server_has_made_longer_again(
    registry: Registry, model: Model, server: Server
) -> None:
    """Nothing but zeros tells what of a block was cut; a server fills what it claims with holes."""
    it = Download(server.store, model, registry.content(model.digests[0]))
    it.claimed = it.present
    it.lay_out()
    (it.store / "manifests").mkdir()
    left = PART // 2 + 1234
    os.truncate(it.data, left)
    registry.hold(it.digest, after=70_001)
    try:
        server.start().wait_ready()
        begun = server.start_pull(it.model.name)
        registry.wait_held(it.digest, 2)
        server.kill()
        begun.close()
    finally:
        registry.release()
    done = run(it.store, "repair", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = unfinished(it)
    assert pull(server, it, registry) <= SIZE - left + 1.1 * MIB * parts


@pytest.mark.parametrize("content", ["right", "wrong"])
def test_leftovers_beside_the_finished_blob(
    content: str, registry: Registry, model: Model, server: Server
) -> None:
    """They block a later pull for ever; the data goes once the blob was hashed and is right."""
    it = Download(server.store, model, registry.content(model.digests[0]))
    it.lay_out()
    (it.store / "manifests").mkdir()
    whole = blob(it.store, it.digest)
    with whole.open("wb") as file:
        file.writelines(it.content.slices(0, SIZE))
        if content == "wrong":
            file.seek(5)
            file.write(b"wrong")
    done = run(it.store, "repair", "--yes")
    left = list(it.data.parent.glob("*-partial*"))
    if content == "right":
        assert done.returncode == 0, done.stdout + done.stderr
        assert left == []
        assert pull(server, it, registry) == 0
    else:
        assert it.data in left, "the only good bytes may be there"


def test_surplus_sidecars_beside_the_finished_blob(
    registry: Registry, model: Model, server: Server
) -> None:
    it = Download(server.store, model, registry.content(model.digests[0]))
    it.lay_out()
    (it.store / "manifests").mkdir()
    os.replace(it.data, blob(it.store, it.digest))
    done = run(it.store, "repair", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(it.data.parent.glob("*-partial*")) == []


def test_a_stale_download_that_was_repaired_survives_the_start(
    registry: Registry, model: Model, server: Server
) -> None:
    """Its sidecars are new: without its data, which the start would delete, they would be false."""
    it = Download(server.store, model, registry.content(model.digests[0]))
    STATES["killed"](it)
    it.aged(8 * DAY)
    (it.store / "manifests").mkdir()
    assert run(it.store, "repair", "--yes").returncode == 0
    parts = unfinished(it)
    assert pull(server, it, registry) <= it.missing + 1.1 * MIB * parts


def test_wanted_files_survive_the_start_after_prepare(
    registry: Registry, model: Model, server: Server
) -> None:
    """Two hours old: the server's start would delete all of it, and the young pull's layers."""
    it = Download(server.store, model, registry.content(model.digests[0]))
    STATES["old"](it)
    other = registry.add_model("other", "1b", [Layer(50_000)], extras=False)
    host, name = other.name.removeprefix("http://").split("/", 1)
    path = it.store / "manifests" / host / name.replace(":", "/")
    path.parent.mkdir(parents=True)
    path.write_bytes(other.manifest)
    assert run(it.store, "prepare", env={"OLLAMA_WATCH_REPAIR": "true"}).returncode == 0
    server.start().wait_ready()
    assert it.data.exists()
    assert it.part(0).exists()
    parts = unfinished(it)
    registry.reset_stats()
    assert collapsed(server.pull(it.model.name))[-1] == "success"
    assert is_right(it.store, it.digest)
    assert registry.bytes_served(it.digest) <= it.missing + 1.1 * MIB * parts

"""`repair --prove`: what a server has left is compared with its registry's sums before its pull."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import OLD, audit, holding, is_right, run
from tests.support.notation import age
from tests.support.servers import EngineServer, collapsed, sidecar
from watcher.demo.registry import Manners, Registry
from watcher.model import MIB, Ranges
from watcher.ollama import ranges, sidecars
from watcher.state import sums

from .driven import Here

CHUNK, SIZE = 2 * MIB, 12_000_000
#: What the progress file records, and what was written: to the end of a chunk.
CLAIMED, WRITTEN = 9 * MIB, 10 * MIB


@pytest.fixture
def left(tmp_path: Path, registry: Registry) -> Here:
    """A download that a server has left."""
    here = Here(tmp_path / "models", registry, SIZE)
    registry.manners = Manners(sums="complete", chunk=CHUNK)
    data(here).write_bytes(here.content()[:WRITTEN])
    os.truncate(data(here), SIZE)
    progress = here.path / "blobs" / f"sha256-{here.digest}-partial-0"
    progress.write_text(sidecar(0, 0, SIZE, CLAIMED))
    for path in (data(here), progress):
        age(path, OLD / 2)
    return here


def data(here: Here) -> Path:
    return here.path / "blobs" / f"sha256-{here.digest}-partial"


def flip(here: Here, *places: int) -> None:
    before = data(here).stat()
    with data(here).open("r+b") as file:
        for at in places:
            (byte,) = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte ^ 1]), at)
    os.utime(data(here), ns=(before.st_atime_ns, before.st_mtime_ns))


def claims(here: Here) -> Ranges:
    """What the progress files record."""
    found = (here.path / "blobs").glob(f"sha256-{here.digest}-partial-*")
    return sidecars.claims([sidecars.parse(path.read_bytes()) for path in found])


def prove(here: Here, *more: str, code: int = 0) -> dict[str, Any]:
    """What `repair --prove` answers."""
    done = run(here.path, "--json", "repair", "--yes", "--prove", here.model.name, *more)
    assert done.returncode == code, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


def message(told: dict[str, Any]) -> str:
    (found,) = [each for each in told["outcomes"] if each["verb"] == "prove"]
    return str(found["message"])


def kept(here: Here) -> Path:
    return here.path / ".ollama-watch" / sums.FOLDER / here.digest


def test_damage_in_recorded_bytes_costs_the_next_pull_its_chunk(left: Here) -> None:
    flip(left, 3 * MIB)
    told = prove(left)
    assert message(told) == "8.4 MB match the sums of their chunks, 2.1 MB don't"
    (write,) = [each for each in told["plan"]["actions"] if each["verb"] == "write_sidecars"]
    assert "2.1 MB recorded as downloaded is wrong by the sums of its chunks" in write["because"]
    # The fifth chunk, which was written and half of it recorded, is right: all of it counts.
    assert claims(left) == ((0, CHUNK), (2 * CHUNK, WRITTEN))
    (shown,) = audit(left.path)["downloads"]
    assert shown["ranges"]["proven"] == [[0, CHUNK], [2 * CHUNK, WRITTEN]]
    left.registry.reset_stats()
    with EngineServer(left.path) as server:
        server.start().wait_ready()
        assert collapsed(server.pull(left.model.name))[-1] == "success"
    assert left.served == SIZE - ranges.size(((0, CHUNK), (2 * CHUNK, WRITTEN)))
    assert is_right(left.path, f"sha256:{left.digest}")


def test_what_was_compared_is_not_compared_again_until_it_changes(left: Here) -> None:
    prove(left)
    again = prove(left)
    assert not again["outcomes"]
    flip(left, 3 * MIB)
    age(data(left), OLD / 3)
    assert "don't" in message(prove(left))
    assert left.registry.stats()["requests"]["sums"] == 1, "they are kept"


def test_later_scans_do_not_believe_what_was_wrong_either(left: Here) -> None:
    flip(left, 3 * MIB)
    prove(left)
    with data(left).open("r+b") as file:  # as a server that goes on elsewhere
        os.pwrite(file.fileno(), left.content()[WRITTEN : WRITTEN + 5], WRITTEN)
    assert run(left.path, "repair", "--yes", "--wait").returncode == 0
    assert not ranges.within(claims(left), CHUNK, 2 * CHUNK)


@pytest.mark.parametrize("kind", ["", "short", "host"])
def test_where_a_registry_serves_no_sums_prove_is_refused_and_claims_stay(
    left: Here, kind: str
) -> None:
    left.registry.manners = Manners(sums=kind, chunk=CHUNK)  # type: ignore[arg-type]
    flip(left, 3 * MIB)
    (told,) = [each for each in prove(left, code=3)["outcomes"] if each["verb"] == "prove"]
    assert "serves no sums of its chunks" in told["message"]
    assert told["refusal"]["remedy"].startswith("pull it")
    assert claims(left)[0][0] == 0
    assert ranges.size(claims(left)) >= CLAIMED
    assert not kept(left).exists()


def test_sums_of_another_blob_change_nothing(left: Here) -> None:
    left.registry.manners = Manners(sums="other", chunk=CHUNK)
    assert "may be that of other data" in message(prove(left, code=3))
    assert ranges.size(claims(left)) >= CLAIMED


@pytest.mark.parametrize("kind", ["registry", "held"])
def test_it_is_refused_with_the_reason(left: Here, kind: str) -> None:
    """Offline, and while a process may write to it."""
    flip(left, 3 * MIB)
    # Its model is known where its registry is not asked, too.
    assert run(left.path, "repair", "--yes", left.model.name).returncode == 0
    with holding(data(left), "r+b") if kind == "held" else contextlib.nullcontext():
        told = prove(left, *(["--offline"] if kind == "registry" else []), code=3)
    (refused,) = [each for each in told["plan"]["refusals"] if each["verb"] == "prove"]
    assert (refused["kind"], bool(refused["remedy"])) == (kind, True)
    assert claims(left)[0] == (0, CLAIMED)
    assert "sums" not in left.registry.stats()["requests"]


def test_of_all_that_is_there_and_hashes_to_something_else_the_wrong_chunk_is_given_up(
    left: Here,
) -> None:
    """Where its sums are kept, without a word for it."""
    data(left).write_bytes(left.content())
    age(data(left), OLD / 2)
    kept(left).parent.mkdir(parents=True)
    lines = left.registry.content(f"sha256:{left.digest}").sums(CHUNK, is_other=False)
    kept(left).write_text("".join(lines))
    flip(left, 3 * MIB)
    assert run(left.path, "repair", "--yes").returncode == 0
    assert not ranges.within(claims(left), CHUNK, 2 * CHUNK)
    assert ranges.size(claims(left)) >= SIZE - CHUNK - 2 * MIB

"""Pulling, resuming and giving up: statements that no recording covers."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.servers import (
    EngineServer,
    Server,
    blob,
    collapsed,
    sidecar,
    tree,
    wait_until,
    wait_written,
)
from watcher.demo.registry import Fault, Layer, Model, Registry

from .conftest import MakeServer

SIZE = 1_000_000
LARGE = 262_144_000
FULL = ["pulling manifest", "verifying sha256 digest", "writing manifest", "success"]


def told(lines: list[dict[str, object]]) -> list[str]:
    """The statuses without those of single layers, which a fast pull may leave out."""
    return [text for text in collapsed(lines) if not text.startswith("pulling ") or "man" in text]


def lay_out_part(
    store: Path, registry: Registry, digest: str, parts: Sequence[tuple[int, int, int]]
) -> None:
    """A download whose sidecars are `(offset, size, completed)`, with exactly those bytes."""
    content = registry.content(digest)
    partial = blob(store, digest, "-partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
        file.truncate(content.size)
        for number, (offset, size, completed) in enumerate(parts):
            file.seek(offset)
            file.writelines(content.slices(offset, offset + completed))
            path = blob(store, digest, f"-partial-{number}")
            path.write_text(sidecar(number, offset, size, completed))


def is_whole(store: Path, digest: str) -> bool:
    data = blob(store, digest).read_bytes()
    return "sha256:" + hashlib.sha256(data).hexdigest() == digest


def partials(store: Path) -> set[str]:
    return {name.split("-", 2)[2] for name in tree(store) if "-partial" in name}


SIDECARS = {
    "empty": ("", "error: EOF"),
    "blank": (" \n", "error: EOF"),
    "half": ('{"N":0,"Offset":0,', "error: unexpected EOF"),
    "half-string": ('{"N', "error: unexpected EOF"),
    "garbage": ("x", "error: invalid character 'x' looking for beginning of value"),
    "string-size": ('{"N":0,"Size":"1"}', "error: json: cannot unmarshal"),
    "fraction": ('{"N":0.5}', "error: json: cannot unmarshal"),
    "array": ("[]", "error: json: cannot unmarshal"),
    "small-keys": ('{"n":0,"offset":0,"size":1000000,"completed":400000}', "success"),
    "bytes-behind": (sidecar(0, 0, SIZE, 400_000) + "}x", "success"),
    "null": ("null", "error: digest mismatch, file must be downloaded again"),
    "braces": ("{}", "error: digest mismatch, file must be downloaded again"),
    "other-number": (sidecar(7, 0, SIZE, 400_000), "success"),
    "too-much": (sidecar(0, 0, SIZE, SIZE + 5), "success"),
    "negative-offset": (sidecar(0, -5, SIZE, 0), "error: max retries exceeded"),
    "null-fields": (
        '{"N":null,"Offset":null,"Size":1000000,"Completed":400000}',
        "success",
    ),
}


@pytest.mark.parametrize("case", SIDECARS)
def test_sidecar_text_decides(
    case: str, store: Path, registry: Registry, make_server: MakeServer
) -> None:
    text, expected = SIDECARS[case]
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    digest = model.digests[0]
    server = make_server({"DEMO_RETRY_SECONDS": "0.01"})
    if case == "negative-offset" and not isinstance(server, EngineServer):
        pytest.skip("the real server tries for a minute")
    lay_out_part(store, registry, digest, [(0, SIZE, SIZE if case == "too-much" else 400_000)])
    blob(store, digest, "-partial-0").write_text(text)
    server.start().wait_ready()
    assert collapsed(server.pull(model.name))[-1].startswith(expected)
    if expected == "success":
        assert is_whole(store, digest)
        claimed = {"too-much": SIZE}.get(case, 400_000)
        assert registry.bytes_served(digest) == SIZE - claimed
        assert partials(store) == ({"partial-7"} if case == "other-number" else set())


def test_any_partition_is_accepted(
    store: Path, registry: Registry, make_server: MakeServer
) -> None:
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    chance = random.Random(7)
    cuts = [0, *sorted(chance.sample(range(1, SIZE), 335)), SIZE]
    ranges = [(a, b - a) for a, b in itertools.pairwise(cuts)]
    parts = [(at, size, size if number % 2 else 0) for number, (at, size) in enumerate(ranges)]
    lay_out_part(store, registry, model.digests[0], parts)
    server = make_server().start().wait_ready()
    assert told(server.pull(model.name)) == FULL
    assert registry.bytes_served(model.digests[0]) == sum(size for _, size in ranges[::2])
    assert is_whole(store, model.digests[0])
    assert partials(store) == set()


def test_last_part_may_be_a_few_bytes(
    store: Path, registry: Registry, engine: EngineServer
) -> None:
    model = registry.add_model("demo", "1b", [Layer(16 * 100_003 + 5)], extras=False)
    digest = model.digests[0]
    registry.hold(digest, after=0)
    server = EngineServer(store, {"DEMO_PART_BYTES": "1000"})
    with server:
        pull = server.start().wait_ready().start_pull(model.name)
        registry.wait_held(digest, 16)
        texts = [blob(store, digest, f"-partial-{n}").read_text() for n in range(17)]
        assert texts[1] == sidecar(1, 100_003, 100_003, 0)
        assert texts[16] == sidecar(16, 1_600_048, 5, 0)
        # No more than 16 at once.
        assert len(registry.held(digest)) == 16
        registry.release()
        assert told(pull.result()) == FULL


def test_connection_that_ends_too_early_keeps_its_progress(
    store: Path, registry: Registry, make_server: MakeServer
) -> None:
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    digest = model.digests[0]
    registry.add_fault(Fault("truncate", after=300_000, times=1))
    registry.hold(digest, at=[600_000])
    server = make_server().start().wait_ready()
    pull = server.start_pull(model.name)
    registry.wait_held(digest, 1)
    assert blob(store, digest, "-partial-0").read_text() == sidecar(0, 0, SIZE, 300_000)
    registry.release()
    assert told(pull.result()) == FULL
    assert registry.bytes_served(digest) == SIZE
    assert "unexpected EOF, retrying in 1s" in server.log


def test_error_page_is_written_over_good_data_and_fetched_again(
    store: Path, registry: Registry, make_server: MakeServer
) -> None:
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    digest = model.digests[0]
    lay_out_part(store, registry, digest, [(0, SIZE, 500_000)])
    with blob(store, digest, "-partial").open("r+b") as file:
        file.seek(500_000)
        file.write(registry.content(digest).read(500_000, 600_000))
    page = registry.add_fault(Fault("page", status=502, times=1))
    registry.hold(digest, at=[500_000])
    server = make_server().start().wait_ready()
    pull = server.start_pull(model.name)
    registry.wait_held(digest, 1)
    with blob(store, digest, "-partial").open("rb") as file:
        file.seek(500_000)
        assert file.read(len(page.body)) == page.body.encode()
    assert blob(store, digest, "-partial-0").read_text() == sidecar(0, 0, SIZE, 500_000)
    registry.release()
    assert told(pull.result()) == FULL
    assert registry.bytes_served(digest) == 500_000


@pytest.mark.parametrize(
    "fault",
    [Fault("page", status=200, cut=True, times=1), Fault("ignore_range", times=1)],
    ids=lambda fault: fault.kind,
)
def test_wrong_bytes_that_count_cost_the_layer(
    fault: Fault, store: Path, registry: Registry, make_server: MakeServer
) -> None:
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    digest = model.digests[0]
    lay_out_part(store, registry, digest, [(0, SIZE, 500_000)])
    # A copy: a fault counts down, and these are shared by several tests.
    registry.add_fault(replace(fault))
    server = make_server({"DEMO_RETRY_SECONDS": "0.05"}).start().wait_ready()
    last = collapsed(server.pull(model.name))[-1]
    assert last.startswith(f"error: digest mismatch, file must be downloaded again: want {digest}")
    assert not blob(store, digest).exists()
    assert partials(store) == set()


def test_stalled_part_is_fetched_on_at_once(
    store: Path, registry: Registry, make_server: MakeServer
) -> None:
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    digest = model.digests[0]
    server = make_server({"DEMO_STALL_SECONDS": "0.1", "DEMO_RETRY_SECONDS": "60"})
    # More often than other failures are allowed; the real one waits for half a minute each time.
    stalls = 8 if isinstance(server, EngineServer) else 1
    stall = registry.add_fault(Fault("stall", after=50_000, times=stalls))
    pull = server.start().wait_ready().start_pull(model.name)
    wait_until(lambda: stall.times == 0, "the last stall")
    registry.hold(digest, at=[60_000])
    registry.wait_held(digest, 1)
    assert server.log.count("stalled; retrying") == stalls
    # Each stall costs what its attempt has brought.
    assert blob(store, digest, "-partial-0").read_text() == sidecar(0, 0, SIZE, 0)
    registry.release()
    assert told(pull.result()) == FULL
    assert registry.bytes_served(digest) == SIZE + stalls * 50_000


@contextmanager
def held(registry: Registry, server: Server, store: Path, model: Model) -> Iterator[None]:
    """All three parts of a large layer have got 10 MB, and no more comes."""
    digest = model.digests[0]
    offsets = [10_000_000, 110_000_000, 210_000_000]
    registry.wait_held(digest, 3)
    wait_written(blob(store, digest, "-partial"), offsets)
    yield
    registry.release()


@pytest.fixture
def large(registry: Registry) -> Model:
    """A model of one layer in three parts, held after 10 MB of each."""
    model = registry.add_model("large", "1b", [Layer(LARGE)], extras=False)
    registry.hold(model.digests[0], after=10_000_000)
    return model


WRITTEN = [
    sidecar(0, 0, 100_000_000, 10_000_000),
    sidecar(1, 100_000_000, 100_000_000, 10_000_000),
    sidecar(2, 200_000_000, 62_144_000, 10_000_000),
]


def sidecars(store: Path, model: Model) -> list[str]:
    return [blob(store, model.digests[0], f"-partial-{n}").read_text() for n in range(3)]


def test_last_request_that_closes_ends_the_download(
    store: Path, registry: Registry, large: Model, make_server: MakeServer
) -> None:
    server = make_server().start().wait_ready()
    first = server.start_pull(large.name)
    with held(registry, server, store, large):
        second = server.start_pull(large.name)
        wait_until(lambda: second.completed, "the second request to join")
        assert registry.stats()["requests"]["data"] == 3
        first.close()
        rows = len(second.lines)
        wait_until(lambda: len(second.lines) > rows + 3, "progress of the second request")
        assert sidecars(store, large) == [text.replace("10000000}", "0}") for text in WRITTEN]
        second.close()
        wait_until(lambda: sidecars(store, large) == WRITTEN, "the sidecars")
        wait_until(lambda: not server.open_files(), "the data to be closed")
    registry.reset_stats()
    lines = server.pull(large.name)
    assert told(lines) == FULL
    assert registry.bytes_served(large.digests[0]) == LARGE - 30_000_000


def test_waiting_for_a_retry_keeps_the_file_open_and_turns_new_pulls_away(
    store: Path, registry: Registry, large: Model, make_server: MakeServer
) -> None:
    registry.add_fault(Fault("reset", after=0, begin=200_000_000))
    server = make_server({"DEMO_RETRY_SECONDS": "0.7"}).start().wait_ready()
    pull = server.start_pull(large.name)
    wait_until(lambda: "part 2 attempt 1 failed" in server.log, "the second failure")
    pull.close()
    wait_until(lambda: sidecars(store, large)[:2] == WRITTEN[:2], "the siblings' end")
    partial = blob(store, large.digests[0], "-partial")
    name = str(partial.relative_to(store))
    assert server.open_files() == {name: "w"}
    assert collapsed(server.pull(large.name))[-1] == "error: context canceled"
    wait_until(lambda: not server.open_files(), "the data to be closed")
    assert sidecars(store, large)[2] == WRITTEN[2].replace("10000000}", "0}")


def test_nothing_stops_a_pull_once_its_data_is_in(
    store: Path, registry: Registry, make_server: MakeServer
) -> None:
    model = registry.add_model("demo", "1b", [Layer(LARGE)], extras=False)
    server = make_server().start().wait_ready()
    pull = server.start_pull(model.name)
    wait_until(lambda: "verifying sha256 digest" in collapsed(pull.lines), "verifying")
    pull.close()
    manifest = store / "manifests" / registry.host / "library/demo/1b"
    wait_until(manifest.exists, "the manifest")
    wait_until(lambda: manifest.read_bytes() == model.manifest, "the manifest's bytes")


def test_one_part_that_fails_ends_its_siblings_without_their_progress(
    store: Path, registry: Registry, large: Model, make_server: MakeServer
) -> None:
    registry.add_fault(Fault("reset", after=0, begin=200_000_000))
    server = make_server({"DEMO_RETRY_SECONDS": "0.03"}).start().wait_ready()
    pull = server.start_pull(large.name)
    wait_written(blob(store, large.digests[0], "-partial"), [10_000_000, 110_000_000])
    assert collapsed(pull.result(120))[-1].startswith("error: max retries exceeded: ")
    assert sidecars(store, large) == [text.replace("10000000}", "0}") for text in WRITTEN]
    assert server.open_files() == {}


def test_present_blobs_are_not_looked_at_and_layers_come_one_after_another(
    store: Path, registry: Registry, make_server: MakeServer
) -> None:
    layers = [Layer(LARGE), Layer(SIZE, seed=5)]
    model = registry.add_model("demo", "1b", layers, extras=False)
    blob(store, model.digests[1]).parent.mkdir(parents=True)
    blob(store, model.digests[1]).write_bytes(b"wrong")
    registry.hold(model.digests[0], after=1_000_000)
    server = make_server().start().wait_ready()
    pull = server.start_pull(model.name)
    registry.wait_held(model.digests[0], 3)
    wait_until(lambda: pull.completed == 3_000_000, "progress")
    assert registry.bytes_served(model.config) == 0
    registry.release()
    assert collapsed(pull.result())[-1] == "success"
    assert blob(store, model.digests[1]).read_bytes() == b"wrong"
    wrong = {"status": f"pulling {model.digests[1][7:19]}", "digest": model.digests[1]}
    assert wrong | {"total": 5, "completed": 5} in pull.lines


@pytest.mark.parametrize("prune", ["", "1"])
def test_layers_of_the_old_manifest_are_removed(
    prune: str, store: Path, registry: Registry, make_server: MakeServer
) -> None:
    shared = Layer(SIZE, seed=1)
    before = registry.add_model("demo", "1b", [shared, Layer(SIZE, seed=2)], extras=False)
    server = make_server({"OLLAMA_NOPRUNE": prune}).start().wait_ready()
    assert told(server.pull(before.name)) == FULL
    after = registry.add_model("demo", "1b", [shared, Layer(SIZE, seed=3)], extras=False)
    removing = [] if prune else ["removing unused layers"]
    assert told(server.pull(after.name)) == [*FULL[:-1], *removing, "success"]
    assert blob(store, after.digests[0]).exists()
    assert blob(store, before.digests[1]).exists() is bool(prune)
    assert blob(store, before.config).exists() is bool(prune)


def test_registry_that_fails_before_the_data(
    store: Path, registry: Registry, make_server: MakeServer
) -> None:
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    server = make_server().start().wait_ready()
    cases = [
        (Fault("page", "manifest", status=404), "pull model manifest: file does not exist"),
        (Fault("page", "manifest", status=503, body="down"), "pull model manifest: 503: down"),
        (
            Fault("page", "manifest", status=200, body="<html>"),
            "pull model manifest: invalid character '<' looking for beginning of value",
        ),
        (Fault("page", "head", status=404), "file does not exist"),
        (Fault("page", "head", status=500), "500: "),
        (Fault("page", "direct", status=204, body=""), "unexpected status code 204"),
        (
            Fault("page", "direct", status=200, body="x"),
            "http: no Location header in response",
        ),
    ]
    for fault, error in cases:
        registry.add_fault(fault)
        pull = server.start_pull(model.name)
        assert collapsed(pull.result())[-1] == f"error: {error}"
        assert pull.status == 200
        registry.clear_faults()
    registry.remove_tag("library/demo", "1b")
    assert collapsed(server.pull(model.name))[-1].endswith("file does not exist")
    assert partials(store) == {"partial", "partial-0"}


def test_hanging_manifest_holds_nothing(
    store: Path, registry: Registry, make_server: MakeServer
) -> None:
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    fault = registry.add_fault(Fault("hang", "manifest", times=1))
    server = make_server().start().wait_ready()
    before = tree(store)
    pull = server.start_pull(model.name)
    wait_until(lambda: fault.times == 0, "the manifest to be asked for")
    assert server.open_files() == {}
    assert tree(store) == before
    pull.close()
    registry.clear_faults()
    assert told(server.pull(model.name)) == FULL


def test_manifest_that_changes_between_tries(
    store: Path, registry: Registry, make_server: MakeServer
) -> None:
    one = registry.add_model("demo", "1b", [Layer(SIZE, seed=1)], extras=False)
    two = registry.add_model("demo", "1b", [Layer(SIZE, seed=2)], extras=False)
    registry.set_manifests("library/demo", "1b", [one.manifest, two.manifest])
    server = make_server().start().wait_ready()
    for model in (one, two):
        assert told(server.pull(model.name))[-1] == "success"
        path = store / "manifests" / registry.host / "library/demo/1b"
        assert path.read_bytes() == model.manifest


def test_glob_characters_hide_sidecars(
    store: Path, registry: Registry, make_server: MakeServer
) -> None:
    odd = store.parent / "mod[1]"
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    lay_out_part(odd, registry, model.digests[0], [(0, SIZE, 400_000)])
    server = make_server({"OLLAMA_MODELS": str(odd)}).start().wait_ready()
    assert told(server.pull(model.name)) == FULL
    assert registry.bytes_served(model.digests[0]) == SIZE


def test_names_match_without_regard_to_case(
    store: Path, registry: Registry, make_server: MakeServer
) -> None:
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    server = make_server().start().wait_ready()
    server.pull(model.name)
    status, _ = server.request(
        "DELETE", "/api/delete", {"model": model.name.replace("library/demo", "LIBRARY/DEMO")}
    )
    assert status == 200
    assert set(tree(store)) == {"blobs", "manifests"}


def test_full_disk_ends_the_pull_at_once(
    tmp_path: Path, registry: Registry, make_server: MakeServer
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        model = registry.add_model("demo", "1b", [Layer(20_000_000)], extras=False)
        server = make_server({"OLLAMA_MODELS": str(small / "models")}).start().wait_ready()
        last = collapsed(server.pull(model.name))[-1]
        partial = blob(small / "models", model.digests[0], "-partial")
        assert last == f"error: write {partial}: no space left on device"
        # Its bytes don't count, and the sidecar is as it was.
        text = blob(small / "models", model.digests[0], "-partial-0").read_text()
        assert text == sidecar(0, 0, 20_000_000, 0)
        server.stop()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_progress_comes_every_60_ms(
    store: Path, registry: Registry, large: Model, make_server: MakeServer
) -> None:
    times: list[float] = []
    server = make_server().start().wait_ready()
    pull = server.start_pull(large.name, lambda line: times.append(time.monotonic()))
    with held(registry, server, store, large):
        wait_until(lambda: len(times) > 22, "twenty lines")
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert sum(gaps) / len(gaps) > 0.05
        assert min(gaps) < 0.08, "a busy machine makes some longer, not all"
    pull.result()


def test_manifest_is_written_as_it_was_served(
    store: Path, registry: Registry, make_server: MakeServer
) -> None:
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    odd = b"\n " + json.dumps(json.loads(model.manifest) | {"more": 1}, indent=3).encode() + b"\n"
    registry.set_manifests("library/demo", "1b", [odd])
    server = make_server().start().wait_ready()
    assert told(server.pull(model.name)) == FULL
    assert (store / "manifests" / registry.host / "library/demo/1b").read_bytes() == odd

"""Every recording of a real server, played again."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.support.servers import (
    EngineServer,
    Server,
    blob,
    collapsed,
    data_segments,
    sidecar,
    tree,
    wait_until,
    wait_written,
)
from watcher.demo.registry import Fault, Registry

from .conftest import MakeServer
from .player import TRUTH, Player, Recorded, load

SPECIAL = {
    "connections-reset",
    "empty-manifest-folders",
    "guard-part-0",
    "live-pull",
    "manifest-dangling-link",
    "rm-beside-corrupt",
}
PLAYED = sorted(path.stem for path in TRUTH.glob("*.json") if path.stem not in SPECIAL)
PARTS = ((0, 100_000_000), (100_000_000, 100_000_000), (200_000_000, 62_144_000))


@pytest.fixture
def player(registry: Registry, store: Path) -> Player:
    return Player(registry, store)


@pytest.mark.parametrize("name", PLAYED)
def test_recorded_store_meets_the_same_fate(
    name: str, player: Player, make_server: MakeServer
) -> None:
    recording = load(name)
    player.lay_out(recording["before"])
    if name == "blob-corrupt":
        corrupt(blob(player.store, player.models["a"].digests[0]))
    player.compare_tree(recording["before"], "as laid out")
    server = make_server().start().wait_ready()
    if "after_server_start" in recording:
        player.compare_tree(recording["after_server_start"], "after the start")
    for number, pull in enumerate(recording["pulls"]):
        play_pull(player, server, pull, f"pull {number}")


def play_pull(player: Player, server: Server, pull: Recorded, what: str) -> None:
    player.registry.reset_stats()
    lines = server.pull(player.model_of(pull).name)
    player.compare_pull(pull, lines, what)
    player.compare_tree(pull["after"], f"after {what}")


def corrupt(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(100_000)
        file.write(b"\0\0\0\0")


def test_guard_is_part_0(player: Player, make_server: MakeServer) -> None:
    recording = load("guard-part-0")
    player.lay_out(recording["before"])
    server = make_server().start().wait_ready()
    first, second = recording["pulls"]
    play_pull(player, server, first, "the guarded pull")
    digest = player.models["a"].digests[0]
    blob(player.store, digest, "-partial-0").write_text(sidecar(0, 0, 100_000_000, 0))
    play_pull(player, server, second, "the next pull")


def interrupted(player: Player, server: Server, offsets: list[int], number: int) -> None:
    """Pull model a up to exactly these offsets, one in each part, then send the signal."""
    model = player.models["a"]
    digest = model.digests[0]
    player.registry.hold(digest, at=offsets)
    server.start().wait_ready()
    pull = server.start_pull(model.name)
    player.registry.wait_held(digest, len(offsets))
    wait_written(blob(player.store, digest, "-partial"), offsets)
    wait_until(
        lambda: pull.completed == sum(offsets) - sum(offset for offset, _ in PARTS),
        "all progress to be told",
    )
    server.kill(number)
    pull.result()
    player.registry.release()


def test_killed_server_leaves_the_recorded_state(player: Player, make_server: MakeServer) -> None:
    before = load("killed")["before"]
    interrupted(player, make_server(), [59834368, 145317888, 256299008], signal.SIGKILL)
    player.compare_tree(before, "after SIGKILL")


def test_terminated_server_writes_the_recorded_sidecars(
    player: Player, make_server: MakeServer
) -> None:
    before = load("terminated")["before"]
    completed = [49741824, 62193664, 49414144]
    offsets = [start + done for (start, _), done in zip(PARTS, completed, strict=True)]
    server = make_server()
    interrupted(player, server, offsets, signal.SIGTERM)
    if isinstance(server, EngineServer):
        player.compare_tree(before, "after SIGTERM")
        return
    # The real server exits while it writes them: each may also be as it was, or empty.
    digest = player.models["a"].digests[0]
    for number, ((start, size), done) in enumerate(zip(PARTS, completed, strict=True)):
        text = blob(player.store, digest, f"-partial-{number}").read_text()
        assert text in ("", *(sidecar(number, start, size, n) for n in (0, done)))


@pytest.mark.parametrize(("how", "left"), [("lost", "as it was"), ("torn", "empty")])
def test_engine_terminates_badly_on_demand(how: str, left: str, player: Player) -> None:
    offsets = [50_000_000, 150_000_000, 250_000_000]
    with EngineServer(player.store, {"DEMO_EXIT": how}) as server:
        interrupted(player, server, offsets, signal.SIGINT)
    digest = player.models["a"].digests[0]
    texts = [blob(player.store, digest, f"-partial-{n}").read_text() for n in range(3)]
    as_it_was = [sidecar(n, start, size, 0) for n, (start, size) in enumerate(PARTS)]
    if left == "empty":
        assert texts.count("") == 1
    else:
        assert texts == as_it_was


def test_connections_reset(player: Player, make_server: MakeServer) -> None:
    recording = load("connections-reset")
    model = player.models["a"]
    player.registry.add_fault(Fault("reset", after=20_000_000))
    player.registry.throttle(200_000_000)
    server = make_server({"DEMO_RETRY_SECONDS": "0.02"}).start().wait_ready()
    lines = server.pull(model.name, timeout=120)
    expected = [player.text(status) for status in recording["statuses"]]
    found = [re.sub(r"127.0.0.1:\d+->\S+:\d+:", "A->B:", text) for text in collapsed(lines)]
    assert found == expected
    # 6 tries of 3 parts, 20 MB each, as in the recording (there in pieces of 64 KiB).
    recorded = next(iter(recording["bytes_served"].values()))
    # Where they are not in step, the last tries of two parts are cut by the end of the third's.
    assert 16 * 20_000_000 < player.registry.bytes_served(model.digests[0]) <= 18 * 20_000_000
    assert recorded == 18 * 20_054_016
    told = [line.get("completed", 0) for line in lines if "total" in line]
    assert any(after < before for before, after in itertools.pairwise(told))
    assert "part 0 attempt 0 failed: read tcp 127.0.0.1:" in server.log
    found_tree = tree(player.store)
    expected_tree = player.expected_tree(recording["after"])
    assert found_tree.keys() == expected_tree.keys() | {"manifests"} & found_tree.keys()
    for name, entry in expected_tree.items():
        if "-partial-" in name:
            assert found_tree[name].text == entry.text
    found_segments = list(data_segments(blob(player.store, model.digests[0], "-partial")))
    assert found_segments == [
        (0, 20_000_768),
        (99_999_744, 120_000_512),
        (199_999_488, 220_000_256),
    ]


def test_live_pull(player: Player, make_server: MakeServer) -> None:
    recording = load("live-pull")
    model = player.models["a"]
    digest = model.digests[0]
    partial = blob(player.store, digest, "-partial")
    server = make_server().start().wait_ready()
    command = Path("/proc", str(server.pid), "cmdline").read_text().split("\0")
    assert "serve" in command
    assert Path("/proc", str(server.pid), "comm").read_text().strip() == recording["server_argv"][0]
    assert server.open_files() == {}
    player.registry.hold(digest, at=[40_000_000, 140_000_000, 240_000_000])
    pull = server.start_pull(model.name)
    player.registry.wait_held(digest, 3)
    wait_written(partial, [40_000_000, 140_000_000, 240_000_000])
    name = str(partial.relative_to(player.store))
    assert server.open_files() == {name: "w"} == open_files(recording, player, 1)
    assert sidecars(player, digest) == texts(recording, player, 1)
    assert partial.stat().st_size == 262_144_000
    # The last part ends first: only its sidecar is rewritten.
    player.registry.hold(digest, at=[60_000_000, 160_000_000])
    sample = next(n for n, s in enumerate(recording["samples"]) if "62144000}" in json.dumps(s))
    wait_until(
        lambda: sidecars(player, digest) == texts(recording, player, sample), "the last part's end"
    )
    rows = len(pull.lines)
    wait_until(lambda: len(pull.lines) >= rows + 10, "ten lines of progress")
    player.registry.release()
    lines = pull.result()
    assert lines[0] == recording["stream"][0]
    # What is 0 is left out: the last line of a small layer may have no `completed`.
    assert list(recording["stream"][1]) in [list(line) for line in lines]
    assert lines[-1] == recording["stream"][-1]
    assert server.open_files() == {}
    after = recording["samples"][-1]["tree"]
    assert set(tree(player.store)) == set(player.expected_tree(after))
    compare_lists(server, recording, player)


def open_files(recording: Recorded, player: Player, sample: int) -> dict[str, str]:
    found = recording["samples"][sample]["open_files"]
    return {player.text(entry["path"]): entry["mode"] for entry in found}


def texts(recording: Recorded, player: Player, sample: int) -> list[str]:
    entries = recording["samples"][sample]["tree"]
    return [player.text(entry["text"]) for entry in entries if "-partial-" in entry["path"]]


def sidecars(player: Player, digest: str) -> list[str]:
    return [blob(player.store, digest, f"-partial-{number}").read_text() for number in range(3)]


def compare_lists(server: Server, recording: Recorded, player: Player) -> None:
    status, body = server.request("GET", "/api/tags")
    (model,) = json.loads(body)["models"]
    (recorded,) = recording["api_tags"]["models"]
    assert (status, list(model)) == (200, list(recorded))
    for key in ("name", "model"):
        assert model[key] == player.text(recorded[key])
    assert model["size"] == recorded["size"]
    assert model["details"] == recorded["details"]
    assert json.loads(server.request("GET", "/api/ps")[1]) == recording["api_ps"]
    version = json.loads(server.request("GET", "/api/version")[1])
    assert version.keys() == recording["api_version"].keys()


def lay_out_model(player: Player, *names: str) -> None:
    """Manifest and small blobs of models, the large layer as a short file (it is not read)."""
    for name in names:
        model = player.models[name]
        path = player.store / "manifests" / player.registry.host / "library" / name / "1b"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model.manifest)
        for digest in (*model.digests, model.config):
            content = player.registry.content(digest)
            blob(player.store, digest).parent.mkdir(exist_ok=True)
            blob(player.store, digest).write_bytes(content.read(0, min(content.size, 1024)))


def test_dangling_link_at_tag_depth(player: Player, make_server: MakeServer) -> None:
    recording = load("manifest-dangling-link")
    lay_out_model(player, "a", "b")
    link = player.store / "manifests" / player.registry.host / "library/b/link"
    link.symlink_to("nowhere")
    server = make_server().start().wait_ready()
    name = player.models["b"].name
    for path, request in (("tags", "GET"), ("delete", "DELETE")):
        status, body = server.request(
            request, f"/api/{path}", {"model": name} if path == "delete" else None
        )
        recorded_status, recorded_body = recording["with_link"][path]
        assert (status, body.decode()) == (recorded_status, player.text(recorded_body))
    assert collapsed(server.pull(name)) == [player.text(x) for x in recording["with_link"]["pull"]]
    link.unlink()
    status, body = server.request("GET", "/api/tags")
    assert [status, body.decode()] == [
        player.text(x) if isinstance(x, str) else x for x in recording["link_removed"]["tags"]
    ]
    server.restart()
    assert server.request("GET", "/api/tags")[0] == recording["after_restart"]["tags"]


def test_dangling_link_that_comes_later_breaks_the_list_only_while_it_is_there(
    player: Player, make_server: MakeServer
) -> None:
    lay_out_model(player, "b")
    server = make_server().start().wait_ready()
    assert server.request("GET", "/api/tags")[0] == 200
    link = player.store / "manifests" / player.registry.host / "library/b/link"
    link.symlink_to("nowhere")
    assert server.request("GET", "/api/tags")[0] == 500
    link.unlink()
    assert server.request("GET", "/api/tags")[0] == 200


def test_rm_beside_a_corrupt_manifest(player: Player, make_server: MakeServer) -> None:
    recording = load("rm-beside-corrupt")
    lay_out_model(player, "a")
    folder = player.store / "manifests" / player.registry.host / "library"
    (folder / "c").mkdir()
    (folder / "c/1b").write_bytes(player.models["a"].manifest)
    (folder / "a/1b").write_bytes(b"")
    server = make_server().start().wait_ready()
    before = tree(player.store)
    name = player.models["a"].name.replace("/a:", "/c:")
    status, _ = server.request("DELETE", "/api/delete", {"model": name})
    assert status == recording["status"]
    gone = set(before) - set(tree(player.store))
    assert gone == {player.text(path) for path in recording["gone"]}


def test_empty_manifest_folders(player: Player, make_server: MakeServer) -> None:
    recording = load("empty-manifest-folders")
    (player.store / "blobs").mkdir(parents=True)
    (player.store / "manifests/localhost:5000/library/x").mkdir(parents=True)
    held = os.open(player.store / "manifests", os.O_RDONLY)
    try:
        make_server().start().wait_ready()
        # The server answers once its start is over; its list makes the folder anew.
        wait_until((player.store / "manifests").exists, "manifests/ to come back")
        assert os.fstat(held).st_nlink == 0
    finally:
        os.close(held)
    assert set(tree(player.store)) == {entry["path"].rstrip("/") for entry in recording["after"]}

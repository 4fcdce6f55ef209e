"""What no retry cures ends a pull at once, with its cause; waiting says what for."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import needs_root
from tests.support.driving import lay_out
from tests.support.servers import EngineServer, Server, blob
from watcher.demo.registry import Fault, Model, Registry
from watcher.observe.host import Host
from watcher.pull import by_server, disk, target
from watcher.pull.account import Options, Update
from watcher.pull.failures import Cause, End

from .driven import MB, POLICY, Seen, add, arrived, drive, site

UNTIL_DONE = Options(insecure=True, until_done=True)
ELSEWHERE = {"WWW-Authenticate": 'Bearer realm="https://auth.example/token",service="x"'}


@pytest.fixture
def quick(server: Server, slow: bool) -> Server:
    """Where the server is the demo's, its six tries take no minute."""
    if isinstance(server, EngineServer):
        server._extra |= {"DEMO_RETRY_SECONDS": "0.01", "DEMO_DIRECT_SECONDS": "0.3"}
    elif not slow:
        pytest.skip("a real server takes a minute to say so: needs --slow")
    return server


def ended_at_once(seen: Seen, cause: Cause, registry: Registry, step: str) -> None:
    assert seen.end.cause is cause, (seen.end, seen.notes)
    assert not any("attempt 2" in note for note in seen.notes), seen.notes
    assert all(each.waiting is None for each in seen.updates)
    assert seen.updates[-1].record.error == seen.end.text
    # Once by ourselves, and once by the server.
    assert registry.stats()["requests"][step] <= 3


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault("page", on="manifest", status=400, body="what?"), Cause.REFUSED),
        (Fault("page", on="manifest", status=402, body="pay"), Cause.REFUSED),
        (Fault("page", on="manifest", status=401), Cause.NO_PERMISSION),
        (Fault("page", on="manifest", status=403, body="no"), Cause.NO_PERMISSION),
        (Fault("page", on="manifest", status=407), Cause.PROXY),
        (Fault("page", on="manifest", status=410, body=""), Cause.NO_MODEL),
        (Fault("page", on="manifest", status=412, body='{"errors":[{}]}'), Cause.OLD_SERVER),
        (Fault("page", on="manifest", status=451, body=""), Cause.LEGAL),
        (Fault("page", on="manifest", status=511), Cause.PORTAL),
        (Fault("page", on="manifest", status=200), Cause.PORTAL),
        (Fault("page", on="manifest", status=200, body='{"layers": 1}'), Cause.BAD_MANIFEST),
        (Fault("page", on="manifest", status=200, body="null"), Cause.BAD_MANIFEST),
        (Fault("page", on="manifest", status=200, body='{"manifests": []}'), Cause.BAD_MANIFEST),
        (Fault("page", on="manifest", status=206, body="{}"), Cause.BAD_MANIFEST),
        (Fault("page", on="manifest", status=401, headers=ELSEWHERE), Cause.REALM),
        (
            Fault("page", on="manifest", status=307, headers={"Location": "ftp://x/y"}),
            Cause.BAD_ADDRESS,
        ),
    ],
    ids=lambda each: each.value if isinstance(each, Cause) else str(each.status),
)
def test_a_manifest_that_no_retry_brings(
    server: Server, registry: Registry, fault: Fault, cause: Cause
) -> None:
    model = add(registry, server, MB)
    registry.add_fault(Fault(**vars(fault)))
    server.start().wait_ready()
    ended_at_once(drive(site(server), model, UNTIL_DONE), cause, registry, "manifest")
    (log,) = (server.store / ".ollama-watch/logs").glob("events.jsonl")
    last = json.loads(log.read_bytes().splitlines()[-1])
    assert (last["event_type"], last["details"]["cause"]) == ("pull_failed", cause.code)


@pytest.mark.parametrize("size", [-5, 1 << 50])
def test_a_manifest_that_only_the_server_believes(
    server: Server, registry: Registry, size: int
) -> None:
    """What is called complete is nothing that the next audit calls an error."""
    model = add(registry, server, MB)
    manifest = json.loads(model.manifest)
    manifest["layers"][0]["size"] = size
    registry.set_manifests("library/demo", "1b", [json.dumps(manifest).encode()])
    server.start().wait_ready()
    seen = drive(site(server), model, UNTIL_DONE)
    assert seen.end.cause is Cause.BAD_MANIFEST, (seen.end, seen.notes)
    assert f"{size:,} bytes" in seen.end.text


#: What a status of a layer's data means, where the server says nothing of it.
HIDDEN = {
    200: Cause.PORTAL,
    401: Cause.NO_PERMISSION,
    404: Cause.NO_LAYER,
    410: Cause.NO_LAYER,
    416: Cause.DAMAGED,
    451: Cause.LEGAL,
}


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        (400, Cause.REFUSED),
        (401, Cause.NO_PERMISSION),
        (404, Cause.NO_LAYER),
        (410, Cause.NO_LAYER),
        (412, Cause.OLD_SERVER),
        (451, Cause.LEGAL),
    ],
)
def test_a_layer_that_no_retry_brings(
    server: Server, registry: Registry, status: int, cause: Cause
) -> None:
    model = add(registry, server, MB)
    registry.add_fault(Fault("page", on="head", digest=model.digests[0], status=status, body=""))
    server.start().wait_ready()
    ended_at_once(drive(site(server), model, UNTIL_DONE), cause, registry, "head")


def held(server: Server, model: Model) -> bool:
    """Whether the server has the data of the layer open."""
    path = os.fspath(blob(server.store, model.digests[0], "-partial"))
    opened = Path(f"/proc/{server.pid}/fd").iterdir()
    return path in [os.readlink(each) for each in opened if os.path.lexists(each)]


def announced(registry: Registry, digest: str, size: int) -> Fault:
    """The registry announces so many bytes of a layer."""
    return registry.add_fault(Fault("page", on="head", digest=digest, status=200, body="x" * size))


def misannounced(server: Server, registry: Registry, size: int) -> Model:
    """A slow layer of 3 MB, announced as so many bytes, and a server that is to pull it."""
    model = add(registry, server, 3 * MB)
    registry.throttle(2 * MB)
    announced(registry, model.digests[0], size)
    server.start().wait_ready()
    return model


LENGTHS = [3 * MB + 1, 5 * MB, 3 * MB - 1, 2 * MB]


def limited(server: Server, size: int) -> None:
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, size))


def test_pull_waits_for_an_error_that_the_server_reports_late(
    quick: Server, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so after six tries, which take longer than what counts as a stall."""
    monkeypatch.setattr(disk, "fault", lambda *_: None)
    if isinstance(quick, EngineServer):
        quick._extra |= {"DEMO_RETRY_SECONDS": "0.2"}
        monkeypatch.setattr(by_server, "_REASON_SECONDS", 30.0)
    model = add(registry, quick)
    quick.start().wait_ready()
    limited(quick, 40 * MB)
    seen = drive(site(quick), model, Options(insecure=True, until_done=True, stall_seconds=2.0))
    assert seen.end.cause is Cause.FILE_TOO_LARGE, (seen.end, seen.notes)
    assert sum(note.startswith("no bytes for") for note in seen.notes) <= 1
    assert registry.stats()["requests"]["manifest"] <= 8


@needs_root
def test_a_file_system_that_takes_no_file_so_long(tmp_path: Path) -> None:
    """Without extents and with small blocks ext4 has a limit of its own, as FAT32 has."""
    store, image = tmp_path / "models", tmp_path / "image"
    (store / "blobs").mkdir(parents=True)
    image.touch()
    os.truncate(image, 64 << 20)
    make = ["mkfs.ext4", "-q", "-b", "1024", "-O", "^extents,^64bit,^has_journal", str(image)]
    mount = ["mount", "-o", "loop", str(image), str(store / "blobs")]
    try:
        for command in (make, mount):
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip(f"{command[0]} can't be run here")
    except FileNotFoundError as error:
        pytest.skip(f"{error.filename} is not here")
    try:
        host = Host(str(store))
        (store / "blobs/sha256-x").touch()
        assert disk.fault(host, 10 * 10**9) is None
        found = disk.fault(host, 20 * 10**9)
        assert found is not None
        assert (found.cause, "20.0 GB" in found.text) == (Cause.FILE_TOO_LARGE, True)
        subprocess.run(["mount", "-o", "remount,ro", str(store / "blobs")], check=True)
        found = disk.fault(host, 1)
        assert found is not None
        assert found.cause is Cause.READ_ONLY
    finally:
        subprocess.run(["umount", str(store / "blobs")], check=True)


@needs_root
@pytest.mark.parametrize("until_done", [True, False])
def test_a_server_that_is_gone_is_not_awaited_on_a_read_only_store(
    tmp_path: Path, until_done: bool
) -> None:
    """It could not serve it; and the pull names the mount."""
    store = tmp_path / "the models"
    (store / "blobs").mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(store)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        (store / "blobs").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(store)], check=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
        found = target.find(url, Host(str(store)), POLICY.settings)
        seen = drive(found, "http://127.0.0.1:1/library/demo:1b", Options(until_done=until_done))
        why = f"the file system at {store} is mounted read-only"
        assert seen.end == End(Cause.READ_ONLY, why)
    finally:
        subprocess.run(["umount", str(store)], check=True)


@needs_root
@pytest.mark.parametrize("what", ["blobs", "data"])
def test_an_immutable_file_ends_the_pull_as_not_permitted(
    server: Server, registry: Registry, what: str
) -> None:
    model = add(registry, server, 3 * MB)
    lay_out(registry, server.store, model.digests[0], aged=600)
    server.start().wait_ready()
    path = server.store / "blobs"
    if what == "data":
        path = next(path.glob("*-partial"))
    if subprocess.run(["chattr", "+i", str(path)], capture_output=True).returncode:
        pytest.skip("nothing can be made immutable here")
    try:
        seen = drive(site(server), model, UNTIL_DONE)
    finally:
        subprocess.run(["chattr", "-i", str(path)], check=True)
    assert seen.end.cause is Cause.NOT_PERMITTED, (seen.end, seen.notes)
    assert not any("attempt 3" in note for note in seen.notes)


def test_waiting_shows_the_reason_the_try_and_the_time(server: Server, registry: Registry) -> None:
    model = add(registry, server, MB)
    registry.add_fault(Fault("page", on="manifest", status=503, times=6))
    server.start().wait_ready()
    began = time.time()
    seen = drive(site(server), model)
    assert seen.end.cause is None, (seen.end, seen.notes)
    assert arrived(server, model)
    waits = [each for each in seen.updates if each.waiting and each.note]
    assert len(waits) >= 2
    for number, each in enumerate(waits, 2):
        assert each.waiting is not None
        assert each.note.startswith(f"waiting for the registry: attempt {number} of 8 in ")
        assert (each.waiting.attempt, each.waiting.attempts) == (number, 8)
        assert "503" in each.waiting.why
        assert each.waiting.until is not None
        assert began <= each.waiting.until <= time.time() + 60
    assert seen.updates[-1].waiting is None


def test_pull_until_done_retries_without_limit(server: Server, registry: Registry) -> None:
    model = add(registry, server, MB)
    fault = registry.add_fault(Fault("page", on="manifest", status=503))
    server.start().wait_ready()

    def over(update: Update) -> None:
        if update.waiting and update.waiting.attempt > 9 and fault.times is None:
            fault.times = 0

    seen = drive(site(server), model, UNTIL_DONE, on_update=over)
    assert seen.end.cause is None, (seen.end, seen.notes)
    assert {each.waiting.attempts for each in seen.updates if each.waiting} == {None}

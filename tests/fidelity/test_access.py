"""A store that its server's user can't use: what a server does there, and what an audit says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run, needs_root
from tests.support.notation import LIBRARY, Store, quiet_machine
from tests.support.runs import one_look, rules
from tests.support.servers import RealServer, ServerDiedError
from watcher.model import Finding
from watcher.observe.host import Host

USER = 12345
#: What is done to a healthy store of the user; what the audit says; whether a server can't start.
STATES = {
    "as it should be": ("true", set[str](), False),
    "blobs of root": (
        "chown 0:0 blobs/*; chmod 600 blobs/*", {"blob_unreadable", "file_owner"}, False,
    ),
    "readable blobs of root": ("chown 0:0 blobs/*", {"file_owner"}, False),
    "one blob for a group": (
        "f=$(ls blobs/*|head -1); chown 0:0 $f; chmod 640 $f", {"blob_unreadable"}, False,
    ),
    "one blob for its group": ("chown 0 blobs/*; chmod 640 blobs/*", {"file_owner"}, False),
    "own blobs that nobody reads": ("chmod 200 blobs/*", {"blob_unreadable", "file_owner"}, False),
    "the folder is roots": ("chown 0:0 blobs", {"store_unwritable"}, False),
    "the folder is roots alone": ("chown 0:0 blobs; chmod 700 blobs", {"store_unlisted"}, True),
    "a folder that is only listed": ("chmod 644 blobs", {"store_unlisted"}, True),
    "a folder that nobody changes": ("chmod 555 blobs", {"store_unwritable"}, False),
    "a folder in it": ("mkdir -m 700 blobs/x", {"store_unlisted"}, True),
    "the store is roots": ("chown 0:0 .", set(), False),
    "the store is roots alone": ("chown 0:0 .; chmod 700 .", {"store_unreadable"}, True),
    "no blobs, and no right to make them": (
        "rm -r blobs manifests/*; touch manifests/x; chown 0:0 .", {"store_unwritable"}, True,
    ),
    "manifests of root": (
        f"chown 0:0 manifests/{LIBRARY}/*/*; chmod 600 manifests/{LIBRARY}/*/*",
        {"manifest_unreadable"}, False,
    ),
    "readable manifests of root": (
        f"chown 0:0 manifests/{LIBRARY}/*/*", {"manifest_unwritable"}, False,
    ),
    "their folders are roots, and one is empty": (
        "mkdir manifests/a; find manifests -type d -exec chown 0:0 {} +",
        {"store_unwritable"}, True,
    ),
    "their folders are roots": (
        "find manifests -type d -exec chown 0:0 {} +", {"store_unwritable"}, False,
    ),
    "manifests that root alone sees": (
        "chown 0:0 manifests; chmod 700 manifests", {"store_unlisted"}, True,
    ),
    "an old spelling that can't be renamed": (
        "f=$(ls blobs|head -1); mv blobs/$f blobs/sha256:${f#sha256-}; chown 0:0 blobs",
        {"store_unwritable"}, True,
    ),
    "files of a download": (
        "chown 0:0 blobs/*-partial*", {"file_owner"}, False,
    ),
    "own files in a folder where only owners rename": (
        "chown 0:0 blobs; chmod 1777 blobs", set(), False,
    ),
    "others files there": (
        "chown 0:0 blobs; chmod 1777 blobs; chown 9 blobs/*-partial*; chmod 666 blobs/*-partial*",
        {"file_owner"}, False,
    ),
}  # fmt: skip
KINDS = {kind for _, kinds, _ in STATES.values() for kind in kinds}


@pytest.fixture
def store() -> Iterator[Store]:
    """A model, and a download that is paused, of an ordinary user, who passes through all above."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        made = Store(Path(folder) / "models of its $user")
        made.model()
        made.broken("10:10 0:0", aged="10m")
        for path in (made.path, *made.path.rglob("*")):
            os.chown(path, USER, USER)
        yield made


def in_it(store: Store, command: str) -> None:
    subprocess.run(["sh", "-ec", command], cwd=store.path, check=True)


def audited(store: Store, run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Of an audit by root, which becomes the store's owner: what is barred, and the forecast."""
    done = run("--store", str(store.path), "audit", "--json")
    if done.returncode == 4:
        # Its owner can't even enter it.
        (command,) = re.findall("-> (.*)", done.stderr.decode())
        shut = {"kind": "store_unreadable", "evidence": done.stderr.decode(), "command": command}
        return [shut], {"start_fails": True, "why": [], "deletes": []}
    assert done.returncode in (0, 1), done.stderr
    document = json.loads(done.stdout)
    told = [each for each in document["findings"] if each["kind"] in KINDS]
    return told, document["forecast"]


@needs_root
@pytest.mark.parametrize("state", STATES)
def test_the_audit_names_what_is_in_the_way_and_its_command_fixes_it(
    store: Store, run: Run, state: str
) -> None:
    command, kinds, fails = STATES[state]
    in_it(store, command)
    told, foreseen = audited(store, run)
    assert {each["kind"] for each in told} == kinds
    assert foreseen["start_fails"] is fails, foreseen["why"]
    for each in told:
        assert str(USER) in each["evidence"]
        in_it(store, each["command"])
    told, foreseen = audited(store, run)
    assert not told
    assert not foreseen["start_fails"]


class OfTheUser(RealServer):
    """The real server, as the store's owner."""

    def command(self) -> list[str]:
        become = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
        return [*become, *super().command()]


@needs_root
@pytest.mark.skipif("OLLAMA_BIN" not in os.environ, reason="OLLAMA_BIN is not set")
@pytest.mark.parametrize("state", STATES)
def test_a_real_server_starts_or_not_as_foreseen(store: Store, run: Run, state: str) -> None:
    command, _, fails = STATES[state]
    in_it(store, command)
    home = store.path.with_name(store.path.name + ".home")
    home.mkdir()
    os.chown(home, USER, USER)
    _, foreseen = audited(store, run)
    with OfTheUser(store.path) as server:
        try:
            server.start().wait_ready()
            started = True
        except ServerDiedError:
            started = False
    assert started is not fails
    deleted = foreseen["deletes"]
    assert not any((store.path / path).exists() for path in deleted)


@needs_root
def test_a_folder_above_the_store_that_the_server_can_not_pass_through() -> None:
    """The user of its unit, to whom nothing of the store belongs."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        above = Path(folder) / "above"
        above.mkdir()
        store = Store(above / "models")
        store.model()
        here = store.host(proc=str(quiet_machine(Path(folder) / "machine")))
        system = Path(here.system) / "etc"
        (system / "systemd/system").mkdir(parents=True)
        (system / "passwd").write_text(f"ollama:x:{USER}:{USER}::/:/bin/false\n")
        (system / "systemd/system/ollama.service").write_text(
            f"[Service]\nUser=ollama\nEnvironment=OLLAMA_MODELS={store.path}\n"
        )
        for mode in (0o700, 0o744):
            above.chmod(mode)
            (told,), starts = above_of(here)
            assert not starts
            assert told.path == str(above)
            subprocess.run(["sh", "-c", told.command], check=True)
            assert above_of(here) == ([], True)


def above_of(here: Host) -> tuple[list[Finding], bool]:
    """The findings about folders above a store, and whether a start is foreseen to go well."""
    report = one_look(here, rules())
    assert report.diagnosis.forecast is not None
    told = [each for each in report.diagnosis.findings if "can't enter" in each.message]
    return told, not report.diagnosis.forecast.start_fails


def many(store: Store, count: int) -> None:
    digests = {store.blob(f"blob {at}".encode()): len(f"blob {at}") for at in range(count)}
    store.manifest("many/latest", digests)


@needs_root
def test_many_blobs_are_one_finding(store: Store, run: Run) -> None:
    many(store, 500)
    in_it(store, "chown -R 12345 .; chmod 0 blobs/*; chown 0 blobs/*-partial*")
    told, _ = audited(store, run)
    found = {each["kind"]: each for each in told}
    assert "501 blobs" in found["blob_unreadable"]["message"]
    assert "3 files" in found["file_owner"]["message"]
    assert len(told) == 2
    for each in told:
        in_it(store, each["command"])
    assert audited(store, run)[0] == []

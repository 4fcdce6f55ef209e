"""A store of which the server may read more than we may: nothing is said that we can't know.

What the server does is tried with the rights of the store's owner in the tests beside; here
somebody else looks.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import environment, needs_root, open_parents
from tests.support.driving import command
from tests.support.notation import LIBRARY, Store

pytestmark = needs_root
OWNER = 12345


@pytest.fixture
def stranger(
    tmp_path: Path, as_nobody: Callable[[Sequence[str]], list[str]]
) -> Callable[..., dict[str, Any]]:
    """What an audit by somebody else tells of a store of one model, made odd before."""
    store = Store(tmp_path / "models")
    store.model("llama3/latest")

    def look(change: Callable[[Store], None]) -> dict[str, Any]:
        change(store)
        for path in (store.path, *store.path.rglob("*")):
            os.chown(path, OWNER, OWNER, follow_symlinks=False)
        open_parents(store.path)
        store.path.chmod(0o755)
        words = as_nobody(["-m", "watcher", "--store", str(store.path), "--json", "audit"])
        done = subprocess.run(words, capture_output=True, timeout=120, env=environment(tmp_path))
        assert done.returncode == 1, done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    return look


def hide_a_folder(store: Store) -> None:
    (store.manifests / LIBRARY).chmod(0o700)


def hide_a_manifest(store: Store) -> None:
    (store.manifests / LIBRARY / "llama3" / "latest").chmod(0o600)


@pytest.mark.parametrize("hide", [hide_a_folder, hide_a_manifest])
def test_files_that_only_we_can_not_read_are_no_fault_of_the_store(
    stranger: Callable[..., dict[str, Any]], hide: Callable[[Store], None]
) -> None:
    told = stranger(hide)
    assert told["forecast"]["deletes"] == []
    assert not told["forecast"]["pruning_off"]
    kinds = {each["kind"] for each in told["findings"]}
    assert kinds <= {"store_unlisted", "manifest_unreadable", "blob_orphan"}
    (error,) = (each for each in told["findings"] if each["severity"] == "error")
    assert error["command"].startswith("sudo ")
    assert error["command"].endswith(" audit")
    for orphan in (each for each in told["findings"] if each["kind"] == "blob_orphan"):
        assert "readable manifest" in orphan["message"]
        assert (orphan["alone"], orphan["command"]) == ("", "")


def test_files_that_no_start_deletes_are_not_announced_as_deleted(
    stranger: Callable[..., dict[str, Any]],
) -> None:
    def broken_and_waste(store: Store) -> None:
        store.manifest("bad/latest", b"{")
        store.orphan()
        store.temporary()

    told = stranger(broken_and_waste)
    assert told["forecast"]["pruning_off"]
    alone = {
        each["kind"]: each["alone"]
        for each in told["findings"]
        if each["kind"] in ("blob_orphan", "file_temporary")
    }
    assert alone == {"blob_orphan": "it stays", "file_temporary": "it stays"}


def test_a_repair_reports_what_the_server_can_not_use(tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    store.model("llama3/latest")
    for path in (store.path, *store.path.rglob("*")):
        os.chown(path, OWNER, OWNER, follow_symlinks=False)
    os.chown(store.manifests / LIBRARY, 0, 0)
    done = subprocess.run(
        command(store.path, "repair", "-n", "--offline"),
        capture_output=True, text=True, timeout=120, env=environment(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1
    assert "nothing to repair" not in done.stdout
    assert f"-> chown -h {OWNER} " in done.stdout

"""What could not be looked at is named by each command, and nothing is concluded from it."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.runs import one_look, one_run, rules
from watcher import reconcile
from watcher.pull.manager import ModelDownloadManager, StoreFiles

from .conftest import IS_ROOT, Run, ordinary_user
from .support.notation import MB, Store

OWNER = 12345
LABEL = f"1-sha256-{'a' * 64}"
Call = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def store(models: Store) -> Store:
    """A model, an unfinished download, something in quarantine, and a folder in each place."""
    models.model("whole/latest")
    models.manifest("part/latest", {models.broken("40:40 60:60", total=200): 200 * MB})
    (models.blobs / "folder").mkdir()
    aside = models.path / ".ollama-watch" / "quarantine"
    aside.mkdir(parents=True)
    (aside / LABEL).write_bytes(b"damaged")
    return models


@pytest.fixture
def call(store: Store, run: Run) -> Call:
    """Runs a command on the store as its owner, who is no root."""

    def of(*words: str) -> subprocess.CompletedProcess[bytes]:
        if IS_ROOT:
            subprocess.run(["chown", "-hR", f"{OWNER}:{OWNER}", store.path], check=True)
        return run("--store", str(store.path), *words)

    return of


def document(call: Call, *words: str, code: int) -> dict[str, Any]:
    done = call("--json", *words)
    assert done.returncode == code, (words, done.stdout, done.stderr)
    return dict(json.loads(done.stdout))


CLOSED = ["blobs", "blobs/folder", "manifests", "manifests/registry.ollama.ai/library"]


@pytest.mark.parametrize("path", CLOSED)
def test_status_names_what_it_could_not_look_at(store: Store, call: Call, path: str) -> None:
    assert document(call, "status", code=0)["unseen"] == []
    (store.path / path).chmod(0)
    told = document(call, "status", code=4)
    assert [each["path"] for each in told["unseen"]] == [path]
    shown = call("status")
    assert shown.returncode == 4
    text = " ".join(shown.stdout.decode().split())
    assert f"not inspected: {path}: " in text
    assert "No unfinished downloads, as far as visible." in text or "resumable" in text
    assert "0 files in blobs/" not in text
    (command,) = told["commands"]
    subprocess.run(["bash", "-ec", command], check=True)
    assert document(call, "status", code=0)["unseen"] == []


#: What can be in a folder's place, and how it is reported.
IN_PLACE = {
    "a link to nothing": "it is a dangling symlink",
    "a loop": "its links lead in a circle",
    "a file": "it is not a folder",
    "a link to a file": "it is not a folder",
}


@pytest.mark.parametrize("what", IN_PLACE)
@pytest.mark.parametrize("top", ["blobs", "manifests"])
def test_a_file_or_link_in_place_of_a_folder_is_not_an_empty_folder(
    store: Store, call: Call, top: str, what: str
) -> None:
    """Of blobs or manifests on a disk that is not mounted nothing is known, so nothing is said."""
    folder = store.path / top
    folder.rename(store.path / "elsewhere")
    if what == "a file":
        folder.write_bytes(b"")
    else:
        (store.path / "file").write_bytes(b"")
        folder.symlink_to({"a loop": top, "a link to a file": "file"}.get(what, "unmounted"))
    for words in (["status"], ["verify"], ["repair", "-n"], ["clean", "--yes"], ["df"]):
        done = call(*words)
        assert done.returncode == 4, (words, done.stdout)
        assert f"{top}" in (done.stdout + done.stderr).decode(), words
    found = {each["path"]: each for each in document(call, "audit", code=1)["findings"]}
    assert found[top]["kind"] == "store_unlisted"
    assert found[top]["evidence"] == IN_PLACE[what]
    missing = [each for each in found.values() if each["kind"] == "blob_missing"]
    assert top != "blobs" or not missing
    prepared = call("prepare")
    assert prepared.returncode == 0
    assert IN_PLACE[what] in prepared.stderr.decode()


@pytest.mark.parametrize("below", ["models", ".ollama/models"])
def test_a_folder_above_a_store_leads_to_it(models: Store, run: Run, below: str) -> None:
    home = models.path.parent / "it's $HOME"
    (home / below).parent.mkdir(parents=True)
    models.path.rename(home / below)
    done = run("--store", str(home), "audit")
    assert done.returncode == 10
    command = done.stderr.decode().rpartition("-> ")[2].strip()
    assert shlex.split(command)[-3:] == ["--store", str(home / below), "audit"]
    assert subprocess.run(["bash", "-ec", command], check=False).returncode == 0


def test_a_store_without_blobs_yet_is_prepared_silently(store: Store, call: Call) -> None:
    shutil.rmtree(store.blobs)
    done = call("prepare")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("name", ["models.json", "queue.json"])
def test_status_names_files_of_ours_that_it_could_not_read(
    store: Store, call: Call, name: str
) -> None:
    (store.path / ".ollama-watch" / name).write_text("{}")
    (store.path / ".ollama-watch" / name).chmod(0)
    (unseen,) = document(call, "status", code=4)["unseen"]
    assert unseen == {"path": f".ollama-watch/{name}", "why": "Permission denied"}


@pytest.mark.parametrize(("path", "code"), [*((each, 4) for each in CLOSED), ("", 0)])
def test_a_reset_does_not_say_that_nothing_is_here(
    store: Store, call: Call, path: str, code: int
) -> None:
    if path:
        (store.path / path).chmod(0)
    done = call("reset", "--yes", "--offline", "whole")
    # A folder in blobs/ holds nothing that a server looks for.
    assert done.returncode == (0 if path == "blobs/folder" else code), done.stderr
    assert (b"no download to forget" in done.stdout) == (done.returncode == 0)
    assert bool(path) == (b"can't be" in done.stderr) or path == "blobs/folder"


@pytest.mark.parametrize("path", ["manifests", "manifests/registry.ollama.ai/library"])
def test_a_name_that_nothing_knows_may_be_one_that_could_not_be_read(
    store: Store, call: Call, path: str
) -> None:
    (store.path / path).chmod(0)
    for words in (("log", "whole"), ("repair", "-n", "--offline", "whole"), ("verify", "whole")):
        done = call(*words)
        assert done.returncode == 2
        assert f"{path} can't be read".encode() in done.stderr


def test_programs_hear_that_it_can_not_be_listed(store: Store) -> None:
    manager = ModelDownloadManager(StoreFiles(store.path))
    assert len(manager.detect_partial_downloads()) == 1
    with ordinary_user(store.path):
        store.blobs.chmod(0)
        with pytest.raises(Exception, match="blobs: the folder can't be listed"):
            manager.detect_partial_downloads()
        store.blobs.chmod(0o755)


# ---------------------------------------------------------------- the quarantine


@pytest.mark.parametrize(
    ("blobs", "code", "in_place"), [("missing", 0, False), ("closed", 4, None), ("there", 0, False)]
)
def test_quarantine_ls_lists_files_even_if_blobs_is_missing_or_closed(
    store: Store, call: Call, blobs: str, code: int, in_place: bool | None
) -> None:
    if blobs == "missing":
        shutil.rmtree(store.blobs)
    elif blobs == "closed":
        store.blobs.chmod(0)
    told = document(call, "quarantine", "ls", code=code)
    (kept,) = told["kept"]
    assert (kept["label"], kept["in_its_place"], kept["replaced"]) == (LABEL, in_place, False)
    assert [each["path"] for each in told["unseen"]] == (["blobs"] if code else [])
    shown = call("quarantine", "ls").stdout
    assert b"the quarantine is empty" not in shown
    assert (b"its place is not visible" if code else b"its place is free") in shown
    refused = call("quarantine", "restore", "-n", LABEL)
    assert (
        refused.returncode == (4 if blobs == "closed" else 1)
        or b"it is unknown whether its place" in refused.stdout
    )


@pytest.mark.parametrize("path", [".ollama-watch/quarantine", ".ollama-watch"])
def test_a_quarantine_that_can_not_be_listed_is_none_with_nothing_in_it(
    store: Store, call: Call, path: str
) -> None:
    (store.path / path).chmod(0)
    told = document(call, "quarantine", "ls", code=4)
    assert [each["path"] for each in told["unseen"]] == [path]
    audit = document(call, "audit", code=1)
    (finding,) = [each for each in audit["findings"] if each["kind"] == "store_unseen"]
    assert finding["path"] == path
    subprocess.run(["bash", "-ec", finding["command"]], check=True)
    assert len(document(call, "quarantine", "ls", code=0)["kept"]) == 1


# ---------------------------------------------------------------- what is remembered


def test_downloads_in_a_folder_that_can_not_be_listed_are_not_reported_as_gone(
    store: Store,
) -> None:
    """Its memory stays, and no event tells that somebody has removed it."""
    host, policy = store.host(), rules(repair=False)
    one_run(host, policy)
    known = reconcile.remembered(host)
    (digest,) = known.downloads
    with ordinary_user(store.path):
        store.blobs.chmod(0)
        for scope in (None, frozenset({digest})):
            report = one_run(host, policy, scope)
            assert not [each for each in report.events if each.event_type == "partial_removed"]
            assert reconcile.remembered(host).downloads == known.downloads
        store.blobs.chmod(0o755)
        for path in store.blobs.glob("*partial*"):
            path.unlink()
        report = one_run(host, policy)
        assert "partial_removed" in [each.event_type for each in report.events]


def test_metrics_count_nothing_that_could_not_be_listed(store: Store) -> None:
    pytest.importorskip("prometheus_client")
    from watcher.service import metrics

    host = store.host()

    def names(closed: bool) -> set[str]:
        store.blobs.chmod(0 if closed else 0o755)
        report = one_look(host, rules())
        with metrics.Metrics(
            str(store.path), rules(metrics_listen=("127.0.0.1", 0)).settings
        ) as kept:
            kept.look(report, 0.1)
            return {each.name.removeprefix("ollama_watch_") for each in kept.collect()}

    there = names(closed=False)
    with ordinary_user(store.path):
        gone = there - names(closed=True)
        store.blobs.chmod(0o755)
    assert gone >= {"blobs", "blob_bytes", "orphan_bytes", "downloads", "download_bytes"}

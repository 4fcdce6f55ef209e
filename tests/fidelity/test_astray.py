"""Bytes that lie where no server looks: told where, not removed, and found after the cure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run, environment
from tests.support.notation import LIBRARY, Store, digest_of
from tests.support.servers import tree

from .conftest import MakeServer

ASTRAY = ("blob_astray", "blob_missing", "blob_orphan")


def in_it(store: Store, command: str) -> None:
    subprocess.run(["bash", "-ec", command], cwd=store.path, check=True)


def findings(store: Store, run: Run, *kinds: str) -> list[dict[str, Any]]:
    done = run("--store", str(store.path), "audit", "--json")
    assert done.returncode in (0, 1), done.stderr
    return [each for each in json.loads(done.stdout)["findings"] if each["kind"] in kinds]


OLD = 'for f in sha256-*; do mv "$f" "sha256:${f#sha256-}"; done'
UPPER = 'for f in sha256-*; do mv "$f" "sha256-$(echo "${f#sha256-}" | tr a-f A-F)"; done'
STATES = {
    "an old spelling": f"cd blobs; {OLD}",
    "a copy that went into itself": "mv blobs old; mkdir blobs; mv old blobs/blobs",
    "a folder in it": "cd blobs; mkdir saved; mv sha256-* saved",
    "old spellings in a folder": f"cd blobs; {OLD}; mkdir saved; mv sha256:* saved",
    "digits in upper case": f"cd blobs; {UPPER}",
    "a store in it": "mkdir models; mv blobs models; mkdir blobs",
    "a store further in": "mkdir -p models/.ollama/models; mv blobs models/.ollama/models;"
    " mkdir blobs",
    "below manifests": "mv blobs manifests; mkdir blobs",
}


@pytest.mark.parametrize("state", STATES)
def test_bytes_that_lie_elsewhere_are_no_missing_blob(models: Store, run: Run, state: str) -> None:
    for name in ("a/latest", "b/latest"):
        models.model(name, aged="9d")
    whole = tree(models.path)
    in_it(models, STATES[state])
    lost = tree(models.path)
    told = findings(models, run, *ASTRAY)
    assert {each["kind"] for each in told} == {"blob_astray"}
    where = {path for path in lost.keys() - whole.keys() if "sha256" in path}
    for each in told:
        assert each["path"] in lost
        assert each["sizes"]["allocated_bytes"] > 0
    done = run("--store", str(models.path), "clean", "--yes")
    assert done.returncode in (0, 1, 3), done.stderr
    assert where <= tree(models.path).keys()
    for _ in range(3):
        for each in findings(models, run, *ASTRAY):
            in_it(models, each["command"])
    assert findings(models, run, *ASTRAY, "blob_old_name") == []
    found = tree(models.path)
    assert {path for path, each in whole.items() if each.kind == "file"} <= found.keys()


def test_digits_in_upper_case_in_a_manifest(models: Store, run: Run) -> None:
    digest = models.model("lower/latest")
    models.manifest("upper/latest", {digest.upper(): len("weights of lower/latest")})
    (told,) = findings(models, run, *ASTRAY)
    assert told["kind"] == "blob_astray"
    in_it(models, told["command"])
    assert findings(models, run, *ASTRAY) == []


def test_a_file_of_another_size_is_not_the_blob(models: Store, run: Run) -> None:
    digest = models.model()
    path = models.blobs / f"sha256-{digest}"
    path.write_bytes(b"short")
    (models.blobs / "blobs").mkdir()
    path.rename(models.blobs / "blobs" / path.name)
    (told,) = findings(models, run, *ASTRAY)
    assert told["kind"] == "blob_missing"


def test_manifests_that_went_into_themselves(models: Store, run: Run) -> None:
    models.model()
    in_it(models, "mv manifests old; mkdir manifests; mv old manifests/manifests")
    told = findings(models, run, "manifest_misplaced")
    (command,) = {each["command"] for each in told}
    in_it(models, command)
    assert findings(models, run, "manifest_misplaced") == []
    assert (models.manifests / LIBRARY / "llama3" / "latest").exists()


def test_models_that_differ_by_case_alone(models: Store, run: Run) -> None:
    for name in ("demo/latest", "Demo/latest", "other/Latest"):
        models.model(name)
    (told,) = findings(models, run, "manifest_case")
    in_it(models, told["command"])
    assert findings(models, run, "manifest_case") == []


# ---------------------------------------------------------------- downloads


def old_download(store: Store, claimed: str = "10:10 0:0", aged: str = "2h") -> str:
    digest = store.broken(claimed, aged=aged)
    in_it(store, f"cd blobs; {OLD.replace('sha256-*', f'sha256-{digest}-*')}")
    return digest


@pytest.mark.parametrize(
    ("claimed", "condition"), [("10:10 0:0", "paused"), ("0:10 0:0", "behind")]
)
def test_an_old_spelling_of_a_download_is_a_download(
    models: Store, run: Run, make_server: MakeServer, claimed: str, condition: str
) -> None:
    models.model()
    digest = old_download(models, claimed)
    done = run("--store", str(models.path), "audit", "--json")
    document = json.loads(done.stdout)
    (download,) = document["downloads"]
    assert (download["digest"], download["condition"]) == (f"sha256:{digest}", condition)
    assert any(each["kind"] == "download_at_risk" for each in document["findings"])
    # It is kept under the names that it has; changed it is only under those of today.
    before = models.names()
    done = run("--store", str(models.path), "repair", "--yes", "--offline")
    assert models.names() == before
    assert done.returncode == (0 if condition == "paused" else 3), done.stderr
    with make_server() as server:
        server.start().wait_ready()
    assert f"sha256-{digest}-partial" in models.names()
    assert f"sha256-{digest}-partial-1" in models.names()


def test_the_refusal_explains_how_to_rename_it(models: Store, run: Run) -> None:
    models.model()
    digest = old_download(models, "0:10 0:0")
    done = run("--store", str(models.path), "repair", "-n", "--offline", "--json")
    (refused,) = json.loads(done.stdout)["plan"]["refusals"]
    assert refused["kind"] == "old_names"
    in_it(models, refused["command"])
    done = run("--store", str(models.path), "repair", "--yes", "--offline")
    assert done.returncode == 0, done.stderr
    assert models.shown(digest).startswith("0:1 9:9 ")


def test_one_of_today_counts_beside_an_old_one(models: Store, run: Run) -> None:
    models.model()
    digest = old_download(models)
    models.broken("20:20 0:0", aged="10m")
    done = run("--store", str(models.path), "audit", "--json")
    (download,) = json.loads(done.stdout)["downloads"]
    assert download["digest"] == f"sha256:{digest}"
    assert download["bytes"]["claimed"] == 20_000_000
    assert digest == digest_of("layer")


@pytest.mark.parametrize("name", ["model", "download"])
def test_old_spellings_on_a_read_only_mount_keep_a_server_from_starting(
    models: Store, run: Run, name: str
) -> None:
    models.model()
    if name == "model":
        in_it(models, f"cd blobs; {OLD}")
    else:
        old_download(models)
    script = "mount --bind . . && cd $PWD && mount -o remount,ro,bind . && "
    script += "exec $0 -m watcher --store . audit --json"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, sys.executable],
        cwd=models.path,
        env=environment(models.path.parent), capture_output=True, check=False,
    )  # fmt: skip
    if done.stderr.startswith((b"unshare:", b"mount:")):
        pytest.skip(f"nothing can be mounted here: {done.stderr.decode()}")
    document = json.loads(done.stdout)
    assert document["forecast"]["start_fails"]
    assert "read-only" in " ".join(document["forecast"]["why"])
    assert done.returncode == 1


# ---------------------------------------------------------------- a store in the store

#: A whole copy that was moved in, or copied in.
COPIES = {
    "models": "mkdir x; {} blobs manifests x; mv x models",
    "models/.ollama/models": "mkdir x; {} blobs manifests x; mkdir -p models/.ollama;"
    " mv x models/.ollama/models",
    "blobs": "mkdir x; {} blobs manifests x; mkdir -p blobs; mv x/* blobs; rmdir x",
    "manifests": "mkdir x; {} blobs manifests x; mkdir -p manifests; mv x/* manifests; rmdir x",
}


def of_everything(store: Store) -> None:
    for name in ("a/latest", "b/latest"):
        store.model(name)
    store.broken("40:40 60:60", total=200)


@pytest.mark.parametrize("inside", COPIES)
def test_a_store_that_was_moved_into_itself_comes_back_whole(
    models: Store, run: Run, inside: str
) -> None:
    of_everything(models)
    whole = tree(models.path)
    in_it(models, COPIES[inside].format("mv"))
    for name in ("blobs", "manifests"):
        (models.path / name).mkdir(exist_ok=True)
    (told,) = findings(models, run, "blob_astray", "manifest_misplaced")
    assert told["kind"] == "blob_astray"
    assert told["sizes"]["allocated_bytes"] > 100_000_000
    in_it(models, told["command"])
    assert findings(models, run, *ASTRAY, "manifest_misplaced") == []
    found = tree(models.path)
    assert {path for path, each in whole.items() if each.kind == "file"} <= found.keys()
    assert not [path for path in found.keys() - whole.keys() if found[path].kind == "file"]


@pytest.mark.parametrize("inside", COPIES)
def test_a_copy_of_what_is_there_is_reported_and_nothing_of_it_moved(
    models: Store, run: Run, inside: str
) -> None:
    of_everything(models)
    in_it(models, COPIES[inside].format("cp -a"))
    (told,) = findings(models, run, *ASTRAY, "manifest_misplaced")
    assert (told["severity"], told["command"]) == ("warning", "")
    assert told["sizes"]["allocated_bytes"] > 100_000_000
    # It names what may be removed, and nothing of the store itself.
    assert re.search(rf"remove {inside}/([a-z]|$|\S* )", told["remedy"])
    if inside in ("blobs", "manifests"):
        assert f"remove {inside}/ " not in told["remedy"]


def test_files_of_two_downloads_of_one_digest_are_not_mixed(models: Store, run: Run) -> None:
    of_everything(models)
    in_it(models, COPIES["models"].format("cp -a"))
    more = models.blobs / f"sha256-{digest_of('layer')}-partial-1"
    more.unlink()
    models.orphan("x")
    in_it(models, "mv blobs/sha256-*[0-9a-f] models/blobs 2>/dev/null || true")
    for path in models.blobs.glob("sha256-*"):
        if "partial" not in path.name:
            path.rename(models.path / "models" / "blobs" / path.name)
    for each in findings(models, run, "blob_astray"):
        in_it(models, each["command"])
    assert not more.exists()
    assert [path for path in models.blobs.iterdir() if "partial" not in path.name]


def test_a_nested_store_that_a_server_runs_on_has_no_command_to_move_it(
    store: Path, run: Run, make_server: MakeServer
) -> None:
    inner, outer = Store(store), Store(store.parent)
    inner.model("theirs/latest")
    outer.model("ours/latest")
    (told,) = findings(outer, run, *ASTRAY)
    assert told["command"]
    make_server().start().wait_ready()
    (told,) = findings(outer, run, *ASTRAY)
    assert told["command"] == ""
    assert "a server runs on it" in told["remedy"]

"""`verify`, `audit` and `repair` of blobs that are not what their names say: each word is true."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ordinary_user
from tests.support.driving import HealthyStore, audit, command, environment, private_proc, run
from tests.support.runs import changed, one_run, rules
from watcher.act import answering, journal
from watcher.decide import modes
from watcher.model import ActionKind, Result
from watcher.observe.host import Host
from watcher.ollama.names import ModelName
from watcher.state import folders, fs, hashes

REPAIR = rules(repair=True, hash=True, online=True, writers_visible=True)


class TrueStore(HealthyStore):
    """One whose blobs have the digests of their content; some are named by several models."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.layer = self.text_blob(f"weights of {self.path}" * 100)
        self.config = self.text_blob(f"config of {self.path}")
        self.empty = self.text_blob("")
        self.shared = self.text_blob(f"a template of {self.path}")
        self.manifest_of("first", self.layer, self.empty, self.shared, self.config)
        self.manifest_of("second", self.text_blob(f"more of {self.path}"), self.shared, self.config)

    def digest(self, text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    def blob_path(self, digest: str) -> Path:
        """Where a blob lies."""
        return self.blobs / f"sha256-{digest}"


@pytest.fixture
def store(tmp_path: Path) -> TrueStore:
    return TrueStore(tmp_path / "models")


def verify(store: HealthyStore, *words: str) -> tuple[int, dict[str, Any]]:
    done = run(store.path, "--json", "verify", *words)
    assert done.stdout, done.stderr
    return done.returncode, dict(json.loads(done.stdout))


def lines(store: HealthyStore, *words: str) -> tuple[int, str]:
    """A command's exit code and its words, in one line."""
    done = run(store.path, *words)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


# ---------------------------------------------------------------- what befalls a blob

Break = Callable[[Path], None]


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _emptied(path: Path) -> None:
    os.truncate(path, 0)


def _longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _other_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes().swapcase() or b"some")


def _lost(path: Path) -> None:
    path.unlink()


def _linked(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def _to_nowhere(path: Path) -> None:
    _linked(path, "nowhere")


def _to_itself(path: Path) -> None:
    _linked(path, path.name)


def _to_a_folder(path: Path) -> None:
    aside = path.parent.parent.parent / "a folder"
    aside.mkdir()
    _linked(path, str(aside))


def _to_other_bytes(path: Path) -> None:
    aside = path.parent.parent.parent / "other bytes"
    aside.write_bytes(path.read_bytes().swapcase() or b"some")
    _linked(path, str(aside))


def _to_fewer_bytes(path: Path) -> None:
    aside = path.parent.parent.parent / "fewer bytes"
    aside.write_bytes(path.read_bytes()[1:] or b"some")
    _linked(path, str(aside))


def _to_a_pipe(path: Path) -> None:
    aside = path.parent.parent.parent / "a pipe"
    os.mkfifo(aside)
    _linked(path, str(aside))


def _to_a_device(path: Path) -> None:
    _linked(path, "/dev/zero")


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "in it").write_text("something")


def _a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _a_socket(path: Path) -> None:
    path.unlink()
    folder = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{folder}/socket")
    (path.parent / "socket").rename(path)
    os.close(folder)


#: What befalls it, and how `audit` calls it before and after it was hashed.
DAMAGES: dict[str, tuple[Break, str, str]] = {
    "cut": (_cut, "blob_short", "blob_corrupt"),
    "emptied": (_emptied, "blob_short", "blob_corrupt"),
    "longer": (_longer, "blob_long", "blob_corrupt"),
    "lost": (_lost, "blob_missing", "blob_missing"),
    "to nowhere": (_to_nowhere, "blob_dangling", "blob_dangling"),
    "to itself": (_to_itself, "blob_dangling", "blob_dangling"),
    "to a folder": (_to_a_folder, "blob_no_file", "blob_no_file"),
    "to other bytes": (_to_other_bytes, "blob_symlink", "blob_corrupt"),
    "to fewer bytes": (_to_fewer_bytes, "blob_short", "blob_corrupt"),
    "to a pipe": (_to_a_pipe, "blob_no_file", "blob_no_file"),
    "to a device": (_to_a_device, "blob_no_file", "blob_no_file"),
    "a folder": (_a_folder, "blob_no_file", "blob_no_file"),
    "a pipe": (_a_pipe, "blob_no_file", "blob_no_file"),
    "a socket": (_a_socket, "blob_no_file", "blob_no_file"),
}
damages = pytest.mark.parametrize("damage", DAMAGES)
#: Beside a layer; with `--slow` all of them.
OF_CONFIGS = ("cut", "lost", "to other bytes", "a folder")
OF_LAYER = pytest.mark.slow("a config and a layer are both blobs; what befalls a layer is tried")


def of_blobs(store: HealthyStore) -> dict[str, dict[str, Any]]:
    """What `audit` says of blobs: by kind."""
    found = audit(store.path)["findings"]
    return {each["kind"]: each for each in found if each["kind"].startswith("blob_")}


@pytest.mark.parametrize(
    ("which", "damage"),
    [
        *(("layer", damage) for damage in DAMAGES),
        *(
            pytest.param("config", each, marks=() if each in OF_CONFIGS else OF_LAYER)
            for each in DAMAGES
        ),
    ],
)
def test_a_blob_that_is_not_what_its_name_says(
    store: TrueStore, tmp_path: Path, damage: str, which: str
) -> None:
    digest = getattr(store, which)
    path, (hurt, before, after) = store.blob_path(digest), DAMAGES[damage]
    size = path.stat().st_size
    hurt(path)
    assert list(of_blobs(store)) == [before]
    code, told = verify(store)
    assert code == 1
    assert [each["kind"] for each in told["wrong"]] == [after]
    assert told["unchecked"] == 0
    (found,) = of_blobs(store).values()
    assert (found["kind"], found["severity"]) == (after, "error")
    assert found["command"], "an error says what helps"
    code, words = lines(store, "repair", "--offline", "--yes")
    assert code != 0
    assert "nothing to repair" not in words
    assert path.is_symlink() or path.exists() or damage == "lost", "nobody has said it can be had"
    outside = {each: each.lstat() for each in tmp_path.iterdir() if " " in each.name}

    here = Host(
        str(store.path), proc=private_proc(tmp_path / "proc"), registry_length=lambda *_: size
    )
    report = one_run(here, REPAIR)
    verbs = [each.action.kind for each in report.outcomes if each.result is Result.DONE]
    assert (ActionKind.QUARANTINE_BLOB in verbs) == (damage != "lost")
    assert not os.path.lexists(path), "so that a pull fetches it"
    kept = list((store.ours / "quarantine").glob("*")) if damage != "lost" else []
    assert [each.name.partition("-")[2] for each in kept] == [path.name] * len(kept)
    assert {each: each.lstat() for each in outside} == outside, "what a link led to is as it was"
    assert list(of_blobs(store)) == ["blob_missing"]


def test_an_empty_layer_is_right_and_one_with_a_byte_is_not(store: TrueStore) -> None:
    assert verify(store)[0] == 0
    _longer(store.blob_path(store.empty))
    code, told = verify(store)
    assert (code, [each["kind"] for each in told["wrong"]]) == (1, ["blob_corrupt"])


def test_an_empty_layer_can_be_had_again(store: TrueStore, tmp_path: Path) -> None:
    _longer(store.blob_path(store.empty))
    proc = private_proc(tmp_path / "proc")
    one_run(Host(str(store.path), proc=proc, registry_length=lambda *_: 0), REPAIR)
    assert not store.blob_path(store.empty).exists()


@pytest.mark.parametrize("how", ["symlink", "hardlink"])
def test_a_link_to_the_right_bytes_is_healthy_and_reported(store: TrueStore, how: str) -> None:
    """What a tool makes that keeps equal files once."""
    path = store.blob_path(store.layer)
    aside = path.parent.parent.parent / "kept once"
    path.rename(aside)
    getattr(path, f"{how}_to")(aside)
    code, told = verify(store)
    assert (code, told["read"], told["wrong"]) == (0, 7, [])
    assert list(of_blobs(store)) == (["blob_symlink"] if how == "symlink" else [])
    assert verify(store)[1]["read"] == 0
    aside.write_bytes(aside.read_bytes().swapcase())
    code, told = verify(store)
    assert (code, told["read"]) == (1, 1), "what the link leads to has changed"


@pytest.mark.parametrize("how", ["manifest", "another manifest"])
def test_a_wrong_size_in_a_manifest_is_the_manifests_fault(store: TrueStore, how: str) -> None:
    name = "first" if how == "manifest" else "second"
    digest = store.layer if how == "manifest" else store.shared
    path = store.path / "manifests/registry.ollama.ai/library" / name / "latest"
    manifest = json.loads(path.read_bytes())
    for layer in manifest["layers"]:
        if layer["digest"].endswith(digest):
            layer["size"] += 7
    path.write_text(json.dumps(manifest))
    code, told = verify(store)
    assert (code, told["checked"], told["wrong"]) == (0, 7, [])
    (found,) = audit(store.path)["findings"]
    assert (found["kind"], found["models"]) == ("manifest_wrong_size", [f"{name}:latest"])
    assert found["command"].endswith(f" pull {name}:latest"), "ours asks for its manifest"
    here = Host(str(store.path), registry_length=lambda *_: pytest.fail("nothing is to be asked"))
    assert one_run(here, REPAIR).outcomes == ()
    assert store.blob_path(digest).exists()


# ---------------------------------------------------------------- what verify says


def test_verify_counts_blobs_read_and_blobs_unchanged(store: TrueStore) -> None:
    assert lines(store, "verify") == (0, "7 blobs checked: all match (7 read, 0 unchanged)")
    assert lines(store, "verify") == (0, "7 blobs checked: all match (0 read, 7 unchanged)")
    assert lines(store, "-q", "verify") == (0, "")
    _cut(store.blob_path(store.layer))
    code, words = lines(store, "-q", "verify")
    assert code == 1
    assert words.startswith("7 blobs checked: 1 corrupt (1 read, 6 unchanged)")
    _lost(store.blob_path(store.shared))
    code, words = lines(store, "verify")
    assert code == 1
    assert words.startswith("6 blobs checked: 1 corrupt, 1 missing (0 read, 6 unchanged)")


def test_a_models_blobs_alone(store: TrueStore) -> None:
    code, words = lines(store, "verify", "second")
    assert (code, words) == (0, "3 blobs checked: all match (3 read, 0 unchanged)")
    _other_bytes(store.blob_path(store.layer))
    assert lines(store, "verify", "second")[0] == 0
    code, told = verify(store, "first")
    keys = ("checked", "read", "unchanged", "unchecked")
    assert (code, [told[key] for key in keys]) == (1, [4, 2, 2, 0])
    _cut(store.blob_path(store.shared))
    assert verify(store, "second")[0] == verify(store, "first")[0] == 1
    assert verify(store, "healthy")[0] == 0


def test_a_time_limit_reports_how_much_is_left(store: TrueStore) -> None:
    code, told = verify(store, "--max-duration", "0s")
    if code == 2:
        pytest.skip("no such short time")
    assert (code, told["checked"], told["unchecked"]) == (1, 0, 7)
    code, words = lines(store, "verify", "--max-duration", "0s")
    assert code == 1
    assert words.startswith("0 blobs checked: unknown; 7 not checked (0 read, 0 unchanged)")


def test_verify_counts_an_unreadable_blob_as_unchecked(store: TrueStore, tmp_path: Path) -> None:
    store.blob_path(store.layer).chmod(0)
    with ordinary_user(tmp_path):
        done = _in_this_process(store, "verify")
    assert done.returncode == 4
    told = json.loads(done.stdout)
    assert (told["checked"], told["unchecked"]) == (6, 1)
    (unseen,) = told["unseen"]
    assert store.layer in unseen["path"]
    assert "Permission denied" in unseen["why"]


def test_verify_reports_that_it_could_not_save_its_results(
    store: TrueStore, tmp_path: Path
) -> None:
    store.path.chmod(0o555)
    _other_bytes(store.blob_path(store.config))
    with ordinary_user(tmp_path):
        done = _in_this_process(store, "verify")
    store.path.chmod(0o755)
    assert done.returncode == 4
    told = json.loads(done.stdout)
    assert [each["kind"] for each in told["wrong"]] == ["blob_corrupt"]
    assert (told["checked"], told["read"], told["unchecked"]) == (7, 7, 0)
    assert "can't be written" in " ".join(told["troubles"])


@pytest.mark.parametrize("how", ["unreadable", "corrupt", "dangling", "folder"])
def test_a_manifest_that_can_not_be_read(store: TrueStore, tmp_path: Path, how: str) -> None:
    path = store.path / "manifests/registry.ollama.ai/library/first/latest"
    if how == "unreadable":
        path.chmod(0)
    elif how == "folder":
        path.parent.chmod(0)
    elif how == "corrupt":
        path.write_text("{")
    else:
        _linked(path, "nowhere")
    with ordinary_user(tmp_path):
        done = _in_this_process(store, "verify")
        repaired = _in_this_process(store, "repair", "--offline", "--yes")
        audited = _in_this_process(store, "audit")
    path.parent.chmod(0o755)
    assert done.returncode == 4
    told = json.loads(done.stdout)
    assert (told["checked"], told["unchecked"]) == (5, 1)
    assert "first" in told["unseen"][0]["path"]
    assert repaired.returncode != 0
    assert audited.returncode == 1


def _in_this_process(store: HealthyStore, *words: str) -> subprocess.CompletedProcess[str]:
    """A command as the user that we are just now, in a child of this very interpreter."""
    done = subprocess.CompletedProcess([*words], -1, "", "")
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.close(out)
            os.dup2(into, 1)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            os.environ.update(environment(store.path))
            from watcher.cli import main

            code = main(["--store", str(store.path), "--json", *words])
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(into)
    with os.fdopen(out) as stream:
        done.stdout = stream.read()
    done.returncode = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return done


# ---------------------------------------------------------------- a disk that fails

strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is missing")


def failing(
    store: HealthyStore, path: str, call: str, *words: str
) -> subprocess.CompletedProcess[str]:
    """A command of ours while the disk fails at each `call` about a path."""
    inject = ["-P", str(store.path / path), "-e", f"trace={call}", "-e", f"inject={call}:error=EIO"]
    done = subprocess.run(
        ["strace", "-f", "-o", "/dev/null", *inject, *command(store.path, "--json", *words)],
        env=environment(store.path),
        cwd=store.path.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    return done


@strace
def test_no_right_is_given_against_a_failing_disk(store: TrueStore) -> None:
    done = failing(store, "manifests/registry.ollama.ai/library", "getdents64", "audit")
    (told,) = (
        each for each in json.loads(done.stdout)["findings"] if each["kind"] == "store_unlisted"
    )
    assert (told["command"], told["evidence"]) == ("", os.strerror(errno.EIO))
    assert "kernel's log" in told["remedy"]


@strace
@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("manifests", "getdents64"),
        ("manifests/registry.ollama.ai/library/first", "getdents64"),
        ("manifests/registry.ollama.ai/library/first/latest", "read"),
        ("blobs", "getdents64"),
        ("manifests", "openat"),
    ],
)
def test_a_failing_disk_is_reported(store: TrueStore, path: str, call: str) -> None:
    assert verify(store)[0] == 0
    done = failing(store, path, call, "verify")
    assert done.returncode == 4, (done.stdout, done.stderr)
    assert json.loads(done.stdout)["unchecked"] >= 1
    repaired = failing(store, path, call, "repair", "--offline", "--yes")
    assert repaired.returncode != 0
    assert "nothing to repair" not in repaired.stdout
    assert failing(store, path, call, "audit").returncode == 1


@strace
def test_a_sidecar_that_the_disk_can_not_read(store: TrueStore) -> None:
    digest = store.download("unfinished", aged=600)
    name = f"blobs/sha256-{digest}-partial-1"
    before = store.tree()
    repaired = failing(store, name, "read", "repair", "--offline", "--yes")
    assert repaired.returncode != 0, repaired.stdout
    assert store.tree() == before, "what can't be read is left alone"
    assert failing(store, name, "read", "audit").returncode == 1


def _unfinished_model(store: TrueStore) -> str:
    """A model of which one layer lies there in part, and two blobs are missing; its digest."""
    digest = store.download("unfinished", aged=7200)
    size = store.partial(digest).stat().st_size
    sizes = {digest: size, store.shared: store.blob_path(store.shared).stat().st_size, "c" * 64: 12}
    *layers, config = [
        {"mediaType": "application/octet-stream", "digest": f"sha256:{each}", "size": length}
        for each, length in sizes.items()
    ]
    path = store.path / "manifests/registry.ollama.ai/library/third/latest"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schemaVersion": 2, "config": config, "layers": layers}))
    return digest


def test_repair_does_not_count_a_missing_blob_that_an_unfinished_pull_will_download(
    store: TrueStore,
) -> None:
    digest = _unfinished_model(store)
    store.partial(digest, 1).unlink()
    missing = f"blobs/sha256-{'c' * 64}"
    assert missing in [each["path"] for each in audit(store.path)["findings"]]
    for _ in range(2):
        done = run(store.path, "--json", "repair", "--offline", "--yes")
        assert (done.returncode, json.loads(done.stdout)["remaining"]) == (0, []), done.stderr
    assert missing in [each["path"] for each in audit(store.path)["findings"]]


@pytest.mark.parametrize("why", ["another model", "left behind", "no file"])
def test_repair_counts_a_missing_blob_that_no_unfinished_pull_will_download(
    store: TrueStore, why: str
) -> None:
    digest = _unfinished_model(store)
    lost = "c" * 64
    if why == "another model":
        _lost(store.blob_path(store.shared))
        lost = store.shared
    elif why == "left behind":
        os.replace(store.partial(digest), store.blob_path(digest))
    else:
        store.partial(digest, 1).unlink()
        store.partial(digest, 1).mkdir()
    done = run(store.path, "--json", "repair", "--offline", "--yes")
    assert done.returncode != 0
    left = [each["path"] for each in json.loads(done.stdout)["remaining"]]
    assert f"blobs/sha256-{lost}" in left


@strace
@pytest.mark.parametrize("how", ["no file", "can't be read"])
def test_a_clean_up_distinguishes_what_is_no_file_from_what_it_could_not_read(
    store: TrueStore, how: str
) -> None:
    digest = store.download("unfinished", aged=7200)
    name = f"blobs/sha256-{digest}-partial-1"
    if how == "no file":
        (store.path / name).unlink()
        (store.path / name).mkdir()
        done = run(store.path, "--json", "clean", "--yes")
    else:
        done = failing(store, name, "read", "clean", "--yes")
    assert done.returncode == (1 if how == "no file" else 4), done.stderr
    assert [each["kind"] for each in json.loads(done.stdout)["remaining"]] == ["download_unknown"]


def test_a_registry_that_never_answers_is_not_asked_for_ever(
    store: TrueStore, tmp_path: Path
) -> None:
    digests = [store.text_blob(f"layer {number} of {store.path}") for number in range(50)]
    store.manifest_of("many", *digests)
    for digest in digests:
        _other_bytes(store.blob_path(digest))
    one_run(Host(str(store.path)), changed(REPAIR, repair=False, online=False, verify=True))
    asked: list[str] = []

    def nobody(_: ModelName, digest: str) -> int | None:
        asked.append(digest)
        raise TimeoutError("no answer")

    here = Host(str(store.path), proc=private_proc(tmp_path / "proc"), registry_length=nobody)
    report = one_run(here, REPAIR)
    assert len(asked) < 5
    assert len(report.plan.refusals) == 50


def test_a_blob_under_an_old_name_is_not_called_missing(store: TrueStore) -> None:
    for path in list(store.blobs.iterdir()):
        path.rename(path.with_name(path.name.replace("sha256-", "sha256:")))
    code, told = lines(store, "verify")
    assert code == 1
    assert "7 misplaced" in told
    assert "missing" not in told
    assert "under names of older servers" in told


def test_healthy_counts_the_blobs_that_were_never_hashed(store: TrueStore) -> None:
    count = len(list(store.blobs.iterdir()))
    told = lines(store, "audit")[1]
    assert told.startswith("healthy: ")
    assert f"; {count} not yet verified. Run: " in told
    assert f"--store {store.path} verify" in told
    assert audit(store.path)["store"]["hashed_blobs"] == 0
    assert verify(store, "first")[0] == 0
    told = lines(store, "audit")[1]
    hashed = audit(store.path)["store"]["hashed_blobs"]
    assert 0 < hashed < count
    assert f"; {count - hashed} not yet verified. Run: " in told
    assert verify(store)[0] == 0
    assert "hashed" not in lines(store, "audit")[1]


def test_a_record_calls_no_model_complete_whose_blob_is_not_right(store: TrueStore) -> None:
    assert run(store.path, "repair", "--offline", "--yes").returncode == 0  # the first look
    right, cut = store.text_blob("right" * 10), store.text_blob("cut short" * 100)
    store.manifest_of("right", right)
    store.manifest_of("wrong", right, cut)
    os.truncate(store.blob_path(cut), 5)
    run(store.path, "repair", "--offline", "--yes")
    kept = json.loads((store.ours / "models.json").read_bytes())["models"]
    states = {key.partition(":")[0].rpartition("/")[2]: each["state"] for key, each in kept.items()}
    assert states == {"right": "completed", "wrong": "error"}


def test_a_lost_memory_is_not_called_healthy(store: TrueStore) -> None:
    assert verify(store)[0] == 0
    assert lines(store, "audit")[1].startswith("healthy: ")
    (store.ours / "state.json").write_text("{")
    code, words = lines(store, "audit")
    assert (code, "healthy: " in words) == (0, False)
    assert [each["kind"] for each in audit(store.path)["findings"]] == ["state_forgotten"]
    assert lines(store, "verify")[0] == 0
    assert lines(store, "audit")[1].startswith("healthy: ")


def test_to_protect_a_blob_keeps_its_hash(store: TrueStore) -> None:
    """A time that we set changes the one that a hash is bound to."""
    path = store.manifest_of("dashed", store.layer)
    path.write_text(path.read_text().replace("sha256:", "sha256-"))
    (store.path / "manifests/registry.ollama.ai/library/first/latest").unlink()
    count = verify(store)[1]["checked"]
    before = store.blob_path(store.layer).stat()
    assert run(store.path, "prepare", env={"OLLAMA_WATCH_REPAIR": "true"}).returncode == 0
    after = store.blob_path(store.layer).stat()
    assert after.st_mtime_ns > before.st_mtime_ns
    assert after.st_ctime_ns > before.st_ctime_ns
    code, told = verify(store)
    assert (code, told["read"], told["unchanged"]) == (0, 0, count)
    _other_bytes(store.blob_path(store.layer))
    assert verify(store)[0] == 1, "a hash of other bytes is not kept"


def test_a_blob_that_is_written_to_while_it_is_protected_is_hashed_anew(
    store: TrueStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.manifest_of("dashed", store.layer)
    path.write_text(path.read_text().replace("sha256:", "sha256-"))
    (store.path / "manifests/registry.ollama.ai/library/first/latest").unlink()
    assert verify(store)[0] == 0
    usual = fs.touch

    def touch_and_write(*given: Any) -> None:
        usual(*given)
        _other_bytes(store.blob_path(store.layer))

    monkeypatch.setattr(fs, "touch", touch_and_write)
    one_run(Host(str(store.path)), rules(refresh=True, writers_visible=True))
    assert verify(store)[0] == 1


@contextlib.contextmanager
def held(store: HealthyStore) -> Iterator[None]:
    """The lock for acting, as another process holds it."""
    with folders.opened_store(str(store.path)) as opened, journal.locked(opened, 0.0):
        yield


def test_hashes_outlast_another_process_that_acts_meanwhile(
    store: TrueStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, kept = answering._keep, list[bool]()

    def keep(*given: Any) -> bool:
        with held(store):
            kept.append(usual(*given))
        return kept[-1]

    monkeypatch.setattr(answering, "_keep", keep)
    report = one_run(Host(str(store.path)), rules(verify=True, hash=True), lock_seconds=0.0)
    assert (kept, report.warnings) == ([False], ())
    assert verify(store)[1]["read"] == 0, "what could not be kept then was kept at the end"


def test_hashes_that_can_not_be_remembered_are_reported(
    store: TrueStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _other_bytes(store.blob_path(store.config))
    monkeypatch.setattr(modes, "VERIFY", modes.VERIFY._replace(lock_seconds=0.0))
    assert run(store.path, "clean", "--yes").returncode == 0
    with held(store):
        done = _in_this_process(store, "verify")
    assert done.returncode == 4
    told = json.loads(done.stdout)
    assert [each["kind"] for each in told["wrong"]] == ["blob_corrupt"]
    assert (told["checked"], told["unchecked"]) == (7, 0)
    assert "can't be remembered: another ollama-watch acts on this store" in told["troubles"][0]


def test_a_hash_that_was_not_kept_is_not_called_a_change(
    store: TrueStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever takes it away again, such as a folder of ours that is exchanged for another."""
    monkeypatch.setattr(hashes, "keep", lambda *_: None)
    done = _in_this_process(store, "verify")
    assert done.returncode == 4
    told = json.loads(done.stdout)
    assert {each["why"] for each in told["unseen"]} == {"its hash could not be remembered"}
    assert told["unchecked"] == 7


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (1_000_000, "expected 3.1 MB, found 1.0 MB"),
        (0, "expected 3.1 MB, found 0 bytes"),
        (3_145_729, "expected 3,145,728 bytes, found 3,145,729 bytes"),
    ],
)
def test_sizes_are_those_that_people_compare(store: TrueStore, found: int, said: str) -> None:
    """In words; exact where two would look alike."""
    layer = store.text_blob("w" * 3_145_728)
    store.manifest_of("large", layer)
    os.truncate(store.blob_path(layer), found)
    assert said in lines(store, "audit")[1]
    assert run(store.path, "verify").returncode == 1
    assert said in lines(store, "audit")[1]


def test_no_text_has_a_bare_number_of_bytes(store: TrueStore) -> None:
    layer = store.text_blob("w" * 3_145_728)
    store.manifest_of("large", layer)
    store.download("left", parts=2)
    odd = store.download("odd", parts=3)
    store.partial(odd, 1).write_text('{"N":1,"Offset":16384,"Size":12345678,"Completed":0}')
    os.truncate(store.blob_path(layer), 1_234_567)
    path = store.manifest_of("wrong", store.text_blob("v" * 1_234_567))
    path.write_text(path.read_text().replace("1234567", "7654321"))
    store.manifest_of("much", store.layer).write_text(json.dumps(_much(store.layer)))
    for words in (["audit"], ["verify"], ["audit"], ["repair", "-n", "--offline"], ["status"]):
        bare = re.findall(r".*\b[0-9]{5,} bytes.*", lines(store, *words)[1])
        assert not bare, (words, bare)


def _much(digest: str) -> dict[str, Any]:
    layer = {"mediaType": "x", "digest": f"sha256:{digest}", "size": -12_345_678}
    return {"schemaVersion": 2, "config": layer, "layers": [layer]}

"""``df`` adds up to what ``du`` says, whatever a store is like; and each byte has its right use."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import watcher.show
from tests.conftest import NOBODY, Run
from tests.support.notation import Store
from tests.support.runs import surveyed
from watcher.decide import usage
from watcher.model import UseKind

KIB = 1024


SCHEMA = json.loads((Path(watcher.show.__path__[0]) / "df.schema.json").read_text())


def du(*paths: Path | str, by: Sequence[str] = ()) -> int:
    """Allocated bytes as ``du`` counts them; `by`: what the command is run by."""
    command = [*by, "du", "--summarize", "--total", "--block-size=1", *map(str, paths)]
    told = subprocess.run(command, capture_output=True, timeout=120).stdout
    return int(told.splitlines()[-1].split()[0])


def document(run: Run, store: Store, *, code: int = 0) -> dict[str, Any]:
    done = run("--store", str(store.path), "df", "--json")
    assert done.returncode == code, done.stderr.decode()
    (line,) = done.stdout.splitlines()
    made: dict[str, Any] = json.loads(line)
    jsonschema.validate(made, SCHEMA)
    return made


def sizes(made: dict[str, Any], kind: str, name: str | None = None) -> tuple[int, int, int]:
    """Apparent, allocated and freed bytes of one use."""
    (found,) = [e["sizes"] for e in made["uses"] if (e["kind"], e["name"]) == (kind, name)]
    return found["apparent_bytes"], found["allocated_bytes"], found["freed_bytes"]


def adds_up(made: dict[str, Any], wanted: int) -> None:
    total = made["total"]
    assert total["allocated_bytes"] == wanted
    for key in ("apparent_bytes", "allocated_bytes"):
        assert sum(use["sizes"][key] for use in made["uses"]) == total[key]
    assert total["freed_bytes"] <= total["allocated_bytes"]


# ---------------------------------------------------------------- odd stores


def of_everything(store: Store) -> None:
    store.model("a/latest")
    shared, own = store.blob(b"x" * 100 * KIB), store.blob(b"y" * 300 * KIB)
    store.manifest("b/latest", {shared: 100 * KIB, own: 300 * KIB})
    store.manifest("c/latest", {shared: 100 * KIB})
    store.broken("1:2 0:1", name="paused")
    store.broken("{}:1", name="blocked")
    store.orphan()
    store.temporary()
    store.temporary("README")
    ours = store.path / ".ollama-watch"
    for name in ("quarantine/0-sha256-x", "logs/events.jsonl"):
        (ours / name).parent.mkdir(parents=True, exist_ok=True)
        (ours / name).write_bytes(b"z" * 5000)


def hard_links(store: Store) -> None:
    for folder in (store.blobs / "split-gguf-1", store.path / "ollama-safetensors1"):
        folder.mkdir()
        digest = store.model(f"{folder.name}/latest")
        os.link(store.blobs / f"sha256-{digest}", folder / "model")
    orphan = store.blobs / f"sha256-{store.orphan()}"
    os.link(orphan, store.path.parent / "elsewhere")
    os.link(store.temporary("one"), store.blobs / "two")


def symlinks(store: Store) -> None:
    outside = store.path.parent / "outside"
    outside.mkdir()
    (outside / "large").write_bytes(b"x" * 1000 * KIB)
    digest = store.model("linked/latest")
    (store.blobs / f"sha256-{digest}").rename(outside / "blob")
    (store.blobs / f"sha256-{digest}").symlink_to(outside / "blob")
    (store.blobs / "to-a-folder").symlink_to(outside)
    (store.path / "to-itself").symlink_to(".")
    (store.manifests / "above").symlink_to("..")
    (store.blobs / "to-nothing").symlink_to("nothing")
    (store.blobs / ("long" * 40)).symlink_to("x" * 2000)


def sparse(store: Store) -> None:
    store.blob(10**12, name="no bytes on the disk at all")
    store.broken("0:1 0:1 0:0", total=250)
    with (store.blobs / "foreign").open("wb") as file:
        file.truncate(1 << 40)
        os.pwrite(file.fileno(), b"x", 1 << 39)


def deep(store: Store) -> None:
    folder = os.open(store.blobs, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)


def odd_names(store: Store) -> None:
    for name in (b"\xff\xfe", b"a\nb", b"\x1b[31m", b"sha256-" + b"A" * 64, b"sha256:" + b"b" * 64):
        Path(os.fsdecode(os.fsencode(store.blobs) + b"/" + name)).write_bytes(b"x" * 5000)


def no_files(store: Store) -> None:
    os.mkfifo(store.blobs / "fifo")
    here = Path.cwd()
    os.chdir(store.blobs)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("socket")
    finally:
        os.chdir(here)
    (store.blobs / f"sha256-{'a' * 64}").mkdir()
    (store.blobs / f"sha256-{'a' * 64}" / "inside").write_bytes(b"x" * 5000)


def bare(store: Store) -> None:
    store.manifests.rmdir()


STORES = [of_everything, hard_links, symlinks, sparse, deep, odd_names, no_files, bare]


@pytest.mark.parametrize("make", STORES)
def test_df_adds_up_to_du_and_writes_nothing(
    run: Run, models: Store, make: Callable[[Store], None]
) -> None:
    make(models)
    models.snapshot()  # it follows links, which sets their times of access
    before = models.snapshot()
    adds_up(document(run, models), du(models.path))
    assert models.snapshot() == before


@pytest.mark.parametrize("name", ["blobs", "manifests"])
def test_df_counts_and_reports_files_behind_a_linked_folder(
    run: Run, models: Store, name: str
) -> None:
    of_everything(models)
    outside = models.path.parent / "outside"
    (models.path / name).rename(outside)
    (models.path / name).symlink_to(outside)
    made = document(run, models)
    adds_up(made, du(models.path, f"{models.path / name}/"))
    assert made["linked"] == [name]
    assert sizes(made, "model", "b:latest")[1] >= 300 * KIB


@pytest.mark.parametrize("name", [*"abcdefgh", "deep/inside"])
def test_a_folder_linked_to_another_of_the_store_is_counted_once(models: Store, name: str) -> None:
    """Whichever of both a listing shows first."""
    of_everything(models)
    os.link(models.blobs / f"sha256-{models.orphan()}", models.path.parent / "elsewhere")
    really = models.path / name
    really.parent.mkdir(exist_ok=True)
    models.blobs.rename(really)
    models.blobs.symlink_to(name)
    found = surveyed(models.host())
    assert found.linked == ("blobs",)
    uses, total = usage.usage(found, ())
    assert total.allocated == sum(use.sizes.allocated for use in uses) == du(models.path)
    by_name = {(use.kind, use.name): use.sizes for use in uses}
    assert by_name[UseKind.MODEL, "b:latest"].apparent == 300 * KIB
    orphan = by_name[UseKind.ORPHAN, ""]
    assert orphan.freed == 0
    assert total.freed == total.allocated - orphan.allocated


def test_a_folder_that_cannot_be_listed_is_reported(
    models: Store, as_nobody: Callable[[Sequence[str]], list[str]]
) -> None:
    of_everything(models)
    closed = models.blobs / "closed"
    closed.mkdir(mode=0o700)
    (closed / "inside").write_bytes(b"x" * 5000)
    unsearchable = models.blobs / "unsearchable"
    unsearchable.mkdir()
    (unsearchable / "inside").write_bytes(b"x" * 5000)
    unsearchable.chmod(0o744)
    command = as_nobody(["-m", "watcher", "--store", str(models.path), "df", "--json"])
    done = subprocess.run(command, capture_output=True, timeout=120, cwd="/")
    assert done.returncode == 4, done.stderr.decode()
    assert done.stdout, done.stderr.decode()
    made = json.loads(done.stdout)
    assert made["unlisted"] == ["blobs/closed", "blobs/unsearchable"]
    assert b"blobs/closed/ can't be listed" in done.stderr
    assert b"sudo " in done.stderr
    nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    adds_up(made, du(models.path, by=nobody))


# ---------------------------------------------------------------- uses


def test_each_byte_has_its_use(run: Run, models: Store) -> None:
    of_everything(models)
    made = document(run, models)
    assert made["schema"] == "ollama-watch/df/1"
    assert sizes(made, "model", "b:latest")[0] == 300 * KIB
    assert sizes(made, "shared")[0] == 100 * KIB
    assert sizes(made, "model", "c:latest") == (0, 0, 0)
    assert sizes(made, "model", "a:latest")[0] == len("weights of a/latest")
    assert sizes(made, "partial", "paused")[0] > 200_000_000
    assert sizes(made, "partial", "blocked")[1] >= 1_000_000
    assert sizes(made, "orphan")[0] == len("bytes of orphan")
    assert sizes(made, "temporary")[0] == sizes(made, "foreign")[0] == len("left over")
    assert sizes(made, "quarantine")[0] == sizes(made, "ours")[0] == 5000
    files = [path for path in models.manifests.rglob("*") if path.is_file()]
    assert sizes(made, "manifests")[0] == sum(path.stat().st_size for path in files)
    assert sizes(made, "folders")[0] == 0
    allocated = [use["sizes"]["allocated_bytes"] for use in made["uses"]]
    assert allocated == sorted(allocated, reverse=True)


def test_the_schema_knows_every_kind_of_use_and_nothing_else(run: Run, models: Store) -> None:
    kinds = SCHEMA["properties"]["uses"]["items"]["properties"]["kind"]["enum"]
    assert kinds == [kind.value for kind in UseKind]
    made = document(run, models)
    wrongs: list[dict[str, Any]] = [{"mood": 1}, {"total": {}}, {"uses": [{"kind": "other"}]}]
    for wrong in wrongs:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**made, **wrong}, SCHEMA)


def test_nothing_is_freed_while_another_hard_link_stays(run: Run, models: Store) -> None:
    hard_links(models)
    made = document(run, models)
    block = sizes(made, "orphan")[1]
    assert block > 0
    assert sizes(made, "orphan")[2] == 0, "a name outside of the store stays"
    assert sizes(made, "model", "split-gguf-1:latest")[1:] == (block, 0)
    assert sizes(made, "foreign")[1:] == (block, block), "both names go together"
    assert made["total"]["freed_bytes"] == made["total"]["allocated_bytes"] - block


def test_a_blob_of_the_old_spelling_is_its_models(run: Run, models: Store) -> None:
    digest = models.model("old/latest")
    path = models.blobs / f"sha256-{digest}"
    path.rename(models.blobs / f"sha256:{digest}")
    assert sizes(document(run, models), "model", "old:latest")[0] == len("weights of old/latest")


# ---------------------------------------------------------------- for people


def _in_one_piece(line: str) -> bool:
    """A command or a name, however long."""
    return line.startswith(("Run: ", "store ", "/")) or "m" * 80 in line


def test_the_table_fits_and_its_last_line_is_what_du_counts(run: Run, models: Store) -> None:
    of_everything(models)
    models.model(f"{'m' * 80}/{'t' * 80}")
    for number in range(30):
        models.model(f"small{number}/latest")
    done = run("--store", str(models.path), "df")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert [line for line in lines if len(line) > 80 and not _in_one_piece(line)] == []
    assert lines[-1].endswith(f"total: {du(models.path)} bytes on disk")
    assert any("smaller models: use -v for all" in line for line in lines)
    verbose = run("-v", "--store", str(models.path), "df").stdout.decode()
    assert all(f" small{number}:latest" in verbose for number in range(30))


def test_two_stores_are_two_documents(run: Run, models: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    done = run("--store", str(models.path), "--store", str(other.path), "--json", "df")
    paths = [json.loads(line)["store"]["path"] for line in done.stdout.splitlines()]
    assert paths == [str(models.path), str(other.path)]

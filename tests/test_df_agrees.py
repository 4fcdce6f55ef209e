"""What ``df`` calls an orphan is what ``clean`` removes, refuses to remove, or leaves as young."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.notation import Store, age, digest_of
from tests.support.runs import one_look, rules, surveyed
from watcher.decide import usage
from watcher.model import ActionKind, UseKind

CLEAN = rules(clean=True, repair=False, purge_replaced=True)


def orphan(store: Store, name: str, aged: str) -> None:
    store.orphan(name, aged=aged)


def old_spelling(store: Store, name: str, aged: str) -> None:
    digest = store.orphan(name, aged=aged)
    (store.blobs / f"sha256-{digest}").rename(store.blobs / f"sha256:{digest}")


def old_partial(store: Store, name: str, aged: str) -> None:
    digest = store.broken("0:1", total=1, name=name, aged=aged)
    for path in store.blobs.glob(f"sha256-{digest}*"):
        path.rename(store.blobs / path.name.replace("-", ":", 1))


def folder(store: Store, name: str, aged: str) -> None:
    path = store.blobs / f"sha256-{digest_of(name)}"
    path.mkdir()
    (path / "inside").write_bytes(b"x" * 5000)
    age(path, aged)


def link(store: Store, name: str, aged: str) -> None:
    path = store.blobs / f"sha256-{digest_of(name)}"
    path.symlink_to("nowhere")
    age(path, aged)


def upper_case(store: Store, name: str, aged: str) -> None:
    digest = store.model(f"{name}/latest", aged=aged)
    (store.blobs / f"sha256-{digest}").rename(store.blobs / f"sha256-{digest.upper()}")


def of_model(store: Store, name: str, aged: str) -> None:
    store.model(f"{name}/latest", aged=aged)


def partial(store: Store, name: str, aged: str) -> None:
    store.broken("1:1", total=1, name=name, aged=aged)


KINDS: list[Callable[[Store, str, str], None]] = [
    orphan, old_spelling, old_partial, folder, link, upper_case, of_model, partial,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_its_orphans_are_those_of_clean_and_audit(models: Store, seed: int) -> None:
    chance = random.Random(seed)
    models.model("kept/latest")
    for number in range(chance.randrange(1, 16)):
        chance.choice(KINDS)(models, f"n{number}", chance.choice(["1m", "2h", "6d", "8d", "40d"]))
    agree(models)


@pytest.mark.parametrize("broken", ["corrupt", "none"])
def test_df_agrees_where_nothing_may_be_removed(models: Store, broken: str) -> None:
    for aged in ("2h", "9d"):
        orphan(models, aged, aged)
    if broken == "corrupt":
        models.manifest("bad/latest", b"{")
    agree(models)


def agree(store: Store) -> None:
    host = store.host()
    report = one_look(host, CLEAN)
    census = report.evidence.census
    uses, _ = usage.usage(surveyed(host), report.diagnosis.diagnosed, census)
    of = {use.kind: use for use in uses if use.kind in (UseKind.ORPHAN, UseKind.OTHER_STORE)}
    goes = {each.subject for each in report.plan.actions if each.kind is ActionKind.REMOVE_ORPHAN}
    refused = [each for each in report.plan.refusals if each.action is ActionKind.REMOVE_ORPHAN]
    goes |= {name for each in refused for name in each.entries}
    downloads = {each.digest for each in report.diagnosis.diagnosed}
    young = {each.digest for each in report.plan.spared} - downloads
    goes |= {f"sha256-{digest}" for digest in young}
    told = [each for each in report.diagnosis.findings if each.kind == "blob_orphan"]
    assert {each.path for each in told} == {f"blobs/{name}" for name in goes}
    files = of[UseKind.ORPHAN].files if UseKind.ORPHAN in of else 0
    assert files == len(goes)
    size = sum((store.blobs / name).stat().st_blocks * 512 for name in goes)
    assert (of[UseKind.ORPHAN].sizes.allocated if files else 0) == size
    other = of[UseKind.OTHER_STORE].files if UseKind.OTHER_STORE in of else 0
    assert other == len(census.elsewhere)


def test_blobs_of_another_store_in_the_same_folder_are_no_orphans(
    models: Store, tmp_path: Path
) -> None:
    other = Store(tmp_path / "other")
    other.model("theirs/latest", aged="30d")
    models.model("ours/latest", aged="30d")
    for path in models.blobs.iterdir():
        path.rename(other.blobs / path.name)
    shutil.rmtree(models.blobs)
    models.blobs.symlink_to(other.blobs)
    other.orphan(aged="30d")
    agree(models)
    host = models.host()
    report = one_look(host, CLEAN)
    assert len(report.evidence.census.elsewhere) == 1
    uses, _ = usage.usage(surveyed(host), report.diagnosis.diagnosed, report.evidence.census)
    (theirs,) = [use for use in uses if use.kind is UseKind.OTHER_STORE]
    assert theirs.files == 1
    assert theirs.sizes.apparent == len("weights of theirs/latest")

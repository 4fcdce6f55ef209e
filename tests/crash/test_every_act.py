"""Every act, broken at each of its changing calls, and done again.

`tests/crash/test_every_call.py` has more of the clean-up. Each call of each act breaks, by SIGKILL
or by an error: the ways take turns, from act to act at other calls. What all do before they begin
breaks in the first one only, and of each act every third call. With `--slow` each call of each
act breaks in each way, and each kill is one of a process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.repair.scenes import seed_of
from tests.support.driving import HealthyStore, is_right
from tests.support.kills import Ended
from tests.support.notation import age
from tests.support.servers import EngineServer, collapsed
from tests.support.transfers import folder
from watcher.demo.registry import Layer as Content
from watcher.demo.registry import Model, Registry
from watcher.model import MIB
from watcher.ollama import sidecars

from .acts import ACTS, LAYER, QUARANTINED, QUIET, Act, Layer
from .conftest import Driver
from .test_every_call import assert_nothing_lost, inodes, places, shape

VERIFY = {"repair": False, "clean": False, "hash": True, "verify": True}
KILL, HALF, EIO = {"how": "kill"}, {"how": "half"}, {"how": "EIO"}
#: From that call on, as on a disk that the kernel has made read-only.
READ_ONLY = {"how": "EROFS", "lasting": True}
WAYS = (KILL, EIO, HALF, {"how": "ENOSPC"}, KILL, {"how": "EACCES"}, HALF, READ_ONLY)


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as served:
        yield served


@pytest.fixture(scope="module")
def model(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Model:
    layer = Content(LAYER, seed=seed_of(tmp_path_factory.getbasetemp()))
    return registry.add_model("demo", "1b", [layer], extras=False)


@pytest.fixture(scope="module")
def layer(registry: Registry, model: Model) -> Layer:
    host, name = model.name.removeprefix("http://").split("/", 1)
    content = registry.content(model.digests[0])
    path = f"{host}/{name.replace(':', '/')}"
    return Layer(content.digest[7:], content.read(0, LAYER), path, model.manifest)


class Trial:
    """One act, laid out anew for each call to break at."""

    def __init__(self, folder: Path, driver: Driver, act: Act, layer: Layer) -> None:
        self._folder, self._driver, self._act, self.layer = folder, driver, act, layer
        self._number = 0
        self.reference = self.store()
        self.before, self.worth = whole_shape(self.reference), contents(self.reference)
        ended = self.run(self.reference)
        assert ended.code == 0, driver.errors
        self.end, self.calls = whole_shape(self.reference), ended.calls
        assert self.end != self.before
        # Sidecars can be written anew; what is in no file at the end was worth nothing.
        self.worth &= {text for name, text in blobs(self.reference) if "-partial-" not in name}

    def store(self) -> HealthyStore:
        """What the act is done on, in a new store."""
        self._number += 1
        store = HealthyStore(self._folder / f"models{self._number}")
        self._act.lay_out(store, self.layer)
        if self._act.order.get("known"):
            assert self._driver.cycle(store, policy=VERIFY).code == 0
        return store

    def run(self, store: HealthyStore, **more: Any) -> Ended:
        """The act: unhindered, if nothing else is said."""
        order = dict(self._act.order)
        for kind in ("restore", "purge"):
            if kind in order["policy"]:
                labels = [f"{QUARANTINED}{self.layer.digest}"]
                order["policy"] = {**order["policy"], kind: labels}
        return self._driver.cycle(store, **order, **more)

    def broken(self, **how: Any) -> HealthyStore:
        """A store in which the act broke at a call, and in which it then was done again."""
        store = self.store()
        files = inodes(store.path)
        ended = self.run(store, **how)
        where = f"{how}, {ended.calls[how['at'] - 1]!r}"
        killed = how["how"] in ("kill", "half")
        assert ended.code in ((-9,) if killed else (0, 3, 4)), where
        assert_nothing_lost(store, files, where)
        self.assert_same_end(store, where)
        return store

    def assert_same_end(self, store: HealthyStore, where: str) -> None:
        """One unhindered run comes to the end that it would have come to at once."""
        assert self.worth <= contents(store), f"{where}: something of worth is gone"
        again = self.run(store)
        assert again.code == 0, f"{where}; then {again}: {self._driver.errors}"
        assert whole_shape(store) == self.end, where
        assert not any(store.ours.glob("intents/*")), where
        assert_remembered(store, self.layer, where)

    def each_call(self, turn: int, slow: bool) -> None:
        """Break at each call, in ways that take turns; in every way where there is time."""
        begins = [at for at, call in enumerate(self.calls, 1) if call == "mkdir intents"]
        first = 0 if slow or turn == 0 else min(begins, default=0)
        chosen = [at for at in places(self.calls, "EIO") if at >= first]
        chosen = chosen if slow else chosen[turn % 3 :: 3]
        for number, at in enumerate(chosen, turn):
            for way in WAYS if slow else (WAYS[number % len(WAYS)],):
                shutil.rmtree(self.broken(at=at, **way).path)


def whole_shape(store: HealthyStore) -> dict[str, object]:
    """The tree without inodes and times, the quarantine included; which times are fresh counts."""
    found = shape(store)
    for path in store.ours.glob("quarantine/*"):
        found[f"quarantine/{path.name.partition('-')[2]}"] = hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
    old = {path.name for path in store.blobs.iterdir() if is_old(path)}
    return {**found, "old": sorted(old)}


def is_old(path: Path) -> bool:
    """Whether the server's next start might delete it soon."""
    return path.stat().st_mtime < path.parent.stat().st_ctime - 1800


def blobs(store: HealthyStore) -> list[tuple[str, str]]:
    """Names and hashes of all files with a digest's name, wherever in a store they lie."""
    files = [path for path in store.path.rglob("*sha256-*") if path.is_file()]
    return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def contents(store: HealthyStore) -> set[str]:
    """Their hashes."""
    return {text for _, text in blobs(store)}


def assert_remembered(store: HealthyStore, layer: Layer, where: str) -> None:
    """Sidecars that we have written are known as ours, and their parts too."""
    written = [path.read_bytes() for path in store.blobs.glob(f"sha256-{layer.digest}-partial-*")]
    if written and (store.blobs / f"sha256-{layer.digest}-partial").exists():
        record = json.loads((store.ours / "state.json").read_bytes())["downloads"][layer.digest]
        parts = sorted(sidecars.parse(raw) for raw in written)
        assert record["mended"], where
        assert sorted(record["partition"]) == [list(part) for part in parts], where


VARIANT = pytest.mark.slow("a variant of an act that is broken at each call beside it")
#: Acts that differ most; the others are variants of them.
USUAL = {"behind", "numbers-too-many", "redundant", "quarantine", "restore", "purge", "prepare"}
USUAL |= {"give-back", "take-over", "fetch"}


@pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=VARIANT) for name in ACTS]
)
def test_broken_at_any_call_it_comes_to_the_same_end(
    name: str, tmp_path: Path, driver: Driver, layer: Layer, slow: bool
) -> None:
    Trial(tmp_path, driver, ACTS[name], layer).each_call(list(ACTS).index(name), slow)


@pytest.mark.parametrize("name", ["numbers-too-many", "redundant", "give-back", "take-over"])
def test_killed_in_what_an_error_sets_off_it_is_undone_or_done(
    name: str, tmp_path: Path, driver: Driver, layer: Layer
) -> None:
    """The decision can't be brought to the disk, what undoes it is killed; nobody acts again."""
    trial = Trial(tmp_path, driver, ACTS[name], layer)
    (decided,) = [n for n, call in enumerate(trial.calls, 1) if call.startswith("open decided")]
    synced = next(n for n, c in enumerate(trial.calls, 1) if n > decided + 3 and c[:5] == "fsync")
    for at in (decided, synced):
        calls = trial.run(trial.store(), at=at, how="EIO").calls
        for then in [place - at for place in places(calls, "kill") if at < place < at + 20]:
            store = trial.store()
            assert trial.run(store, at=at, how="EIO", then=then).code == -9
            trial.run(store, clean=False)
            where = f"killed {then} calls after an error at {at}, {calls[at + then - 1]!r}"
            assert whole_shape(store) in (trial.before, trial.end), where
            shutil.rmtree(store.path)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("take-over", "kill"),
        ("take-over", "EIO"),
        ("take-over-copied", "kill"),
        pytest.param("take-over-copied", "EIO", marks=VARIANT),
    ],
)
def test_broken_at_any_call_of_taking_over_every_trusted_byte_is_claimed_on_one_side(
    name: str, how: str, tmp_path: Path, driver: Driver, layer: Layer
) -> None:
    """By the server's progress files or by our ledger; nobody acts again."""
    trial = Trial(tmp_path, driver, ACTS[name], layer)
    begins = next(at for at, call in enumerate(trial.calls, 1) if call == "mkdir intents")
    for at in [at for at in places(trial.calls, how) if at >= begins]:
        store = trial.store()
        trial.run(store, at=at, how=how)
        where = f"{how} at {at}, {trial.calls[at - 1]!r}"
        assert_no_false_claim(store, layer, where)
        trial.run(store, clean=False)
        assert whole_shape(store) in (trial.before, trial.end), where
        shutil.rmtree(store.path)


@pytest.mark.parametrize("how", ["kill", "EIO"])
def test_broken_at_any_call_a_blob_has_its_damaged_file_or_the_right_one(
    how: str, tmp_path: Path, driver: Driver, layer: Layer, slow: bool
) -> None:
    """Until the right one is there, all that was fetched is kept; the damaged one goes aside.

    With `--slow` also at each call before the intent, which all acts make, and for an error not at
    every second call alone.
    """
    act = ACTS["fetch"]
    order = {**act.order, "policy": {**act.order["policy"], "quarantine_max_bytes": 2 * LAYER}}
    trial = Trial(tmp_path, driver, act._replace(order=order), layer)
    first = 1 if slow else trial.calls.index("mkdir intents") + 1
    chosen = [at for at in places(trial.calls, how) if at >= first]
    for at in chosen if slow or how == "kill" else chosen[::2]:
        store = trial.store()
        blob, data = (store.blobs / f"sha256-{layer.digest}"), folder(store.path, layer.digest)
        damaged = blob.read_bytes()
        trial.run(store, at=at, how=how)
        where = f"{how} at {at}, {trial.calls[at - 1]!r}"
        found = blob.read_bytes()
        assert found == layer.content or (
            found == damaged and (data / "data").read_bytes() == layer.content
        ), where
        assert trial.run(store).code == 0, where
        assert blob.read_bytes() == layer.content, where
        told = (store.ours / "logs/events.jsonl").read_text()
        assert found == damaged or "every file is back in its place" not in told, where
        assert not list(data.parent.glob("*/data")), where
        (aside,) = (store.ours / "quarantine").iterdir()
        assert aside.read_bytes() == damaged, where
        shutil.rmtree(store.path)


def test_killed_while_a_folder_in_a_blobs_place_is_put_aside_it_is_put_aside(
    tmp_path: Path, driver: Driver, layer: Layer
) -> None:
    def laid_out(name: str) -> HealthyStore:
        store = HealthyStore(tmp_path / name)
        ACTS["quarantine"].lay_out(store, layer)
        blob = store.blobs / f"sha256-{layer.digest}"
        blob.unlink()
        blob.mkdir()
        age(blob, QUIET)
        return store

    order = ACTS["quarantine"].order
    calls = driver.cycle(laid_out("reference"), **order).calls
    renames = [at for at, call in enumerate(calls, 1) if re.match(r"rename .*sha256-", call)]
    assert renames
    for at in renames:
        store, where = laid_out(f"killed{at}"), f"killed behind {at}, {calls[at - 1]!r}"
        driver.cycle(store, **order, at=at + 1, how="kill")
        assert driver.cycle(store, **order).code == 0, where
        assert not list(store.ours.glob("intents/*")), where
        (aside,) = (store.ours / "quarantine").iterdir()
        assert aside.is_dir(), where


def test_where_names_can_not_be_exchanged_a_kill_loses_neither_file(
    tmp_path: Path, driver: Driver, layer: Layer
) -> None:
    act = ACTS["fetch"]
    policy = {**act.order["policy"], "quarantine_max_bytes": 2 * LAYER}
    order = {**act.order, "policy": policy, "no_replace": False}
    trial = Trial(tmp_path, driver, act._replace(order=order), layer)
    renames = [at for at, call in enumerate(trial.calls, 1) if re.match(r"rename .*\bdata\b", call)]
    assert len(renames) > 3
    for at in renames:
        store = trial.store()
        damaged = (store.blobs / f"sha256-{layer.digest}").read_bytes()
        trial.run(store, at=at, how="kill")
        where = f"killed at {at}, {trial.calls[at - 1]!r}"
        assert trial.run(store).code == 0, where
        assert (store.blobs / f"sha256-{layer.digest}").read_bytes() == layer.content, where
        (aside,) = (store.ours / "quarantine").iterdir()
        assert aside.read_bytes() == damaged, where
        assert not list(store.ours.glob("transfers/*/data")), where
        shutil.rmtree(store.path)


def test_killed_while_a_take_over_is_put_back_it_is_put_back_all_the_same(
    tmp_path: Path, driver: Driver, layer: Layer
) -> None:
    trial = Trial(tmp_path, driver, ACTS["take-over"], layer)
    (decided,) = [n for n, call in enumerate(trial.calls, 1) if call.startswith("open decided")]
    store = trial.store()
    trial.run(store, at=decided + 1, how="kill")
    for at in places(trial.run(store, clean=False).calls, "kill"):
        store = trial.store()
        trial.run(store, at=decided + 1, how="kill")
        ended = trial.run(store, clean=False, at=at, how="kill")
        assert ended.code == -9
        trial.run(store, clean=False)
        assert whole_shape(store) in (trial.before, trial.end), f"killed at {ended.calls[-1]!r}"
        shutil.rmtree(store.path)


def assert_no_false_claim(store: HealthyStore, layer: Layer, where: str) -> None:
    """What a ledger claims is there, and no server can write to it."""
    data = folder(store.path, layer.digest) / "data"
    ledger = data.with_name("ledger")
    for start, end in json.loads(ledger.read_bytes())["durable"] if ledger.exists() else ():
        with data.open("rb") as file:
            assert os.pread(file.fileno(), end - start, start) == layer.content[start:end], where
    if data.exists():
        assert data.stat().st_nlink == 1, where
    guard, partial = store.partial(layer.digest, 0), store.partial(layer.digest)
    guarded = guard.exists() and guard.stat().st_size == 0
    assert partial.exists() or guarded or store.partials(layer.digest) == [], where


@pytest.mark.parametrize("name", ACTS)
def test_a_pull_completes_the_state_after_each_act(
    name: str, tmp_path: Path, driver: Driver, layer: Layer, registry: Registry, model: Model
) -> None:
    """All ways come to one end, so the pull of one is that of all."""
    trial = Trial(tmp_path, driver, ACTS[name], layer)
    store = trial.reference.path
    (store / "manifests").mkdir(exist_ok=True)
    parts = len(list(trial.reference.blobs.glob("*-partial-*")))
    registry.reset_stats()
    with EngineServer(store) as server:
        server.start().wait_ready()
        assert collapsed(server.pull(model.name))[-1] == "success"
    assert is_right(store, model.digests[0])
    assert registry.bytes_served(model.digests[0]) <= ACTS[name].missing + parts * MIB

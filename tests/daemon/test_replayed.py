"""Random histories of a server, a user and kills: the log tells the same end as the disk."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable

import pytest

from tests.support.driving import Daemon, HealthyStore, whole_lines
from tests.support.notation import age
from tests.support.servers import EngineServer, Pull, blob, wait_until
from watcher.demo.registry import Layer, Model, Registry
from watcher.ollama import names
from watcher.state import fs, records

from .replayed import State, on_disk, replay

HISTORIES = int(os.environ.get("REPLAYED_HISTORIES", "4"))
STEPS = 25
SIZE = 2_000_000


class History:
    """One history of a store that is empty at first."""

    def __init__(self, store: HealthyStore, registry: Registry, seed: int) -> None:
        self.chance = random.Random(seed)
        self.told = [f"seed {seed}"]
        self.store, self.registry = store, registry
        shutil.rmtree(store.path / "manifests" / "registry.ollama.ai")
        for path in store.blobs.iterdir():
            path.unlink()
        # No two histories have a layer in common: who has its files open elsewhere is none of ours.
        first = int(store.digest("layers")[:7], 16)
        shared = Layer(SIZE, seed=first)
        self.models = [
            registry.add_model(f"m{n}", "1b", [Layer(SIZE, seed=first + 1 + n), shared])
            for n in range(2)
        ]
        self.server = EngineServer(store.path, {"DEMO_PART_BYTES": "500_000"})
        self.running = False
        self.pull: Pull | None = None
        repairs = str(self.chance.random() < 0.5).lower()
        self.daemon = Daemon(store.path, {"OLLAMA_WATCH_REPAIR": repairs})

    def __enter__(self) -> History:
        self.daemon.start().wait_idle()
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is not None:
            error.add_note("\n".join(self.told))
        self.registry.release()
        self.server.stop()
        if self.pull is not None:
            self.pull.close()
        self.daemon.close()

    def run(self) -> None:
        """So many steps, and then all comes to rest."""
        for _ in range(STEPS):
            do = self.chance.choice(ACTIONS)
            self.told.append(do.__name__)
            do(self)
            if self.chance.random() < 0.5:
                self.daemon.wait_idle()
        self.kill_server()
        (self.store.path / "manifests").mkdir(exist_ok=True)
        for path in self.store.blobs.iterdir():
            age(path, 100)
        self.look()

    def look(self) -> None:
        """Have the daemon look at everything, and wait until it has."""
        before = len(self.daemon.of("settings_read"))
        os.kill(self.daemon.pid, signal.SIGHUP)
        self.daemon.wait_event("settings_read", before + 1)
        self.daemon.wait_idle()

    def begin(self) -> None:
        """A pull, held back in the middle, or not at all."""
        self.start_server()
        self.end_pull()
        model = self.chance.choice(self.models)
        self.held(model)
        self.pull = self.server.start_pull(model.name)
        digests = [*model.digests, model.config]
        wait_until(
            lambda: self.ended() or any(self.registry.held(each) for each in digests), "the pull"
        )

    def held(self, model: Model) -> None:
        after = self.chance.choice([0, 100_000, 300_000, 10 * SIZE])
        for digest in (*model.digests, model.config):
            self.registry.hold(digest, after=after)

    def ended(self) -> bool:
        return self.pull is not None and self.pull.ended

    def finish(self) -> None:
        self.registry.release()
        if self.pull is not None:
            self.pull.result()

    def end_pull(self) -> None:
        if self.pull is not None:
            self.pull.close()
            self.pull = None
            wait_until(
                lambda: not self.running or "w" not in self.server.open_files().values(), "the end"
            )
        self.registry.release()

    def kill_server(self) -> None:
        if self.running:
            self.server.kill()
            self.running = False
        self.end_pull()

    def start_server(self) -> None:
        if not self.running:
            self.server.start().wait_ready()
            self.running = True

    def remove_model(self) -> None:
        self.start_server()
        name = self.chance.choice(self.models).name.removeprefix("http://")
        self.server.request("DELETE", "/api/delete", {"model": name})

    def lose_sidecar(self) -> None:
        sidecars = sorted(self.store.blobs.glob("*-partial-*"))
        if sidecars:
            self.chance.choice(sidecars).unlink(missing_ok=True)

    def lose_download(self) -> None:
        for path in self.store.blobs.glob("*-partial*"):
            path.unlink(missing_ok=True)

    def lose_blob(self) -> None:
        """Of a model that stays: its next pull is known to be its own."""
        blobs = sorted(each for each in self.store.blobs.iterdir() if len(each.name) == 71)
        if blobs:
            self.chance.choice(blobs).unlink()

    def lose_manifests(self) -> None:
        shutil.rmtree(self.store.path / "manifests", ignore_errors=True)

    def make_manifests(self) -> None:
        (self.store.path / "manifests").mkdir(exist_ok=True)

    def grow_old(self) -> None:
        for path in self.store.blobs.iterdir():
            with contextlib.suppress(FileNotFoundError):
                age(path, 100)
        self.look()

    def kill_daemon(self) -> None:
        self.daemon.kill(self.chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        self.daemon.start()
        if self.chance.random() < 0.7:
            self.daemon.wait_idle()
        else:
            # Killed in the middle of its first look.
            wait_until(lambda: self.daemon.told.stat().st_size, "its first line")
            self.daemon.kill()
            self.daemon.start().wait_idle()


ACTIONS: tuple[Callable[[History], None], ...] = (
    *(History.begin,) * 6,
    *(History.finish,) * 4,
    History.end_pull,
    *(History.kill_server,) * 4,
    History.remove_model,
    *(History.lose_sidecar,) * 4,
    History.lose_download,
    *(History.lose_blob,) * 2,
    History.lose_manifests,
    History.make_manifests,
    History.grow_old,
    History.kill_daemon,
)


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_the_log_shows_the_same_end_as_the_disk(
    seed: int, store: HealthyStore, registry: Registry
) -> None:
    with History(store, registry, seed) as history:
        history.run()
        history.daemon.kill(signal.SIGTERM)
        told = whole_lines(store.ours / "logs/events.jsonl")
        there = on_disk(store)
        assert replay(told) == there
        _records_agree(store, there)
        assert "Traceback" not in history.daemon.errors, history.daemon.errors


def _digests(store: HealthyStore, model: str) -> list[str]:
    """The digests that a model's manifest lists."""
    path = store.path / "manifests" / names.to_model(model).path
    manifest = json.loads(path.read_bytes())
    return [each["digest"] for each in (manifest["config"], *manifest["layers"])]


def _records_agree(store: HealthyStore, there: State) -> None:
    """A model's record says what became of its download, though nobody of ours has driven it."""
    with fs.opened_folder(str(store.path)) as folder:
        kept = records.read(folder)
    unfinished = {model for _, models in there.downloads.values() for model in models}
    for model in there.models - unfinished:
        is_whole = all(blob(store.path, each).exists() for each in _digests(store, model))
        wanted = records.State.COMPLETED if is_whole else records.State.ERROR
        assert kept[names.to_model(model).key].state is wanted, model
    for model in unfinished - there.models:
        assert kept[names.to_model(model).key].state is records.State.ERROR, model
    for key, record in kept.items():
        assert not record.state.active, key
        if key not in {names.to_model(each).key for each in there.models | unfinished}:
            assert record.state is records.State.IDLE, key

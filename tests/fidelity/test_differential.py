"""The engine and the real server on the same random, damaged downloads (needs OLLAMA_BIN)."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from tests.support.servers import EngineServer, RealServer, Server, blob, collapsed, sidecar, tree
from watcher.demo.registry import Layer, Model, Registry

pytestmark = pytest.mark.skipif("OLLAMA_BIN" not in os.environ, reason="OLLAMA_BIN is not set")

MODELS = 60
Outcome = tuple[list[str], int, dict[str, str]]


def break_one(chance: random.Random, store: Path, registry: Registry, digest: str) -> None:
    """Lay out a download with a random partition, random claims, and up to three damages."""
    content = registry.content(digest)
    cuts = sorted(chance.sample(range(1, content.size), chance.choice([0, 1, 2, 11])))
    edges = [0, *cuts, content.size]
    texts: dict[str, str | None] = {}
    partial = blob(store, digest, "-partial")
    data = chance.choice(["kept", "kept", "kept", "short", "long", "missing", "folder"])
    with partial.open("wb") as file:
        file.truncate(content.size)
        for number, (start, stop) in enumerate(itertools.pairwise(edges)):
            completed = chance.choice([0, stop - start, chance.randrange(stop - start + 1)])
            texts[str(number)] = sidecar(number, start, stop - start, completed)
            file.seek(start)
            file.writelines(content.slices(start, start + completed))
        if data in ("short", "long"):
            file.truncate(content.size + (100 if data == "long" else -100))
    if data in ("missing", "folder"):
        partial.unlink()
    if data == "folder":
        partial.mkdir()
    for _ in range(chance.choice([0, 1, 1, 2, 3])):
        damage(chance, texts, content.size)
    for name, text in texts.items():
        path = blob(store, digest, f"-partial-{name}")
        if text is None:
            path.symlink_to("nowhere")
        else:
            path.write_text(text)


def damage(chance: random.Random, texts: dict[str, str | None], size: int) -> None:
    """Damage one sidecar. Nothing that the real server would retry for a minute."""
    name = chance.choice(sorted(texts) or ["0"])
    text = texts.pop(name, None) or ""
    match chance.randrange(9):
        case 0:
            pass
        case 1:
            texts[name] = ""
        case 2:
            texts[name] = text[: chance.randrange(30)]
        case 3:
            texts[name] = chance.choice(["{}", "null"])
        case 4:
            texts[name] = re.sub(r'"N":\d+', f'"N":{chance.randrange(20)}', text)
        case 5:
            texts[chance.choice(["00", "x", "10", f"{name}-", f"{name}0"])] = text
        case 6:
            texts[name] = sidecar(0, 0, size, size + chance.randrange(9))
        case 7:
            texts[name] = f" {text.strip().lower()}}} behind"
        case 8:
            texts[name] = None


def fate(server: Server, registry: Registry, model: Model) -> Outcome:
    """What a pull tells, what it is served, and what it leaves of its layer."""
    digest = model.digests[0]
    before = registry.bytes_served(digest)
    told = [
        re.sub(r"got sha256:\w+", "got", text).replace(str(server.store), "")
        for text in collapsed(server.pull(model.name))
        if not re.fullmatch(r"pulling [0-9a-f]{12}", text)
    ]
    left = {
        name: _fingerprint(server.store / name) for name in tree(server.store) if digest[7:] in name
    }
    return told, registry.bytes_served(digest) - before, left


def _fingerprint(path: Path) -> str:
    if path.is_symlink() or path.is_dir():
        return "link" if path.is_symlink() else "folder"
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("seed", range(3))
def test_same_fate(seed: int, tmp_path: Path, registry: Registry) -> None:
    chance = random.Random(seed)
    engine_store, real_store = tmp_path / "engine", tmp_path / "real"
    (engine_store / "blobs").mkdir(parents=True)
    models = []
    for number in range(MODELS):
        layer = Layer(chance.randrange(50_000, 300_000), seed=chance.randrange(2**32))
        models.append(registry.add_model(f"m{number}", "1b", [layer], extras=False))
        break_one(chance, engine_store, registry, models[-1].digests[0])
    shutil.copytree(engine_store, real_store, symlinks=True)
    with EngineServer(engine_store) as engine, RealServer(real_store) as real:
        engine.start().wait_ready()
        real.start().wait_ready()
        for model in models * 2:
            assert fate(engine, registry, model) == fate(real, registry, model), model.name

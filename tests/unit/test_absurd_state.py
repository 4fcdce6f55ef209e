"""Whatever somebody writes into files of ours: it is set aside or harmless, and all goes on."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import POLICY, HealthyStore
from tests.support.runs import one_run
from watcher import cli, reconcile
from watcher.errors import WatchError
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.ollama.names import to_model
from watcher.pull import queue
from watcher.state import fs, hashes, memory, records, registry_cache

#: In the place of any value: beyond what its kind can have, of another kind, too long, too deep.
DEEP: Any = []
for _ in range(900):
    DEEP = [DEEP]
ABSURD = {
    "10**30": 10**30,
    "2**63": 1 << 63,
    "2**64": 1 << 64,
    "-1": -1,
    "-10**30": -(10**30),
    "1e300": 1e300,
    "-1e300": -1e300,
    "1.5": 1.5,
    "text": "../../../etc/passwd",
    "long": "x" * (1 << 17),
    "number as text": "9" * 5000,
    "control": "a\n\0b\x1b[2J",
    "null": None,
    "true": True,
    "list": [[0, 10**30]],
    "object": {"a": {}},
    "deep": DEEP,
}
#: In one file: a blob that is right, one that is not, and partial data.
SHARD = "ab"
HASHED = {
    f"sha256-{SHARD}{'1' * 62}": hashes.Hashed(1, 2, 3, SHARD + "1" * 62, "boot"),
    f"sha256-{SHARD}{'2' * 62}": hashes.Hashed(1, 2, 3, "3" * 64, "", ((0, 5),)),
    f"sha256-{SHARD}{'3' * 62}-partial": hashes.Hashed(1, 2, 3, SHARD + "3" * 62, "boot"),
}


@pytest.fixture
def store(tmp_path: Path) -> HealthyStore:
    """With each of the files, and something in each place of them."""
    made = HealthyStore(tmp_path / "models")
    made.download("wanted", aged=2 * 3600)
    made.file("sha256-" + made.digest("named")[:60], "odd")
    one_run(Host(str(made.path)), POLICY, approve=reconcile.approve_none)
    with fs.opened_folder(str(made.path)) as folder:
        records.change(folder, "llama3", {"state": "starting", "total_bytes": 10})
        line = queue.add(queue.Queue(), "a", 0, 0.0, 1.0)
        line = queue.add(line, "b", 0, 0.0, 2.0)
        line, item = queue.take(line, queue.Runner(1 << 22, 1), 3.0)
        assert item is not None
        ended = queue.Driven(queue.Result.FAILED, "why")
        queue.FILE.change(folder, lambda _: queue.ended(line, item, ended, 4.0, 0.0))
        layer = {"mediaType": "x", "digest": "sha256:" + "1" * 64, "size": 5}
        raw = json.dumps({"schemaVersion": 2, "config": layer, "layers": [layer]}).encode()
        registry_cache.keep(folder, to_model("llama3"), raw, "tag", 1.0)
        known = memory.load(folder)
        digest = made.digest("wanted")
        memory.save(
            folder,
            memory.Memory(
                downloads=known.downloads,
                touched={"a": memory.Touched(1, 2, 3)},
                hashes=hashes.Hashes(HASHED),
                asked={digest: memory.Asked(5, 1.0)},
                unproven=frozenset({digest}),
                models=known.models,
                problems=frozenset({("kind", "path")}),
                looked_at=known.looked_at,
            ),
        )
    return made


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a document, and to every key."""
    yield path
    if isinstance(value, dict):
        for key, each in value.items():
            yield from places(each, (*path, key))
    elif isinstance(value, list):
        for at, each in enumerate(value):
            yield from places(each, (*path, at))


def changed(document: Any, path: tuple[Any, ...], absurd: object) -> Any:
    if not path:
        return absurd
    made = copy.deepcopy(document)
    at = made
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = absurd
    return made


def renamed(document: Any, path: tuple[Any, ...], key: str) -> Any:
    """The document with another key at a place in it."""
    made = copy.deepcopy(document)
    at = made
    for step in path[:-1]:
        at = at[step]
    at[key] = at.pop(path[-1])
    return made


def use_state(folder: int) -> None:
    found = memory.load(folder)
    assert not found.unreadable
    memory.save(folder, found)
    assert not memory.load(folder).lost


def use_records(folder: int) -> None:
    records.change(folder, "other", {"state": "starting"})
    assert records.read(folder)["other:latest"].state == "starting"


def use_queue(folder: int) -> None:
    kept = queue.FILE.change(folder, lambda line: queue.add(line, "other", 0, 0.0, 5.0))
    assert queue.position(kept, "other:latest") >= 0
    queue.take(kept, queue.Runner(1, 1), 1e9)
    queue.next_due(kept)


def use_hashes(folder: int) -> None:
    of_disk = hashes.Hashes().of_disk(folder, "boot")
    for name in HASHED:
        of_disk.get(name)
    list(of_disk.blobs())
    more = {names.blob(SHARD * 32): hashes.Hashed(7, 8, 9, SHARD * 32)}
    hashes.keep(folder, more)
    assert hashes.Hashes().of_disk(folder, "").get(names.blob(SHARD * 32)) == hashes.Hashed(
        7, 8, 9, SHARD * 32
    )


def use_cache(folder: int) -> None:
    registry_cache.known_layers(folder)
    raw = json.dumps({"schemaVersion": 2, "config": {}, "layers": []}).encode()
    registry_cache.keep(folder, to_model("other"), raw, "tag", 2.0)


FILES: dict[str, Callable[[int], None]] = {
    "state.json": use_state,
    "models.json": use_records,
    "queue.json": use_queue,
    "registry-cache.json": use_cache,
    f"hashes/{SHARD}.json": use_hashes,
}


@pytest.mark.parametrize("name", FILES)
def test_an_absurd_value_in_any_place_is_set_aside_or_harmless(
    store: HealthyStore, name: str
) -> None:
    file = store.ours / name
    document = json.loads(file.read_bytes())
    count = 0
    with fs.opened_folder(str(store.path)) as folder:
        for path in places(document):
            made = [(how, changed(document, path, absurd)) for how, absurd in ABSURD.items()]
            if path and isinstance(path[-1], str):
                keys = (key for key in ABSURD.values() if isinstance(key, str))
                made += [("key", renamed(document, path, key)) for key in keys]
            for how, each in made:
                file.write_text(json.dumps(each))
                try:
                    FILES[name](folder)
                except WatchError as error:
                    pytest.fail(f"{how} at {path}: {error}")
                except Exception as error:
                    raise AssertionError(f"{how} at {path}: {error!r}") from error
                count += 1
    assert count > 100


@pytest.mark.parametrize("how", ["10**30", "-1e300", "deep", "list"])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("state.json", ("downloads", None, "doubted")),
        ("state.json", ("downloads", None, "progress_at")),
        ("state.json", ("downloads", None, "total_bytes")),
        ("state.json", ("looked_at",)),
        ("state.json", ("untold",)),
        ("models.json", ("models", None, "updated_at")),
        ("queue.json", ("line", 0, 4)),
        ("registry-cache.json", ("models", None, 2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_commands_go_on_over_an_absurd_value(
    store: HealthyStore,
    name: str,
    place: tuple[Any, ...],
    how: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = store.ours / name
    document = json.loads(file.read_bytes())
    at = document
    path: list[Any] = []
    for step in place:
        key = next(iter(at)) if step is None else step
        path.append(key)
        at = at[key]
    for words in (["status"], ["audit"], ["queue", "ls"], ["repair", "--offline", "--yes"]):
        file.write_text(json.dumps(changed(document, tuple(path), ABSURD[how])))
        code = cli.main(["--store", str(store.path), *words])
        told = capsys.readouterr()
        assert code in (0, 1, 3), (words, told)
        assert "Traceback" not in told.err
        assert "fault" not in told.err


def test_a_file_of_ours_that_is_too_large_is_not_read(store: HealthyStore) -> None:
    os.truncate(store.ours / "queue.json", 1 << 40)
    with fs.opened_folder(str(store.path)) as folder:
        assert queue.FILE.read(folder) == queue.Queue()

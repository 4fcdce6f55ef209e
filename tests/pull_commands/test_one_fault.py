"""One model's fault never ends another one's pull: several, the queue, the library."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import run
from tests.support.servers import EngineServer
from watcher import ModelDownloadManager, StoreFiles
from watcher.demo.registry import Layer, Model, Registry
from watcher.errors import DownloadError
from watcher.ollama import manifests
from watcher.pull import before
from watcher.pull.account import Account, Options

MB = 1_000_000
GOOD = "good"


def changed(model: Model, **given: Any) -> bytes:
    """A model's manifest with something else in its first layer, or beside it."""
    manifest = json.loads(model.manifest)
    for key, value in given.items():
        (manifest["layers"][0] if key in manifest["layers"][0] else manifest)[key] = value
    return json.dumps(manifest).encode()


ABSURD: dict[str, Any] = {
    "negative": {"size": -1},
    "most negative": {"size": -(2**63)},
    "largest": {"size": 2**63 - 1},
    "beyond": {"size": 2**63},
    "far beyond": {"size": 10**40},
    "a float": {"size": 1.5},
    "infinite": {"size": float("inf")},
    "a text": {"size": "12"},
    "true": {"size": True},
    "a list": {"size": [1]},
    "null": {"size": None},
    "no digest": {"digest": ""},
    "a number's digest": {"digest": 5},
    "another digest": {"digest": "sha512:aa"},
    "a path": {"digest": "../../x"},
    "a number's type": {"mediaType": 5},
    "no list": {"layers": {}},
    "no record": {"layers": [7]},
    "no config": {"config": []},
    "a text's version": {"schemaVersion": "2"},
}
RAW = {
    "null": b"null",
    "a list": b"[]",
    "nothing": b"",
    "half": b'{"layers": [',
    "deep": b"[" * 200_000,
    "deep layers": b'{"layers":' + b"[" * 200_000,
    "no UTF-8": b'{"layers": [], "mediaType": "\xff\xfe"}',
}


@pytest.fixture
def bad(registry: Registry, request: pytest.FixtureRequest) -> str:
    """The name of a model whose manifest makes no sense, in the way that a test asks for."""
    model = registry.add_model("bad", "1b", [Layer(MB), Layer(2 * MB)])
    body = request.param if isinstance(request.param, bytes) else changed(model, **request.param)
    registry.set_manifests("library/bad", "1b", [body])
    return model.name


@pytest.fixture
def looks(slow: bool, request: pytest.FixtureRequest) -> list[str]:
    """Commands that read what the pull remembers: one of them by the test's name; slow: all."""
    every = ["audit", "status", "df", "repair"]
    return every if slow else [every[sum(map(ord, request.node.name)) % len(every)]]


#: Read in the same way as one that stands beside it.
ALIKE = {
    "most negative",
    "beyond",
    "infinite",
    "true",
    "a list",
    "no record",
    "deep layers",
    "half",
}
SAME_KIND = pytest.mark.slow("another value of a kind that stands beside it")


def every(kinds: dict[str, Any], alike: Set[str] = frozenset()) -> Any:
    return [
        pytest.param(each, id=name, marks=SAME_KIND if name in alike else ())
        for name, each in kinds.items()
    ]


@pytest.mark.parametrize("bad", every(ABSURD | RAW, ALIKE), indirect=True)
def test_a_manifest_that_makes_no_sense(
    store: Path, server: EngineServer, registry: Registry, bad: str, looks: list[str]
) -> None:
    good = registry.add_model(GOOD, "1b", [Layer(MB)]).name
    done = run(store, "pull", "--insecure", "--host", server.url, bad, good)
    assert done.returncode in (0, 4), done.stderr
    assert "Traceback" not in done.stderr
    assert "bug in ollama-watch" not in done.stderr
    assert f"{good.removeprefix('http://')}: Download complete" in done.stdout
    records = json.loads((store / ".ollama-watch/models.json").read_bytes())["models"]
    states = {key.rpartition("/")[2]: record["state"] for key, record in records.items()}
    assert states["good:1b"] == "completed"
    assert states["bad:1b"] == ("error" if done.returncode else "completed")
    cache = (store / ".ollama-watch/registry-cache.json").read_text()
    assert "library/good" in cache
    for key, (raw, *_) in json.loads(cache)["models"].items():
        sizes = list(manifests.parse(raw.encode()).named.values())
        assert all(0 <= size < 1 << 47 for size, _ in sizes), (key, sizes)
    for command in looks:
        looked = run(store, "--json", command, *(["-n"] if command == "repair" else []))
        assert looked.returncode in (0, 1, 3, 4), (command, looked.stderr)
        assert "bug in ollama-watch" not in looked.stderr
        json.loads(looked.stdout)


@pytest.mark.parametrize("words", [(), ("--parallel", "3")], ids=["in turn", "side by side"])
def test_one_failed_model_does_not_keep_the_others_from_arriving(
    store: Path, server: EngineServer, registry: Registry, words: tuple[str, ...]
) -> None:
    names = [registry.add_model(each, "1b", [Layer(MB)]).name for each in ("a", "b")]
    missing = f"http://{registry.host}/library/nothing:1b"
    done = run(
        store, "pull", "--insecure", "--host", server.url, names[0], missing, names[1], *words
    )
    assert done.returncode == 2
    assert done.stdout.count("Download complete") == 2


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours goes wrong at one model, in a way that nobody has thought of."""
    usual = before.take_up

    def take_up(account: Account, *more: Any) -> Any:
        if "bad" in account.model:
            raise OverflowError("int too large")
        return usual(account, *more)

    monkeypatch.setattr(before, "take_up", take_up)


@pytest.mark.usefixtures("broken")
def test_a_fault_of_ours_is_the_end_of_one_pull(
    store: Path, server: EngineServer, registry: Registry
) -> None:
    bad, good = (registry.add_model(each, "1b", [Layer(MB)]).name for each in ("bad", "good"))
    manager = ModelDownloadManager(StoreFiles(store), server=server.url)
    with pytest.raises(DownloadError, match="OverflowError: int too large") as raised:
        manager.download_model(bad, options=Options(insecure=True))
    assert raised.value.cause == "fault"
    assert manager.get_download_state(bad)["status"] == "error"
    assert manager.get_download_log(bad)[-1]["event_type"] == "pull_failed"
    manager.download_model(good, options=Options(insecure=True))
    assert manager.get_download_state(good)["status"] == "completed"

"""JSON carries names exactly, and they can be read back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Run
from tests.support.notation import Store
from watcher.ollama import names
from watcher.state import memory
from watcher.state.memory import Memory, Touched

RAW = st.binary(min_size=1, max_size=12).filter(lambda raw: not {0, ord("/")} & set(raw))
ODD = (
    b"x\ny",
    b"back\\slash",
    b"byte\xff",
    b"byte\\xff",
    b"byte\\xfe",
    b"uml\xc3\xa4ut",
    b" ",
    b"\x7f",
)


@given(st.lists(RAW, unique=True, max_size=5))
def test_names_are_shown_exactly_and_apart(raw: list[bytes]) -> None:
    told = [names.exact(os.fsdecode(each)) for each in raw]
    there = orjson.loads(orjson.dumps(told))
    assert [os.fsencode(names.from_exact(each)) for each in there] == raw
    assert len(set(there)) == len(raw)


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20))
def test_utf8_is_reported_as_it_is(name: str) -> None:
    assert names.exact(name) == names.from_exact(name) == name


@given(st.text(st.characters(exclude_characters="\0"), max_size=20))
def test_a_name_survives_its_exact_form_in_json(name: str) -> None:
    assert names.from_exact(names.exact(name)) == name


@given(st.lists(RAW, min_size=1, unique=True, max_size=5))
def test_the_memory_knows_files_by_their_own_names(raw: list[bytes]) -> None:
    found = [os.fsdecode(each) for each in raw]
    touched = {name: Touched(at, 1, 2) for at, name in enumerate(found)}
    problems = frozenset(("manifest_bad_name", name) for name in found)
    before = Memory(touched=touched, problems=problems)
    assert memory._FILE.from_bytes(memory._FILE.to_bytes(before)).touched == touched
    assert memory._decode_seen(memory._encode_seen(before))[1] == problems


def documents(run: Run, store: Store, *words: str) -> list[dict[str, Any]]:
    done = run("--store", str(store.path), "--json", *words)
    assert done.returncode in (0, 1, 3), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def read_back(told: list[str]) -> list[bytes]:
    return sorted(os.fsencode(names.from_exact(each)) for each in told)


def test_each_document_has_the_very_names(run: Run, models: Store) -> None:
    models.model()
    for name in ODD:
        Path(os.fsdecode(os.fsencode(models.blobs) + b"/" + name)).write_bytes(b"x")
    (audit,) = documents(run, models, "audit")
    foreign = [each["path"] for each in audit["findings"] if each["kind"] == "file_foreign"]
    assert read_back(foreign) == sorted(b"blobs/" + name for name in ODD)
    assert "blobs/x\ny" in foreign
    assert "blobs/back\\slash" in foreign
    later = [each["path"] for each in audit["forecast"]["later"]]
    assert read_back(later) == sorted(b"blobs/" + name for name in ODD)


def test_an_event_has_the_very_names(run: Run, models: Store) -> None:
    folder = models.manifests / "registry.ollama.ai/library/m"
    folder.mkdir(parents=True)
    for name in (b"x\ny", b"byte\xff"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"{}")
    documents(run, models, "repair", "--offline", "--yes")
    lines = (models.path / ".ollama-watch/logs/events.jsonl").read_bytes().splitlines()
    events = [json.loads(line) for line in lines]
    (problem,) = [each for each in events if each["details"].get("kind") == "manifest_bad_name"]
    where = b"manifests/registry.ollama.ai/library/m/"
    assert read_back(problem["details"]["paths"]) == [where + b"byte\xff", where + b"x\ny"]


@pytest.mark.parametrize("name", ["a b", "x\ny", "qu'ote", "do$llar", "back\\slash"])
def test_the_store_s_own_path(run: Run, tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / name)
    store.model()
    (audit,) = documents(run, store, "audit")
    assert audit["store"]["path"] == str(store.path)
    (status,) = documents(run, store, "status")
    assert status["store"] == str(store.path)
    (queue,) = documents(run, store, "queue", "ls")
    assert queue["store"] == str(store.path)

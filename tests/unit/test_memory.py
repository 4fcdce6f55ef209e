"""``state.json``: kept whole, and never in the way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.notation import digest_of
from watcher.model import Condition
from watcher.state import memory
from watcher.state.memory import Memory, Remembered

D = digest_of("d")


@pytest.fixture
def state(folder: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{folder}")) / ".ollama-watch" / "state.json"


def record(**changes: Any) -> Remembered:
    given: dict[str, Any] = {
        "device": 1,
        "inode": 2,
        "born_ns": 3,
        "condition": Condition.BEHIND,
        "stale": False,
        "pulling": True,
        "total": 262_000_000,
        "claimed": 5,
        "allocated": 7,
        "progress_at": 1_700_000_000.5,
        "models": ("a:b", "c:d"),
    }
    return Remembered(**{**given, **changes})


def test_a_saved_memory_is_read_back_unchanged(folder: int) -> None:
    kept = Memory({D: record(), f"{D}.tmp": record(total=None, models=())})
    memory.save(folder, kept)
    assert memory.load(folder) == kept


def test_no_memory_is_an_empty_one(folder: int) -> None:
    assert memory.load(folder) == Memory()


def whole(folder: int, state: Path) -> dict[str, Any]:
    memory.save(folder, Memory({D: record()}))
    document: dict[str, Any] = json.loads(state.read_bytes())
    return document


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"null", b"[]", b"{}", b'{"schema":"x"}', b"\0" * 50, b"\xff", b"[" * 5000,
     b'{"schema":"ollama-watch/state/1"}', b'{"schema":"ollama-watch/state/1","downloads":[]}',
     b'{"schema":"ollama-watch/state/1","downloads":{"x":null}}',
     b'{"schema":"ollama-watch/state/2","downloads":{}}'],
)  # fmt: skip
def test_a_damaged_file_is_reported_set_aside_and_replaced(
    folder: int, state: Path, raw: bytes
) -> None:
    state.parent.mkdir()
    state.write_bytes(raw)
    lost = memory.load(folder)
    assert lost.lost
    assert not lost.downloads
    memory.save(folder, lost)
    assert (state.parent / "state.json.damaged").read_bytes() == raw
    assert memory.load(folder) == Memory()


@pytest.mark.parametrize(
    ("field", "value"),
    [("device", "x"), ("device", None), ("device", 1e999), ("condition", "happy"), ("inode", []),
     ("total_bytes", {}), ("models", 3), ("progress_at", "x"),
     ("progress_at", 1e999)],
)  # fmt: skip
def test_a_record_that_makes_no_sense_is_damage(
    folder: int, state: Path, field: str, value: object
) -> None:
    document = whole(folder, state)
    document["downloads"][D][field] = value
    state.write_text(json.dumps(document).replace("Infinity", "1e999"))
    assert memory.load(folder).lost


@pytest.mark.parametrize("digest", ["x", "../../etc/passwd", "a\0b", "9" * 300])
def test_a_key_that_is_no_digest_is_damage(folder: int, state: Path, digest: str) -> None:
    document = whole(folder, state)
    document["downloads"][digest] = document["downloads"][D]
    state.write_text(json.dumps(document))
    assert memory.load(folder).lost


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder"])
def test_a_state_that_is_no_file_is_not_read_through(
    folder: int, state: Path, tmp_path: Path, kind: str
) -> None:
    memory.save(folder, Memory())
    state.unlink()
    if kind == "symlink":
        (tmp_path / "elsewhere").write_bytes(b"{}")
        state.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(state)
    else:
        state.mkdir()
    lost = memory.load(folder)
    assert lost.lost
    memory.save(folder, lost)
    assert memory.load(folder) == Memory()
    if kind == "symlink":
        assert (tmp_path / "elsewhere").read_bytes() == b"{}"


def test_a_linked_folder_of_ours_is_not_followed(folder: int, state: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    state.parent.symlink_to(tmp_path / "elsewhere")
    assert memory.load(folder).lost
    with pytest.raises(OSError):
        memory.save(folder, Memory())
    assert list((tmp_path / "elsewhere").iterdir()) == []


class _Overtaken(bytes):
    """Text that another thread lets go of, or replaces, while it is compared."""

    def __new__(cls, raw: bytes, last: object) -> _Overtaken:
        made = super().__new__(cls, raw)
        made.last = last
        return made

    last: object

    def __eq__(self, other: object) -> bool:
        memory._FILE._last = self.last  # type: ignore[assignment]
        return bytes.__eq__(self, other)

    __hash__ = bytes.__hash__


@pytest.mark.parametrize("last", [None, (b"other", Memory(looked_at=7.0))])
def test_threads_that_read_it_at_once_get_what_they_read(
    folder: int, state: Path, last: object
) -> None:
    kept = Memory({D: record()})
    memory.save(folder, kept)
    known = memory._FILE.from_bytes(state.read_bytes())
    memory._FILE._last = _Overtaken(state.read_bytes(), last), known
    try:
        assert memory.load(folder) == kept
    finally:
        memory.let_go()

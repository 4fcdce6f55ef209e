"""The record of a model's download: what a change may be, and what is kept of it."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import IS_ROOT, needs_root
from watcher.errors import NoPermissionError, RecordError, TargetError
from watcher.ollama import names
from watcher.state import fs, records
from watcher.state.records import Record, State

NOW = 1_700_000_000.0


@pytest.fixture
def place(folder: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{folder}")) / ".ollama-watch" / "models.json"


def after(before: Record, **changes: object) -> Record:
    return records.after(before, changes, NOW, "m")


def at(*way: State, **changes: object) -> Record:
    """A record that went this way, then changed."""
    record = Record()
    for state in way:
        record = after(record, state=state)
    return after(record, **changes) if changes else record


DOWNLOADING = (State.STARTING, State.PULLING_MANIFEST, State.DOWNLOADING)


# ---------------------------------------------------------------- a change


def test_a_change_is_what_is_read_again(folder: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert records.read(folder) == {}
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: NOW)
        made = records.change(folder, "llama3", {"state": "starting"})
    assert made == Record(State.STARTING, started_at=NOW, updated_at=NOW)
    assert records.read(folder) == {"llama3:latest": made}
    more = records.change(folder, "llama3", {"state": "pulling_manifest", "total_bytes": 200})
    assert (more.total_bytes, more.started_at) == (200, NOW)
    records.change(folder, "me/other:8b", {"state": "error", "error": "no network"})
    assert set(records.read(folder)) == {"llama3:latest", "me/other:8b"}
    assert records.read(folder)["me/other:8b"].error == "no network"


@pytest.mark.parametrize(
    "spelled", ["Llama3", "llama3:latest", "registry.ollama.ai/library/LLAMA3"]
)
def test_spellings_of_one_model_are_one_record(folder: int, spelled: str) -> None:
    records.change(folder, "llama3", {"state": "starting"})
    records.change(folder, spelled, {"state": "error"})
    assert [each.state for each in records.read(folder).values()] == [State.ERROR]


def test_records_refuse_an_invalid_model_name(folder: int, place: Path) -> None:
    with pytest.raises(TargetError, match="a b"):
        records.change(folder, "a b", {})
    assert not place.exists()


def test_illegal_transitions_name_model_and_states(folder: int, place: Path) -> None:
    records.change(folder, "llama3", {"state": "starting"})
    before = place.read_bytes()
    with pytest.raises(
        RecordError, match="llama3: status: starting can't become verifying"
    ) as told:
        records.change(folder, "llama3", {"state": "verifying"})
    assert "completed, error, pulling_manifest" in told.value.next_step
    assert place.read_bytes() == before


def test_unknown_keys_are_all_named() -> None:
    with pytest.raises(RecordError, match="m: unknown: colour, updated_at") as told:
        after(Record(), colour="red", updated_at=1, state="starting")
    assert "total_bytes" in told.value.next_step


BAD: list[tuple[str, list[object]]] = [
    ("state", ["happy", None, 1, "", "IDLE", [], {}]),
    ("total_bytes", [-1, 1.0, True, "1", 1 << 63, [], float("nan")]),
    ("downloaded_bytes", [None, -1, 1.5, "x", 1 << 63]),
    ("present_bytes", [None, -1]),
    ("progress_percent", [None, -0.1, 100.1, float("nan"), float("inf"), "50", True, 10**400]),
    ("bytes_per_second", [-1, float("inf"), "fast", False]),
    ("lost_bytes", [None, -1, 0.5]),
    ("resets", [None, -1, "3"]),
    ("stalls", [None, -1, True]),
    ("error", [None, 1, b"bytes"]),
    ("manifest_pulled", [None, 1, "yes"]),
    ("resume_supported", [0, "no"]),
]


@pytest.mark.parametrize(("key", "value"), [(key, each) for key, bad in BAD for each in bad])
def test_bad_values_are_refused_with_their_names(key: str, value: object) -> None:
    state = {} if key == "state" else {"state": "error"}
    shown = "status" if key == "state" else key
    with pytest.raises(RecordError, match=f"m: {shown} = "):
        after(Record(), **state, **{key: value})


def test_every_key_has_bad_values_here() -> None:
    assert {key for key, _ in BAD} == set(records.CHANGEABLE)


def test_an_error_has_its_reason_as_long_as_it_is_one() -> None:
    broken = at(*DOWNLOADING, state="error", error="connection reset")
    assert broken.error == "connection reset"
    assert after(broken, downloaded_bytes=5).error == "connection reset"
    assert after(broken, state="starting").error == ""
    with pytest.raises(RecordError, match="m: error: the state is downloading"):
        at(*DOWNLOADING, error="x")


# ---------------------------------------------------------------- progress


def test_progress_follows_bytes_and_never_falls_within_one_download() -> None:
    record = at(*DOWNLOADING, total_bytes=200, downloaded_bytes=100)
    assert record.progress_percent == 50
    lost = after(record, downloaded_bytes=20)
    assert (lost.downloaded_bytes, lost.progress_percent) == (20, 50)
    assert after(lost, progress_percent=30.0).progress_percent == 50
    assert after(lost, total_bytes=1000).progress_percent == 50
    for way in ({"state": "error"}, {"state": "starting"}):
        lost = after(lost, **way)
        assert lost.progress_percent == 50
    assert after(lost, state="completed").progress_percent == 100


def test_a_new_download_begins_at_nothing() -> None:
    done = at(*DOWNLOADING, state="completed", total_bytes=200, manifest_pulled=True)
    assert (done.downloaded_bytes, done.progress_percent) == (200, 100)
    fresh = after(done, state="starting")
    assert fresh == Record(State.STARTING, started_at=NOW, updated_at=NOW)
    broken = at(*DOWNLOADING, total_bytes=200, downloaded_bytes=100, state="error")
    for state in ("reset", "idle"):
        assert after(broken, state=state) == Record(State(state), updated_at=NOW)


def test_one_rate_only_while_somebody_is_at_work() -> None:
    record = at(*DOWNLOADING, bytes_per_second=5.0)
    assert record.bytes_per_second == 5
    assert after(record, state="error").bytes_per_second is None


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "state": st.sampled_from(State),
        "total_bytes": st.none() | st.integers(0, 300),
        "downloaded_bytes": st.integers(0, 300),
        "progress_percent": st.floats(0, 100),
    },
)


@given(st.lists(CHANGES, max_size=30))
def test_whatever_comes_a_record_is_sound(changes: list[dict[str, Any]]) -> None:
    record = Record()
    for each in changes:
        legal = records.may_follow(record.state, each.get("state", record.state))
        try:
            now = after(record, **each)
        except RecordError:
            assert not legal
            continue
        assert legal
        assert 0 <= now.progress_percent <= 100
        same = (
            record.state.active
            or record.state is now.state
            or (record.state is State.ERROR and now.state not in (State.RESET, State.IDLE))
        )
        assert not same or now.progress_percent >= record.progress_percent
        assert now.started_at is not None or not now.state.active
        assert records._FILE.from_bytes(records._FILE.to_bytes({"m:latest": now})) == {
            "m:latest": now
        }
        record = now


# ---------------------------------------------------------------- the file


DAMAGED = [
    b"", b"{", b"null", b"[]", b"{}", b"\0" * 50, b"\xff", b"[" * 5000,
    b'{"schema":"ollama-watch/models/2","models":{}}', b'{"schema":"ollama-watch/models/1"}',
    b'{"schema":"ollama-watch/models/1","models":{"m:latest":{}}}',
    b'{"schema":"ollama-watch/models/1","models":{"a b":{}}}',
    b'{"schema":"ollama-watch/models/1","models":[]}',
]  # fmt: skip


@pytest.mark.parametrize("raw", DAMAGED)
def test_a_damaged_file_is_set_aside_reported_and_all_goes_on(
    folder: int, place: Path, raw: bytes
) -> None:
    place.parent.mkdir()
    place.write_bytes(raw)
    assert records.read(folder) == {}
    made = records.change(folder, "llama3", {"state": "starting"})
    assert records.read(folder) == {"llama3:latest": made}
    assert place.with_name("models.json.damaged").read_bytes() == raw


@pytest.mark.parametrize("key", [*records.CHANGEABLE, "started_at", "updated_at"])
def test_a_value_that_can_not_be_is_damage(folder: int, place: Path, key: str) -> None:
    records.change(folder, "llama3", {"state": "starting"})
    document = json.loads(place.read_bytes())
    document["models"]["llama3:latest"][key] = -1
    place.write_text(json.dumps(document))
    assert records.read(folder) == {}


def test_a_later_versions_keys_are_no_damage(folder: int, place: Path) -> None:
    made = records.change(folder, "llama3", {"state": "starting"})
    document = json.loads(place.read_bytes())
    document["models"]["llama3:latest"]["mood"] = "good"
    place.write_text(json.dumps(document))
    assert records.read(folder) == {"llama3:latest": made}


def test_an_earlier_version_s_records_are_none_either(folder: int, place: Path) -> None:
    made = records.change(folder, "llama3", {"state": "starting", "present_bytes": 5})
    document = json.loads(place.read_bytes())
    for key in ("lost_bytes", "resets", "stalls"):
        del document["models"]["llama3:latest"][key]
    place.write_text(json.dumps(document))
    assert records.read(folder) == {"llama3:latest": made}


def test_a_symlink_in_its_place_is_not_followed(folder: int, place: Path, tmp_path: Path) -> None:
    place.parent.mkdir()
    (tmp_path / "other").write_text("of somebody else")
    place.symlink_to(tmp_path / "other")
    assert records.read(folder) == {}
    records.change(folder, "llama3", {"state": "starting"})
    assert stat.S_ISREG(place.lstat().st_mode)
    assert (tmp_path / "other").read_text() == "of somebody else"


@pytest.mark.skipif(IS_ROOT, reason="root can read everything")
def test_unreadable_records_are_not_overwritten(folder: int, place: Path) -> None:
    records.change(folder, "llama3", {"state": "starting"})
    place.chmod(0)
    _assert_kept(folder)
    place.chmod(0o644)
    assert set(records.read(folder)) == {"llama3:latest"}


def test_a_failing_disk_is_reported_and_nothing_is_written_over(
    folder: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.change(folder, "llama3", {"state": "starting"})
    before = place.read_bytes()

    def fails(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fs, "read_ours", fails)
    _assert_kept(folder)
    assert place.read_bytes() == before


def _assert_kept(folder: int) -> None:
    for act in (
        lambda: records.read(folder),
        lambda: records.change(folder, "llama3", {"state": "error"}),
    ):
        with pytest.raises(
            NoPermissionError, match=r"models\.json can't be read: Permission denied"
        ):
            act()


@needs_root
def test_records_written_by_root_belong_to_the_owner_of_the_store(folder: int, place: Path) -> None:
    os.fchown(folder, 1234, 1234)
    records.change(folder, "llama3", {"state": "starting"})
    owners = {each.stat().st_uid for each in (place.parent, *place.parent.iterdir())}
    assert owners == {1234}


def test_only_a_new_state_is_brought_to_the_disk(
    folder: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    records.change(folder, "llama3", {"state": "starting"})
    assert synced
    synced.clear()
    records.change(folder, "llama3", {"state": "starting", "total_bytes": 5})
    assert not synced
    records.change(folder, "llama3", {"state": "error"})
    assert synced


def test_states_of_others_downloads_are_recorded_by_allowed_transitions(folder: int) -> None:
    seen = [
        ("llama3", State.DOWNLOADING, ""),
        ("llama3", State.ERROR, "killed"),
        ("phi", State.COMPLETED, ""),
        ("gone", State.IDLE, ""),
    ]
    records.follow(folder, seen, lambda _: (), 5.0)
    kept = {key: (each.state, each.error) for key, each in records.read(folder).items()}
    assert kept == {
        names.to_model("llama3").key: (State.ERROR, "killed"),
        names.to_model("phi").key: (State.COMPLETED, ""),
    }


def test_a_record_that_a_process_of_ours_writes_is_left_to_it(folder: int) -> None:
    records.change(folder, "llama3", {"state": "starting"})
    lock = records.driving_lock("llama3")
    assert records.drive(lock, folder)
    assert not records.drive(records.driving_lock("LLAMA3:latest"), folder)
    records.follow(folder, [("llama3", State.ERROR, "killed")], lambda _: (), 5.0)
    lock.release()
    assert records.read(folder)[names.to_model("llama3").key].state is State.STARTING
    records.follow(folder, [("llama3", State.ERROR, "killed")], lambda _: (), 5.0)
    assert records.read(folder)[names.to_model("llama3").key].state is State.ERROR

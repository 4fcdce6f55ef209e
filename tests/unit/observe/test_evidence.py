"""One look at a store: what was read of each download, and what could not be."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.notation import MB, Store, age, digest_of, manifest_bytes, quiet_machine
from tests.support.runs import rules
from watcher.decide import diagnose
from watcher.model import DAY, HOUR, MIB, Condition, Download, Evidence, Kind
from watcher.observe.evidence import observe
from watcher.state import fs
from watcher.state.memory import Asked, Memory, Remembered


def look(models: Store, memory: Memory | None = None, **more: Any) -> Evidence:
    return observe(models.host(**more), rules(), memory or Memory(), None)


def one(models: Store, memory: Memory | None = None, **more: Any) -> Download:
    (found,) = look(models, memory, **more).downloads
    return found


def condition(models: Store) -> Condition:
    (diagnosed,) = diagnose.diagnose(look(models), rules())
    return diagnosed.condition


@pytest.mark.parametrize(
    ("parts", "total", "expected"),
    [
        ("2:2 1:1 0:0", None, Condition.PAUSED),
        ("0:0", None, Condition.PAUSED),
        ("0:3 1:1", None, Condition.BEHIND),
        ("3:1 1:1", None, Condition.HOLLOW),
        ("3:- 1:-", None, Condition.HOLLOW),
        ("0:1 -:1", None, Condition.BLOCKED),
        ("E:1 0:1", None, Condition.BLOCKED),
        ("{}:1 0:1", None, Condition.BLOCKED),
        ("-1:1 0:1", None, Condition.BLOCKED),
        ("101:1 0:1", None, Condition.BLOCKED),
        ("-:1 -:0", None, Condition.UNCLAIMED),
        ("0:5", 5, Condition.WHOLE),
        ("-:5", 5, Condition.WHOLE),
        ("5:5", 5, Condition.WHOLE),
    ],
)
def test_real_files_to_conditions(
    models: Store, parts: str, total: float | None, expected: Condition
) -> None:
    models.broken(parts, total=total)
    assert condition(models) is expected


def test_the_length_comes_from_whole_sidecars_a_manifest_or_the_data(models: Store) -> None:
    digest = models.broken("0:1 0:1")
    assert (one(models).total, one(models).total_from) == (200 * MB, "sidecars")
    (models.blobs / f"sha256-{digest}-partial-1").write_bytes(b"")
    assert (one(models).total, one(models).total_from) == (200 * MB, "data")
    models.manifest("m/latest", {digest: 150 * MB})
    assert (one(models).total, one(models).total_from) == (150 * MB, "manifest")
    assert one(models).models == ("m:latest",)


def test_data_that_was_cut_does_not_show_its_length(models: Store) -> None:
    # A pull with a sidecar missing has cut it to the sum of the others.
    digest = models.broken("0:1 -:1 0:1")
    os.truncate(models.blobs / f"sha256-{digest}-partial", 200 * MB)
    assert one(models).total is None


def remembered(models: Store, digest: str, **changes: Any) -> Memory:
    name = f"sha256-{digest}-partial"
    fd = os.open(models.blobs, os.O_RDONLY)
    born, status = fs.born(name, fd), os.stat(name, dir_fd=fd)
    os.close(fd)
    given: dict[str, Any] = {
        "device": status.st_dev,
        "inode": status.st_ino,
        "born_ns": born,
        "condition": Condition.PAUSED,
        "stale": False,
        "pulling": False,
        "total": 300 * MB,
        "claimed": 0,
        "allocated": 0,
        "progress_at": 1_000.0,
        "models": ("me/mine:latest",),
    }
    return Memory({digest: Remembered(**{**given, **changes})})


def test_memory_knows_the_length_the_progress_and_the_models(models: Store) -> None:
    digest = models.broken("0:1 -:1 0:1")
    data = models.blobs / f"sha256-{digest}-partial"
    os.truncate(data, 200 * MB)
    os.utime(data, (900, 900))
    found = one(models, remembered(models, digest))
    assert (found.total, found.total_from) == (300 * MB, "memory")
    assert found.progress_at == 1_000.0
    os.utime(data, (1_100, 1_100))
    assert one(models, remembered(models, digest)).progress_at == 1_100.0
    assert found.models == ("me/mine:latest",)


@pytest.mark.parametrize("other", [{"inode": 1}, {"born_ns": 1}])
def test_memory_of_another_file_does_not_count(models: Store, other: dict[str, int]) -> None:
    digest = models.broken("0:1 -:1")
    found = one(models, remembered(models, digest, **other))
    assert found.total_from == "data"
    assert found.progress_at is None


@pytest.mark.parametrize("other", [{}, {"inode": 1}])
def test_bytes_in_doubt_are_in_doubt_in_a_copy_as_well(
    models: Store, other: dict[str, int]
) -> None:
    digest = models.broken("0:50")
    given = remembered(models, digest, doubted=((20 * MB, 21 * MB),), **other)
    trusted = one(models, given).trust.trusted
    assert trusted == ((MIB, 20 * MB), (21 * MB, 50 * MB))


def test_a_machine_that_started_after_the_last_write_makes_zeros_doubtful(
    models: Store, tmp_path: Path
) -> None:
    digest = models.broken("3:3")
    data = models.blobs / f"sha256-{digest}-partial"
    with data.open("r+b") as file:
        os.pwrite(file.fileno(), bytes(4096), 4096 * 100)
    age(data, "2h")
    assert one(models).trust.trusted == ((0, 3 * MB),)
    later = quiet_machine(tmp_path / "later", booted="1h")
    trust = one(models, proc=later).trust
    assert trust.rebooted
    assert trust.trusted == ((0, 409_600), (413_696, 3 * MB))


def test_times_in_the_future_do_not_say_that_no_start_came_between(
    models: Store, tmp_path: Path
) -> None:
    """The clock was a day ahead when it was written, and looked through; then it was set right."""
    digest = models.broken("3:3")
    data = models.blobs / f"sha256-{digest}-partial"
    with data.open("r+b") as file:
        os.pwrite(file.fileno(), bytes(4096), 4096 * 100)
    checked = remembered(models, digest, checked_at=time.time())
    started = quiet_machine(tmp_path / "started", booted="25h")
    yesterday: dict[str, Any] = {"proc": started, "clock": lambda: time.time() - DAY}
    for memory in (Memory(), checked):
        trust = one(models, memory, **yesterday).trust
        assert trust.rebooted
        assert trust.trusted == ((0, 409_600), (413_696, 3 * MB))


@pytest.mark.parametrize(("ago", "counts"), [(0, True), (HOUR - 1, True), (HOUR, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_answer_of_a_registry_is_good_for_an_hour(
    models: Store, ago: float, counts: bool, sign: int
) -> None:
    digest = models.broken("0:1 -:1 0:1")
    os.truncate(models.blobs / f"sha256-{digest}-partial", 200 * MB)
    now = time.time()
    memory = Memory(asked={digest: Asked(300 * MB, now - ago * sign)})
    counts = counts and (sign == 1 or ago == 0)
    assert (one(models, memory, clock=lambda: now).total == 300 * MB) is counts


def test_a_pipe_in_place_of_the_data_is_not_opened(models: Store) -> None:
    digest = models.broken("0:1")
    data = models.blobs / f"sha256-{digest}-partial"
    data.unlink()
    os.mkfifo(data)
    age(data, "2h")
    found = one(models)
    assert found.data is not None
    assert found.data.kind is Kind.OTHER
    assert condition(models) is Condition.UNKNOWN


def test_data_longer_than_its_parts_is_no_valid_set(models: Store) -> None:
    digest = models.broken("0:1 0:1")
    os.truncate(models.blobs / f"sha256-{digest}-partial", 250 * MB)
    assert one(models).faults


def test_a_download_of_the_transfer_path_has_no_parts(models: Store) -> None:
    digest = models.model()
    (models.blobs / f"sha256-{digest}").rename(models.blobs / f"sha256-{digest}.tmp")
    found = one(models)
    assert found.transfer
    assert found.key == f"{digest}.tmp"


def test_a_manifest_that_is_being_written_is_looked_at_again(models: Store) -> None:
    path = models.manifest("m/latest", b"", aged="0s")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        path.write_bytes(manifest_bytes({digest_of("x"): 1}))

    assert not look(models, sleep=sleep).census.odd_manifests
    assert len(waits) == 1


def test_a_narrow_look_reads_only_what_it_was_asked_for(models: Store) -> None:
    wanted = models.broken("0:1", name="wanted")
    models.broken("0:1", name="other")
    seen = observe(models.host(), rules(), Memory(), frozenset({wanted}))
    assert [each.digest for each in seen.downloads] == [wanted]
    assert seen.scope == frozenset({wanted})


def test_looking_changes_nothing(models: Store) -> None:
    models.broken("0:1 -:1 {}:1")
    before = models.snapshot()
    look(models)
    assert models.snapshot() == before

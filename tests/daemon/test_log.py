"""``log``: what people read of the event logs, with and without a daemon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.driving import KEYS, Daemon, HealthyStore, command, environment, run
from tests.support.servers import wait_until
from watcher.config import Settings
from watcher.model import DAY
from watcher.state import event_log
from watcher.state.event_log import Event

DIGEST = "ab" * 32
NOW = 1_764_000_000.0


def tell(store: HealthyStore, *told: Event, policy: Settings | None = None) -> None:
    fd = os.open(store.path, os.O_RDONLY)
    try:
        event_log.write(fd, told, policy or Settings())
    finally:
        os.close(fd)


def event(
    message: str,
    *models: str,
    at: float = NOW,
    kind: str = "partial_found",
    digest: str | None = None,
) -> Event:
    details: dict[str, object] = {"models": list(models)}
    if digest is not None:
        details["digest"] = f"sha256:{digest}"
    short = f"sha256-{digest[:12]}" if digest else None
    return Event(at, kind, message, models[0] if models else short, details)


def told(store: HealthyStore, *words: str) -> list[str]:
    """The messages that `log --json` gives."""
    done = run(store.path, "log", "--json", *words)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(list(each) == KEYS for each in found)
    return [each["message"] for each in found]


# ---------------------------------------------------------------- what is chosen


def test_a_model_is_found_as_people_write_it_and_from_before_it_was_known(
    store: HealthyStore,
) -> None:
    tell(
        store,
        event("as a digest", digest=DIGEST),
        event("another", digest="cd" * 32),
        event("as a model", "llama3:latest", digest=DIGEST),
        event("of two", "a:1", "LLama3:latest"),
        event("other tag", "llama3:8b"),
        Event(NOW, "refused", "of an act", "llama3:latest", {"subject": DIGEST, "models": []}),
        Event(NOW, "check_started", "of the service"),
    )
    mine = ["as a digest", "as a model", "of two", "of an act"]
    assert told(store, "llama3") == mine
    assert told(store, "Llama3:latest") == mine
    assert told(store, "registry.ollama.ai/library/llama3") == mine
    assert told(store, "llama3:8b") == ["other tag"]
    assert told(store, f"sha256-{DIGEST[:12]}") == ["as a digest", "as a model", "of an act"]
    assert told(store, f"sha256:{'cd' * 32}") == told(store, "cdcd") == ["another"]
    assert len(told(store)) == 7


def test_a_model_that_no_event_names_is_found_by_its_manifest(store: HealthyStore) -> None:
    tell(store, event("its layer", digest=store.digests[0]), event("another", digest=DIGEST))
    assert told(store, "healthy") == ["its layer"]


def test_an_unknown_model_is_reported_with_the_nearest_names(store: HealthyStore) -> None:
    tell(store, event("x", "llama3:latest"))
    done = run(store.path, "log", "lama3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "lama3" in done.stderr
    assert "did you mean llama3:latest?" in done.stderr
    assert run(store.path, "log", "lama3", "--follow").returncode == 2


def test_log_selects_events_by_time_type_and_number(store: HealthyStore) -> None:
    now = time.time()
    tell(
        store,
        event("old", at=now - 3 * DAY),
        event("young", at=now - 3600),
        event("stale", at=now - 1800, kind="partial_stale"),
        event("last", at=now - 60, kind="error"),
    )
    assert told(store, "--since", "2h") == ["young", "stale", "last"]
    assert told(store, "--since", event_log.rfc3339(now - 1801)) == ["stale", "last"]
    assert told(store, "--type", "error", "--type", "partial_stale") == ["stale", "last"]
    assert told(store, "--lines", "2") == ["stale", "last"]
    assert told(store, "-n", "0") == []
    assert run(store.path, "log", "-n", "0").stdout == "", "no word about lines not asked for"
    done = run(store.path, "log", "--since", "tomorrow")
    assert done.returncode == 2
    assert "such as 2h" in done.stderr
    done = run(store.path, "log", "--type", "eror")
    assert (done.returncode, done.stdout) == (0, "No events.\n")
    assert "eror" in done.stderr
    assert "error, partial_found, partial_stale" in done.stderr


def test_logs_set_aside_are_read_in_order_and_damage_is_reported(store: HealthyStore) -> None:
    for number in range(30):
        tell(store, event(str(number), at=NOW + number), policy=Settings(log_max_bytes=500))
    assert len(list((store.ours / "logs").iterdir())) > 3
    assert told(store) == [str(number) for number in range(30)]
    with (store.ours / "logs/events.jsonl").open("ab") as log:
        log.write(b'not a line\n{"timestamp": "20')
    done = run(store.path, "log")
    assert done.returncode == 0
    assert done.stderr == "skipped 2 damaged lines of the log\n"
    assert done.stdout.endswith("  29\n")


# ---------------------------------------------------------------- how it is shown


def test_the_log_is_readable_in_80_columns_and_begins_each_day(store: HealthyStore) -> None:
    long = "the download was interrupted: " + "behind, because of this and that " * 6
    tell(
        store,
        event(long, at=NOW, kind="download_interrupted"),
        event("wi\x1b[31mld\n", at=NOW + 1),
        event("", at=NOW + 2 * DAY),
        event("y" * 200, at=NOW + 2 * DAY),
    )
    done = run(store.path, "log", env={"TZ": "UTC"})
    assert done.stderr == ""
    shown = done.stdout.splitlines()
    assert shown.pop(0) == "4 events, from 2025-11-24 16:00 to 2025-11-26 16:00."
    assert shown[0] == "2025-11-24"
    assert shown[1].startswith("16:00:00  download_interrupted  the download was interrupted")
    assert all(len(each) <= 80 or "y" * 200 in each for each in shown), "a name is never broken"
    assert all(each == each.rstrip() for each in shown)
    assert "\x1b" not in done.stdout
    assert [each for each in shown if each[:2] == "20"] == ["2025-11-24", "2025-11-26"]


def test_nothing_logged_yet_is_no_error(store: HealthyStore) -> None:
    done = run(store.path, "log")
    assert (done.returncode, done.stdout, done.stderr) == (0, "No events.\n", "")
    assert not store.ours.exists()
    done = run(store.path.with_name("nowhere"), "log")
    assert done.returncode == 10


def test_log_has_the_events_of_a_daemon_while_it_runs_and_after_its_end(
    store: HealthyStore,
) -> None:
    with Daemon(store.path) as daemon:
        store.download("new", aged=DAY)
        daemon.wait_event("partial_found")
        assert told(store) == [each["message"] for each in daemon.events]
        daemon.kill(signal.SIGTERM)
    assert told(store)[-1].startswith("ollama-watch stopped")


def test_another_user_reads_it_or_is_shown_how(
    store: HealthyStore, as_nobody: Callable[[list[str]], list[str]]
) -> None:
    tell(store, event("x", "llama3:latest"))

    def read(*words: str) -> subprocess.CompletedProcess[str]:
        mine = ["-m", "watcher", "--store", str(store.path), "log", *words]
        return subprocess.run(as_nobody(mine), capture_output=True, text=True, timeout=120)

    assert read().stdout.endswith("  x\n")
    for path in (store.ours / "logs/events.jsonl", store.ours, store.path):
        mode = path.stat().st_mode
        path.chmod(0o700)
        for words in ([], ["llama3"], ["--follow"]):
            done = read(*words)
            assert done.returncode == 4, (path, words)
            assert "permission denied" in done.stderr.lower()
            assert f"--store {store.path} log" in done.stderr.split("sudo ")[1]
        path.chmod(mode)


# ---------------------------------------------------------------- following


class Following:
    """``log --follow`` as a process, and what it has written."""

    def __init__(self, store: HealthyStore, *words: str) -> None:
        self.path = store.path.with_name("followed")
        with self.path.open("wb") as out:
            self.process = subprocess.Popen(
                command(store.path, "log", "--follow", *words),
                env=environment(store.path),
                stdout=out,
                stderr=subprocess.PIPE,
            )

    @property
    def messages(self) -> list[str]:
        raw = self.path.read_bytes()
        return [json.loads(each)["message"] for each in raw[: raw.rfind(b"\n") + 1].splitlines()]

    def wait(self, *expected: str) -> None:
        wait_until(lambda: self.messages == list(expected), f"{expected}, not {self.messages}")


@pytest.fixture
def follow(store: HealthyStore) -> Iterator[Callable[..., Following]]:
    started: list[Following] = []

    def begin(*words: str) -> Following:
        started.append(Following(store, *words))
        return started[-1]

    yield begin
    for each in started:
        each.process.kill()
        each.process.communicate()


def test_log_follow_waits_for_a_missing_log_and_follows_it_through_rotation(
    store: HealthyStore, follow: Callable[..., Following]
) -> None:
    following = follow("--json")
    tell(store, event("first"))
    following.wait("first")
    for number in range(20):
        tell(store, event(str(number), at=NOW + number), policy=Settings(log_max_bytes=500))
    following.wait("first", *map(str, range(20)))
    half = event("half").line
    path: Path = store.ours / "logs/events.jsonl"
    with path.open("ab", buffering=0) as log:
        log.write(half[:20])
        tell_before = len(following.messages)
        log.write(half[20:])
    following.wait("first", *map(str, range(20)), "half")
    assert tell_before == 21
    following.process.send_signal(signal.SIGINT)
    _, errors = following.process.communicate(timeout=120)
    assert (following.process.returncode, errors) == (130, b"")


def test_a_followed_model_is_found_by_the_digest_that_it_turns_out_to_have(
    store: HealthyStore, follow: Callable[..., Following]
) -> None:
    tell(store, *(event(str(number), "llama3:latest") for number in range(20)))
    following = follow("--json", "llama3")
    following.wait(*map(str, range(10, 20)))
    tell(
        store,
        event("of another", digest="cd" * 32),
        event("learnt", "llama3:latest", digest=DIGEST),
        event("then", digest=DIGEST),
    )
    following.wait(*map(str, range(10, 20)), "learnt", "then")


def test_only_one_store_can_be_followed(store: HealthyStore, tmp_path: Path) -> None:
    other = HealthyStore(tmp_path / "other")
    tell(store, event("here"))
    tell(other, event("there"))
    assert told(store, "--since", "1970-01-01") == ["here"]
    both = command(store.path, "--store", str(other.path), "log", "--json")
    done = subprocess.run(both, env=environment(store.path), capture_output=True, timeout=120)
    assert [json.loads(each)["message"] for each in done.stdout.splitlines()] == ["here", "there"]
    done = subprocess.run([*both, "--follow"], env=environment(store.path), capture_output=True)
    assert done.returncode == 2

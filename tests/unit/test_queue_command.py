"""``queue`` on the command line: what it prints, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import IS_ROOT, Run
from tests.support.notation import Store
from tests.support.runs import rules
from watcher import cli
from watcher.commands import queueing
from watcher.commands.context import Context
from watcher.errors import Exit
from watcher.pull import queue, running
from watcher.pull.queue import Driven, Queue, Result
from watcher.state import fs, records

Say = Callable[..., str]


@pytest.fixture
def say(models: Store, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs ``queue …`` on the store; gives back what was printed."""

    def call(*words: str, code: int = 0, before: tuple[str, ...] = ()) -> str:
        capsys.readouterr()
        assert cli.main(["--store", str(models.path), *before, "queue", *words]) == code
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return told.out if code == 0 else told.err

    return call


@pytest.fixture
def document(say: Say) -> Callable[[], dict[str, Any]]:
    def call() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(say("ls", "--json"))
        return found

    return call


def line(document: dict[str, Any]) -> list[str]:
    return [item["model"].removesuffix(":latest") for item in document["items"]]


def change(store: Store, do: Callable[[Queue], Queue]) -> None:
    with fs.opened_folder(str(store.path)) as folder:
        queue.FILE.change(folder, do)


def test_an_empty_queue_explains_how_to_fill_it_and_writes_nothing(say: Say, models: Store) -> None:
    words, command = say("ls").splitlines()
    assert words == "the queue is empty; to add a model:"
    assert command.endswith(f"watch --store {models.path} queue add MODEL")
    assert say("ls", before=("-q",)) == ""
    assert not (models.path / ".ollama-watch").exists()


def test_queue_add_reports_the_place_of_each_model(say: Say) -> None:
    assert say("add", "llama3") == "1 of 1: llama3:latest: waiting\n"
    assert say("add", "a", "b", "--priority", "high") == (
        "1 of 3: a:latest: waiting\n2 of 3: b:latest: waiting\n"
    )
    assert say("add", "LLAMA3", "--priority", "20") == "1 of 3: llama3:latest: waiting\n"
    assert say("add", "quiet", before=("-q",)) == ""


def test_the_whole_life_of_a_line(say: Say, document: Callable[[], dict[str, Any]]) -> None:
    say("add", "a", "b", "c")
    say("add", "d", "--priority", "-5")
    say("move", "c", "1")
    assert line(document()) == ["c", "a", "b", "d"]
    say("rm", "a", "b")
    say("pause", "d")
    say("pause")
    found = document()
    assert (line(found), found["paused"]) == (["c", "d"], True)
    assert [item["state"] for item in found["items"]] == ["waiting", "paused"]
    say("resume")
    say("resume", "d")
    found = document()
    assert ([item["state"] for item in found["items"]], found["paused"]) == (["waiting"] * 2, False)


def test_the_document(say: Say, models: Store) -> None:
    found = json.loads(say("add", "me/it:8b", "--priority", "low", "--json"))
    (item,) = found.pop("items")
    assert set(found) == {"schema", "time", "store", "paused", "run_by", "done"}
    assert (found["schema"], found["store"]) == ("ollama-watch/queue/1", str(models.path))
    added = item.pop("added_at")
    assert added.endswith("Z")
    assert item == {
        "position": 1, "model": "me/it:8b", "priority": -10, "state": "waiting", "since": added,
        "ready_at": None, "pid": None, "tries": 0, "reasons": [], "done_by": None,
    }  # fmt: skip


@pytest.mark.parametrize("words", [("rm", "b"), ("move", "a", "2"), ("pause", "a"), ("resume",)])
def test_every_change_answers_programs_with_the_queue(say: Say, words: tuple[str, ...]) -> None:
    say("add", "a", "b")
    assert json.loads(say(*words, before=("--json",)))["schema"] == "ollama-watch/queue/1"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("add", "a b"), "no name of a model: 'a b'"),
        (("add", "x", "--priority", "urgent"), "want high, normal, low or a number"),
        (("add", "x", "--after", "25:00"), "want a time of day such as 22:00"),
        (("rm", "lama3"), "not in the queue: lama3\n  did you mean llama3:latest?"),
        (("move", "lama3", "1"), "did you mean llama3:latest?"),
        (("move", "llama3", "0"), "0 is not in the range"),
        (("pause", "llama3", "lama3"), "did you mean llama3:latest?"),
        (("resume", "\udcff"), "no name of a model: '\\xff'"),
        (("rm",), "Missing argument"),
    ],
)
def test_bad_input_is_refused_with_its_name_and_changes_nothing(
    say: Say,
    document: Callable[[], dict[str, Any]],
    words: tuple[str, ...],
    told: str,
) -> None:
    say("add", "llama3")
    before = document()["items"]
    assert told in say(*words, code=2)
    assert document()["items"] == before


def test_a_queue_belongs_to_one_store(
    models: Store, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Store(tmp_path_factory.mktemp("other") / "models")
    both = ["--store", str(models.path), "--store", str(other.path)]
    assert cli.main([*both, "queue", "add", "a"]) == 2
    assert "2 stores were given" in capsys.readouterr().err
    assert cli.main([*both, "--json", "queue", "ls"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_table_fits_80_columns_and_names_what_is_with_each(
    say: Say, models: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_700_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    parent = queue.Runner(os.getppid(), running.born(os.getppid()) or 0)
    long = "hf.co/an-organisation/A-Very-Long-Repository-Name-GGUF:Q4_K_M"

    def fill(kept: Queue) -> Queue:
        for model in ("failing", "hopeless", "running", "paused", "ready", long):
            kept = queue.add(kept, model, 0, 0.0, now - 600)
        kept = queue.add(kept, "tonight", 10, now + 3600, now)
        for reason, retry in (("no network " * 8, True), ("no such model\nas that", False)):
            kept, item = queue.take(kept, running.me(), now)
            assert item is not None
            ends = Driven(Result.FAILED, reason, retry)
            kept = queue.ended(kept, item, ends, now, 0.5)
        kept, _ = queue.take(kept, parent, now)
        kept, item = queue.take(queue.pause(kept, ["paused"], now), running.me(), now)
        assert item is not None
        return queue.ended(kept, item, Driven(Result.DONE), now, 0.5)

    change(models, fill)
    with fs.opened_folder(str(models.path)) as folder:
        for model in ("running", "failing", long):
            for state in ("starting", "pulling_manifest", "downloading"):
                records.change(folder, model, {"state": state, "total_bytes": 10**9})
            records.change(folder, model, {"bytes_per_second": 1e7})
    told = say("ls", before=("--no-color",))
    rows = [row for row in told.splitlines() if not row.startswith("-> ")]
    assert max(map(len, rows)) <= 80
    for words in ("failed 1 time, again at", "failed: no such model", f"pid {parent.pid}",
                  "waiting until", "done at", "paused", "high"):  # fmt: skip
        assert words in told
    assert "as that" not in told
    by = {item["model"]: item["done_by"] for item in json.loads(say("ls", "--json"))["items"]}
    assert by["running:latest"] == "2023-11-14T22:15:00.000Z"
    assert by["failing:latest"] == "2023-11-14T22:16:40.000Z"
    assert by[long] == "2023-11-14T22:18:20.000Z"
    assert (by["hopeless:latest"], by["paused:latest"]) == (None, None)


def test_a_long_queue_shows_its_first_items(say: Say, models: Store) -> None:
    def fill(kept: Queue) -> Queue:
        for number in range(2031):
            kept = queue.add(kept, f"m{number}", 0, 0.0, 1.0)
        return kept

    change(models, fill)
    told = say("ls").splitlines()
    assert len(told) == 34
    assert told[-1] == "and 2,001 more; show all: -v"


def test_the_list_names_what_runs_the_queue(
    say: Say, models: Store, document: Callable[[], dict[str, Any]]
) -> None:
    say("add", "a")
    words, command, *_ = say("ls").splitlines()
    assert words == "1 queued; nothing runs it; set queue = true for the daemon, or run it"
    assert command.endswith(f"ollama-watch --store {models.path} queue run")
    told = []

    def drive(*_: object) -> Driven:
        told.append((say("ls"), document()["run_by"]))
        return Driven(Result.DONE)

    queueing.run(Context(rules().settings, stores=(str(models.path),)), drive)
    ((shown, by),) = told
    assert shown.startswith(f"1 queued; run by ollama-watch queue run (pid {os.getpid()})\n")
    assert by == {"pid": os.getpid(), "daemon": False}
    assert document()["run_by"] is None


def test_queue_ls_shows_the_model_of_a_dead_runner_as_waiting(
    say: Say, models: Store, document: Callable[[], dict[str, Any]]
) -> None:
    say("add", "a")
    change(models, lambda kept: queue.take(kept, queue.Runner(1 << 22, 1), 1.0)[0])
    before = (models.path / ".ollama-watch" / "queue.json").read_bytes()
    assert document()["items"][0]["state"] == "waiting"
    assert (models.path / ".ollama-watch" / "queue.json").read_bytes() == before


@pytest.mark.parametrize(
    ("driven", "code", "told"),
    [
        (Driven(Result.DONE), Exit.HEALTHY, "a:latest: done at"),
        (Driven(Result.FAILED, "no such model", retry=False), Exit.FAILED, "failed: no such model"),
    ],
)
def test_run_reports_how_each_ended(
    say: Say,
    models: Store,
    capsys: pytest.CaptureFixture[str],
    driven: Driven,
    code: Exit,
    told: str,
) -> None:
    say("add", "a")
    context = Context(rules().settings, stores=(str(models.path),))
    assert queueing.run(context, lambda *_: driven) is code
    assert told in capsys.readouterr().err


def test_a_paused_queue_runs_nothing_and_reports_it(
    say: Say, models: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    say("add", "a")
    say("pause")
    context = Context(rules().settings, stores=(str(models.path),))
    assert queueing.run(context, lambda *_: pytest.fail("driven")) is Exit.HEALTHY
    resume = f"ollama-watch --store {models.path} queue resume\n"
    assert resume in capsys.readouterr().err
    assert resume in say("ls")


@pytest.mark.skipif(IS_ROOT, reason="root may write everywhere")
def test_a_store_that_can_not_be_written_is_reported(models: Store, say: Say) -> None:
    models.path.chmod(0o555)
    try:
        told = say("add", "a", code=4)
    finally:
        models.path.chmod(0o755)
    assert "queue.json can't be written: Permission denied" in told
    assert "run it as root" in told


def test_no_rights_are_given_to_what_is_not_there(
    models: Store, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a share that gives what is made to another user."""

    def refused(*_: object, **__: object) -> bool:
        raise PermissionError(errno.EACCES, "the blobs belong to user id 1")

    monkeypatch.setattr(fs, "ensure_folder", refused)
    told = say("add", "a", code=4)
    assert "queue.json can't be written: the blobs belong to user id 1" in told
    assert "chmod" not in told


def test_a_damaged_queue_is_reported_and_set_aside(
    models: Store, say: Say, capsys: pytest.CaptureFixture[str]
) -> None:
    say("add", "a")
    (models.path / ".ollama-watch" / "queue.json").write_text("{")
    assert cli.main(["--store", str(models.path), "queue", "add", "b"]) == 0
    assert "queue.json is damaged" in capsys.readouterr().err
    assert "1 of 1: b:latest" in say("add", "b")


def test_the_command_line_as_a_process(models: Store, run: Run) -> None:
    store = ("--store", str(models.path))
    assert run(*store, "queue", "add", "llama3", "--after", "22:00").returncode == 0
    done = run(*store, "queue", "ls")
    assert done.returncode == 0
    assert b"llama3:latest" in done.stdout
    assert run(*store, "queue", "rm", "x").returncode == 2

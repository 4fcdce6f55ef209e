"""Many downloads go through an act together: each stands for itself, and stop is asked between."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import (
    POLICY,
    HealthyStore,
    command,
    content,
    environment,
    holding,
    host,
    ollama_process,
    private_proc,
)
from tests.support.runs import one_run, rules
from tests.support.servers import wait_until
from watcher import reconcile
from watcher.act import apply
from watcher.commands import prepare
from watcher.commands.context import Context
from watcher.decide import plan
from watcher.errors import EndedError
from watcher.model import RefusalKind, Result, Rules
from watcher.observe import evidence, processes
from watcher.state import fs, memory
from watcher.state.event_log import Event

REPAIR = rules(repair=True, repair_stale=True, writers_visible=True)
MANY = apply.FIRST_DOWNLOADS + 20


@pytest.fixture
def store(tmp_path: Path) -> HealthyStore:
    return HealthyStore(tmp_path / "models")


def broken(store: HealthyStore, count: int) -> list[str]:
    """Downloads with a sidecar missing."""
    made = [store.download(f"broken {number}", aged=7200) for number in range(count)]
    for digest in made:
        store.partial(digest, 2).unlink()
    return made


def is_new(path: Path) -> bool:
    return path.stat().st_mtime > time.time() - 3600


def guards(store: HealthyStore) -> list[str]:
    return [path.name for path in store.blobs.iterdir() if not path.stat().st_size]


def test_many_repairs_share_one_wait_and_few_looks(
    store: HealthyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(store.path))
    monkeypatch.setattr(reconcile, "_FRESH_SECONDS", 600.0)
    digests = broken(store, MANY)
    waits: list[int] = []
    looks: list[int] = []
    plans: list[int] = []
    real, make = processes.holders_of, plan.make

    def counted(*words: Any) -> Any:
        looks.append(len(list(words[1])))
        return real(*words)

    def planned(*words: Any) -> Any:
        plans.append(len(waits))
        return make(*words)

    def sleep(seconds: float) -> None:
        waits.append(len(guards(store)))
        assert seconds >= 2

    monkeypatch.setattr(processes, "holders_of", counted)
    monkeypatch.setattr(plan, "make", planned)
    with ollama_process(tmp_path, "serve") as pid:
        here = host(
            store,
            private_proc(tmp_path / "proc", pid),
            sleep=sleep,
            version=lambda _: "0.33.0",
        )
        report = one_run(here, REPAIR)
    assert [each.result for each in report.outcomes] == [Result.DONE] * MANY
    assert waits == [apply.FIRST_DOWNLOADS, MANY - apply.FIRST_DOWNLOADS]
    assert looks == [3 * waits[0]] * 2 + [3 * waits[1]] * 2
    assert 1 not in plans  # the second batch goes by the plan of the first
    assert guards(store) == []
    assert {digest for digest in digests if store.partial(digest, 0).exists()} == set(digests)


def test_one_opened_or_changed_download_keeps_no_other_from_being_repaired(
    store: HealthyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(store.path))
    opened, changed, *others = broken(store, 6)
    before = {digest: download(store, digest) for digest in (opened, changed)}
    taken: list[Any] = []

    def sleep(_: float) -> None:
        taken.append(holding(store.partial(opened), "r+b"))
        private_proc(tmp_path / "proc", taken[0].__enter__())
        with store.partial(changed).open("ab") as data:
            data.write(b"x")

    with ollama_process(tmp_path, "serve") as pid:
        shown = private_proc(tmp_path / "proc", pid)
        here = host(store, shown, sleep=sleep, version=lambda _: "0.33.0")
        try:
            report = one_run(here, REPAIR)
        finally:
            taken[0].__exit__(None, None, None)
    ended = {each.action.subject: each for each in report.outcomes}
    assert [ended[digest].result for digest in others] == [Result.DONE] * 4
    refusals = [ended[digest].refusal for digest in (opened, changed)]
    assert [each.kind for each in refusals if each] == [RefusalKind.HELD, RefusalKind.CHANGED]
    assert download(store, opened) == before[opened]
    assert download(store, changed)[1:] == before[changed][1:]
    assert store.leftovers() == []


def download(store: HealthyStore, digest: str) -> list[tuple[str, int, bytes]]:
    """A download's files, the data first, with inode and content."""
    return [
        (name, (store.blobs / name).stat().st_ino, (store.blobs / name).read_bytes())
        for name in store.partials(digest)
    ]


def stop_after(calls: int) -> Callable[[], bool]:
    left = [calls]

    def stop() -> bool:
        left[0] -= 1
        return left[0] < 0

    return stop


@pytest.mark.parametrize("policy", [REPAIR, POLICY], ids=["repair", "clean"])
@pytest.mark.parametrize("calls", [0, 1, 2, 4, 7, 8, 9])
def test_stopped_between_two_of_them_each_is_done_or_as_it_was(
    calls: int, policy: Rules, store: HealthyStore, tmp_path: Path
) -> None:
    digests = broken(store, 6) if policy is REPAIR else [store.download(f"{n}") for n in range(6)]
    before = {digest: download(store, digest) for digest in digests}
    here = host(store, private_proc(tmp_path / "proc"))
    one_run(here, policy, approve=reconcile.approve_none)
    partitions = remembered(store)
    report = one_run(here, policy, stop=stop_after(calls))
    done = {each.action.subject for each in report.outcomes if each.result is Result.DONE}
    assert len(done) < 6 or calls > 6
    for digest in set(digests) - done:
        assert download(store, digest) == before[digest]
        assert remembered(store)[digest] == partitions[digest]
    kinds = {each.refusal.kind for each in report.outcomes if each.refusal}
    assert kinds <= {RefusalKind.STOPPED}
    assert store.leftovers() == []
    again = one_run(here, policy)
    assert {each.result for each in again.outcomes} <= {Result.DONE}
    assert guards(store) == []


def test_prepare_begins_after_two_whole_looks(
    store: HealthyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests, came = broken(store, 3), []
    here, look, begin = host(store, private_proc(tmp_path / "proc")), evidence.observe, fs.move

    def observe(*words: Any) -> Any:
        came.extend(["look"] * (words[3] is None))
        return look(*words)

    def move(*words: Any, **more: Any) -> None:
        came.extend(["act"] * (words[0] == "guard"))
        begin(*words, **more)

    monkeypatch.setattr(evidence, "observe", observe)
    monkeypatch.setattr(fs, "move", move)
    monkeypatch.setattr(fs, "replace", move)
    monkeypatch.setattr(Context, "hosts", lambda *_, **__: [here])
    settings = rules(writers_visible=True).settings
    prepare.prepare.callback(Context(settings, stores=(str(store.path),)))
    assert came[: came.index("act")] == ["look", "look"]
    assert all(is_new(store.partial(each, 0)) for each in digests)
    assert len(remembered(store)) == 3


def test_a_stop_during_the_wait_puts_the_whole_batch_back(
    store: HealthyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(store.path))
    digests = broken(store, 5)
    before = {digest: download(store, digest) for digest in digests}
    waits: list[float] = []
    with ollama_process(tmp_path, "serve") as pid:
        shown = private_proc(tmp_path / "proc", pid)
        here = host(store, shown, sleep=waits.append, version=lambda _: "0.33.0")
        report = one_run(here, REPAIR, stop=lambda: bool(waits))
    assert len(waits) == 1
    assert [each.refusal.kind for each in report.outcomes if each.refusal] == (
        [RefusalKind.STOPPED] * 5
    )
    assert {digest: download(store, digest) for digest in digests} == before
    assert store.leftovers() == []


def remembered(store: HealthyStore) -> dict[str, object]:
    """The parts that are remembered of each download."""
    with fs.opened_folder(str(store.path)) as fd:
        return {
            digest: (record.partition, record.mended)
            for digest, record in memory.load(fd).downloads.items()
        }


OTHER_END = pytest.mark.slow("the other way to end a command or a daemon is tried of each")


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (["repair", "--yes", "--offline"], signal.SIGINT),
        pytest.param(["repair", "--yes", "--offline"], signal.SIGTERM, marks=OTHER_END),
        (["repair", "--yes", "--offline"], signal.SIGHUP),  # its terminal is closed
        pytest.param(["daemon"], signal.SIGINT, marks=OTHER_END),
        (["daemon"], signal.SIGTERM),
    ],
)
def test_a_signal_ends_it_between_two_acts_with_everything_in_order(
    words: list[str], number: signal.Signals, store: HealthyStore
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as by nohup")
    digests = broken(store, 300)
    process = subprocess.Popen(
        command(store.path, *words),
        env=environment(store.path, {"OLLAMA_WATCH_REPAIR": "true"}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: any(is_new(store.partial(each, 1)) for each in digests), "the first")
        process.send_signal(number)
        process.wait(120)
    finally:
        process.kill()
        process.wait()
    usual = 130 if number == signal.SIGINT else -number
    assert process.returncode == (0 if words == ["daemon"] else usual)
    assert guards(store) == []
    assert list((store.ours / "intents").iterdir()) == []


class Ends:
    """Asked to end from the question of that number on."""

    def __init__(self, after: int) -> None:
        self.after, self.asked = after, 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.came()

    def came(self) -> bool:
        """Whether the end has been asked for."""
        return self.asked > self.after


def test_a_stop_during_any_scan_leaves_everything_in_order(
    store: HealthyStore, tmp_path: Path
) -> None:
    ended, after = 0, 0
    proc = private_proc(tmp_path / "proc")
    while ended == after:
        digests = broken(store, 4)
        ends = Ends(after)
        with contextlib.suppress(EndedError):
            one_run(host(store, proc, ends=ends), REPAIR, stop=ends.came)
        ended += ends.asked > after
        after += 1
        assert guards(store) == [], after
        assert store.leftovers() == []
        one_run(host(store, proc), REPAIR)
        assert all(is_new(store.partial(each, 0)) for each in digests)
    assert ended > 10  # before, during and after the acts


def test_a_wrong_hash_is_reported_even_if_the_scan_after_it_is_given_up(
    store: HealthyStore, tmp_path: Path
) -> None:
    digest = store.text_blob("good")
    store.manifest_of("llama3", digest)
    (store.blobs / f"sha256-{digest}").write_bytes(b"evil")
    told: list[Event] = []
    here = host(
        store,
        private_proc(tmp_path / "proc"),
        ends=(store.ours / memory.NAME).exists,  # once the hash is remembered
        report=told.append,
    )
    with pytest.raises(EndedError):
        one_run(here, rules(hash=True, verify=True))
    assert {each.event_type for each in told} == {"blob_corrupt"}
    assert f"sha256:{digest}" in {each.details["digest"] for each in told}


def test_a_batch_that_is_interrupted_by_an_error_of_ours_is_put_back(
    store: HealthyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(store, 4)
    before = content(store.blobs)
    monkeypatch.setattr(processes, "holders_of", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        one_run(host(store, private_proc(tmp_path / "proc")), REPAIR)
    assert {name: each[2:] for name, each in content(store.blobs).items()} == {
        name: each[2:] for name, each in before.items()
    }
    assert store.leftovers() == []
    assert os.listdir(store.ours / "intents") == []

"""A server that begins something in the middle of a repair: at worst one EOF, then all is right."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.support.driving import is_right, private_proc
from tests.support.runs import one_run, rules
from tests.support.servers import Server, collapsed, wait_until
from watcher.act import transaction
from watcher.demo.registry import Layer, Model, Registry
from watcher.model import RefusalKind, Result
from watcher.observe.host import Host
from watcher.reconcile import Report
from watcher.state import fs

from .scenes import MIB, SIZE, STATES, Download, seed_of

POLICY = rules(repair=True, repair_stale=True, writers_visible=True)


@pytest.fixture
def model(registry: Registry, tmp_path: Path) -> Model:
    return registry.add_model("demo", "1b", [Layer(SIZE, seed=seed_of(tmp_path))], extras=False)


@pytest.fixture
def server(server: Server) -> Server:
    """The server, answering."""
    return server.start().wait_ready()


@pytest.fixture
def it(server: Server, registry: Registry, model: Model) -> Download:
    """A killed download, quiet for long."""
    made = Download(server.store, model, registry.content(model.digests[0]))
    STATES["killed"](made)
    return made


def repair(server: Server, **more: object) -> Report:
    """A cycle that sees of the machine's processes the server alone."""
    proc = private_proc(server.store.with_name("proc"), server.pid)
    given: dict[str, object] = {"sleep": lambda _: None, **more}
    return one_run(Host(str(server.store), proc=proc, **given), POLICY)  # type: ignore[arg-type]


def ends_right(server: Server, it: Download, registry: Registry) -> None:
    """A pull brings what was missing, and no more."""
    parts = len(it.texts())
    assert collapsed(server.pull(it.model.name))[-1] == "success"
    assert is_right(it.store, it.digest)
    assert registry.bytes_served(it.digest) <= it.missing + 1.1 * MIB * parts


def test_a_pull_under_the_guard_fails_once(
    it: Download, server: Server, registry: Registry
) -> None:
    told: list[str] = []

    def sleep(seconds: float) -> None:
        assert seconds >= 2
        told.extend(collapsed(server.pull(it.model.name)))

    report = repair(server, sleep=sleep)
    assert told[-1] == "error: EOF"
    assert [each.result for each in report.outcomes] == [Result.DONE]
    ends_right(server, it, registry)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_pull_between_the_renames_fails_once(
    at: int, it: Download, server: Server, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    put_new, replace, calls = transaction._put_new, fs.replace, [0]

    def counted(*words: object) -> None:
        if calls[0] == at:
            told.extend(collapsed(server.pull(it.model.name)))
        calls[0] += 1
        replace(*words)  # type: ignore[arg-type]

    def hooked(*words: object) -> None:
        monkeypatch.setattr(fs, "replace", counted)
        put_new(*words)  # type: ignore[arg-type]
        monkeypatch.setattr(fs, "replace", replace)

    monkeypatch.setattr(transaction, "_put_new", hooked)
    report = repair(server)
    assert calls[0] > at
    assert told[-1] == "error: EOF"
    assert [each.result for each in report.outcomes] == [Result.DONE]
    ends_right(server, it, registry)


def test_a_pull_that_begins_before_the_guard_keeps_its_download(
    it: Download, server: Server, registry: Registry
) -> None:
    registry.hold(it.digest, after=0)
    pulls = []
    before = it.texts()

    def pull_first(event: object) -> None:
        if getattr(event, "event_type", "") == "act_started":
            pulls.append(server.start_pull(it.model.name))
            registry.wait_held(it.digest, 1)

    report = repair(server, report=pull_first)
    assert [each.result for each in report.outcomes] == [Result.REFUSED]
    assert it.texts() == before
    registry.release()
    assert collapsed(pulls[0].result())[-1] == "success"
    assert is_right(it.store, it.digest)


def test_repair_leaves_a_download_that_is_opened_between_scan_and_action(
    it: Download, server: Server
) -> None:
    server.stop()
    inodes = {path.name: path.stat().st_ino for path in it.data.parent.iterdir()}
    before, holders = it.texts(), []

    def open_it(event: object) -> None:
        if getattr(event, "event_type", "") == "act_started":
            holders.append(_writer(it.data))

    try:
        report = one_run(Host(str(it.store), report=open_it), POLICY)
    finally:
        for pid in holders:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert [each.refusal.kind for each in report.outcomes if each.refusal] == [RefusalKind.HELD]
    assert it.texts() == before
    assert {path.name: path.stat().st_ino for path in it.data.parent.iterdir()} == inodes


def _writer(path: Path) -> int:
    """A child that has a file open for writing."""
    fd = os.open(path, os.O_WRONLY)
    dup = [(os.POSIX_SPAWN_DUP2, fd, 9)]
    pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], {}, file_actions=dup)
    os.close(fd)
    return pid


def stopped_in_the_middle(it: Download) -> int:
    """A repair in a child, stopped just after its guard is in place; the child's pid."""
    pid = os.fork()
    if pid == 0:
        try:
            here = Host(
                str(it.store),
                proc=private_proc(it.store.with_name("proc")),
                sleep=lambda _: None,
            )
            real = transaction._check_unchanged

            def stop(*words: object) -> None:
                os.kill(os.getpid(), signal.SIGSTOP)
                real(*words)  # type: ignore[arg-type]

            transaction._check_unchanged = stop  # type: ignore[assignment]
            one_run(here, POLICY)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return pid


def test_a_server_starts_while_a_repair_is_stopped_in_the_middle(
    it: Download, server: Server, registry: Registry
) -> None:
    server.stop()
    pid = stopped_in_the_middle(it)
    try:
        assert it.part(0).read_bytes() == b""
        server.start().wait_ready()
        assert collapsed(server.pull(it.model.name))[-1] == "error: EOF"
    finally:
        os.kill(pid, signal.SIGCONT)
        os.waitpid(pid, 0)
    ends_right(server, it, registry)


def test_an_interrupted_repair_is_not_recovered_while_a_server_starts(
    it: Download, server: Server, registry: Registry
) -> None:
    """A name that goes from blobs/ in the middle of a start stops the server."""
    server.stop()
    for number in range(3):
        it.part(number).unlink()
    pid = stopped_in_the_middle(it)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    before = sorted(path.name for path in it.data.parent.iterdir())
    assert it.part(0).exists()
    server.start()
    name = Path(f"/proc/{server.pid}/comm")
    wait_until(lambda: name.read_text().strip() == "ollama", "its name")
    os.kill(server.pid, signal.SIGSTOP)
    try:
        repair(server, version=lambda _: None)
        after = sorted(path.name for path in it.data.parent.iterdir())
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert after == before


def test_starts_and_repairs_at_the_same_time_harm_neither(
    it: Download, server: Server, registry: Registry
) -> None:
    """Repairs over and over, while the server is started and pulls."""
    server.stop()
    over = threading.Event()

    def repair_on() -> None:
        while not over.is_set():
            one_run(Host(str(it.store)), POLICY)
            time.sleep(0.01)

    thread = threading.Thread(target=repair_on)
    thread.start()
    try:
        server.start().wait_ready()
        told = collapsed(server.pull(it.model.name))
        until = time.monotonic() + 120
        # A pull that is asked for again at once may meet the guard of the same repair.
        while told[-1] == "error: EOF" and time.monotonic() < until:
            told = collapsed(server.pull(it.model.name))
    finally:
        over.set()
        thread.join(120)
    assert told[-1] == "success"
    assert is_right(it.store, it.digest)

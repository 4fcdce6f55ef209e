"""Damaged and missing blobs: what is wrong is fetched, and a right file takes their place."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.filesize import decimal

from tests.support.driving import Daemon, audit, command, environment, run
from tests.support.notation import age
from tests.support.servers import sidecar
from watcher.config import Settings
from watcher.decide import modes
from watcher.demo.registry import Fault, Layer, Manners, Registry
from watcher.errors import ChangedError
from watcher.model import (
    HOUR,
    MIB,
    Action,
    ActionKind,
    Entry,
    Outcome,
    Ranges,
    RefusalKind,
    Result,
)
from watcher.observe.host import Host
from watcher.reconcile import Reconciler, Report
from watcher.service.scrub import Scrub
from watcher.state import fs, sums
from watcher.transfer.mending import Mender
from watcher.transfer.questions import asking

from .driven import SECONDS, Here, wait_for

CHUNK = 4 * MIB
SIZE = sums.FROM + CHUNK
FETCH = "repair", "--yes", "--fetch"


@pytest.fixture
def here(tmp_path: Path, registry: Registry) -> Here:
    """A store that has the whole model."""
    found = Here(tmp_path / "models", registry, SIZE)
    for digest in (*found.model.digests, found.model.config):
        content = registry.content(digest)
        blob = found.path / "blobs" / digest.replace(":", "-")
        blob.write_bytes(content.read(0, content.size))
    found.manifest.parent.mkdir(parents=True)
    found.manifest.write_bytes(found.model.manifest)
    registry.manners = Manners(sums="complete", chunk=CHUNK)
    return found


def flip(here: Here, *places: int) -> None:
    with here.blob.open("r+b") as file:
        for at in places:
            (byte,) = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte ^ 1]), at)


def verify(here: Here) -> None:
    assert run(here.path, "verify").returncode in (0, 1)


def document(here: Here, *words: str, code: int = 0, **env: str) -> dict[str, Any]:
    done = run(here.path, "--json", *words, env=env)
    assert done.returncode == code, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


def kept(here: Here) -> list[Path]:
    return sorted((here.path / ".ollama-watch" / "quarantine").glob("*"))


def check_right(here: Here) -> None:
    here.check()
    done = run(here.path, "verify")
    assert "0 read" in done.stdout or done.returncode == 0, done.stdout
    assert not audit(here.path)["findings"]


@pytest.fixture
def rotten(here: Here, monkeypatch: pytest.MonkeyPatch) -> Ranges:
    """Three sectors of the layer that the disk can't give back: the range of their bytes."""
    meant, low = here.blob.stat(), 5 * CHUNK + 4096
    high = low + 3 * 4096
    preadv, pread, copy = os.preadv, os.pread, os.copy_file_range

    def most(fd: int, at: int, count: int) -> int:
        """So much can be read from there on, as a kernel does it."""
        if not os.path.samestat(os.fstat(fd), meant) or at >= high or at + count <= low:
            return count
        if at >= low:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return low - at

    def failing_preadv(fd: int, buffers: list[memoryview], at: int) -> int:
        return preadv(fd, [buffers[0][: most(fd, at, len(buffers[0]))]], at)

    def failing_pread(fd: int, count: int, at: int) -> bytes:
        return pread(fd, most(fd, at, count), at)

    def failing_copy(source: int, fd: int, count: int, at: int, to: int) -> int:
        return copy(source, fd, most(source, at, count), at, to)

    monkeypatch.setattr(os, "preadv", failing_preadv)
    monkeypatch.setattr(os, "pread", failing_pread)
    monkeypatch.setattr(os, "copy_file_range", failing_copy)
    return ((low, high),)


def repaired(
    here: Here, meanwhile: Callable[[], None] = lambda: None, has_asked: bool = False, **more: Any
) -> Report:
    """What a repair that fetches comes to in this process; `meanwhile`: once it has fetched."""
    until, settings = time.monotonic() + SECONDS, Settings(writers_visible=True, **more)
    host = asking(Host(str(here.path), stops=lambda: time.monotonic() > until))
    mender = Mender(host, settings, has_asked=has_asked)

    def fetch(action: Action) -> tuple[Entry, int]:
        found = mender.fetch(action)
        meanwhile()
        return found

    host = replace(host, fetch=fetch, sums=mender.sums)
    return Reconciler(host, settings).reconcile(modes.REPAIR._replace(fetch=True))


@pytest.mark.parametrize("has_sums", [True, False])
def test_what_the_disk_can_not_give_back_costs_its_chunk_or_itself(
    here: Here, rotten: Ranges, has_sums: bool
) -> None:
    if not has_sums:
        here.registry.manners = Manners()
    report = Reconciler(Host(str(here.path)), Settings()).reconcile(modes.VERIFY)
    (finding,) = report.diagnosis.findings
    assert finding.wrong == rotten
    (*_, done) = repaired(here).outcomes
    assert (done.action.kind, done.result) == (ActionKind.FETCH_CHUNKS, Result.DONE)
    assert done.action.fetches == 3 * 4096
    assert here.served <= done.action.fetches + 1
    check_right(here)


def test_a_flipped_byte_costs_its_chunk(here: Here) -> None:
    flip(here, 5 * CHUNK + 7)
    damaged = here.blob.read_bytes()
    verify(here)
    told = document(here, *FETCH)
    assert here.served <= CHUNK + 1
    done = [each for each in told["outcomes"] if each["verb"] == "fetch_chunks"]
    assert [each["result"] for each in done] == ["done"]
    (aside,) = kept(here)
    assert aside.read_bytes() == damaged
    check_right(here)


def test_behind_a_symlink_it_costs_its_chunk_as_well(here: Here, tmp_path: Path) -> None:
    """The right chunks are copied from where it leads, and the symlink goes to quarantine."""
    here.blob.rename(tmp_path / "elsewhere")
    here.blob.symlink_to(tmp_path / "elsewhere")
    flip(here, 5 * CHUNK + 7)
    verify(here)
    document(here, *FETCH)
    assert here.served == CHUNK + 1
    assert kept(here)[0].is_symlink()
    check_right(here)


def test_the_plan_names_the_bytes_and_changes_nothing(here: Here) -> None:
    verify(here)
    flip(here, 3, SIZE - 1)
    verify(here)
    before = here.blob.stat()
    asked = len(here.registry.asked)
    (action,) = [
        each
        for each in document(here, "repair", "-n", code=1)["plan"]["actions"]
        if each["verb"] == "fetch_chunks"
    ]
    assert (action["fetches_bytes"], action["needs_bytes"]) == (sums.CHUNK + CHUNK, SIZE)
    words = " ".join(run(here.path, "repair", "-n").stdout.split())
    assert "fetches at most 21.0 MB, needs 71.3 MB of the disk" in words
    assert (here.blob.stat(), len(here.registry.asked)) == (before, asked)
    actions = document(here, "repair", "-n", "--offline", code=3)["plan"]["actions"]
    assert "fetch_chunks" not in {each["verb"] for each in actions}


@pytest.mark.parametrize("words", [("repair", "--yes"), ("pull", "--insecure", "MODEL")])
def test_without_a_word_for_it_no_byte_is_fetched(here: Here, words: tuple[str, ...]) -> None:
    """The damaged blob goes to quarantine, and its right chunks are copied from there."""
    flip(here, 3)
    verify(here)
    for _ in ("it is damaged", "it is missing"):
        done = run(here.path, "repair", "--yes")
        assert done.returncode == 1, "its model has no such layer"
        assert "repair --fetch" in " ".join(done.stdout.split())
        assert here.served == 0
    words = tuple(here.model.name if each == "MODEL" else each for each in words)
    said = {"OLLAMA_WATCH_FETCH": "true", "OLLAMA_HOST": "127.0.0.1:1"}
    done = run(here.path, *words, env=said)
    assert done.returncode == 0, done.stdout + done.stderr
    assert here.served <= CHUNK + 1
    check_right(here)


def answered(here: Here, answers: bytes) -> str:
    """What `repair` prints on a terminal on which somebody answers."""
    ours, theirs = os.openpty()
    with subprocess.Popen(
        command(here.path, "repair"),
        env=environment(here.path),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ):
        os.close(theirs)
        os.write(ours, answers)
        printed = b""
        with contextlib.suppress(OSError):  # EIO: nobody has it open any more
            while more := os.read(ours, 4096):
                printed += more
    os.close(ours)
    return printed.decode()


def test_a_prompt_names_the_bytes(here: Here) -> None:
    flip(here, 3)
    verify(here)
    question = f"fetch at most {decimal(CHUNK)} ({decimal(2 * CHUNK)} if some arrive damaged)?"
    assert f"Do it, and {question}" in answered(here, b"n\n")
    assert here.served == 0
    assert answered(here, b"y\n").count("Do it") == 1
    check_right(here)


def stopped(report: Report) -> Outcome:
    """What came of a repair that would have fetched more than was agreed to."""
    (*_, failed) = report.outcomes
    assert failed.result is Result.FAILED
    assert "more than was agreed to" in failed.message
    assert "repair --fetch sha256-" in failed.command
    return failed


def test_sums_that_lie_cost_no_more_than_was_agreed_to(here: Here) -> None:
    """All that was copied by them is wrong, and would be fetched."""
    here.registry.manners = Manners()
    verify(here)
    before = (here.path / ".ollama-watch/sums" / here.digest).read_bytes()
    flip(here, 3, SIZE // 2)
    first = sums.Whole(with_sums=True)
    with here.blob.open("rb") as file:
        sums.add(first, file.fileno(), 0, sums.CHUNK)
    lie = first.sums() + before.partition(b"\n")[2]
    (here.path / ".ollama-watch/sums" / here.digest).write_bytes(lie)
    verify(here)
    stopped(repaired(here, has_asked=True))
    assert here.served == sums.CHUNK + 1
    damaged = here.blob.read_bytes()
    (*_, done) = repaired(here, has_asked=True).outcomes
    assert done.result is Result.DONE
    assert done.message.startswith("The blob of")
    assert f"is right, {decimal(done.action.fetches)} fetched" in done.message
    assert here.served == sums.CHUNK + SIZE + 2
    assert kept(here)[0].read_bytes() == damaged
    check_right(here)


def test_a_mirror_that_lies_costs_no_more_than_was_agreed_to(here: Here) -> None:
    here.registry.manners = Manners()
    here.blob.unlink()
    with Registry() as mirror:
        mirror.manners = Manners(plain=True)
        mirror.add_model("demo", "1b", [Layer(SIZE)], extras=False)
        mirror.add_fault(Fault("flip", begin=1, after=1000))
        failed = stopped(repaired(here, has_asked=True, mirrors=(mirror.url,)))
        assert mirror.url in failed.message, "who has sent them"
        assert here.served == 0
    # What was printed, by a command of its own, which finds no mirror in the settings.
    words = shlex.split(failed.command)
    assert run(here.path, *words[words.index("repair") :], "--yes").returncode == 0
    assert here.served == SIZE + 1
    check_right(here)


@pytest.mark.parametrize(("has_asked", "times"), [(True, 1), (True, 3), (False, 3)])
def test_a_chunk_that_arrives_damaged_is_fetched_again(
    here: Here, has_asked: bool, times: int
) -> None:
    """Once, if somebody was asked, and as often as it takes, if not."""
    low = 5 * CHUNK
    flip(here, low + 7)
    verify(here)
    here.registry.add_fault(Fault("flip", begin=low, end=low + 1, after=5, every=1, times=times))
    if has_asked and times > 1:
        stopped(repaired(here, has_asked=True))
        assert here.served == 2 * CHUNK + 1
        return
    (*_, done) = repaired(here, has_asked=has_asked).outcomes
    assert done.result is Result.DONE
    assert here.served == (times + 1) * CHUNK + 1
    assert done.action.fetches == here.served - 1
    check_right(here)


@pytest.mark.parametrize(
    ("answer", "fetches", "repairs"),
    [
        ("w", 0, 1),
        pytest.param("n", 0, 0, marks=pytest.mark.slow("as where nothing else is to be done")),
        pytest.param("y", 1, 1, marks=pytest.mark.slow("as where nothing else is to be done")),
    ],
)
def test_what_is_fetched_can_be_declined_by_itself(
    here: Here, answer: str, fetches: int, repairs: int
) -> None:
    """Beside it, a download needs repair. The blob is hashed before anybody is asked."""
    os.truncate(here.blob, SIZE - 5)
    digest = "ab" * 32
    data = here.path / "blobs" / f"sha256-{digest}-partial"
    data.write_bytes(b"x" * 5 * MIB)
    progress = data.with_name(f"{data.name}-0")
    progress.write_text(sidecar(0, 0, 5 * MIB, 0))
    for path in (data, progress):
        age(path, HOUR)
    printed = answered(here, f"{answer}\n".encode())
    question = "fetch at most 5 bytes (10 bytes if some arrive damaged)? [y/N, or w: "
    assert printed.count(question) == printed.count("Do it") == 1
    assert (here.served > 0) == fetches
    assert (progress.read_text() != sidecar(0, 0, 5 * MIB, 0)) == repairs
    assert (here.blob.stat().st_size == SIZE) == fetches


@pytest.mark.parametrize("damage", ["wrong", "missing"])
def test_a_daemon_fetches_where_the_settings_say_so(here: Here, damage: str) -> None:
    """What is wrong as what is too long, too short, and missing."""
    config = here.path / "blobs" / here.model.config.replace(":", "-")
    if damage == "wrong":
        flip(here, 3)
        verify(here)
        _long(config)
    else:
        os.truncate(here.blob, SIZE - 5)
        config.unlink()
    said = {"OLLAMA_WATCH_REPAIR": "true", "OLLAMA_WATCH_FETCH": "true"}
    with Daemon(here.path, said):
        aside = 2 if damage == "wrong" else 1
        wait_for(lambda: len(kept(here)) == aside and config.exists() and not here.folder.exists())
    assert here.served <= CHUNK + 1
    check_right(here)


def test_a_daemon_fetches_at_the_rate_of_the_settings_as_they_are_by_now(here: Here) -> None:
    here.blob.unlink()
    complaints: list[str] = []
    scrub = Scrub(asking(Host(str(here.path))), complaints.append)
    slow = Settings(writers_visible=True, fetch=True, rate=100_000)
    with contextlib.ExitStack() as running:
        running.callback(scrub.stop)
        scrub.want(frozenset({here.digest}), slow)
        wait_for(lambda: here.served > 1)
        scrub.want(frozenset({here.digest}), replace(slow, rate=0))
        wait_for(lambda: here.blob.exists() and not here.folder.exists())
    assert not complaints
    check_right(here)


def test_a_daemon_fetches_nothing_where_they_do_not(here: Here) -> None:
    here.blob.unlink()
    with Daemon(here.path, {"OLLAMA_WATCH_REPAIR": "true"}) as daemon:
        daemon.wait_event("store_problem")
        daemon.wait_idle()
    assert (here.served, here.blob.exists()) == (0, False)


def test_a_missing_blob_that_its_registry_lacks_is_refused_with_the_reason(here: Here) -> None:
    here.blob.unlink()
    here.registry.add_fault(Fault("page", on="head", digest=f"sha256:{here.digest}", status=404))
    (refused,) = document(here, *FETCH, code=3)["plan"]["refusals"]
    assert (refused["verb"], refused["kind"]) == ("fetch_chunks", "registry")
    assert "does not have it" in refused["why"]
    assert refused["remedy"]


def test_by_sums_of_ours_a_flipped_byte_costs_a_chunk_of_ours(here: Here) -> None:
    here.registry.manners = Manners()
    verify(here)
    flip(here, SIZE // 2)
    verify(here)
    document(here, *FETCH)
    assert here.served == sums.CHUNK + 1
    check_right(here)


def test_no_more_is_fetched_than_was_said_whatever_chunks_the_registry_has(here: Here) -> None:
    """They are larger than those of ours, by which the plan names the bytes."""
    here.registry.manners = Manners()
    verify(here)
    flip(here, SIZE // 2)
    verify(here)
    here.registry.manners = Manners(sums="complete", chunk=2 * sums.CHUNK)
    (*_, done) = document(here, *FETCH)["outcomes"]
    assert (done["verb"], done["result"]) == ("fetch_chunks", "done")
    assert here.served == sums.CHUNK + 1
    check_right(here)


def test_without_sums_a_damaged_layer_is_fetched_once_and_nothing_copied(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is copied of it before: all of that would be doubted, and fetched after all."""
    here.registry.manners = Manners()
    flip(here, 3)
    verify(here)
    copied: list[object] = []
    monkeypatch.setattr(fs, "copy", lambda *words: copied.append(words))
    (*_, done) = repaired(here).outcomes
    assert (done.result, copied) == (Result.DONE, [])
    assert here.served == SIZE + 1
    check_right(here)


@pytest.mark.parametrize("whose", ["the registry's", "ours", "none"])
def test_a_blob_that_is_too_short_has_its_end_fetched(here: Here, whose: str) -> None:
    """What is there of the chunk that it ends in is no part of it, whosever sums are known."""
    if whose != "the registry's":
        here.registry.manners = Manners()
    if whose == "ours":
        verify(here)
    os.truncate(here.blob, SIZE - CHUNK - 5)
    document(here, *FETCH)
    assert here.served == CHUNK + 5 + 1
    check_right(here)


def test_what_was_copied_and_not_proven_is_fetched_at_most(here: Here) -> None:
    """A repair was stopped after it had copied what is there of a short blob."""
    here.registry.manners = Manners()
    os.truncate(here.blob, SIZE - CHUNK)
    flip(here, 3)
    with here.ledger() as ledger, here.blob.open("rb") as blob:
        assert sum(ledger.take(blob.fileno(), ((0, SIZE - CHUNK),))) == SIZE - CHUNK
        ledger.make_durable(ledger.arrived)
    verify(here)
    (*_, done) = document(here, *FETCH)["outcomes"]
    assert (done["result"], here.served) == ("done", SIZE + 1)
    assert f"is right, {decimal(SIZE)} fetched" in done["message"]
    check_right(here)


def _long(blob: Path) -> None:
    with blob.open("ab") as file:
        file.write(b"more")


def _linked_to_nothing(blob: Path) -> None:
    blob.unlink()
    blob.symlink_to("nothing")


@pytest.mark.parametrize(
    ("damage", "most"), [(_long, CHUNK), (Path.unlink, SIZE), (_linked_to_nothing, SIZE)]
)
def test_whatever_it_is_a_right_blob_takes_its_place(
    here: Here, damage: Callable[[Path], None], most: int
) -> None:
    damage(here.blob)
    document(here, *FETCH)
    assert here.served <= most + 1
    check_right(here)


def test_what_the_quarantine_has_no_room_for_is_dropped(here: Here) -> None:
    flip(here, 3)
    verify(here)
    document(here, *FETCH, OLLAMA_WATCH_QUARANTINE_MAX_SIZE="1MB")
    assert not kept(here)
    check_right(here)


def test_what_was_to_be_kept_is_not_dropped_unsaid(here: Here) -> None:
    """Something else goes to quarantine while it is fetched, and takes its room."""
    flip(here, 3)
    verify(here)
    other = here.path / ".ollama-watch/quarantine" / f"00000009-sha256-{'0' * 64}"

    def meanwhile() -> None:
        other.parent.mkdir()
        other.write_bytes(b"x" * CHUNK)

    damaged = here.blob.read_bytes()
    (*_, refused) = repaired(here, meanwhile, quarantine_max_bytes=SIZE + MIB).outcomes
    assert (refused.action.kind, refused.result) == (ActionKind.FETCH_CHUNKS, Result.REFUSED)
    assert here.blob.read_bytes() == damaged
    repaired(here, quarantine_max_bytes=SIZE + MIB)
    assert kept(here) == [other]
    check_right(here)


def test_a_layer_that_the_server_downloads_meanwhile_gets_its_name_later(here: Here) -> None:
    """The server would replace the right file by its own, and remove that if it is wrong."""
    here.blob.unlink()
    partial = here.blob.with_name(f"{here.blob.name}-partial")
    with contextlib.ExitStack() as pull:

        def begun() -> None:
            file = pull.enter_context(partial.open("wb"))
            server = pull.enter_context(subprocess.Popen(["sleep", "600"], stdout=file))
            pull.callback(server.kill)

        (*_, refused) = repaired(here, begun).outcomes
        assert (refused.action.kind, refused.result) == (ActionKind.FETCH_CHUNKS, Result.REFUSED)
        assert refused.refusal is not None
        assert refused.refusal.kind is RefusalKind.LIVE
        assert not here.blob.exists()
    partial.unlink()
    repaired(here)
    assert here.served <= SIZE + 1
    check_right(here)


def test_a_disk_without_room_ends_it_with_the_next_step(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the plan has seen as free is used by the time that it is fetched."""
    flip(here, 3)
    verify(here)
    options = Mender._options
    monkeypatch.setattr(Mender, "_options", lambda x: replace(options(x), reserve=1 << 60))
    (*_, failed) = repaired(here).outcomes
    assert (failed.action.kind, failed.result) == (ActionKind.FETCH_CHUNKS, Result.FAILED)
    assert "the disk is full" in failed.message
    assert "free space" in failed.message
    assert here.served <= 1
    monkeypatch.undo()
    document(here, *FETCH)
    check_right(here)


def test_a_blob_that_a_process_has_open_stays(here: Here) -> None:
    flip(here, 3)
    verify(here)
    with here.blob.open("rb") as file:
        document(here, *FETCH, code=3)
        assert os.path.samestat(os.fstat(file.fileno()), here.blob.stat())
    served = here.served
    document(here, *FETCH)
    assert here.served == served, "what was fetched is kept"
    check_right(here)


def test_names_that_are_no_models_are_asked_of_nobody(here: Here) -> None:
    """Such as those in a memory that somebody has edited."""
    action = Action(ActionKind.FETCH_CHUNKS, here.digest, "", (), models=("../x", "a b"))
    with pytest.raises(ChangedError, match="no known model has sha256-"):
        Mender(Host(str(here.path)), Settings()).fetch(action)


def test_one_that_its_registry_does_not_give_keeps_no_other_from_being_replaced(
    here: Here,
) -> None:
    config = here.path / "blobs" / here.model.config.replace(":", "-")
    config.write_bytes(config.read_bytes().swapcase())
    flip(here, 3)
    verify(here)
    here.registry.add_fault(Fault("page", digest=f"sha256:{here.digest}", status=404))
    told = document(here, *FETCH, code=4)
    results = {each["subject"]: each for each in told["outcomes"] if each["verb"] == "fetch_chunks"}
    assert results[here.digest]["result"] == "failed"
    assert "404" in results[here.digest]["message"]
    assert results[here.model.config[7:]]["result"] == "done"

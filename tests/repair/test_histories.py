"""After each repair every claimed byte is the true one, whatever came before it.

Histories are drawn by seeds that a failure names; `REPAIR_HISTORIES` sets how many there are. Left
out: an error page cut short, whose progress the server counts. One false claim is told apart
(`History.forgiven`), since nothing on the disk or in the memory could have told it.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.support.examples import some
from tests.support.notation import Store
from watcher.model import Result
from watcher.state import fs

from .model import BLOCK, HEAD, STEP, History, small_scale

HISTORIES = int(os.environ.get("REPAIR_HISTORIES", some(80)))
TOTALS = [2 * STEP + 100_000, 3 * STEP, 3 * STEP + 62, 5 * STEP + 7]
ENDS = ["well", "cancelled", "killed", "killed", "reset", "page"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_scale(monkeypatch)


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(Store(tmp_path / "models"), 3 * STEP + 62, 1)


def lengths(history: History, chance: random.Random, number: int) -> int:
    """How far an attempt gets: anywhere, or just to where something begins or ends."""
    part = history.sidecars()[number]
    edges = [part.end]
    with history.data.open("rb") as file:
        at = part.starts_at
        while at < part.end and len(edges) < 30:
            try:
                begin = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            edges += [begin, at]
    if chance.random() < 0.5:
        return chance.randrange(1, part.size + 1)
    return max(1, chance.choice(edges) - part.starts_at - chance.randrange(6000))


def live_on(history: History, chance: random.Random) -> None:
    """What happens between two repairs: attempts, at most one loss of sidecars, our looks."""
    losses = 1
    for _ in range(chance.randint(1, 8)):
        there = history.sidecars()
        at = chance.random()
        if at < 0.12 and there and losses:
            losses = 0
            if chance.random() < 0.5:
                history.lose(*there)
                continue
            history.lose(chance.choice(list(there)))
            return
        if at < 0.15:
            history.look()
            continue
        history.resume()
        open_parts = [n for n, part in history.sidecars().items() if part.completed < part.size]
        if not open_parts:
            return
        number = chance.choice(open_parts)
        history.attempt(number, chance.choice(ENDS), lengths(history, chance, number))


@pytest.mark.parametrize("group", range(10))
def test_every_claim_is_true_after_each_repair(group: int, tmp_path: Path) -> None:
    for seed in range(group, HISTORIES, 10):
        chance = random.Random(seed)
        history = History(Store(tmp_path / str(seed) / "m"), chance.choice(TOTALS), seed)
        for _ in range(chance.randint(2, 5)):
            live_on(history, chance)
            report = history.repair()
            undone = [each.message for each in report.outcomes if each.result is not Result.DONE]
            assert undone == [], str(history)
            false = [each for each in history.false_claims() if not history.forgiven(*each)]
            assert false == [], f"{history}\n{history.sidecars()}"
            if history.false_claims():
                break
        shutil.rmtree(tmp_path / str(seed))


def meanwhile(history: History, chance: random.Random) -> None:
    """What the memory may be wrong about: power cuts, times that we set, another file."""
    what = chance.random()
    if what < 0.6:
        history.power_cut(chance.sample(range(history.total // BLOCK + 1), chance.randint(0, 60)))
        if chance.random() < 0.5:
            history.keep_fresh()
    elif what < 0.8:
        history.start_over()
    elif history.sidecars():
        history.lose(*history.sidecars())
        history.resume()


@pytest.mark.parametrize("group", range(4))
def test_every_claim_is_true_whatever_the_memory_holds(group: int, tmp_path: Path) -> None:
    """Power cuts, times that we have set, a new download in the old inode, all sidecars lost."""
    for seed in range(group, HISTORIES // 5, 4):
        chance = random.Random(1_000_000 + seed)
        history = History(Store(tmp_path / str(seed) / "m"), chance.choice(TOTALS), seed)
        for _ in range(chance.randint(3, 5)):
            live_on(history, chance)
            meanwhile(history, chance)
            # With a number missing a server only cuts the data, and claims what it cuts.
            if sorted(history.sidecars()) == list(range(len(history.sidecars()))):
                live_on(history, chance)
            history.repair()
            false = [each for each in history.false_claims() if not history.forgiven(*each)]
            assert false == [], f"{history}\n{history.sidecars()}"
            if history.false_claims():
                break
        shutil.rmtree(tmp_path / str(seed))


# ---------------------------------------------------------------- single ones, made by hand


@pytest.mark.parametrize("births", ["known", "unknown"])
def test_times_that_we_have_set_do_not_hide_a_power_cut(
    history: History, births: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claimed, and never written: after our refresh the file seems younger than the start."""
    if births == "unknown":
        monkeypatch.setattr(fs, "born", lambda *_: 0)
    history.attempt(0, "cancelled", 3 * HEAD)
    history.repair()
    history.power_cut([5, 6])
    assert history.keep_fresh().outcomes, "times were set"
    history.repair()
    assert history.false_claims() == [], str(history)


def test_a_new_download_in_the_old_inode_is_another_one(history: History) -> None:
    """What was remembered of the parts of the old one would make its zeros true."""
    history.attempt(1, "killed", 3 * HEAD)
    history.repair()
    if not history.start_over():
        pytest.skip("this file system gives the inode to somebody else")
    history.attempt(0, "killed", STEP)
    history.attempt(1, "killed", 2 * HEAD)
    history.lose(*history.sidecars())
    report = history.repair()
    assert not report.evidence.downloads[0].trust.rebooted
    assert history.false_claims() == [], str(history)


def test_zeros_before_doubted_bytes_are_not_claimed(history: History) -> None:
    """A pull comes to within a block of what is there behind its part's hole, and is killed.

    The block before the doubted bytes is allocated now, so that no hole is left, and its end was
    never written. All sidecars are there all the time.
    """
    history.attempt(1, "killed", 3 * HEAD)
    history.repair()
    (before,) = [p for p in history.sidecars().values() if p.offset <= STEP - 1 < p.end]
    assert before.end == STEP + HEAD, "the doubted bytes are the end of the missing piece"
    history.attempt(before.number, "killed", STEP - before.starts_at - STEP % BLOCK - 100)
    history.repair()
    assert history.false_claims() == [], str(history)


def test_zeros_before_a_part_are_not_claimed_once_its_border_is_forgotten(
    history: History,
) -> None:
    """A piece that was cut ends where the next part has begun; a server that begins again by the
    part rule forgets that border, and the zeros before it stay."""
    history.attempt(0, "cancelled", HEAD)
    history.attempt(1, "well", 0)
    history.attempt(2, "cancelled", 3 * HEAD + 5)
    history.lose(2)
    history.repair()
    borders = [part.offset for part in history.sidecars().values()]
    inside = [part for part in history.sidecars().values() if part.completed < part.size]
    for part in inside:
        history.attempt(part.number, "killed", part.end - part.starts_at - 50)
    history.lose(*history.sidecars())
    history.resume()
    history.repair()
    assert history.false_claims() == [], f"{history}\n{borders}"


def test_a_page_at_the_start_of_a_true_set_is_doubted_later(history: History) -> None:
    """Nothing had to be mended when it came: the sidecars were complete and true."""
    history.attempt(2, "cancelled", STEP - 2000)
    history.attempt(2, "killed", 2000)
    history.attempt(2, "page", 1000)
    history.attempt(3, "well", 0)
    history.repair()
    history.lose(*history.sidecars())
    history.resume()
    history.attempt(2, "cancelled", 2 * HEAD)
    history.repair()
    assert history.false_claims() == [], str(history)


def test_a_lost_sidecar_is_made_up_for_in_one_run(history: History) -> None:
    """The memory of what is to be done must not change the plan that is to be done."""
    history.attempt(0, "well", 0)
    history.attempt(1, "well", 0)
    history.attempt(2, "cancelled", HEAD // 5)
    history.repair()
    history.lose(1)
    report = history.repair()
    assert [each.result for each in report.outcomes] == [Result.DONE], report.outcomes[0].message


@pytest.mark.parametrize("ends", ["killed", "reset"])
def test_kill_after_kill_costs_no_more_than_the_starts(history: History, ends: str) -> None:
    """With all sidecars there, what is missing beyond the holes is 1 MiB for each attempt."""
    starts = 0
    for _ in range(5):
        history.resume()
        for number in list(history.sidecars()):
            part = history.sidecars()[number]
            if part.completed < part.size:
                starts += 1
                history.attempt(number, ends, (part.size - part.completed) // 2)
        history.repair()
        assert history.false_claims() == []
        parts = history.sidecars().values()
        left = sum(part.size - part.completed for part in parts)
        with history.data.open("rb") as file:
            holes = sum(1 for byte in file.read() if byte == 0)
        assert left <= holes + starts * (HEAD + BLOCK), str(history)
        assert len(parts) <= 16 + 129 + 1
